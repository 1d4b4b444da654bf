"""What a proxy is, and the refusal of scores that say nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from heterolora.errors import SettingError
from heterolora.proxies.evidence import Evidence, Statistic

Score: TypeAlias = float | Sequence[float]
"""One number for a site, or one number for each unit of rank at it, largest first."""


class Proxy(Protocol):
    """Scores every site of a search space; higher means: spend rank here.

    Attributes:
        control: the proxy is allowed to give equal scores everywhere.
        remedy: the setting that would help if it does so although it should not.

    A proxy whose score of a site follows from what was gathered there, and from nothing else, says so with
    ``local = True``: its sites may be scored a few at a time (so that large values are never held for all of them), and
    again from resampled batches. Any other sees all sites at once.

    A proxy that scores frozen weights says so with ``needs_weights = True``, and is refused before the pass in a space
    with sites where none acts.

    A proxy that looks at trained adapters says so with ``needs_trained = True``: its evidence is a model in whose
    forward such adapters stand (``probe.adapter_warmup_steps``), whatever the other proxies see.
    """

    control: bool
    remedy: str

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the shared gradient pass must gather; empty if the proxy needs no pass."""

    def score(self, evidence: Evidence) -> Mapping[str, Score]:
        """A score for every site of ``evidence.sites``, by name."""


def needs_trained(proxy: Proxy) -> bool:
    """Whether trained adapters must stand in the forward."""
    return bool(getattr(proxy, "needs_trained", False))


def looks_at_batches(proxy: Proxy) -> bool:
    """Whether a proxy needs batches to score."""
    return bool(proxy.statistics) or needs_trained(proxy)


class DegenerateScores(ValueError):  # noqa: N818
    """A proxy whose scores cannot rank anything; an allocation made from them would be a random draw."""


NO_GRADIENT = "no gradient reaches the sites: check probe.batches, and probe.head_warmup_steps for a head that is zero"
"""The remedy of every proxy that scores by gradients."""


def weights_of(evidence: Evidence, proxy: str) -> dict[str, torch.Tensor]:
    """The frozen weight at every site, by name.

    Raises:
        SettingError: if there are sites where no frozen weight acts.
    """
    weights = {site.name: evidence.weight(site.name) for site in evidence.sites}
    check_weights(proxy, [name for name, weight in weights.items() if weight is None])
    return {name: weight for name, weight in weights.items() if weight is not None}


def check_weights(proxy: str, without: Sequence[str]) -> None:
    """Refuse a space for a proxy of frozen weights, if there are sites where none acts.

    Raises:
        SettingError: naming some of these sites, and a space that works.
    """
    if without:
        raise SettingError(
            "proxy", proxy, f"scores frozen weights, and none acts at {without[:3]}; use search_space=lora_all"
        )


def total(score: Score) -> float:
    """A site's score as one number: the sum over its units of rank."""
    return math.fsum(score) if isinstance(score, Sequence) else score


def leading(score: Score, units: int) -> float:
    """A site's score as one number: the sum over the first units of rank, which are all that it may be granted."""
    return math.fsum(score[:units]) if isinstance(score, Sequence) else score


def check_scores(name: str, proxy: Proxy, scores: Mapping[str, Score], sites: Sequence[str]) -> None:
    """Refuse scores that are missing, not finite, all zero or all equal.

    Raises:
        DegenerateScores: naming the proxy, what is wrong and the setting that would help. Controls may be constant.
    """
    if scores.keys() != set(sites):
        missing, extra = sorted(set(sites) - scores.keys()), sorted(scores.keys() - set(sites))
        raise DegenerateScores(f"proxy={name}: every site needs one score; missing {missing}, unknown {extra}")
    flat = {site: list(value) if isinstance(value, Sequence) else [value] for site, value in scores.items()}
    if bad := [site for site, values in flat.items() if not all(map(math.isfinite, values))]:
        raise DegenerateScores(
            f"proxy={name}: scores that are not finite at {bad[:5]} ({len(bad)} sites); {proxy.remedy}"
        )
    if bad := [site for site, values in flat.items() if sorted(values, reverse=True) != values]:
        raise DegenerateScores(f"proxy={name}: values per unit of rank must not increase, they do at {bad[:5]}")
    if proxy.control or not flat:
        return
    if not any(value for values in flat.values() for value in values):
        raise DegenerateScores(f"proxy={name}: every score is 0, so it ranks nothing; {proxy.remedy}")
    if len(flat) > 1 and len({tuple(values) for values in flat.values()}) == 1:
        raise DegenerateScores(f"proxy={name}: every score is the same, so it ranks nothing; {proxy.remedy}")
