"""PARA's schedule (arXiv 2604.27796): after a short training, one threshold on the singular values of all deltas."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.adapters.lora import LoRA
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator
from heterolora.callbacks.allocate import Decided, Found, Look, Search, same_budget
from heterolora.callbacks.events import Events, check_switching
from heterolora.errors import SettingError
from heterolora.lit import LitAdapted
from heterolora.scoring import Probe


@dataclass(frozen=True)
class Para:
    """Train all that the budget pays for, then keep the largest singular values of all deltas, and train on.

    At the event every delta becomes its truncated singular value decomposition, both factors alike in size, and the
    optimizer forgets what it knew of them.

    Args:
        at: when: a share of the training (0.1), or a number of steps (20).
        keep: what may be held afterwards, as a share of the budget; the paper reports 0.1 to 0.25 at equal quality.
    """

    at: int | float
    keep: float

    scored_by: ClassVar[str] = "singular_values"
    starting_budget = same_budget

    def __post_init__(self) -> None:
        if not (self.at >= 1 if isinstance(self.at, int) else 0 < self.at < 1):
            raise SettingError("allocation.at", self.at, "a number of steps, or a share of the training below 1")
        if not 0 < self.keep <= 1:
            raise SettingError("allocation.keep", self.keep, "a share of the budget above 0, up to 1")

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """As ``AllocationTime`` has it.

        Raises:
            SettingError: naming the setting.
        """
        check_switching("para", adapter, compiled)
        if not isinstance(adapter, LoRA):
            raise SettingError("adapter", type(adapter).__name__, "allocation=para writes LoRA's factors: adapter=lora")

    def callback(
        self,
        run_search: Search,
        on_found: Found,
        on_decision: Decided,
        look: Look,
        allocator: Allocator,
        resumed: bool,
    ) -> L.Callback:
        """The Lightning callback that does it."""
        return CutRanks(self, run_search, on_found, on_decision, resumed)


class CutRanks(Events):
    """The one event of ``Para``.

    Args:
        settings: when and how much.
        run_search: finds the first allocation.
        on_found: told about it before training starts.
        on_decision: told about both decisions.
        resumed: the run goes on from a checkpoint.
    """

    def __init__(
        self, settings: Para, run_search: Search, on_found: Found, on_decision: Decided, resumed: bool
    ) -> None:
        super().__init__(run_search, on_found, on_decision, resumed, every=1, start=settings.at, stop=1.0, off="reset")
        self.settings = settings
        self.budget = 0

    def begin(self, lit: LitAdapted, allocation: Allocation) -> None:
        """What may be held afterwards."""
        whole = allocation.spent if allocation.budget is None else allocation.budget
        self.budget = int(self.settings.keep * whole)

    def is_due(self, step: int, in_epoch: int) -> bool:
        """Once."""
        return self.searches <= 1 and step >= max(1, self.first) and super().is_due(step, in_epoch)

    def happen(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        """Decompose all deltas, and cut."""
        model, optimizer = lit.model, trainer.optimizers[0]
        adapters: dict[str, Any] = {name: model.adapter(name) for name in model.held}
        values = {name: decompose(adapter) for name, adapter in adapters.items()}
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                optimizer.state.pop(parameter, None)
        cost = model.family.cost(model.space.sites)
        ranks = dict.fromkeys(model.ranks, 0)
        units = sorted((-value, place, unit, name) for place, (name, held) in enumerate(values.items())
                       for unit, value in enumerate(held))  # fmt: skip
        spent = 0
        for *_, name in units:  # one threshold: the first unit that does not fit ends it
            spent += cost.marginal(ranks, name)
            if spent > self.budget:
                break
            ranks[name] += 1
        if not any(ranks.values()):
            raise SettingError("allocation.keep", self.settings.keep, f"{self.budget} parameters pay for no rank")
        self.change(trainer, lit, batch, step, ranks, {name: values.get(name, [0.0]) for name in model.ranks})

    def state_dict(self) -> dict[str, Any]:
        """Also what may be held."""
        return super().state_dict() | {"budget": self.budget}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        super().load_state_dict(state_dict)
        self.budget = state_dict["budget"]


@torch.no_grad()
def decompose(adapter: Any) -> list[float]:
    """Write a LoRA's factors as those of a singular value decomposition; its singular values, scale included.

    The map stays what it was but for rounding. Units are in the order of their singular values, which both factors
    share: ``A = sqrt(S / |scale|) V^T``, ``B = +-U sqrt(S / |scale|)``.
    """
    down, up = adapter.A.double(), adapter.B.double()
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T)
    rank = len(down)
    root = s.sqrt()
    adapter.A.copy_(root[:, None] * (vh[:rank] @ right.Q.T))
    adapter.B.copy_((left.Q @ u[:, :rank]) * root)
    found: list[float] = (abs(adapter.scale) * s).tolist()
    return found
