"""Unit by unit, to whoever gains most for its price."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from heterolora.allocation import Allocation
from heterolora.allocators.base import Expand, GainRule, Gains, Normalise, parameters_only, tie_order
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Greedy:
    """Grant one unit of rank at a time to the site with the largest gain per parameter that still fits.

    It stops when no unit fits any more, so that less is left than the cheapest unit it could still add.

    Args:
        min_rank: every site gets this much first.
        max_rank: no site gets more.
        gain: value of the k-th unit where the proxy gives one number s: ``harmonic`` s/k, or ``flat`` s.
        normalise: how scores of different sites are made comparable, before the division by cost.
        seed: order of ties.
    """

    min_rank: int
    max_rank: int
    gain: Expand
    normalise: Normalise
    seed: int

    counts_sites = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_rank <= self.max_rank:
            raise SettingError("min_rank", self.min_rank, f"a whole number from 0 to max_rank={self.max_rank}")
        if self.max_rank < 1:
            raise SettingError("max_rank", self.max_rank, "a whole number of at least 1")

    @property
    def gain_rule(self) -> GainRule:
        """As the arguments say."""
        return GainRule(self.gain, self.max_rank, self.normalise)

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks from ``min_rank`` up."""
        allowed = parameters_only(budget, "greedy")
        if small := [name for name, values in gains.items() if len(values) < self.min_rank]:
            raise SettingError("allocator.min_rank", self.min_rank, f"more than {small[:3]} can hold")
        ranks = dict.fromkeys(gains, self.min_rank)
        spent = cost(ranks)
        if spent > allowed:
            raise SettingError("allocator.min_rank", self.min_rank, f"costs {spent}, the budget is {allowed}")

        def offer(name: str) -> tuple[float, int, str] | None:
            if ranks[name] >= len(gains[name]):
                return None
            price = cost.marginal(ranks, name)
            return -gains[name][ranks[name]] / max(price, 1), tie_order(self.seed, name), name

        queue = [entry for name in gains if (entry := offer(name)) is not None]
        heapq.heapify(queue)
        while queue:
            _, _, name = heapq.heappop(queue)
            price = cost.marginal(ranks, name)
            if spent + price > allowed:
                continue  # its further units cost no less
            ranks[name] += 1
            spent += price
            if (entry := offer(name)) is not None:
                heapq.heappush(queue, entry)
        return Allocation(ranks, spent, allowed)
