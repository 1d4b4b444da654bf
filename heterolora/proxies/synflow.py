"""SynFlow (Tanaka et al. 2020, arXiv 2006.05467) on the adapter's factors."""

from dataclasses import dataclass

from heterolora.adapters.base import plain_factors
from heterolora.errors import SettingError
from heterolora.positive import flows
from heterolora.proxies.evidence import Evidence, Statistic


@dataclass(frozen=True)
class Synflow:
    """``sum |A| o dR/d|A| + sum |B| o dR/d|B|``, divided by R, in the network of absolute weights; without data.

    R is the sum of the last block's outputs when the stream starts with ones (see ``heterolora.positive``; the task's
    head is random, and no part of it). The two sums are equal: each is ``|scale| <G, |B| |A|>``, the share of the whole
    flow that would pass the site. What only decides where attention looks (q, k) carries no flow, and scores 0.
    """

    control = False
    remedy = (
        "with B = 0 nothing flows (probe.init=random), through q and k alone nothing does, and float16 may overflow "
        "(model.dtype=float32)"
    )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """None: it needs no batches."""
        return ()

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site.

        Raises:
            SettingError: if the probe is to stand in the forward, or the backbone is no single known stack.
        """
        if evidence.bench.live:
            raise SettingError("probe.live", True, "proxy=synflow scores the pretrained network; use false")
        scores = {}
        for name, pairs in flows(evidence.bench.model, evidence.sites).items():
            adapter = evidence.adapters[name]
            a, b = (factor.double().abs() for factor in plain_factors(adapter))
            through = sum(((source @ a.T) * (gradient @ b)).sum().item() for source, gradient in pairs)
            scores[name] = 2 * abs(adapter.scale) * through
        return scores
