"""An allocation made elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heterolora.allocation import Allocation, check_ranks, read_ranks
from heterolora.allocators.base import Gains
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Fixed:
    """Ranks from a file (an ``allocation.json`` of an earlier run, or a JSON object site -> rank), or given outright.

    Args:
        path: the file; null: ``ranks`` are given.
        ranks: site -> rank; null: ``path`` is given. Sites that neither names get no rank.
    """

    path: str | None
    ranks: Mapping[str, int] | None

    counts_sites = True

    def __post_init__(self) -> None:
        if (self.path is None) == (self.ranks is None):
            raise SettingError(
                "path",
                self.path,
                "allocator=fixed needs one of two: the file to read, e.g. allocator.path=RUN/allocation.json, or "
                "allocator.ranks={0.q: 4, ...}",
            )
        if self.path is not None and not Path(self.path).expanduser().is_file():
            raise SettingError("path", self.path, "no such file")

    @property
    def _given(self) -> tuple[str, object]:
        """Which setting gave the ranks, for messages."""
        return ("allocator.path", self.path) if self.ranks is None else ("allocator.ranks", dict(self.ranks))

    def _read(self) -> Mapping[str, int]:
        if self.path is None:
            return check_ranks(self.ranks)
        return read_ranks(Path(self.path).expanduser())

    @property
    def gain_rule(self) -> None:
        """It looks at no scores."""
        return None

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """The file's ranks, if they fit this space and this budget."""
        try:
            read = self._read()
        except ValueError as error:
            raise SettingError(*self._given, str(error)) from error
        if unknown := sorted(name for name, rank in read.items() if rank and name not in groups):
            raise SettingError(*self._given, f"sites {unknown[:5]} are not in this search space")
        if large := [name for name, rank in read.items() if rank and rank > len(gains[name])]:
            raise SettingError(*self._given, f"more rank than min(in, out) at {large[:5]}")
        ranks = {name: read.get(name, 0) for name in groups}
        if not any(ranks.values()):
            raise SettingError(*self._given, "gives no site any rank")
        spent, active = cost(ranks), [rank for rank in ranks.values() if rank]
        if isinstance(budget, SiteCount):
            if len(active) > budget.total or set(active) != {budget.rank}:
                raise SettingError(
                    *self._given, f"the budget is {budget.total} sites of rank {budget.rank}, not {active}"
                )
            return Allocation(ranks, spent, None)
        if spent > budget:
            raise SettingError(*self._given, f"costs {spent} parameters, the budget is {budget}")
        return Allocation(ranks, spent, budget)
