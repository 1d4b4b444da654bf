"""The same rank everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterolora.allocation import Allocation
from heterolora.allocators.base import Gains, parameters_only
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Uniform:
    """The largest rank that all sites can have within the budget; what is left is reported as unspent.

    Args:
        groups: labels of the groups whose sites get it, of ``search_space.group_by``; null: all.
    """

    groups: Sequence[str] | None

    counts_sites = False

    @property
    def gain_rule(self) -> None:
        """It looks at no scores."""
        return None

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """One rank for all."""
        allowed = parameters_only(budget, "uniform")
        if unknown := sorted(set(self.groups or ()) - set(groups.values())):
            raise SettingError("allocator.groups", unknown, f"no such groups, there are {sorted(set(groups.values()))}")
        sites = [name for name, values in gains.items() if values and (not self.groups or groups[name] in self.groups)]
        if (cheapest := cost(dict.fromkeys(sites, 1))) > allowed:
            raise SettingError(
                "budget", allowed, f"rank 1 at all {len(sites)} sites costs {cheapest}; give more, or a smaller space"
            )
        rank, limit = 1, min(len(gains[name]) for name in sites)
        while rank < limit and cost(dict.fromkeys(sites, rank + 1)) <= allowed:
            rank += 1
        ranks = dict.fromkeys(groups, 0) | dict.fromkeys(sites, rank)
        return Allocation(ranks, cost(ranks), allowed)
