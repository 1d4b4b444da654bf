"""Trainer settings."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import nn

from heterolora.checkpoints import KeepCheckpoints, WholeFiles
from heterolora.errors import SettingError
from heterolora.lit import LOG_EVERY
from heterolora.processes import ALONE, Processes
from heterolora.strategy import Replica, Sharded


@dataclass(frozen=True)
class TrainerSettings:
    """How long and on what to train.

    Args:
        max_epochs: epochs.
        max_steps: optimizer steps after which training stops; -1: no limit but the epochs.
        precision: ``32-true``, or autocast to a half precision: ``bf16-mixed``, or on a GPU ``16-mixed`` (what the
            frozen weights are held in is ``model.dtype``).
        accumulate: batches whose gradients make one step.
        accelerator: Lightning's accelerator.
        devices: processes on this machine, each with a device of its own; torchrun and srun may start as many on each
            of several machines. ``data.batch_size`` rows are those of all processes together.
        strategy: of several processes; ``auto``, ``ddp``: each holds the whole model; ``fsdp``: once the allocation is
            known, each holds its share of every frozen block.
        threads: CPU threads of torch in each process; null: torch's own choice, divided among the processes of a
            machine. Bits depend on it.
        test: evaluate the test splits at the end; false while settings are still being chosen.
        compile: run the adapted model through torch.compile in training and evaluation (a search is not worth it); the
            first batches of each take a minute or two. Results agree with those of false, but not to the last bit;
            the backbone's dropout draws other numbers.
        checkpoint_every: optimizer steps between checkpoints within an epoch; null: at the ends of epochs alone.
    """

    max_epochs: int
    max_steps: int
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    accumulate: int
    accelerator: str
    devices: int
    strategy: Literal["auto", "ddp", "fsdp"]
    threads: int | None
    test: bool
    compile: bool
    checkpoint_every: int | None

    def __post_init__(self) -> None:
        if self.max_epochs < 1:
            raise SettingError("max_epochs", self.max_epochs, "a whole number of at least 1")
        if self.max_steps != -1 and self.max_steps < 1:
            raise SettingError("max_steps", self.max_steps, "a whole number of at least 1, or -1 for no limit")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise SettingError("checkpoint_every", self.checkpoint_every, "a whole number of at least 1, or null")
        if self.accumulate < 1:
            raise SettingError("accumulate", self.accumulate, "a whole number of at least 1")
        if self.precision == "16-mixed" and not torch.cuda.is_available():
            raise SettingError("precision", self.precision, "needs a GPU; use bf16-mixed or 32-true")
        if self.devices < 1:
            raise SettingError("devices", self.devices, "a whole number of at least 1")
        if self.threads is not None and not 1 <= self.threads <= (os.cpu_count() or 1):
            raise SettingError("threads", self.threads, f"1 to {os.cpu_count()}, or null")

    def check_processes(self, processes: Processes) -> None:
        """Refuse what these processes cannot do.

        Raises:
            SettingError: naming the setting.
        """
        if self.devices != processes.local_size:
            started = "this command trains in one process" if processes.alone else "so many processes were started"
            raise SettingError(
                "trainer.devices", self.devices, f"{started} on this machine: give {processes.local_size}"
            )
        if processes.alone:
            if self.strategy == "fsdp":
                raise SettingError(
                    "trainer.strategy", "fsdp", "divides a model among several processes: trainer.devices=2, ..."
                )
            return
        if self.precision == "16-mixed":
            raise SettingError(
                "trainer.precision", self.precision, "each process would scale its losses by itself: bf16-mixed"
            )
        self._device(processes)

    def _strategy(self, processes: Processes) -> str | Strategy:
        """What Lightning is told."""
        if processes.alone:
            return "auto"
        return (Sharded if self.strategy == "fsdp" else Replica)(self._device(processes), processes)

    def uses_cuda(self) -> bool:
        """Whether several processes have a GPU each."""
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    def _device(self, processes: Processes) -> torch.device:
        """Of one of several processes."""
        if not self.uses_cuda():
            if self.accelerator not in ("auto", "cpu"):
                raise SettingError("trainer.accelerator", self.accelerator, "several processes need cpu, or GPUs")
            return torch.device("cpu")
        if (count := torch.cuda.device_count()) < processes.local_size:
            raise SettingError("trainer.devices", processes.local_size, f"this machine has {count} GPUs")
        return torch.device("cuda", processes.local_rank)

    def compile_model(self, model: nn.Module) -> None:
        """Compile the model's calls, if that is wanted, for batches of any length; it stays the same object.

        Nothing is compiled before its first call, which comes when the adapters are enabled.

        Raises:
            SettingError: if there is nothing to compile with.
        """
        if not self.compile:
            return
        if not (
            torch.cuda.is_available() or any(shutil.which(name) for name in (os.environ.get("CXX"), "g++") if name)
        ):
            raise SettingError("trainer.compile", True, "needs a C++ compiler: g++, or what CXX names; or use false")
        model.compile(dynamic=True)

    def steps(self, examples: int, batch_size: int) -> int:
        """Optimizer steps of a whole training."""
        batches = math.ceil(examples / batch_size)
        steps = self.max_epochs * math.ceil(batches / self.accumulate)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    def make(
        self,
        folder: Path,
        callbacks: Sequence[Callback],
        logger: Any,
        clip: float | None,
        processes: Processes = ALONE,
    ) -> L.Trainer:
        """The trainer; it keeps the newest checkpoints in ``folder/checkpoints``.

        Raises:
            SettingError: if Lightning refuses a value.
        """
        try:
            return L.Trainer(
                max_epochs=self.max_epochs,
                max_steps=self.max_steps,
                precision=self.precision,
                accumulate_grad_batches=self.accumulate,
                accelerator=self.accelerator,
                devices=1,
                strategy=self._strategy(processes),
                use_distributed_sampler=False,
                gradient_clip_val=clip,
                callbacks=[*callbacks, KeepCheckpoints(folder, self.checkpoint_every, processes.alone)],
                plugins=[WholeFiles(), LightningEnvironment()],  # none of SLURM's handlers, nor its hints
                logger=logger,
                default_root_dir=folder,
                deterministic=True,
                inference_mode=not self.compile,  # else tests are compiled anew, after validations without it
                num_sanity_val_steps=0,
                log_every_n_steps=LOG_EVERY,
                enable_model_summary=False,
                enable_progress_bar=any(getattr(c, "is_enabled", None) is not None for c in callbacks),
            )
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise SettingError("trainer", self, f"Lightning refuses it: {str(error).splitlines()[0]}") from error
