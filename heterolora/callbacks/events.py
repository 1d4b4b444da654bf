"""Events in the middle of training at which an allocation changes: when they come, and how the change is made."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.adapters.lora import LoRA
from heterolora.adapters.svd import SVD
from heterolora.allocation import Allocation
from heterolora.callbacks.allocate import AllocateRanks, Decided, Found, Search
from heterolora.errors import SettingError
from heterolora.history import Decision
from heterolora.lit import LitAdapted, share_of
from heterolora.prefix import evaluating
from heterolora.switching import Heritage, Off, Switch, changes

_log = logging.getLogger(__name__)


def check_switching(name: str, adapter: AdapterFamily, compiled: bool) -> None:
    """Refuse what cannot be right where ranks change in training.

    Args:
        name: of the allocation in force, as the config has it.
        adapter: makes the adapters.
        compiled: whether the model is compiled.

    Raises:
        SettingError: naming the setting.
    """
    if adapter.switching != "ranks":
        raise SettingError(
            "adapter",
            type(adapter).__name__,
            f"allocation={name} changes ranks in training, which it cannot: adapter=lora",
        )
    if (scaling := getattr(adapter, "scaling", "constant")) != "constant":
        raise SettingError("adapter.scaling", scaling, f"allocation={name} changes ranks, and this the scale: constant")
    if compiled:
        raise SettingError("trainer.compile", True, f"not with allocation={name}: each change would compile anew")


def check_any_units(name: str, adapter: AdapterFamily) -> None:
    """Refuse families of which single units of rank are no adapter, since frozen factors or lengths stay behind.

    Raises:
        SettingError: naming the family.
    """
    if not isinstance(adapter, (LoRA, SVD)):
        raise SettingError(
            "adapter", type(adapter).__name__, f"allocation={name} moves single units of rank: adapter=lora, or svd"
        )


class Events(AllocateRanks):
    """An allocation before training, as a static one, and events before some of the batches.

    A subclass says what happens at one; which steps they come at is here, and what of it a checkpoint holds.

    Args:
        run_search: finds an allocation, on the model as it is then.
        on_found: told about the first one before training starts.
        on_decision: told about every decision, the first one included, when it is in force.
        resumed: the run goes on from a checkpoint, in which its ranks are.
        every: optimizer steps between events (a whole number), or a share of an epoch up to 1, counted from each
            epoch's first step.
        start: none before so many steps (a whole number), or before this share of the training.
        stop: none from then on; likewise.
        off: what becomes of a site that is switched off.
    """

    def __init__(
        self,
        run_search: Search,
        on_found: Found,
        on_decision: Decided,
        resumed: bool,
        *,
        every: int | float,
        start: int | float,
        stop: int | float,
        off: Off,
    ) -> None:
        super().__init__(run_search, on_found)
        self.on_decision = on_decision
        self.resumed = resumed
        self.every, self.start, self.stop = every, start, stop
        self.off: Off = off
        self.searches = 0
        self.decided = -1  # the step of the last decision

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Search, enable, report; a resumed run has all that from its checkpoint."""
        if stage != "fit":
            return
        assert isinstance(pl_module, LitAdapted)
        pl_module.switch = Switch(pl_module.model, pl_module.seed, self.off)
        if self.resumed:
            return
        result = self.allocate(trainer, pl_module)
        self.begin(pl_module, result.allocation)
        self.searches, self.decided = 1, 0
        self.on_decision(Decision(0, result.scores or {}, result.allocation.ranks, "before training"))

    def begin(self, lit: LitAdapted, allocation: Allocation) -> None:
        """The first allocation is in force."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """How long training is, and an epoch of it.

        Raises:
            SettingError: if no event would ever be due.
        """
        steps = math.ceil(int(trainer.num_training_batches) / trainer.accumulate_grad_batches)
        total = int(trainer.estimated_stepping_batches)
        self.period = self.every if isinstance(self.every, int) else math.ceil(self.every * steps)
        self.first = step_of(self.start, total)
        self.last = step_of(self.stop, total)
        # A resumed run may have all its events behind it.
        if not self.resumed and not any(self.is_due(step, step % steps) for step in range(1, total)):
            raise SettingError(
                "allocation",
                f"every={self.every}, start={self.start}, stop={self.stop}",
                f"no decision would come in {total} steps, {steps} an epoch",
            )

    def is_due(self, step: int, in_epoch: int) -> bool:
        """Whether an event comes before this step (from 0)."""
        counted = step if isinstance(self.every, int) else in_epoch
        return counted % self.period == 0 and self.first <= step < self.last

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide, if it is time; never between batches whose gradients make one step."""
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches or step == self.decided:
            return
        if not self.is_due(step, batch_idx // trainer.accumulate_grad_batches):
            return
        assert isinstance(pl_module, LitAdapted)
        self.happen(trainer, pl_module, batch, step)
        self.searches, self.decided = self.searches + 1, step

    def happen(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        """The event of this step, before its batch."""
        raise NotImplementedError

    def change(
        self,
        trainer: L.Trainer,
        lit: LitAdapted,
        batch: Mapping[str, torch.Tensor],
        step: int,
        ranks: Mapping[str, int],
        scores: Mapping[str, Any],
        inherits: Mapping[str, Heritage] | None = None,
        seed: int | None = None,
        why: str | None = None,
    ) -> None:
        """Switch to these ranks, measure how far the loss jumps, and tell of it; see ``Switch.to``."""
        assert lit.switch is not None
        reason = why or f"step {step}"
        gained, lost = changes(lit.switch.live, ranks)
        if gained or lost or inherits:
            loss = _loss(lit, batch)
            lit.most_held = lit.held_parameters
            lit.switch.to(ranks, trainer.optimizers[0], inherits, seed)
            jump = _loss(lit, batch) - loss
            lit.note({"switch/on": len(gained), "switch/off": len(lost), "switch/jump": jump}, step)
            _log.info("step %d: %d sites gain, %d lose; the loss jumps by %+.2e", step, len(gained), len(lost), jump)
            reason += f": {len(gained)} gain, {len(lost)} lose, jump {jump:+.2e}"
        lit.check_replicas()
        self.on_decision(Decision(step, scores, ranks, reason))

    def state_dict(self) -> dict[str, Any]:
        """How many searches there were, and when the last was."""
        return {"searches": self.searches, "decided": self.decided}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.searches, self.decided = state_dict["searches"], state_dict["decided"]


def step_of(moment: int | float, total: int) -> int:
    """A number of steps, or a share of the training, as a number of steps."""
    return moment if isinstance(moment, int) else round(moment * total)


@torch.no_grad()
def _loss(lit: LitAdapted, batch: Mapping[str, torch.Tensor]) -> float:
    """Of one batch of all processes, without dropout."""
    with evaluating(lit.model):
        return lit.processes.summed(lit.scalar_loss(lit.model, batch) * share_of(batch)).item()
