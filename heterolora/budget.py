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
        roles: the roles; null: every linear layer of the blocks. A fused layer (``qkv``) has the roles that it stands
            for as well, and counts once.
    """

    rank: int
    roles: Sequence[str] | None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SettingError("rank", self.rank, "a whole number of at least 1")

    def resolve(self, space: "Space") -> int:
        """``sum rank (in + out)`` over the backbone's linear layers of these roles."""
        sites = space.survey.lora_sites
        existing = list(dict.fromkeys(role for site in sites for role in site.roles))
        roles = existing if self.roles is None else list(self.roles)
        if not roles:
            raise SettingError("budget.roles", roles, f"at least one of {existing}, or null for all")
        if unknown := [role for role in roles if role not in existing]:
            raise SettingError("budget.roles", roles, f"{unknown} not in this backbone, which has {existing}")
        chosen = [site for site in sites if not set(roles).isdisjoint(site.roles)]
        return sum(self.rank * (site.in_features + site.out_features) for site in chosen)


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
class Share:
    """A share of the backbone's parameters, rounded down; a task head is no part of the backbone.

    Args:
        value: the share, from above 0 to 1.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise SettingError("value", self.value, "a share from above 0 to 1")

    def resolve(self, space: "Space") -> int:
        """``floor(value * parameters)``."""
        whole = space.survey.parameters
        parameters = math.floor(_exact(self.value) * whole)
        if parameters < 1:
            raise SettingError("budget.value", self.value, f"less than 1 of the backbone's {whole} parameters")
        return parameters


@dataclass(frozen=True)
class Fraction:
    """The paper's rule: ``floor(p n_lora) + round(p n_shortcut)`` sites of the search space, each at one rank.

    Each group of the search space, whatever its label, gets its own count by this rule.

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
        p = _exact(self.p)
        counts = dict.fromkeys((space.groups[site.name] for site in space.sites), 0)
        sizes = Counter((space.groups[site.name], site.kind) for site in space.sites)
        for (group, kind), n in sizes.items():
            counts[group] += math.floor(p * n) if kind == "lora" else round(p * n)
        if not any(counts.values()):
            totals = dict(Counter(space.groups[site.name] for site in space.sites))
            raise SettingError("budget.p", self.p, f"no site of {totals} would be chosen; give a larger share")
        return SiteCount(counts, self.rank)


def _exact(share: float) -> Exact:
    """The number that was written: as floats, 0.7 * 180 is below 126."""
    return Exact(str(share))
