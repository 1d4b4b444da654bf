"""Allocation under two budgets: parameters held, and the predicted time of a training step.

It works with any allocator, through what every allocator does: sites that are out of the question are handed over
without a gain, so that they can hold no rank.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, Gains, tie_order
from heterolora.cost import Cost
from heterolora.errors import SettingError
from heterolora.sites import Site
from heterolora.step_time import StepLimit


def allocate_in_time(
    allocator: Allocator,
    gains: Gains,
    cost: Cost,
    budget: int,
    groups: Mapping[str, str],
    sites: Sequence[Site],
    limit: StepLimit,
) -> Allocation:
    """The best allocation found whose predicted step keeps to the limit.

    For each level at which the backward pass may end, from the lowest up, the allocator is asked with the sites from
    there on alone. Where that breaks the limit, sites go, those of least gain per predicted second first, by bisection,
    until it holds; and where no number of sites helps, parameters. The first level that keeps to the limit with all of
    its sites is the last: those above offer less. Of all allocations within the limit the one with the largest sum of
    gains wins; of an allocator that looks at no gains, the one with most sites, then what it spends.

    Args:
        allocator: any.
        gains: see ``Allocator.allocate``.
        cost: likewise.
        budget: parameters allowed.
        groups: site name -> family.
        sites: those that ``gains`` names.
        limit: on the step.

    Raises:
        SettingError: if nothing keeps to the limit, or what the allocator refuses without one. An allocation without
            any rank is no error here, as it is none there.
    """
    plain = allocator.allocate(gains, cost, budget, groups)  # what is refused without a limit is refused with one
    search = _Search(allocator, gains, cost, budget, groups, sites, limit)
    if search.take(plain) or not plain.active:
        return plain
    for level in sorted({limit.level(site) for site in sites}):
        if search.from_level(level):
            break
    if search.best is None:
        search.single_sites()
    if search.best is None:
        raise search.refusal()
    return search.best


@dataclass
class _Search:
    """One question, and the best answer so far."""

    allocator: Allocator
    gains: Gains
    cost: Cost
    budget: int
    groups: Mapping[str, str]
    sites: Sequence[Site]
    limit: StepLimit
    best: Allocation | None = None
    _worth: tuple[float, ...] = ()
    _fastest: float = math.inf
    _by_name: dict[str, Site] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {site.name: site for site in self.sites}

    def take(self, found: Allocation) -> bool:
        """Keep it if nothing better is known; whether it keeps to the limit."""
        seconds = self._seconds(found)
        keeps = seconds <= self.limit.seconds
        if found.active:
            self._fastest = min(self._fastest, seconds)
        worth = self._value(found, seconds)
        if keeps and (self.best is None or worth > self._worth):
            self.best, self._worth = found, worth
        return keeps

    def from_level(self, level: float) -> bool:
        """Try the sites of this level and above; whether all of them together keep to the limit."""
        if self.limit.least(level) > self.limit.seconds:
            return False
        names = [site.name for site in self.sites if self.limit.level(site) >= level]
        found = self._ask(names, self.budget)
        if found is None or self._keeps(found):
            return found is not None and bool(found.active)
        order = self._by_gain_per_second(names, found.ranks)
        if not self._largest(len(order) - 1, lambda count: self._ask(order[:count], self.budget), refused=False):
            self._largest(self.budget - 1, lambda parameters: self._ask(names, parameters), refused=True)
        return False

    def single_sites(self) -> None:
        """Try one site alone, of each sort and level: at its lowest price, then with all parameters.

        What is slower than every one of these cannot be the fastest allocation.
        """
        alike = {(self.limit.level(s), self.limit.predict([s], {s.name: 1})): s.name for s in reversed(self.sites)}
        for name in alike.values():
            for parameters in (self.cost({name: 1}), self.budget):
                self._ask([name], min(parameters, self.budget))

    def refusal(self) -> SettingError:
        """Why there is no answer."""
        smallest = math.ceil(1000 * self._fastest / self.limit.reference) / 1000
        return SettingError(
            "budget.step_time",
            self.limit.share,
            f"the fastest allocation here is predicted to take {smallest:.3f} of the uniform one's step; give at least "
            "that",
        )

    def _ask(self, names: Collection[str], budget: int) -> Allocation | None:
        """What the allocator makes of these sites alone, if it does not refuse; the best within the limit is kept."""
        chosen = set(names)
        gains = {name: values if name in chosen else () for name, values in self.gains.items()}
        try:
            found = self.allocator.allocate(gains, self.cost, budget, self.groups)
        except SettingError:
            return None
        found = Allocation(found.ranks, found.spent, self.budget)
        if found.active:
            self.take(found)
        return found

    def _largest(self, most: int, ask: Callable[[int], Allocation | None], refused: bool) -> bool:
        """Bisect for the largest number whose allocation keeps to the limit; whether one with rank was met.

        Args:
            most: the largest number to try.
            ask: what the allocator makes of a number; None: it refuses.
            refused: whether a number that is refused is too small, and not too large.
        """
        low, high, met = 0, most, False
        while low < high:
            middle = (low + high + 1) // 2
            found = ask(middle)
            if refused if found is None else self._keeps(found):
                low, met = middle, met or bool(found and found.active)
            else:
                high = middle - 1
        return met

    def _seconds(self, found: Allocation) -> float:
        return self.limit.predict([self._by_name[name] for name in found.active], found.ranks)

    def _keeps(self, found: Allocation) -> bool:
        return self._seconds(found) <= self.limit.seconds

    def _value(self, found: Allocation, seconds: float) -> tuple[float, ...]:
        if self.allocator.gain_rule is None:
            return len(found.active), found.spent, -seconds
        gain = math.fsum(value for name, rank in found.active.items() for value in self.gains[name][:rank])
        return gain, found.spent, -seconds

    def _by_gain_per_second(self, names: Sequence[str], ranks: Mapping[str, int]) -> list[str]:
        """Best first; sites that got no rank come last, by their first unit."""

        def key(name: str) -> tuple[bool, float, int]:
            rank = max(ranks[name], 1)
            seconds = self.limit.times.adapter(self._by_name[name], rank)
            gained = 1.0 if self.allocator.gain_rule is None else sum(self.gains[name][:rank])
            worth = gained / seconds if seconds else math.copysign(math.inf, gained)
            return not ranks[name], -worth, tie_order(0, name)

        return sorted(names, key=key)
