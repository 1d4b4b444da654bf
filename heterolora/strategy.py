"""How Lightning sees one of several processes: as one device, with others to wait for."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from heterolora.errors import SettingError
from heterolora.lit import LitAdapted
from heterolora.processes import Processes


class Replica(SingleDeviceStrategy):
    """One of several processes that hold the same model, each on its device.

    Nothing wraps the model: what is trained changes while an allocation is made anew, which a wrapper with buckets of
    gradients, such as ``DistributedDataParallel``, does not allow. ``LitAdapted`` sums gradients itself, once before
    each optimizer step; they are few.

    Args:
        device: of this process.
        processes: all of them; they have met already. Lightning is told of a world of one: with more it would talk to
            them itself, also in the middle of an exchange, when a signal comes.
    """

    strategy_name = "replica"

    def __init__(self, device: torch.device, processes: Processes) -> None:
        super().__init__(device)
        self.processes = processes
        self.global_rank = processes.rank
        self.local_rank = processes.local_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this one writes checkpoints and logs."""
        return self.processes.leads

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Until all are here."""
        self.processes.wait()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The first process's object."""
        return self.processes.told(obj)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any, say so."""
        found = self.processes.gathered(decision)
        return min(found) if all else max(found)


class Sharded(Replica):
    """A replica that holds its share of each frozen block, and gathers the rest when the block is called (FSDP2).

    Adapters and head stay whole in every process: they are small, and what is exchanged about them stays as it was.
    Blocks are divided when the allocation is known, since proxies look at whole ones.
    """

    strategy_name = "sharded"

    def setup(self, trainer: L.Trainer) -> None:
        """Divide the blocks, once; then as always."""
        assert isinstance(self.lightning_module, LitAdapted)
        model = self.lightning_module.model
        self.model_to_device()
        mesh = init_device_mesh(self.root_device.type, (self.processes.size,))
        stacks = model.space.survey.stacks.values()
        for name in dict.fromkeys(name for stack in stacks for name in stack.blocks):
            block = model.backbone.get_submodule(name)
            if isinstance(block, FSDPModule):
                continue
            if any(parameter.requires_grad for parameter in block.parameters()):
                raise SettingError("trainer.strategy", "fsdp", f"{name} is trained itself, and is not frozen")
            fully_shard(block, mesh=mesh)
        super().setup(trainer)
