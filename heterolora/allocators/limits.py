"""Limits on the rank of each site and on what groups of sites may spend, and the granting that keeps to them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction as Exact
from functools import cached_property
from typing import TypeAlias

from heterolora.allocators.base import Gains
from heterolora.cost import AdditiveCost, Cost
from heterolora.errors import SettingError

Limits: TypeAlias = Mapping[str | int, Mapping[str, int | float]]
"""Group (its label, which for layers is a number) -> any of ``min_share``, ``max_share`` (of the budget, 0 to 1),
``min_rank``, ``max_rank`` (of each site)."""

KEYS = ("min_share", "max_share", "min_rank", "max_rank")


@dataclass(frozen=True)
class Bounds:
    """What limits mean for one problem.

    Attributes:
        floors: site -> least rank.
        caps: site -> largest rank.
        budget: parameters that all sites may spend together.
        groups: site -> label of its group.
        reserves: label -> parameters that the other groups must leave to it; labels without a reserve are missing.
        ceilings: label -> parameters that the group may spend; labels without a ceiling are missing.
    """

    floors: Mapping[str, int]
    caps: Mapping[str, int]
    budget: int
    groups: Mapping[str, str]
    reserves: Mapping[str, int]
    ceilings: Mapping[str, int]

    def grant(self, order: Iterable[str], units: Mapping[str, int], ranks: dict[str, int]) -> None:
        """Grant one unit of rank to each name in turn, where it fits.

        A unit that does not fit will not fit later either, for what its group may spend only shrinks. The one exception
        is the end: what is then left of a reserve is too little for its own group, and open to all.

        Args:
            order: a name for each unit that may be granted.
            units: site -> parameters of one unit.
            ranks: what each site holds already, within these bounds; it is changed.
        """
        spent = spending(ranks, units, self.groups)
        left = self.budget - sum(spent.values())
        room = {label: self.ceilings.get(label, self.budget) - spent[label] for label in spent}
        held = {label: max(reserve - spent[label], 0) for label, reserve in self.reserves.items()}
        for reserved in (held, {}) if held else ({},):
            free = left - sum(reserved.values())
            refused = []
            for name in order:
                price, label = units[name], self.groups[name]
                own = reserved.get(label, 0)
                if price > free + own or price > room[label]:
                    refused.append(name)
                    continue
                if own:
                    reserved[label] = own - min(price, own)
                free -= max(price - own, 0)
                room[label] -= price
                left -= price
                ranks[name] += 1
            order = refused


@dataclass(frozen=True)
class LimitRule:
    """How an allocator's least and largest ranks and its limits become bounds.

    Attributes:
        min_rank: least rank of every site whose group says nothing else.
        max_rank: largest rank, likewise.
        limits: what groups say; None: nothing.

    Raises:
        SettingError: for limits that contradict each other, whatever the problem.
    """

    min_rank: int
    max_rank: int
    limits: Limits | None

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise SettingError("max_rank", self.max_rank, "a whole number of at least 1")
        if not 0 <= self.min_rank <= self.max_rank:
            raise SettingError("min_rank", self.min_rank, f"a whole number from 0 to max_rank={self.max_rank}")
        limits = self.by_label
        for label, limit in limits.items():
            self._check_values(label, limit)
            self._check_order(label, limit)
        least = {label: limit["min_share"] for label, limit in limits.items() if "min_share" in limit}
        if sum(map(_exact, least.values())) > 1:
            raise SettingError("allocator.limits", least, "the min_share of all groups sum to more than 1")

    @cached_property
    def by_label(self) -> dict[str, Mapping[str, int | float]]:
        """The limits under the labels of groups."""
        return {str(label): limit for label, limit in (self.limits or {}).items()}

    @property
    def largest_rank(self) -> int:
        """The largest rank that any site may get."""
        return max([self.max_rank, *(int(limit.get("max_rank", 0)) for limit in self.by_label.values())])

    def resolve(self, gains: Gains, cost: Cost, budget: int, groups: Mapping[str, str]) -> Bounds:
        """The bounds of one problem; a reserve is never larger than what its group can spend.

        Raises:
            SettingError: if a group does not exist, or least ranks do not fit.
        """
        labels = {groups[name] for name in gains}
        for label, limit in self.by_label.items():
            if label not in labels:
                raise SettingError(
                    f"allocator.limits.{label}", dict(limit), f"no such group, there are {sorted(labels)}"
                )
        floors = {name: self._rank(groups[name], "min_rank") for name in gains}
        caps = {name: min(self._rank(groups[name], "max_rank"), len(values)) for name, values in gains.items()}
        self._check_floors(floors, caps, cost, budget, groups)
        shares = {
            key: {label: limit[key] for label, limit in self.by_label.items() if key in limit} for key in KEYS[:2]
        }
        if not isinstance(cost, AdditiveCost):
            self._check_no_shares(shares)
            return Bounds(floors, caps, budget, groups, {}, {})
        most = spending(caps, cost.units, groups)
        reserves = {
            label: min(math.floor(_exact(share) * budget), most[label]) for label, share in shares["min_share"].items()
        }
        ceilings = {label: math.floor(_exact(share) * budget) for label, share in shares["max_share"].items()}
        bounds = Bounds(floors, caps, budget, groups, reserves, ceilings)
        self._check_shares(bounds, spending(floors, cost.units, groups))
        return bounds

    def _rank(self, label: str, key: str) -> int:
        return int(self.by_label.get(label, {}).get(key, getattr(self, key)))

    def _setting(self, label: str, key: str) -> str:
        """Where a group's rank was set."""
        return f"allocator.limits.{label}.{key}" if key in self.by_label.get(label, {}) else f"allocator.{key}"

    def _check_values(self, label: str, limit: Mapping[str, int | float]) -> None:
        for key, value in limit.items():
            setting = f"allocator.limits.{label}.{key}"
            if key not in KEYS:
                raise SettingError(setting, value, f"unknown; possible: {list(KEYS)}")
            if key.endswith("_share") and not 0 <= value <= 1:
                raise SettingError(setting, value, "a share of the budget, from 0 to 1")
            if key.endswith("_rank") and (not isinstance(value, int) or value < 0):
                raise SettingError(setting, value, "a whole number of at least 0")

    def _check_order(self, label: str, limit: Mapping[str, int | float]) -> None:
        largest_share = limit.get("max_share", 1)
        if limit.get("min_share", 0) > largest_share:
            raise SettingError(
                f"allocator.limits.{label}.min_share", limit["min_share"], f"above max_share={largest_share}"
            )
        least, largest = self._rank(label, "min_rank"), self._rank(label, "max_rank")
        if least > largest:
            key, other = ("min_rank", f"above max_rank={largest}")
            if key not in limit:
                key, other = ("max_rank", f"below min_rank={least}")
            raise SettingError(f"allocator.limits.{label}.{key}", limit[key], other)

    def _check_floors(
        self, floors: Mapping[str, int], caps: Mapping[str, int], cost: Cost, budget: int, groups: Mapping[str, str]
    ) -> None:
        small: dict[str, list[str]] = {}
        least: dict[str, dict[str, int]] = {}
        for name, rank in floors.items():
            setting = self._setting(groups[name], "min_rank")
            least.setdefault(setting, {})[name] = rank
            if rank > caps[name]:
                small.setdefault(setting, []).append(name)
        for setting, names in small.items():
            raise SettingError(setting, floors[names[0]], f"more than {names[:3]} can hold")
        if (price := cost(floors)) > budget:
            dearest = max(sorted(least), key=lambda setting: cost(least[setting]))
            rank = max(least[dearest].values())
            raise SettingError(dearest, rank, f"costs {price}, the budget is {budget}")

    def _check_no_shares(self, shares: Mapping[str, Mapping[str, int | float]]) -> None:
        for key, by_label in shares.items():
            for label, share in by_label.items():
                raise SettingError(
                    f"allocator.limits.{label}.{key}",
                    share,
                    "where sites share an adapter's factors, no group spends alone; use min_rank and max_rank",
                )

    def _check_shares(self, bounds: Bounds, least: Mapping[str, int]) -> None:
        limits, budget = self.by_label, bounds.budget
        for label, ceiling in bounds.ceilings.items():
            if least[label] > ceiling:
                raise SettingError(
                    f"allocator.limits.{label}.max_share",
                    limits[label]["max_share"],
                    f"allows {ceiling} of {budget} parameters, the group's least ranks cost {least[label]}",
                )
        excess = {label: max(reserve - least[label], 0) for label, reserve in bounds.reserves.items()}
        if sum(least.values()) + sum(excess.values()) > budget:
            label = max(sorted(excess), key=lambda label: excess[label])
            raise SettingError(
                f"allocator.limits.{label}.min_share",
                limits[label]["min_share"],
                f"reserves {bounds.reserves[label]} of {budget} parameters, more than all least ranks leave",
            )


def spending(ranks: Mapping[str, int], units: Mapping[str, int], groups: Mapping[str, str]) -> dict[str, int]:
    """Group -> parameters that its sites' ranks cost."""
    spent = dict.fromkeys((groups[name] for name in ranks), 0)
    for name, rank in ranks.items():
        spent[groups[name]] += rank * units[name]
    return spent


def _exact(share: float) -> Exact:
    """The number that was written: as a float, 0.29 * 100 is below 29."""
    return Exact(str(share))
