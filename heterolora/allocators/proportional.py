"""Parameters in proportion to the scores."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction as Exact
from functools import cached_property

from heterolora.allocation import Allocation
from heterolora.allocators.base import GainRule, Gains, Normalise, additive_only, parameters_only, tie_order
from heterolora.allocators.exact import spend_exactly
from heterolora.allocators.limits import Bounds, LimitRule, Limits
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Proportional:
    """Parameters in proportion to the sites' scores, as far as least and largest ranks allow.

    A site's weight is the mean gain of the units that it may get (the score itself, where the proxy gives one number).
    What a bounded site or group cannot take, or must take, is made up for by all others in proportion. All this is
    exact; then ranks are rounded down, and what is left is granted one unit at a time, the largest remainder first,
    until no unit fits any more, so that less is left than the cheapest unit that could still be added. Without bounds
    and for equal sites, these are the shares of GoRA (arXiv 2502.12171), which however loses what its bounds cut off.

    Args:
        min_rank: no site gets less.
        max_rank: no site gets more.
        normalise: how scores of different sites are made comparable.
        limits: group -> any of min_share, max_share (of the budget), min_rank, max_rank (instead of the two above);
            null: none.
        exact: spend the whole budget where some mix of units can: trades the units that are least missed, as
            ``spend_exactly`` says. Here these are not those of least score, but those whose trade leaves the smallest
            sum of squared differences between ranks and the exact ones before rounding.
        seed: order of ties.
    """

    min_rank: int
    max_rank: int
    normalise: Normalise
    limits: Limits | None
    exact: bool
    seed: int

    counts_sites = False

    def __post_init__(self) -> None:
        self._limit_rule()

    @property
    def gain_rule(self) -> GainRule:
        """One value a site matters, which ``flat`` keeps."""
        return GainRule("flat", self._limit_rule().largest_rank, self.normalise)

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks by largest remainders.

        Raises:
            SettingError: for scores that cannot be shares, or an adapter whose sites share factors.
        """
        allowed = parameters_only(budget, "proportional")
        units = additive_only(cost, "proportional").units
        bounds = self._limit_rule().resolve(gains, cost, allowed, groups)
        parameters = _ideal_parameters(_weights(gains, bounds.caps), units, bounds)
        ideal = {name: own / units[name] for name, own in parameters.items()}
        ranks = {name: math.floor(ideal[name]) for name in gains}
        bounds.grant(self._by_remainder(ideal, bounds.caps), units, ranks)
        if self.exact:
            ranks = spend_exactly(ranks, _nearness(ideal, bounds.caps), units, bounds, self.seed)
        return Allocation(ranks, cost(ranks), allowed)

    def _limit_rule(self) -> LimitRule:
        return LimitRule(self.min_rank, self.max_rank, self.limits)

    def _by_remainder(self, ideal: Mapping[str, Exact], caps: Mapping[str, int]) -> list[str]:
        """The site of each unit that may be added to the ranks rounded down; each grant takes 1 from a remainder."""
        remainders = {name: rank - math.floor(rank) for name, rank in ideal.items()}
        places = {remainder: place for place, remainder in enumerate(sorted(set(remainders.values()), reverse=True))}
        units = []
        for name, rank in ideal.items():
            place, tie = places[remainders[name]], tie_order(self.seed, name)
            units += [(more, place, tie, name) for more in range(caps[name] - math.floor(rank))]
        return [name for _, _, _, name in sorted(units)]


def _nearness(ideal: Mapping[str, Exact], caps: Mapping[str, int]) -> dict[str, list[float]]:
    """How much each unit lowers the squared difference between a site's rank and its ideal one: gains for a trade."""
    return {name: [2 * (float(rank) - k) + 1 for k in range(1, caps[name] + 1)] for name, rank in ideal.items()}


@dataclass(frozen=True)
class _Share:
    """What a site gets at a level of funding: ``level * weight`` parameters, but no less and no more than it may."""

    weight: int
    least: int
    most: int

    @property
    def breaks(self) -> tuple[Exact, ...]:
        """Levels where it leaves its least and reaches its most."""
        return (Exact(self.least, self.weight), Exact(self.most, self.weight)) if self.weight else ()


@dataclass(frozen=True)
class _Pool:
    """The sites of a group; where its reserve or ceiling binds, it stays at the level that spends just that."""

    shares: Mapping[str, _Share]
    reserve: int
    ceiling: int

    @cached_property
    def levels(self) -> tuple[Exact, Exact]:
        """The lowest and the highest level that the reserve and the ceiling allow."""
        breaks = [level for share in self.shares.values() for level in share.breaks]
        return _level(self._total, breaks, self.reserve), _level(self._total, breaks, self.ceiling)

    @property
    def breaks(self) -> list[Exact]:
        """Levels between which the spending is linear."""
        return [*self.levels, *(level for share in self.shares.values() for level in share.breaks)]

    def within(self, level: Exact) -> Exact:
        """The pool's own level where the others are at this one."""
        return min(max(level, self.levels[0]), self.levels[1])

    def spent(self, level: Exact) -> Exact:
        """Parameters; a reserve that weights of 0 cannot use by now still counts."""
        return max(self._total(self.within(level)), Exact(self.reserve))

    def _total(self, level: Exact) -> Exact:
        # one sum of whole numbers: thousands of fractions would be slow
        top, bottom = level.numerator, level.denominator
        shares = self.shares.values()
        return Exact(sum(min(max(top * s.weight, bottom * s.least), bottom * s.most) for s in shares), bottom)


def _weights(gains: Gains, caps: Mapping[str, int]) -> dict[str, int]:
    """Mean gain of the units that a site may get, exactly, times one number that makes them all whole."""
    means = {}
    for name, values in gains.items():
        units = [Exact(value) for value in values[: caps[name]]]
        means[name] = sum(units, Exact(0)) / max(len(units), 1)
    if negative := [name for name, mean in means.items() if mean < 0]:
        raise SettingError(
            "allocator", "proportional", f"scores below 0, as at {sorted(negative)[:3]}, cannot be shares; use greedy"
        )
    if not any(means.values()):
        raise SettingError("allocator", "proportional", "all scores are 0, which gives no shares; use another proxy")
    whole = math.lcm(*(mean.denominator for mean in means.values()))
    return {name: mean.numerator * (whole // mean.denominator) for name, mean in means.items()}


def _ideal_parameters(weights: Mapping[str, int], units: Mapping[str, int], bounds: Bounds) -> dict[str, Exact]:
    """Parameters of each site at the level of funding that spends the budget, or as much of it as weights can."""
    members: dict[str, dict[str, _Share]] = {}
    for name, weight in weights.items():
        share = _Share(weight, bounds.floors[name] * units[name], bounds.caps[name] * units[name])
        members.setdefault(bounds.groups[name], {})[name] = share
    pools = [
        _Pool(shares, bounds.reserves.get(label, 0), bounds.ceilings.get(label, bounds.budget))
        for label, shares in members.items()
    ]
    breaks = [level for pool in pools for level in pool.breaks]
    level = _level(lambda level: sum((pool.spent(level) for pool in pools), Exact(0)), breaks, bounds.budget)
    ideal = {}
    for pool in pools:
        own = pool.within(level)
        for name, share in pool.shares.items():
            ideal[name] = min(max(own * share.weight, Exact(share.least)), Exact(share.most))
    return ideal


def _level(total: Callable[[Exact], Exact], breaks: Iterable[Exact], target: int) -> Exact:
    """The lowest level at which a total that is linear between breaks meets the target; the last break if none does."""
    levels = sorted({Exact(0), *breaks})
    after = bisect_left(levels, Exact(target), key=total)
    if after == len(levels):
        return levels[-1]
    if after == 0:
        return levels[0]
    low, high = levels[after - 1], levels[after]
    return low + (high - low) * (target - total(low)) / (total(high) - total(low))
