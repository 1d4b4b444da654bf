"""Unit by unit, to whoever gains most for its price."""

from collections.abc import Mapping
from dataclasses import dataclass

from heterolora.allocation import Allocation
from heterolora.allocators.base import Expand, GainRule, Gains, Normalise, parameters_only, tie_order
from heterolora.budget import SiteCount
from heterolora.cost import AdditiveCost, Cost
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
        if self.max_rank < 1:
            raise SettingError("max_rank", self.max_rank, "a whole number of at least 1")
        if not 0 <= self.min_rank <= self.max_rank:
            raise SettingError("min_rank", self.min_rank, f"a whole number from 0 to max_rank={self.max_rank}")

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

        if isinstance(cost, AdditiveCost):
            self._grant_in_order(gains, cost, allowed - spent, ranks)
        else:
            self._grant_one_by_one(gains, cost, allowed - spent, ranks)
        return Allocation(ranks, cost(ranks), allowed)

    def _grant_in_order(self, gains: Gains, cost: AdditiveCost, left: int, ranks: dict[str, int]) -> None:
        """Prices never change and gains never rise, so one sort of all units gives the order of grants."""
        units = []
        for name, values in gains.items():
            price, tie = cost.units[name], tie_order(self.seed, name)
            units += [(-values[k] / price, tie, k, name) for k in range(self.min_rank, min(self.max_rank, len(values)))]
        for _, _, _, name in sorted(units):
            if cost.units[name] <= left:
                left -= cost.units[name]
                ranks[name] += 1

    def _grant_one_by_one(self, gains: Gains, cost: Cost, left: int, ranks: dict[str, int]) -> None:
        """Where factors are shared, a grant changes the price of others: ask anew at every step."""

        def order(name: str) -> tuple[float, int]:
            return -gains[name][ranks[name]] / max(cost.marginal(ranks, name), 1), tie_order(self.seed, name)

        while True:
            growing = [name for name in gains if ranks[name] < min(self.max_rank, len(gains[name]))]
            fitting = [name for name in growing if cost.marginal(ranks, name) <= left]
            if not fitting:
                return
            name = min(fitting, key=order)
            left -= cost.marginal(ranks, name)
            ranks[name] += 1
