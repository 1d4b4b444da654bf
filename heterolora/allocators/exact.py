"""Spending a budget to the last parameter: units that are least missed are traded for units of other prices."""

import contextlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

from heterolora.allocators.base import Gains, tie_order
from heterolora.allocators.limits import Bounds, spending

MOST_TAKEN = (1, 3, 6, 12)
"""Units that a trade may take back in all: the largest of these for which there are no more than ``MOST_TRIES`` mixes
to try. Smaller ones are tried first, which costs little."""

MOST_TRIES = 100_000
"""Mixes of units, a table's entries, that are tried for one of these; about a tenth of a second."""

Ladder: TypeAlias = Sequence[tuple[str, float]]
"""The site of each unit that may be traded and the gain that this loses, the least loss first."""

State: TypeAlias = tuple[int, int, float]
"""Parameters that a trade spends so far, those in the pool at hand, and the cheapest unit that the pool could add."""

Found: TypeAlias = tuple[float, tuple[int, ...]]
"""Gain that a trade loses so far, and how many units of each price it grants (below 0: takes back)."""


def spend_exactly(
    ranks: Mapping[str, int], gains: Gains, units: Mapping[str, int], bounds: Bounds, seed: int
) -> dict[str, int]:
    """The ranks after the trade that spends the whole budget and loses the least gain; unchanged where none does it.

    Every mix of units spends a multiple of the common divisor of their prices (beyond the least ranks). Where the
    budget is no such multiple, the largest one below it counts as the whole.

    A trade grants units of some prices and takes back units of others: of each price those of largest and of least
    gain, where sites' ranks end. It takes back at most 12 units in all; or 6, 3, 1, none, where there are too many
    mixes to try (``MOST_TRIES``): with many prices of little in common, or many groups with shares. Of trades that lose
    equally little, one that takes back the fewest units is made. Other ties follow the seeded order of the sites.

    Args:
        ranks: what an allocator gave, within the bounds.
        gains: value of each unit of rank, never increasing within a site.
        units: site -> parameters of one unit.
        bounds: they hold afterwards too; reserves as ``Bounds.grant`` keeps them, open to all once none of their
            group's units fits any more.
        seed: order of ties.
    """
    left = bounds.budget - sum(spending(ranks, units, bounds.groups).values())
    divisor = math.gcd(*(units[name] for name in ranks if bounds.floors[name] < bounds.caps[name]))
    target = left // divisor * divisor if divisor else 0
    if target:
        pools = _pools(ranks, gains, units, bounds, seed, target)
        # Takes cannot raise what a pool can hold in the end, so too little room is known before the search.
        if sum(pool.largest for pool in pools) >= target:
            return _applied(_best_trade(pools, target), ranks)
    return dict(ranks)


@dataclass(frozen=True)
class _Price:
    """The units of one price in a pool.

    Attributes:
        price: parameters of a unit.
        taken: units that may be taken back.
        granted: units that may be granted.
        open: units that the sites could still hold, which may be more than what ``granted`` lists.
        tie: place of the first of its sites among equals.
    """

    price: int
    taken: Ladder
    granted: Ladder
    open: int
    tie: int

    @cached_property
    def losses(self) -> dict[int, float]:
        """Gain lost by granting a number of units (below 0: taking back)."""
        taken = enumerate(accumulate((loss for _, loss in self.taken), initial=0.0))
        granted = enumerate(accumulate((loss for _, loss in self.granted), initial=0.0))
        return {-count: loss for count, loss in taken} | dict(granted)


@dataclass(frozen=True)
class _Pool:
    """Sites whose spending is limited together.

    Attributes:
        prices: its units.
        room: parameters that it may spend more than now; None: no trade meets a limit of it.
        owed: parameters that are reserved to it beyond what it spends now; None: no trade meets its reserve.
    """

    prices: Sequence[_Price]
    room: int | None
    owed: int | None

    @property
    def tie(self) -> int:
        """Place of the first of its sites among equals."""
        return min(price.tie for price in self.prices)

    @property
    def largest(self) -> int:
        """Parameters that it could spend more than now, whatever the budget."""
        whole = sum(price.price * price.open for price in self.prices)
        return whole if self.room is None else min(whole, self.room)

    def allows(self, more: int, cheapest: float) -> bool:
        """Whether it may spend so many parameters more, if afterwards this is the cheapest unit that it could add."""
        fits = self.room is None or more <= self.room
        return fits and (self.owed is None or cheapest > self.owed - more)


@dataclass(frozen=True)
class _Step:
    """A price of a pool, and what the prices that come after it can do."""

    pool: _Pool
    units: _Price
    last: bool  # of its pool
    grants: int  # parameters that prices after it can grant
    dearest: int  # the largest price after it of a unit that can be taken back

    def after(self, state: State, count: int) -> State | None:
        """The state with so many units granted; None: the pool's limits do not allow it."""
        amount, more, cheapest = state
        spent = count * self.units.price
        if self.pool.room is None:
            return amount + spent, 0, math.inf
        if self.pool.owed is not None and count < self.units.open:
            cheapest = min(cheapest, self.units.price)
        if not self.last:
            return amount + spent, more + spent, cheapest
        return (amount + spent, 0, math.inf) if self.pool.allows(more + spent, cheapest) else None

    def counts(self, amount: int, target: int, most: int) -> range:
        """How many units may be granted after so many parameters, so that the prices after it can meet the target."""
        price = self.units.price
        fewest = -((amount + self.grants - target) // price)
        largest = (target + most * self.dearest - amount) // price
        return range(max(fewest, -most, -len(self.units.taken)), min(largest, len(self.units.granted)) + 1)


class _TooManyError(Exception):
    """The search would take too long."""


def _pools(
    ranks: Mapping[str, int], gains: Gains, units: Mapping[str, int], bounds: Bounds, seed: int, target: int
) -> list[_Pool]:
    """The sites by what limits them together, and by price; in the order of ties."""
    ties = {name: tie_order(seed, name) for name in ranks}
    limited = {label for label, ceiling in bounds.ceilings.items() if ceiling < bounds.budget}
    limited |= {label for label, reserve in bounds.reserves.items() if reserve > 0}
    spent = spending(ranks, units, bounds.groups)
    members: dict[str | None, dict[int, list[str]]] = {}
    for name in ranks:
        label = bounds.groups[name] if bounds.groups[name] in limited else None
        members.setdefault(label, {}).setdefault(units[name], []).append(name)
    back = MOST_TAKEN[-1] * max(units[name] for name in ranks)  # parameters that a trade can take back
    pools = []
    for label, by_price in members.items():
        room, owed = _limits(label, bounds, spent, target, back)
        most = back + (target if room is None else min(target, room))  # that a trade can grant
        prices = []
        for price, names in by_price.items():
            taken = _ladder(names, ranks, gains, bounds.floors, ties, MOST_TAKEN[-1])
            granted = _ladder(names, ranks, gains, bounds.caps, ties, most // price)
            open_ = sum(bounds.caps[name] - ranks[name] for name in names)
            prices.append(_Price(price, taken, granted, open_, min(ties[name] for name in names)))
        prices.sort(key=lambda one: one.tie)
        pools.append(_Pool(prices, room, owed))
    # Free pools last: before them, a state need not hold what they spent besides what the limited pool at hand spends.
    return sorted(pools, key=lambda pool: (pool.room is None, pool.tie))


def _limits(
    label: str | None, bounds: Bounds, spent: Mapping[str, int], target: int, back: int
) -> tuple[int | None, int | None]:
    """A pool's room and what is owed to it, where a trade can meet them that takes back at most ``back`` parameters."""
    if label is None:
        return None, None
    room = bounds.ceilings.get(label, bounds.budget) - spent[label]
    owed = bounds.reserves.get(label, 0) - spent[label]
    if owed + back > 0:
        return room, owed
    return (room if room < target + back else None), None


def _ladder(
    names: Sequence[str],
    ranks: Mapping[str, int],
    gains: Gains,
    ends: Mapping[str, int],
    ties: Mapping[str, int],
    most: int,
) -> Ladder:
    """Units of one price between the ranks and where they end: the best ones up to a cap, the least ones to a floor.

    What is granted last among equals is taken back first.
    """

    def entry(name: str, rank: int) -> tuple[float, int, str, int]:
        if rank < ends[name]:
            return -gains[name][rank], ties[name], name, rank + 1
        return gains[name][rank - 1], -ties[name], name, rank - 1

    heap = [entry(name, ranks[name]) for name in names if ranks[name] != ends[name]]
    heapq.heapify(heap)
    ladder: list[tuple[str, float]] = []
    while heap and len(ladder) < most:
        loss, _, name, rank = heap[0]
        ladder.append((name, loss))
        if rank != ends[name]:
            heapq.heapreplace(heap, entry(name, rank))
        else:
            heapq.heappop(heap)
    return ladder


def _best_trade(pools: Sequence[_Pool], target: int) -> list[tuple[_Price, int]]:
    """The units of each price to grant (below 0: to take back); none where no trade meets the target."""
    steps = _steps(pools)
    counts: tuple[int, ...] = ()
    with contextlib.suppress(_TooManyError):
        for most in MOST_TAKEN:
            counts = _search(steps, target, most)
    return [(step.units, count) for step, count in zip(steps, counts, strict=False)]


def _steps(pools: Sequence[_Pool]) -> list[_Step]:
    """The prices in the order of the search."""
    steps: list[_Step] = []
    grants = dearest = 0
    for pool in reversed(pools):
        for units in reversed(pool.prices):
            steps.append(_Step(pool, units, units is pool.prices[-1], grants, dearest))
            grants += units.price * len(units.granted)
            dearest = max(dearest, units.price if units.taken else 0)
    return steps[::-1]


def _search(steps: Sequence[_Step], target: int, most: int) -> tuple[int, ...]:
    """How many units of each price the best trade grants that takes back at most so many; empty: there is none.

    A table, price by price: for each number of units taken back and each state, the trade that loses the least.

    Raises:
        _TooManyError: if it would be too large.
    """
    layers: list[dict[State, Found]] = [{} for _ in range(most + 1)]
    layers[0][0, 0, math.inf] = 0.0, ()
    tries = 0
    for step in steps:
        grown: list[dict[State, Found]] = [{} for _ in layers]
        for taken, layer in enumerate(layers):
            for state, found in layer.items():
                counts = step.counts(state[0], target, most - taken)
                tries += 1 + len(counts)
                if tries > MOST_TRIES:
                    raise _TooManyError
                _extend(grown, taken, state, found, step, counts)
        layers = _undominated(grown)
    ends = [found for layer in layers for found in layer.values()]  # the fewest taken back first, and min keeps it
    return min(ends, key=lambda found: found[0], default=(0.0, ()))[1]


def _extend(
    grown: Sequence[dict[State, Found]], taken: int, state: State, found: Found, step: _Step, counts: range
) -> None:
    """Enter what a trade becomes with each number of units of one more price, where nothing better is known."""
    before, trade = found
    losses, after = step.units.losses, step.after
    for count in counts:
        new = after(state, count)
        if new is None:
            continue
        loss = before + losses[count]
        layer = grown[taken - min(count, 0)]
        known = layer.get(new)
        if known is None or loss < known[0]:
            layer[new] = loss, (*trade, count)


def _undominated(layers: Sequence[Mapping[State, Found]]) -> list[dict[State, Found]]:
    """Without trades that take back more than another one and lose no less."""
    best: dict[State, float] = {}
    kept: list[dict[State, Found]] = []
    for layer in layers:
        kept.append({state: found for state, found in layer.items() if found[0] < best.get(state, math.inf)})
        best.update((state, found[0]) for state, found in kept[-1].items())
    return kept


def _applied(trade: Sequence[tuple[_Price, int]], ranks: Mapping[str, int]) -> dict[str, int]:
    traded = dict(ranks)
    for units, count in trade:
        for name, _ in units.taken[: max(-count, 0)]:
            traded[name] -= 1
        for name, _ in units.granted[: max(count, 0)]:
            traded[name] += 1
    return traded
