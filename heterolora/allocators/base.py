"""What an allocator is, how scores become gains per unit of rank, and how ties are broken."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from heterolora.allocation import Allocation
from heterolora.budget import SiteCount
from heterolora.cost import AdditiveCost, Cost
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.sites import Port, Site

Gains: TypeAlias = Mapping[str, Sequence[float]]
"""Site name -> value of each unit of rank, never increasing; its length is the largest rank the site may get.
A site without any value takes no part: whoever asks has put it out of the question."""

Normalise: TypeAlias = Literal["none", "per_parameter", "per_group", "order"]
Expand: TypeAlias = Literal["harmonic", "flat"]


@dataclass(frozen=True)
class GainRule:
    """How a proxy's scores become gains.

    Attributes:
        gain: what the k-th unit of rank is worth where the proxy gives one number s for the site: ``harmonic`` s/k
            (s itself where it is negative: gains never rise), or ``flat`` s.
        max_rank: no site gets more.
        normalise: ``none``; ``per_parameter``: divided by what a unit of rank costs; ``per_group``: divided by the mean
            size of the scores of the site's group; ``order``: sizes are replaced by their order, see ``_by_order``.
    """

    gain: Expand
    max_rank: int
    normalise: Normalise

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise SettingError("allocator.max_rank", self.max_rank, "a whole number of at least 1")

    def gains(
        self, scores: Mapping[str, float | Sequence[float]], sites: Sequence[Site], groups: Mapping[str, str]
    ) -> dict[str, list[float]]:
        """Gains of each site; a site holds no more rank than min(in, out), beyond which it adds nothing."""
        if self.normalise == "order":
            scores = _by_order({site.name: scores[site.name] for site in sites})
        factors = self._factors(scores, sites, groups)
        gains = {}
        for site in sites:
            score, limit = scores[site.name], min(self.max_rank, site.in_features, site.out_features)
            if isinstance(score, Sequence):
                values = list(score[:limit])
            else:
                values = [score / k if self.gain == "harmonic" and score > 0 else score for k in range(1, limit + 1)]
            gains[site.name] = [value * factors[site.name] for value in values]
        return gains

    def _factors(
        self, scores: Mapping[str, float | Sequence[float]], sites: Sequence[Site], groups: Mapping[str, str]
    ) -> dict[str, float]:
        if self.normalise == "per_parameter":
            return {site.name: 1 / (site.in_features + site.out_features) for site in sites}
        if self.normalise == "per_group":
            sizes: dict[str, list[float]] = {}
            for site in sites:
                score = scores[site.name]
                sizes.setdefault(groups[site.name], []).append(abs(_total(score)))
            means = {group: sum(values) / len(values) for group, values in sizes.items()}
            if flat := [group for group, mean in means.items() if mean == 0]:
                raise SettingError("allocator.normalise", "per_group", f"all scores of {flat} are 0; use none")
            return {site.name: 1 / means[groups[site.name]] for site in sites}
        return {site.name: 1.0 for site in sites}


def _total(score: float | Sequence[float]) -> float:
    return sum(score) if isinstance(score, Sequence) else score


def _by_order(scores: Mapping[str, float | Sequence[float]]) -> dict[str, float | list[float]]:
    """Each site's score becomes the share of sites whose score is at most as large: from above 0 to 1, equal for ties.

    The units of a list sum to that share, in the proportions that they had; where they have none, because the list's
    total is not above 0, each gets the same.
    """
    totals = {name: _total(score) for name, score in scores.items()}
    ascending = sorted(totals.values())
    placed: dict[str, float | list[float]] = {}
    for name, score in scores.items():
        total, share = totals[name], bisect_right(ascending, totals[name]) / len(ascending)
        if not isinstance(score, Sequence):
            placed[name] = share
        elif total > 0:
            placed[name] = [value / total * share for value in score]
        else:
            placed[name] = [share / len(score)] * len(score)
    return placed


class Allocator(Protocol):
    """Decides the rank of every site.

    Attributes:
        counts_sites: whether it understands a budget that is a number of sites.
    """

    counts_sites: bool

    @property
    def gain_rule(self) -> GainRule | None:
        """How scores become gains; None: the allocator looks at no scores, and none need be computed."""

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks within the budget.

        Args:
            gains: value of each unit of rank at each site.
            cost: parameters that ranks hold.
            budget: parameters allowed, or a number of sites.
            groups: site name -> family, for rules that treat families apart.
        """


def favoured(gains: Gains, ranks: Mapping[str, int], margin: float) -> dict[str, list[float]]:
    """Gains in which what is held already counts for more, so that it goes only for something clearly better.

    Args:
        gains: value of each unit of rank at each site.
        ranks: units that each site holds.
        margin: by how much more, as a share: a held unit gives way to one whose gain is more than 1 + margin times its
            own.
    """

    def value(gain: float) -> float:
        return gain * (1 + margin) if gain > 0 else gain / (1 + margin)

    return {
        name: [value(gain) if unit < ranks.get(name, 0) else gain for unit, gain in enumerate(values)]
        for name, values in gains.items()
    }


def tie_order(seed: int, name: str) -> int:
    """A site's place among equals: a draw that depends on the seed and its name alone, not on the other sites."""
    return derive(seed, "tie", name)


def parameters_only(budget: int | SiteCount, allocator: str) -> int:
    """The budget as a number of parameters.

    Raises:
        SettingError: if it is a number of sites, which only ``top`` understands.
    """
    if isinstance(budget, SiteCount):
        raise SettingError("budget", "fraction", f"counts sites, which allocator={allocator} cannot; use allocator=top")
    return budget


def placed(allocator: Allocator, sites: Sequence[Site]) -> Allocator:
    """The allocator, with what it was told about modules of a backbone as what that means for the sites at them.

    Only an allocator with a method ``at_modules`` was told of any (``fixed``, from a file of PEFT's).

    Args:
        allocator: as the config has it.
        sites: the candidates.
    """
    if (at_modules := getattr(allocator, "at_modules", None)) is None:
        return allocator
    found: Allocator = at_modules({site.sink.module: site.name for site in sites if isinstance(site.sink, Port)})
    return found


def additive_only(cost: Cost, allocator: str) -> AdditiveCost:
    """The cost, if every site has a price of its own.

    Raises:
        SettingError: if factors are shared between sites.
    """
    if not isinstance(cost, AdditiveCost):
        raise SettingError(
            "allocator", allocator, "needs a price for each site, but this adapter's sites share factors; use greedy"
        )
    return cost
