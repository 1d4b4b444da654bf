"""The control that prefers nothing."""

from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, Statistic


@dataclass(frozen=True)
class Constant:
    """Score 1 everywhere: the allocation is then decided by cost and by the seeded order of ties."""

    control = True
    remedy = ""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """None: it looks at nothing."""
        return ()

    def score(self, evidence: Evidence) -> dict[str, float]:
        """1 for every site."""
        return {site.name: 1.0 for site in evidence.sites}
