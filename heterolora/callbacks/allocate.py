"""When allocation happens; the static way: once, before the first epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import lightning as L

from heterolora.adapters.base import AdapterFamily
from heterolora.allocators.base import Allocator
from heterolora.budget import Budget
from heterolora.history import Decision
from heterolora.lit import LitAdapted
from heterolora.proxies.evidence import Batch
from heterolora.scoring import Probe, SearchResult, Standing


@dataclass(frozen=True)
class Moment:
    """When a search happens in training.

    Attributes:
        draw: how many searches came before it.
        standing: what is trained then; None before training.
    """

    draw: int
    standing: Standing | None


Search: TypeAlias = Callable[[LitAdapted, Moment], SearchResult]
"""Finds an allocation, on the model as it is then."""

Found: TypeAlias = Callable[[SearchResult], None]
"""Told about the first allocation, once its adapters are there and before training starts."""

Decided: TypeAlias = Callable[[Decision], None]
"""Told about each decision when it is in force."""


Look: TypeAlias = Callable[[LitAdapted, int], Sequence[Batch]]
"""So many batches of the training split, the same at each call, on the model's device; never validation data."""


def same_budget(_: object, budget: Budget) -> Budget:
    """``AllocationTime.starting_budget`` of those that never hold more than at first."""
    return budget


class AllocationTime(Protocol):
    """When allocation happens.

    What decides by scores of its own says how they are called, in ``scored_by``.
    """

    def starting_budget(self, budget: Budget) -> Budget:
        """What the first allocation may spend, where the run's budget is ``budget``."""

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """Refuse what cannot be right with the other settings.

        Args:
            allocator: makes the allocations.
            probe: how sites are looked at.
            adapter: makes the adapters.
            compiled: whether the model is compiled.
            timed: whether the budget limits the time of a step, by times that are not kept.

        Raises:
            SettingError: naming the setting.
        """

    def callback(
        self,
        run_search: Search,
        on_found: Found,
        on_decision: Decided,
        look: Look,
        allocator: Allocator,
        resumed: bool,
    ) -> L.Callback | None:
        """The Lightning callback that does it; None: a resumed run has its ranks from the checkpoint, and keeps them.

        Args:
            run_search: finds an allocation.
            on_found: told about the first.
            on_decision: told about all that come in the middle of training, and then of the first, too.
            look: gives batches to look at.
            allocator: makes them.
            resumed: the run goes on from a checkpoint.
        """


class AllocateRanks(L.Callback):
    """Search and enable in ``setup("fit")``: Lightning makes the optimizer after it, so that it sees the adapters."""

    def __init__(self, run_search: Search, on_found: Found) -> None:
        self.run_search = run_search
        self.on_found = on_found

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Search, enable, report."""
        if stage == "fit":
            self.allocate(trainer, pl_module)

    def allocate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> SearchResult:
        """Do it; what was found."""
        assert isinstance(pl_module, LitAdapted)
        pl_module.to(trainer.strategy.root_device)
        result = self.run_search(pl_module, Moment(0, None))
        pl_module.model.enable(result.allocation.ranks, pl_module.seed)
        pl_module.check_replicas()
        self.on_found(result)
        return result

    def finish(self, lit: LitAdapted) -> None:
        """Training is over."""


@dataclass(frozen=True)
class Static:
    """Allocate once, before the first epoch; sites without rank hold no parameters and no optimizer state."""

    starting_budget = same_budget

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """Nothing is in the way."""

    def callback(
        self,
        run_search: Search,
        on_found: Found,
        on_decision: Decided,
        look: Look,
        allocator: Allocator,
        resumed: bool,
    ) -> L.Callback | None:
        """The Lightning callback that does it."""
        return None if resumed else AllocateRanks(run_search, on_found)
