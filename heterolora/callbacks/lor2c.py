"""LoR2C's events (Zhao, Yu, Zhang, Yang, arXiv 2503.00572): block shortcuts are merged, or give way to LoRA inside."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator
from heterolora.callbacks.allocate import Decided, Found, Look, Search, same_budget
from heterolora.callbacks.events import Events, check_any_units, check_switching
from heterolora.errors import SettingError
from heterolora.lit import LitAdapted
from heterolora.scoring import Probe
from heterolora.sites import Site, Tap
from heterolora.space import Space
from heterolora.switching import Heritage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoR2C:
    """In the first part of training, merge adjacent shortcuts and inject LoRA in place of a shortcut, event by event.

    The score of a shortcut is the shape of its feature space, ``1 - (s_1 + ... + s_k) / (s_1 + ... + s_r)`` of the
    singular values of BA with k = r / 2: low means concentrated. Merging takes the pair, one's sink the other's
    source, with the smallest sum of scores; one adapter from the first's source to the second's sink takes their
    place, with the factors (and moments) of the member with the larger score. Injection takes the single-block
    shortcut with the smallest score away, and gives the block's layers of some roles a share of its rank each.

    Args:
        merges: how many.
        injections: how many.
        until: share of the training in which all of them happen; the paper: a quarter.
        roles: of the layers that get LoRA.
        share: of the shortcut's rank, for each of these; the paper: a half for q and v, which costs the same.
        score: ``sfs``, as the paper has it; or ``mean`` of the singular values, as the authors' script for GLUE (merges
            the smallest, injects at the largest).
    """

    merges: int
    injections: int
    until: float
    roles: Sequence[str]
    share: float
    score: Literal["sfs", "mean"]

    scored_by: ClassVar[str] = "sfs"
    starting_budget = same_budget

    def __post_init__(self) -> None:
        for name in ("merges", "injections"):
            if getattr(self, name) < 0:
                raise SettingError(f"allocation.{name}", getattr(self, name), "a whole number of at least 0")
        if not self.merges + self.injections:
            raise SettingError("allocation.merges", 0, "no event at all: give some, or allocation=static")
        for name in ("until", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingError(f"allocation.{name}", getattr(self, name), "a share above 0, up to 1")

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """As ``AllocationTime`` has it.

        Raises:
            SettingError: naming the setting.
        """
        check_switching("lor2c", adapter, compiled)
        check_any_units("lor2c", adapter)

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
        return MergeAndInject(self, run_search, on_found, on_decision, resumed)


class MergeAndInject(Events):
    """The events of ``LoR2C``.

    Args:
        settings: how many and when.
        run_search: finds the first allocation.
        on_found: told about it before training starts.
        on_decision: told about every decision.
        resumed: the run goes on from a checkpoint.
    """

    def __init__(
        self, settings: LoR2C, run_search: Search, on_found: Found, on_decision: Decided, resumed: bool
    ) -> None:
        super().__init__(run_search, on_found, on_decision, resumed, every=1, start=1, stop=1.0, off="reset")
        self.settings = settings

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """When the events come.

        Raises:
            SettingError: if there is no time for them, or no site that a merged adapter could take.
        """
        assert isinstance(pl_module, LitAdapted)
        chosen, total = self.settings, int(trainer.estimated_stepping_batches)
        events = max(chosen.merges, chosen.injections)
        self.every = max(1, int(chosen.until * total / events))
        if self.every * events >= total:
            raise SettingError("allocation", f"merges={chosen.merges}", f"{events} events need more than {total} steps")
        space = pl_module.model.space
        longest = max((site.span or 0 for site in space.sites), default=0)
        if chosen.merges and longest <= 2:
            raise SettingError("search_space.spans", longest, "merged shortcuts are longer: search_space=lor2c")
        super().on_train_start(trainer, pl_module)

    def is_due(self, step: int, in_epoch: int) -> bool:
        """Every so many steps, whatever the epoch, for as many events as are wanted."""
        events = max(self.settings.merges, self.settings.injections)
        return 0 < step <= events * int(self.every) and step % int(self.every) == 0

    def happen(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        """A merge, an injection, or both."""
        number = step // int(self.every)
        if number <= self.settings.merges:
            self._merge(trainer, lit, batch, step)
        if number <= self.settings.injections:
            self._inject(trainer, lit, batch, step)

    def _scores(self, lit: LitAdapted) -> dict[str, float]:
        """Of the adapters that go from tap to tap, in the sites' order."""
        scored = shape_of_features if self.settings.score == "sfs" else mean_singular_value
        return {name: scored(lit.model.adapter(name)) for name in lit.model.held if _taps(lit.model.site(name))}

    def _merge(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        scores, ranks = self._scores(lit), lit.model.ranks
        pairs = mergeable(lit.model.space, list(scores))
        if not pairs:
            _log.info("step %d: no two adapters are left that could be merged", step)
            return
        first, second, whole = min(pairs, key=lambda pair: scores[pair[0]] + scores[pair[1]])
        kept = max((first, second), key=lambda name: scores[name])
        after = {**ranks, first: 0, second: 0, whole: ranks[kept]}
        heritage = {whole: Heritage(kept, range(ranks[kept]))}
        why = f"step {step}: {first} and {second} become {whole}, with what {kept} had learned"
        self.change(trainer, lit, batch, step, after, self._shown(lit, scores), heritage, why=why)

    def _inject(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        space, scores, ranks = lit.model.space, self._scores(lit), lit.model.ranks
        single = {name: score for name, score in scores.items() if space[name].span == 2}
        places = {name: self._inside(space, space[name]) for name in single}
        if not any(places.values()):
            _log.info("step %d: no single block's adapter is left for an injection", step)
            return
        best = min if self.settings.score == "sfs" else max
        name = best((n for n in single if places[n]), key=lambda n: single[n])
        rank = max(1, int(ranks[name] * self.settings.share))
        after = {**ranks, name: 0, **{inner: ranks[inner] + rank for inner in places[name]}}
        cost = lit.model.family.cost(space.sites)
        if cost(after) > cost(ranks):
            _log.warning("step %d: nothing is injected, LoRA in place of %s costs more than it", step, name)
            return
        why = f"step {step}: {name} gives way to {', '.join(places[name])}"
        self.change(trainer, lit, batch, step, after, self._shown(lit, scores), why=why)

    def _inside(self, space: Space, site: Site) -> list[str]:
        """The layers of a block that get LoRA in place of its shortcut."""
        inner = [s for s in space.sites if not _taps(s) and (s.layer, s.stream) == (site.layer, site.stream)]
        return [s.name for s in inner if set(s.roles) & set(self.settings.roles)]

    def _shown(self, lit: LitAdapted, scores: Mapping[str, float]) -> dict[str, float]:
        return {name: scores.get(name, 0.0) for name in lit.model.ranks}

    def begin(self, lit: LitAdapted, allocation: Allocation) -> None:
        """Nothing is to be remembered."""


def _taps(site: Site) -> bool:
    return isinstance(site.source, Tap) and isinstance(site.sink, Tap)


def mergeable(space: Space, held: Sequence[str]) -> list[tuple[str, str, str]]:
    """Pairs of held sites of which one's sink is the other's source, and the site that spans both."""
    spanning = {(site.source, site.sink): site.name for site in space.sites if _taps(site)}
    found = []
    for first in map(space.__getitem__, held):
        for second in map(space.__getitem__, held):
            whole = spanning.get((first.source, second.sink)) if first.sink == second.source else None
            if whole is not None and whole not in held:
                found.append((first.name, second.name, whole))
    return found


@torch.no_grad()
def _singular_values(adapter: Any) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.svdvals(adapter.delta_weight().double())
    return values[: adapter.rank]


def concentration(values: torch.Tensor, leading: int) -> float:
    """``1 - sum of the leading ones / sum of all``; 0 where all are 0.

    Args:
        values: singular values, largest first.
        leading: k.
    """
    whole = values.sum()
    return (1 - values[:leading].sum() / whole).item() if whole > 0 else 0.0


def shape_of_features(adapter: Any) -> float:
    """SFS with k = r / 2."""
    return concentration(_singular_values(adapter), max(1, adapter.rank // 2))


def mean_singular_value(adapter: Any) -> float:
    """Over all dimensions of the map, as the authors' code has it."""
    delta = adapter.delta_weight()
    return float(_singular_values(adapter).sum() / min(delta.shape))
