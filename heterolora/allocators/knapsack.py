"""The largest sum of gains that a budget can buy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from heterolora.allocation import Allocation
from heterolora.allocators.base import Expand, GainRule, Gains, Normalise, additive_only, parameters_only, tie_order
from heterolora.allocators.greedy import by_gain_per_parameter
from heterolora.allocators.limits import Bounds, LimitRule, Limits, spending
from heterolora.budget import SiteCount
from heterolora.cost import AdditiveCost, Cost
from heterolora.errors import SettingError

Table: TypeAlias = NDArray[np.float64]
"""``table[c]``: the largest gain that spends exactly c, in multiples of a common divisor; -inf where nothing does."""

MOST_STEPS = 2 * 10**9
"""Additions and comparisons of numbers; a few seconds."""

MOST_CELLS = 5 * 10**7
"""Numbers in all tables: 400 MB."""

NOTHING: Table = np.zeros(1)
"""The table of no sites."""


@dataclass(frozen=True)
class Knapsack:
    """The ranks with the largest sum of gains within the budget: exact, where greedy is only close.

    Gains never rise within a site, so of all units of one price the best k are a choice of ranks, whatever k. What is
    left to find is k for each price: a table over the budget in multiples of the prices' common divisor. Sums are
    those of double precision. Among equal optima, the prices and sites that come first in the seeded order get more;
    units of no gain that still fit are added at the end, so that less is left than the cheapest unit that could be.

    Args:
        min_rank: no site gets less.
        max_rank: no site gets more.
        gain: value of the k-th unit where the proxy gives one number s: ``harmonic`` s/k, or ``flat`` s.
        normalise: how scores of different sites are made comparable.
        limits: group -> any of min_share, max_share (of the budget), min_rank, max_rank (instead of the two above);
            null: none.
        exact: spend the whole budget where some mix of units can: the best of all ranks that do, although others may
            gain more. The whole is the largest multiple of the prices' common divisor within the budget.
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
        """The best ranks.

        Raises:
            SettingError: for gains below 0, an adapter whose sites share factors, or tables that would be too large.
        """
        allowed = parameters_only(budget, "knapsack")
        additive = additive_only(cost, "knapsack")
        bounds = self._limit_rule().resolve(gains, cost, allowed, groups)
        if negative := [name for name, cap in bounds.caps.items() if cap and gains[name][cap - 1] < 0]:
            raise SettingError(
                "allocator",
                "knapsack",
                f"gains below 0, as at {sorted(negative)[:3]}, are not worth a unit; use greedy",
            )
        ranks = dict(bounds.floors)
        pools, capacity = _pools(gains, additive, bounds, self.seed)
        _check_size(pools, capacity)
        for name in _best_units(pools, capacity, self.exact):
            ranks[name] += 1
        bounds.grant(by_gain_per_parameter(gains, additive, ranks, bounds.caps, self.seed), additive.units, ranks)
        return Allocation(ranks, cost(ranks), allowed)

    def _limit_rule(self) -> LimitRule:
        return LimitRule(self.min_rank, self.max_rank, self.limits)


@dataclass(frozen=True)
class _Units:
    """All units of one price in a pool, best first.

    Attributes:
        price: of one unit, in multiples of the common divisor.
        names: the site of each unit.
        totals: gain of the best k units, for k from 0.
        tie: place of the first of its sites among equals.
    """

    price: int
    names: Sequence[str]
    totals: Table
    tie: int


@dataclass(frozen=True)
class _Pool:
    """Sites whose spending is limited together.

    Attributes:
        units: by price; where there is a reserve, the dearest first.
        capacity: what the pool may spend beyond the least ranks.
        reserve: what is reserved to it beyond the least ranks, rounded down: prices are whole, so nothing is lost.
    """

    units: Sequence[_Units]
    capacity: int
    reserve: int

    @property
    def tie(self) -> int:
        """Place of the first of its sites among equals."""
        return min(units.tie for units in self.units)

    @cached_property
    def tables(self) -> list[Table]:
        """The table of the first j prices, for j from 0."""
        tables = [NOTHING]
        for units in self.units:
            tables.append(_add(tables[-1], units.price, units.totals, self.capacity))
        return tables

    @cached_property
    def table(self) -> Table:
        """The table of the pool."""
        table = np.full(len(self.tables[-1]), -np.inf)
        for free, spent, gain, least in self._ways:
            part = self.tables[free][: max(len(table) - spent, 0)] + gain
            part[: max(least - spent, 0)] = -np.inf
            np.maximum(table[spent : spent + len(part)], part, out=table[spent : spent + len(part)])
        return table

    def trace(self, spent: int) -> list[int]:
        """How many units of each price the table's choice takes."""
        for free, fixed, gain, least in self._ways:
            left, table = spent - fixed, self.tables[free]
            if least <= spent and 0 <= left < len(table) and table[left] + gain == self.table[spent]:
                break
        counts = [len(units.names) for units in self.units]
        for number in range(free - 1, -1, -1):
            units = self.units[number]
            counts[number] = _choice(self.tables[number], units.price, units.totals, left)
            left -= counts[number] * units.price
        return counts

    @property
    def _ways(self) -> list[tuple[int, int, float, int]]:
        """(free prices, spent on the others, their gain, least that is spent in all) of choices that use the reserve.

        A reserve is used once none of the pool's units fits into what is left of it. So, from the cheapest price on:
        either all units of a price are taken, or so much is spent that not one more of them fits.
        """
        ways, spent, gain = [], 0, 0.0
        for free in range(len(self.units), -1, -1):
            least = 0 if free == 0 else max(self.reserve - self.units[free - 1].price + 1, 0)
            ways.append((free, spent, gain, least))
            if least == 0:
                break
            spent += self.units[free - 1].price * len(self.units[free - 1].names)
            gain += float(self.units[free - 1].totals[-1])
        return ways


def _pools(gains: Gains, cost: AdditiveCost, bounds: Bounds, seed: int) -> tuple[list[_Pool], int]:
    """The units above the least ranks, by pool and price, and the budget for them in multiples of the divisor."""
    open_ = {name: cost.units[name] for name in gains if bounds.floors[name] < bounds.caps[name]}
    divisor = math.gcd(*open_.values()) or 1
    least = spending(bounds.floors, cost.units, bounds.groups)
    capacity = (bounds.budget - sum(least.values())) // divisor
    # No more than everything costs: a table need not be longer, however much is allowed.
    whole = sum(price // divisor * (bounds.caps[name] - bounds.floors[name]) for name, price in open_.items())
    capacity = min(capacity, whole)
    labels = sorted({*bounds.reserves, *bounds.ceilings})
    members: dict[str | None, list[str]] = {label: [] for label in labels}
    members[None] = []  # all groups without a share of their own make one pool
    for name in open_:
        members[bounds.groups[name] if bounds.groups[name] in members else None].append(name)
    pools = []
    for label, names in members.items():
        if not names:
            continue
        reserve, most = 0, capacity
        if label is not None:
            reserve = (bounds.reserves.get(label, 0) - least[label]) // divisor
            most = min(capacity, (bounds.ceilings.get(label, bounds.budget) - least[label]) // divisor)
        by_price: dict[int, list[str]] = {}
        for name in names:
            by_price.setdefault(open_[name] // divisor, []).append(name)
        units = [_units(price, sites, gains, bounds, seed) for price, sites in by_price.items()]
        units.sort(key=lambda one: -one.price if reserve > 0 else -one.tie)
        pools.append(_Pool(units, most, reserve))
    return sorted(pools, key=lambda pool: -pool.tie), capacity


def _units(price: int, names: Sequence[str], gains: Gains, bounds: Bounds, seed: int) -> _Units:
    ties = {name: tie_order(seed, name) for name in names}
    units = sorted(
        (-gains[name][k], ties[name], k, name) for name in names for k in range(bounds.floors[name], bounds.caps[name])
    )
    totals = np.cumsum([0.0, *(-loss for loss, _, _, _ in units)])
    return _Units(price, [name for _, _, _, name in units], totals, min(ties.values()))


def _best_units(pools: Sequence[_Pool], capacity: int, exact: bool) -> list[str]:
    """The sites of the units of an optimum, a site once for each unit; exact: of one that spends all, if any does."""
    if not pools:
        return []
    tables = [NOTHING]
    for pool in pools[:-1]:
        tables.append(_add(tables[-1], 1, pool.table, capacity))
    split = _exact_split(tables[-1], pools[-1].table, capacity) if exact else None
    last, left = split or _best_split(tables[-1], pools[-1].table, capacity)
    names = _named(pools[-1], last)
    for table, pool in zip(reversed(tables[:-1]), reversed(pools[:-1]), strict=True):
        share = _choice(table, 1, pool.table, left)
        names += _named(pool, share)
        left -= share
    return names


def _exact_split(table: Table, last: Table, capacity: int) -> tuple[int, int] | None:
    """What the last pool and all others spend at the best that spends all; None: nothing does."""
    share = _choice(table, 1, last, capacity)
    left = capacity - share
    return (share, left) if left < len(table) and last[share] + table[left] > -np.inf else None


def _best_split(table: Table, last: Table, capacity: int) -> tuple[int, int]:
    """What the last pool and all others spend at the optimum; among equal ones the cheapest, then the last pool's most.

    The last pool needs no table together with the others: only the whole budget is asked about.
    """
    best = np.maximum.accumulate(table)
    risen = np.concatenate([[False], best[1:] > best[:-1]])
    first = np.maximum.accumulate(np.where(risen, np.arange(len(best)), 0))  # where the best up to here was reached
    spent = np.arange(min(len(last), capacity + 1))
    rest = np.minimum(capacity - spent, len(best) - 1)
    values = last[: len(spent)] + best[rest]
    optima = np.flatnonzero(values == values.max())
    costs = optima + first[rest[optima]]
    chosen = optima[costs == costs.min()][-1]
    return int(chosen), int(first[rest[chosen]])


def _named(pool: _Pool, spent: int) -> list[str]:
    counts = pool.trace(spent)
    return [name for units, count in zip(pool.units, counts, strict=True) for name in units.names[:count]]


def _add(table: Table, price: int, totals: Table, capacity: int) -> Table:
    """The table with up to K more units of one price, whose best k gain ``totals[k]`` (-inf: not possible)."""
    length = _length(len(table), price, totals, capacity)
    result = np.full(length, -np.inf)
    scratch = np.empty(len(table))
    for count in range(min(len(totals) - 1, (length - 1) // price) + 1):
        if totals[count] == -np.inf:
            continue
        start = count * price
        size = min(len(table), length - start)
        np.add(table[:size], totals[count], out=scratch[:size])
        np.maximum(result[start : start + size], scratch[:size], out=result[start : start + size])
    return result


def _length(length: int, price: int, totals: Table, capacity: int) -> int:
    return min(length - 1 + price * (len(totals) - 1), capacity) + 1


def _choice(table: Table, price: int, totals: Table, spent: int) -> int:
    """How many of the units that ``_add`` added to the table are in what it found for ``spent``; the most, if equal."""
    counts = np.arange(min(len(totals) - 1, spent // price) + 1)
    rest = spent - counts * price
    values = np.full(len(counts), -np.inf)
    inside = rest < len(table)
    values[inside] = table[rest[inside]] + totals[counts[inside]]
    return _largest(values)


def _largest(values: Table) -> int:
    """The last place of the largest value."""
    return len(values) - 1 - int(np.argmax(values[::-1]))


def _check_size(pools: Sequence[_Pool], capacity: int) -> None:
    """Refuse tables that would take too long or too much memory, before any is made."""
    steps = cells = 0
    whole = 1
    for number, pool in enumerate(pools):
        length = 1
        for units in pool.units:
            counts = min(len(units.names), pool.capacity // units.price) + 1
            steps += length * counts
            length = _length(length, units.price, units.totals, pool.capacity)
            cells += length
        if 0 < number < len(pools) - 1:
            steps += whole * length
        whole = min(whole - 1 + length - 1, capacity) + 1
        cells += length + whole
    if steps > MOST_STEPS or cells > MOST_CELLS:
        raise SettingError(
            "allocator",
            "knapsack",
            f"the exact table would take {steps:.1e} steps and {cells:.1e} numbers, "
            f"the most are {MOST_STEPS:.0e} and {MOST_CELLS:.0e}; use greedy",
        )
