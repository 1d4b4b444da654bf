"""Budgets: how many trainable adapter parameters an allocation may hold.

A budget is resolved from the backbone alone, never from the search space, so that two search spaces can be compared at
the same budget. The exception is ``Fraction``, the paper's rule, which counts sites.

A second budget, ``step_time``, limits the predicted time of a training step, as a share of what the budget's
*reference* takes: a uniform allocation that follows from the backbone alone, too.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction as Exact
from typing import TYPE_CHECKING, Protocol

from heterolora.errors import SettingError

if TYPE_CHECKING:  # a budget is plain arithmetic; allocators import it without torch
    from heterolora.sites import Site
    from heterolora.space import Space, Survey


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

    @property
    def step_time(self) -> float | None:
        """Largest predicted time of a training step, as a share of the reference's; None: no limit."""

    def resolve(self, space: "Space") -> int | SiteCount:
        """The budget for this search space's backbone."""

    def reference(self, survey: "Survey") -> dict[str, int]:
        """Ranks of the uniform allocation that ``step_time`` is a share of, by names of ``survey.lora_sites``."""


@dataclass(frozen=True)
class Multiple:
    """Another budget, several times: what a method holds that ends with less than it begins with.

    Attributes:
        of: the other.
        factor: how many times.
    """

    of: Budget
    factor: float

    @property
    def step_time(self) -> float | None:
        """As the other has it."""
        return self.of.step_time

    def resolve(self, space: "Space") -> int | SiteCount:
        """Rounded down.

        Raises:
            SettingError: if the other counts sites.
        """
        found = self.of.resolve(space)
        if isinstance(found, SiteCount):
            raise SettingError("budget", "fraction", "counts sites; this allocation needs a number of parameters")
        return int(self.factor * found)

    def reference(self, survey: "Survey") -> dict[str, int]:
        """As the other has it."""
        return self.of.reference(survey)


@dataclass(frozen=True)
class UniformRank:
    """What LoRA of one rank on the given roles of every layer costs.

    Args:
        rank: the rank.
        roles: the roles; null: every linear layer of the blocks. A fused layer (``qkv``) has the roles that it stands
            for as well, and counts once.
        step_time: largest predicted time of a training step, as a share of that of the uniform allocation (this rank on
            these roles); null: no limit.
    """

    rank: int
    roles: Sequence[str] | None
    step_time: float | None

    def __post_init__(self) -> None:
        _check_step_time(self.step_time)
        if self.rank < 1:
            raise SettingError("rank", self.rank, "a whole number of at least 1")

    def resolve(self, space: "Space") -> int:
        """``sum rank (in + out)`` over the backbone's linear layers of these roles."""
        chosen = self._sites(space.survey)
        return sum(self.rank * (site.in_features + site.out_features) for site in chosen)

    def reference(self, survey: "Survey") -> dict[str, int]:
        """What the budget is named after; no site holds more than min(in, out)."""
        return {site.name: min(self.rank, site.in_features, site.out_features) for site in self._sites(survey)}

    def _sites(self, survey: "Survey") -> list["Site"]:
        sites = survey.lora_sites
        existing = list(dict.fromkeys(role for site in sites for role in site.roles))
        roles = existing if self.roles is None else list(self.roles)
        if not roles:
            raise SettingError("budget.roles", roles, f"at least one of {existing}, or null for all")
        if unknown := [role for role in roles if role not in existing]:
            raise SettingError("budget.roles", roles, f"{unknown} not in this backbone, which has {existing}")
        return [site for site in sites if not set(roles).isdisjoint(site.roles)]


@dataclass(frozen=True)
class Params:
    """A plain number of parameters.

    Args:
        value: trainable adapter parameters allowed.
        step_time: largest predicted time of a training step, as a share of that of the uniform allocation (every linear
            layer at the largest equal rank that these parameters pay for, at least 1); null: no limit.
    """

    value: int
    step_time: float | None

    def __post_init__(self) -> None:
        _check_step_time(self.step_time)
        if self.value < 1:
            raise SettingError("value", self.value, "a whole number of at least 1")

    def resolve(self, space: "Space") -> int:
        """The number itself."""
        return self.value

    def reference(self, survey: "Survey") -> dict[str, int]:
        """Every linear layer at one rank."""
        return _equal_rank(survey, self.value)


@dataclass(frozen=True)
class Share:
    """A share of the backbone's parameters, rounded down; a task head is no part of the backbone.

    Args:
        value: the share, from above 0 to 1.
        step_time: largest predicted time of a training step, as a share of that of the uniform allocation (every linear
            layer at the largest equal rank that these parameters pay for, at least 1); null: no limit.
    """

    value: float
    step_time: float | None

    def __post_init__(self) -> None:
        _check_step_time(self.step_time)
        if not 0 < self.value <= 1:
            raise SettingError("value", self.value, "a share from above 0 to 1")

    def reference(self, survey: "Survey") -> dict[str, int]:
        """Every linear layer at one rank."""
        return _equal_rank(survey, self._parameters(survey))

    def resolve(self, space: "Space") -> int:
        """``floor(value * parameters)``."""
        return self._parameters(space.survey)

    def _parameters(self, survey: "Survey") -> int:
        whole = survey.parameters
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
        step_time: null, for a number of sites leaves nothing to choose by time.
    """

    p: float
    rank: int
    step_time: float | None

    def __post_init__(self) -> None:
        if self.step_time is not None:
            raise SettingError(
                "step_time", self.step_time, "goes with a number of parameters, this budget counts sites: null here"
            )
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

    def reference(self, survey: "Survey") -> dict[str, int]:
        """There is none.

        Raises:
            SettingError: always.
        """
        raise SettingError("budget", "fraction", "counts sites, and is compared with no uniform allocation")


def _check_step_time(share: float | None) -> None:
    if share is not None and not 0 < share < math.inf:
        raise SettingError("step_time", share, "a share above 0 of the uniform allocation's step, e.g. 0.7; or null")


def _equal_rank(survey: "Survey", parameters: int) -> dict[str, int]:
    """The largest rank that all linear layers can have for so many parameters, at least 1 and at most min(in, out)."""
    price = sum(site.in_features + site.out_features for site in survey.lora_sites)
    widest = min(min(site.in_features, site.out_features) for site in survey.lora_sites)
    return dict.fromkeys((site.name for site in survey.lora_sites), max(1, min(parameters // price, widest)))


def _exact(share: float) -> Exact:
    """The number that was written: as floats, 0.7 * 180 is below 126."""
    return Exact(str(share))
