"""Dynamic allocation: sites are scored and switched while training goes on."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator
from heterolora.callbacks.allocate import Decided, Found, Look, Moment, Search, same_budget
from heterolora.callbacks.events import Events
from heterolora.errors import SettingError
from heterolora.lit import LitAdapted
from heterolora.proxies.base import DegenerateScores
from heterolora.scoring import Probe, Standing
from heterolora.switching import Off

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dynamic:
    """Allocate before training, and again and again while it goes on.

    Each decision scores all candidate sites, with the adapters that are trained in the forward, and makes the
    allocation anew. Sites are scored by the probe's random factors, all alike: a site that was never trained has B = 0,
    by which a score such as SNIP's is 0 for ever.

    Args:
        every: optimizer steps between decisions (a whole number), or a share of an epoch up to 1, counted from each
            epoch's first step.
        start: no decision before so many steps (a whole number), or before this share of the training; the allocation
            that a static run would have stands until then.
        stop: no decision from then on; likewise.
        held: ``budget``: what is in memory keeps to the budget; ``all``: every candidate holds an adapter all the time,
            and the budget counts those that are on (arXiv 2406.14956; four times the parameters at p = 0.25).
        off: what becomes of a site that is switched off: ``reset``: its adapter is dropped; ``keep``: it is held as it
            is, and comes back so; ``freeze``: it stays in the function and in the export, trained no longer. null:
            ``reset`` where the budget is held, ``keep`` where all are.
        margin: a unit of rank gives way only to one whose gain is more than 1 + margin times its own.
        factors: ``probe``, or ``own``: sites that were trained are scored by their own factors, all others by the
            probe's.
    """

    every: int | float
    start: int | float
    stop: int | float
    held: Literal["budget", "all"]
    off: Off | None
    margin: float
    factors: Literal["probe", "own"]

    def __post_init__(self) -> None:
        if not (self.every >= 1 if isinstance(self.every, int) else 0 < self.every <= 1):
            raise SettingError(
                "every", self.every, "a whole number of steps, at least 1, or a share of an epoch up to 1.0"
            )
        for name in ("start", "stop"):
            value = getattr(self, name)
            if not (value >= 0 if isinstance(value, int) else 0 <= value <= 1):
                raise SettingError(name, value, "a whole number of steps, or a share of the training from 0.0 to 1.0")
        if type(self.start) is type(self.stop) and self.start >= self.stop:
            raise SettingError("stop", self.stop, f"must come after start={self.start}")
        if not 0 <= self.margin < math.inf:
            raise SettingError("margin", self.margin, "a number of at least 0")
        if self.held == "budget" and self.off in ("keep", "freeze"):
            raise SettingError(
                "off", self.off, "holds more than the budget pays for: held=all, or off=reset, or null for what fits"
            )

    starting_budget = same_budget

    @property
    def dropping(self) -> Off:
        """What ``off`` comes to."""
        return self.off or ("reset" if self.held == "budget" else "keep")

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """As ``AllocationTime`` has it.

        Raises:
            SettingError: naming the setting.
        """
        if allocator.gain_rule is None:
            raise SettingError(
                "allocation",
                "dynamic",
                f"allocator={type(allocator).__name__.lower()} looks at no scores, and would decide the same each time",
            )
        one_rank = getattr(allocator, "rank", None) is not None
        if not one_rank and self.dropping == "freeze":
            raise SettingError("allocation.off", "freeze", "freezes whole sites: use an allocator of one rank, top")
        if adapter.switching == "never" or (adapter.switching == "sites" and not one_rank):
            raise SettingError(
                "allocation",
                "dynamic",
                f"{type(adapter).__name__} cannot be switched while it is trained: its sites share factors"
                if adapter.switching == "never"
                else f"the factors of {type(adapter).__name__} depend on the rank: use an allocator of one rank, top",
            )
        scaling = getattr(adapter, "scaling", "constant")
        if not one_rank and scaling != "constant":
            raise SettingError(
                "adapter.scaling", scaling, "would change what a site gives when its rank changes: constant, or top"
            )
        if probe.live:
            raise SettingError("probe.live", True, "with allocation=dynamic the trained adapters are in the forward")
        if compiled:
            raise SettingError("trainer.compile", True, "not with allocation=dynamic: each switch would compile anew")
        if timed:
            raise SettingError("data.cache_dir", None, "budget.step_time with allocation=dynamic keeps times there")

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
        rule = allocator.gain_rule
        assert rule is not None  # as checked
        return Reallocate(self, run_search, on_found, on_decision, rule.max_rank, resumed)


class Reallocate(Events):
    """Searches in ``setup("fit")`` as a static allocation does, then before the batches at which a decision is due.

    Args:
        settings: when, and what becomes of sites that are switched off.
        run_search: finds an allocation, on the model as it is then.
        on_found: told about the first one before training starts.
        on_decision: told about every decision, the first one included, when it is in force.
        most: largest rank that a site may get.
        resumed: the run goes on from a checkpoint, in which its ranks are.
    """

    def __init__(
        self,
        settings: Dynamic,
        run_search: Search,
        on_found: Found,
        on_decision: Decided,
        most: int,
        resumed: bool,
    ) -> None:
        times = {"every": settings.every, "start": settings.start, "stop": settings.stop}
        super().__init__(run_search, on_found, on_decision, resumed, off=settings.dropping, **times)
        self.settings = settings
        self.most = most

    def begin(self, lit: LitAdapted, allocation: Allocation) -> None:
        """Hold every site from now on, if that is wanted."""
        assert lit.switch is not None
        if self.settings.held == "all":
            lit.switch.hold_all(self.most)
            lit.switch.take_on(allocation.ranks)

    def happen(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        """Score all sites and allocate anew."""
        assert lit.switch is not None
        before = lit.switch.live
        standing = Standing(before, self.settings.margin, self.settings.factors == "own")
        try:
            result = self.run_search(lit, Moment(self.searches, standing))
        except DegenerateScores as error:  # what is trained is not given up for scores that say nothing
            why = f"step {step}: nothing changed, {error}"
            _log.warning("%s", why)
            self.change(trainer, lit, batch, step, before, {}, why=why)
            return
        self.change(trainer, lit, batch, step, result.allocation.ranks, result.scores or {})
