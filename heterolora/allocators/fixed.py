"""An allocation made elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heterolora.allocation import Allocation, read_ranks
from heterolora.allocators.base import Gains
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Fixed:
    """Read the ranks from a file: an ``allocation.json`` of an earlier run, or a plain JSON object site -> rank.

    Args:
        path: the file; sites that it does not name get no rank.
    """

    path: str | None

    counts_sites = True

    def __post_init__(self) -> None:
        if self.path is None:
            raise SettingError(
                "path", None, "allocator=fixed needs the file to read, e.g. allocator.path=RUN/allocation.json"
            )
        if not Path(self.path).expanduser().is_file():
            raise SettingError("path", self.path, "no such file")

    @property
    def gain_rule(self) -> None:
        """It looks at no scores."""
        return None

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """The file's ranks, if they fit this space and this budget."""
        assert self.path is not None
        try:
            read = read_ranks(Path(self.path).expanduser())
        except ValueError as error:
            raise SettingError("allocator.path", self.path, str(error)) from error
        if unknown := sorted(name for name, rank in read.items() if rank and name not in groups):
            raise SettingError("allocator.path", self.path, f"sites {unknown[:5]} are not in this search space")
        if large := [name for name, rank in read.items() if rank and rank > len(gains[name])]:
            raise SettingError("allocator.path", self.path, f"more rank than min(in, out) at {large[:5]}")
        ranks = {name: read.get(name, 0) for name in groups}
        if not any(ranks.values()):
            raise SettingError("allocator.path", self.path, "gives no site any rank")
        spent, active = cost(ranks), [rank for rank in ranks.values() if rank]
        if isinstance(budget, SiteCount):
            if len(active) > budget.total or set(active) != {budget.rank}:
                raise SettingError(
                    "allocator.path",
                    self.path,
                    f"the budget is {budget.total} sites of rank {budget.rank}, not {active}",
                )
            return Allocation(ranks, spent, None)
        if spent > budget:
            raise SettingError("allocator.path", self.path, f"costs {spent} parameters, the budget is {budget}")
        return Allocation(ranks, spent, budget)
