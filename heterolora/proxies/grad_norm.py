"""Gradient norm of the adapter's factors."""

from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, FactorGradients, Statistic


@dataclass(frozen=True)
class GradNorm:
    """``||g_A|| + ||g_B||``, Frobenius norms of the summed gradient (HeteroLoRA, arXiv 2406.14956, section 3)."""

    control = False
    remedy = "no gradient reaches the sites: check probe.batches, and probe.head_warmup_steps for a head that is zero"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The factors' gradients."""
        return (FactorGradients(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site."""
        gathered = evidence.gathered[FactorGradients()]
        return {site.name: sum(part.norm().item() for part in gathered[site.name]) for site in evidence.sites}
