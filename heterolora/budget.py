"""Budgets: how many trainable adapter parameters an allocation may hold.

A budget is resolved from the backbone alone, never from the search space, so that two search spaces can be compared at
the same budget. The exception is ``Fraction``, the paper's rule, which counts sites.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction as Exact
from typing import TYPE_CHECKING, Protocol

from heterolora.errors import SettingError

if TYPE_CHECKING:  # a budget is plain arithmetic; allocators import it without torch
    from heterolora.space import Space


@dataclass(frozen=True)
class SiteCount:
    """A budget of sites instead of parameters: so many of each group, each at one rank."""

    counts: Mapping[str, int]
    rank: int

    @property
    def total(self) -> int:
        """Sites over all groups."""
        return sum(self.counts.values())


class Budget(Protocol):
    """Something that resolves to a number of parameters, or of sites."""

    def resolve(self, space: "Space") -> int | SiteCount:
        """The budget for this search space's backbone."""


@dataclass(frozen=True)
class UniformRank:
    """What LoRA of one rank on the given roles of every layer costs.

    Args:
        rank: the rank.
        roles: the roles; null: every linear layer of the blocks.
    """

    rank: int
    roles: Sequence[str] | None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SettingError("rank", self.rank, "a whole number of at least 1")

    def resolve(self, space: "Space") -> int:
        """``sum rank (in + out)`` over the backbone's linear layers of these roles."""
        sites = space.survey.lora_sites
        existing = list(dict.fromkeys(site.role for site in sites))
        roles = existing if self.roles is None else list(self.roles)
        if not roles:
            raise SettingError("budget.roles", roles, f"at least one of {existing}, or null for all")
        if unknown := [role for role in roles if role not in existing]:
            raise SettingError("budget.roles", roles, f"{unknown} not in this backbone, which has {existing}")
        return sum(self.rank * (site.in_features + site.out_features) for site in sites if site.role in roles)


@dataclass(frozen=True)
class Params:
    """A plain number of parameters.

    Args:
        value: trainable adapter parameters allowed.
    """

    value: int

    def __post_init__(self) -> None:
        if self.value < 1:
            raise SettingError("value", self.value, "a whole number of at least 1")

    def resolve(self, space: "Space") -> int:
        """The number itself."""
        return self.value


@dataclass(frozen=True)
class Fraction:
    """The paper's rule: ``floor(p n_lora) + round(p n_shortcut)`` sites of the search space, each at one rank.

    Args:
        p: share of the sites, from above 0 to 1.
        rank: rank of each chosen site.
    """

    p: float
    rank: int

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise SettingError("p", self.p, "a share from above 0 to 1")
        if self.rank < 1:
            raise SettingError("rank", self.rank, "a whole number of at least 1")

    def resolve(self, space: "Space") -> SiteCount:
        """How many sites of each group (REFERENCE.md 1.6; Python's rounding, half to even, as in the paper's code)."""
        sizes = Counter(space.groups[site.name] for site in space.sites)
        p = Exact(str(self.p))  # the number that was written: as floats, 0.7 * 180 is below 126
        counts = {group: math.floor(p * n) if group == "lora" else round(p * n) for group, n in sizes.items()}
        if not any(counts.values()):
            raise SettingError("budget.p", self.p, f"no site of {dict(sizes)} would be chosen; give a larger share")
        return SiteCount(counts, self.rank)
