"""Gradient norm of the adapter's factors."""

from dataclasses import dataclass

from heterolora.proxies.base import NO_GRADIENT
from heterolora.proxies.evidence import Evidence, FactorGradients, Statistic


@dataclass(frozen=True)
class GradNorm:
    """``||g_A|| + ||g_B||``, Frobenius norms of the summed gradient (HeteroLoRA, arXiv 2406.14956, section 3)."""

    control = False
    local = True
    remedy = NO_GRADIENT

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The factors' gradients."""
        return (FactorGradients(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site."""
        gathered = evidence.gathered[FactorGradients()]
        return {site.name: sum(part.norm().item() for part in gathered[site.name]) for site in evidence.sites}
