"""The control that prefers late layers."""

from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, Statistic


@dataclass(frozen=True)
class Depth:
    """The layer's number, from 1: what a gradient that fades towards the input would say without looking."""

    control = True
    remedy = ""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """None: it looks at nothing."""
        return ()

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site."""
        return {site.name: site.layer + 1.0 for site in evidence.sites}
