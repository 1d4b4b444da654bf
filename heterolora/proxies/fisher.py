"""The empirical Fisher information of the adapter's factors."""

from dataclasses import dataclass

from heterolora.proxies.base import NO_GRADIENT
from heterolora.proxies.evidence import Evidence, SquaredFactorGradients, Statistic


@dataclass(frozen=True)
class Fisher:
    """``sum over batches of sum(g o g)`` over A and B (arXiv 1906.04113, 2101.08134), the batch as the sample."""

    control = False
    local = True
    remedy = NO_GRADIENT

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The squared gradients of each batch."""
        return (SquaredFactorGradients(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site."""
        gathered = evidence.gathered[SquaredFactorGradients()]
        return {site.name: sum(part.sum().item() for part in gathered[site.name]) for site in evidence.sites}
