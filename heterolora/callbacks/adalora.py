"""AdaLoRA's schedule (Zhang et al., ICLR 2023, arXiv 2303.10512): singular values are masked while training goes on."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.adapters.svd import SVD, Triplets
from heterolora.allocators.base import Allocator
from heterolora.budget import Budget, Multiple
from heterolora.callbacks.allocate import AllocateRanks, Decided, Found, Look, Search
from heterolora.callbacks.events import step_of
from heterolora.errors import SettingError
from heterolora.history import Decision
from heterolora.lit import LitAdapted
from heterolora.scoring import Probe

_log = logging.getLogger(__name__)

_LINES = 50
"""Decisions that a history holds at most; masks may change at every step."""


@dataclass(frozen=True)
class AdaLoRA:
    """Begin with more units of rank than are wanted, and mask the least important ones on a cubic schedule.

    With ``b`` the number of units of all sites: ``b0`` for t up to ``warmup``, then
    ``int(bT + (b0 - bT) (1 - (t - ti) / (T - tf - ti))^3)``, and ``bT`` for the last ``final`` steps, as in the
    authors' code (the printed equation does not end at bT). Importance is the smoothed ``|w dL/dw|`` times its smoothed
    deviation, of E's entry plus the means over A's row and B's column; a unit whose importance is at most that of the
    ``b0 - b``-th smallest has its E set to 0, and may come back until the final phase. Masked units are held all the
    same, and are cut off when training is over.

    Args:
        ratio: ``b0 / bT``; the paper: 1.5.
        start: ``budget``: what training begins with is within the budget, so that what it ends with is less;
            ``paper``: what it ends with is, and ratio times as much is held in training.
        warmup: ti, before which nothing is masked: a share of the training (0.1), or a number of steps (20).
        final: tf, for which the last mask stands; likewise.
        every: steps between masks.
        beta1: of the smoothed importance.
        beta2: of its deviation.
        orthogonal: gamma, what the mean of ``||A A^T - I||`` and ``||B^T B - I||`` over all sites (Frobenius norms, not
            squared, as in the authors' code) counts in the loss.
    """

    ratio: float
    start: Literal["budget", "paper"]
    warmup: int | float
    final: int | float
    every: int
    beta1: float
    beta2: float
    orthogonal: float

    scored_by: ClassVar[str] = "adalora"

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise SettingError("allocation.ratio", self.ratio, "a number of at least 1")
        for name in ("warmup", "final"):
            value = getattr(self, name)
            if not (value >= 0 if isinstance(value, int) else 0 <= value < 1):
                raise SettingError(f"allocation.{name}", value, "a number of steps, or a share of the training below 1")
        if self.every < 1:
            raise SettingError("allocation.every", self.every, "a whole number of at least 1")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise SettingError(f"allocation.{name}", getattr(self, name), "a number between 0 and 1")
        if not 0 <= self.orthogonal < math.inf:
            raise SettingError("allocation.orthogonal", self.orthogonal, "a number of at least 0")

    def starting_budget(self, budget: Budget) -> Budget:
        """What the first allocation may spend."""
        return budget if self.start == "budget" else Multiple(budget, self.ratio)

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """As ``AllocationTime`` has it.

        Raises:
            SettingError: naming the setting.
        """
        if not isinstance(adapter, SVD):
            raise SettingError(
                "adapter", type(adapter).__name__, "allocation=adalora masks singular values: adapter=svd"
            )
        if adapter.scaling != "constant":
            raise SettingError("adapter.scaling", adapter.scaling, "with allocation=adalora: constant")

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
        return MaskTriplets(self, run_search, on_found, on_decision, resumed)

    def units(self, step: int, begin: int, end: int, first: int, last: int) -> int:
        """Units of rank that are live at a step.

        Args:
            step: counted from 1.
            begin: b0.
            end: bT.
            first: ti.
            last: ``T - tf``.
        """
        if step <= first:
            return begin
        if step > last:
            return end
        return int((begin - end) * (1 - (step - first) / (last - first)) ** 3 + end)


class MaskTriplets(AllocateRanks):
    """After each optimizer step: update importances, and mask if it is time.

    Args:
        settings: the schedule.
        run_search: finds the first allocation.
        on_found: told about it before training starts.
        on_decision: told about it, and about masks that change.
        resumed: the run goes on from a checkpoint.
    """

    def __init__(
        self, settings: AdaLoRA, run_search: Search, on_found: Found, on_decision: Decided, resumed: bool
    ) -> None:
        super().__init__(run_search, on_found)
        self.settings = settings
        self.on_decision = on_decision
        self.resumed = resumed
        self.sensitivity: dict[str, torch.Tensor] = {}
        self.deviation: dict[str, torch.Tensor] = {}
        self.masked: dict[str, torch.Tensor] = {}  # site -> which units are masked now
        self._seen = 0  # optimizer steps
        self._told: tuple[int, dict[str, int]] = (0, {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Search, enable, report."""
        if stage == "fit" and not self.resumed:
            result = self.allocate(trainer, pl_module)
            self.on_decision(Decision(0, result.scores or {}, result.allocation.ranks, "before training"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """How long training is.

        Raises:
            SettingError: if there is no time for the schedule.
        """
        assert isinstance(pl_module, LitAdapted)
        self.total = int(trainer.estimated_stepping_batches)
        self.first = step_of(self.settings.warmup, self.total)
        self.last = self.total - step_of(self.settings.final, self.total)
        if not max(self.first, 1) < self.last:  # importances come from a step before the last mask
            raise SettingError(
                "allocation",
                f"warmup={self.settings.warmup}, final={self.settings.final}",
                f"leave no step of {self.total} for the schedule",
            )
        self.begin = sum(pl_module.model.ranks.values())
        self.end = max(1, int(self.begin / self.settings.ratio + 1e-9))
        self._seen = trainer.global_step
        if self.settings.orthogonal:
            pl_module.penalty = lambda: self.settings.orthogonal * irregularity(self._triplets(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step, with its gradients still there: values are those after it, as in the authors' code."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        assert isinstance(pl_module, LitAdapted)
        self.after_step(pl_module, step)

    def after_step(self, lit: LitAdapted, step: int) -> None:
        """Update importances, and mask if it is time; ``step`` counts from 1."""
        triplets = self._triplets(lit)
        if step < self.last:
            self._update(triplets)
        if step > self.last:
            self._mask(triplets)
        elif step == self.last or (step > self.first and step % self.settings.every == 0):
            scores = self._scores(triplets)
            live = self.settings.units(step, self.begin, self.end, self.first, self.last)
            self.masked = masks(scores, self.begin - live)
            self._mask(triplets)
            self._tell(lit, step, scores)

    def finish(self, lit: LitAdapted) -> None:
        """Cut off what is masked: what is held is what is live.

        What grew since the last mask (``every`` above 1, and training that was ended before the final phase) is masked
        first, as it would have been; after the final phase the function stays as it is.
        """
        lit.penalty = None
        self._mask(self._triplets(lit))
        lit.most_held = max(lit.most_held, lit.model.held_parameters)
        kept: dict[str, Any] = {}
        for name, adapter in self._triplets(lit).items():
            live = torch.nonzero(~self.masked[name]).flatten() if name in self.masked else None
            if live is None:
                kept[name] = adapter
            elif len(live):
                with torch.no_grad():
                    parts = adapter.A[live].clone(), adapter.E[live].clone(), adapter.B[:, live].clone()
                kept[name] = Triplets(*parts, adapter.scale, adapter.dropout)
        lit.model.install(kept)

    def _triplets(self, lit: LitAdapted) -> dict[str, Triplets]:
        found: dict[str, Any] = {name: lit.model.adapter(name) for name in lit.model.held}
        return found

    @torch.no_grad()
    def _update(self, triplets: Mapping[str, Triplets]) -> None:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        for name, adapter in triplets.items():
            for key, value in adapter.named_parameters():
                assert value.grad is not None
                now, of = (value * value.grad).abs(), f"{name}.{key}"
                smooth = self.sensitivity.get(of, torch.zeros_like(now)).to(now)
                self.sensitivity[of] = smooth = beta1 * smooth + (1 - beta1) * now
                away = self.deviation.get(of, torch.zeros_like(now)).to(now)
                self.deviation[of] = beta2 * away + (1 - beta2) * (now - smooth).abs()

    def _scores(self, triplets: Mapping[str, Triplets]) -> dict[str, torch.Tensor]:
        """Importance of each unit, ``[rank]``, in the sites' order."""
        found = {}
        for name in triplets:
            a, e, b = (self.sensitivity[f"{name}.{key}"] * self.deviation[f"{name}.{key}"] for key in "AEB")
            found[name] = e + (b.mean(0) + a.mean(1))
        return found

    @torch.no_grad()
    def _mask(self, triplets: Mapping[str, Triplets]) -> None:
        for name, masked in self.masked.items():
            triplets[name].E.masked_fill_(masked.to(triplets[name].E.device), 0.0)

    def _tell(self, lit: LitAdapted, step: int, scores: Mapping[str, torch.Tensor]) -> None:
        """Of masks that have changed: as many as a history can show, and the last."""
        ranks = dict.fromkeys(lit.model.ranks, 0) | {name: int((~m).sum()) for name, m in self.masked.items()}
        before, known = self._told
        if ranks == known or (step - before < self.total / _LINES and step != self.last):
            return
        self._told = (step, ranks)
        units = {name: sorted(values.tolist(), reverse=True) for name, values in scores.items()}
        everywhere = {name: units.get(name, [0.0]) for name in ranks}
        live = sum(ranks.values())
        lit.note({"adalora/live": live}, step)
        _log.info("step %d: %d of %d units of rank are live", step, live, self.begin)
        # Made at the end of a step: one that goes on from a checkpoint of this very step must find it.
        self.on_decision(Decision(step - 1, everywhere, ranks, f"after step {step}: {live} of {self.begin} units live"))

    def state_dict(self) -> dict[str, Any]:
        """Smoothed importances, and the masks."""
        return {
            "sensitivity": dict(self.sensitivity),
            "deviation": dict(self.deviation),
            "masked": dict(self.masked),
            "told": [self._told[0], dict(self._told[1])],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.sensitivity, self.deviation = dict(state_dict["sensitivity"]), dict(state_dict["deviation"])
        self.masked = dict(state_dict["masked"])
        self._told = (state_dict["told"][0], dict(state_dict["told"][1]))


def masks(scores: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Which units are masked: those whose score is at most the ``count``-th smallest, so that ties go together."""
    if count < 1:
        return {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    threshold = torch.cat(list(scores.values())).kthvalue(count).values
    return {name: values <= threshold for name, values in scores.items()}


def irregularity(triplets: Mapping[str, Triplets]) -> torch.Tensor:
    """Mean of ``||A A^T - I||`` and ``||B^T B - I||``, Frobenius norms, over all sites."""
    device = next(iter(triplets.values())).A.device.type
    with torch.autocast(device, enabled=False):
        norms = []
        for adapter in triplets.values():
            for product in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B):
                norms.append((product - torch.eye(len(product)).to(product)).norm())
        return torch.stack(norms).mean()
