"""Unit by unit, to whoever gains most for its price."""

from collections.abc import Mapping
from dataclasses import dataclass

from heterolora.allocation import Allocation
from heterolora.allocators.base import Expand, GainRule, Gains, Normalise, parameters_only, tie_order
from heterolora.allocators.exact import spend_exactly
from heterolora.allocators.limits import Bounds, LimitRule, Limits
from heterolora.budget import SiteCount
from heterolora.cost import AdditiveCost, Cost


@dataclass(frozen=True)
class Greedy:
    """Grant one unit of rank at a time to the site with the largest gain per parameter that still fits.

    It stops when no unit fits any more, so that less is left than the cheapest unit it could still add; ``exact`` then
    spends that too, where some trade can.

    Args:
        min_rank: every site gets this much first.
        max_rank: no site gets more.
        gain: value of the k-th unit where the proxy gives one number s: ``harmonic`` s/k, or ``flat`` s.
        normalise: how scores of different sites are made comparable, before the division by cost.
        limits: group -> any of min_share, max_share (of the budget), min_rank, max_rank (instead of the two above);
            null: none. With an adapter whose sites share factors, ranks only.
        exact: spend the whole budget where some mix of units can: trades the units that are least missed, as
            ``spend_exactly`` says. With an adapter whose sites share factors it does nothing: a unit's price there
            depends on the ranks of others, so that no trade has a price.
        seed: order of ties.
    """

    min_rank: int
    max_rank: int
    gain: Expand
    normalise: Normalise
    limits: Limits | None
    exact: bool
    seed: int

    counts_sites = False

    def __post_init__(self) -> None:
        self._limit_rule()

    @property
    def gain_rule(self) -> GainRule:
        """As the arguments say."""
        return GainRule(self.gain, self._limit_rule().largest_rank, self.normalise)

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks from the least ones up."""
        allowed = parameters_only(budget, "greedy")
        bounds = self._limit_rule().resolve(gains, cost, allowed, groups)
        ranks = dict(bounds.floors)
        if isinstance(cost, AdditiveCost):
            bounds.grant(by_gain_per_parameter(gains, cost, ranks, bounds.caps, self.seed), cost.units, ranks)
            if self.exact:
                ranks = spend_exactly(ranks, gains, cost.units, bounds, self.seed)
        else:
            self._grant_one_by_one(gains, cost, bounds, ranks)
        return Allocation(ranks, cost(ranks), allowed)

    def _limit_rule(self) -> LimitRule:
        return LimitRule(self.min_rank, self.max_rank, self.limits)

    def _grant_one_by_one(self, gains: Gains, cost: Cost, bounds: Bounds, ranks: dict[str, int]) -> None:
        """Where factors are shared, a grant changes the price of others: ask anew at every step."""
        left = bounds.budget - cost(ranks)

        def order(name: str) -> tuple[float, int]:
            return -gains[name][ranks[name]] / max(cost.marginal(ranks, name), 1), tie_order(self.seed, name)

        while True:
            growing = [name for name in gains if ranks[name] < bounds.caps[name]]
            fitting = [name for name in growing if cost.marginal(ranks, name) <= left]
            if not fitting:
                return
            name = min(fitting, key=order)
            left -= cost.marginal(ranks, name)
            ranks[name] += 1


def by_gain_per_parameter(
    gains: Gains, cost: AdditiveCost, ranks: Mapping[str, int], caps: Mapping[str, int], seed: int
) -> list[str]:
    """The site of each unit between ranks and caps, best first.

    Prices never change and gains never rise, so one sort of all units gives the order of grants.
    """
    units = []
    for name, values in gains.items():
        price, tie = cost.units[name], tie_order(seed, name)
        units += [(-values[k] / price, tie, k, name) for k in range(ranks[name], caps[name])]
    return [name for _, _, _, name in sorted(units)]
