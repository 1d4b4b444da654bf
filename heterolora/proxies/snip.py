"""SNIP (Lee et al. 2019, arXiv 1810.02340) on the adapter's factors."""

from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, FactorGradients, Statistic


@dataclass(frozen=True)
class Snip:
    """``sum |A o g_A| + sum |B o g_B|`` of the summed gradient; 0 everywhere if B = 0, so it needs random factors."""

    control = False
    local = True
    remedy = "with B = 0 every |weight * gradient| is 0: use probe.init=random"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The factors' gradients."""
        return (FactorGradients(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site."""
        scores = {}
        for site in evidence.sites:
            adapter = evidence.adapters[site.name]
            g_a, g_b = evidence.gathered[FactorGradients()][site.name]
            scores[site.name] = ((adapter.A * g_a).abs().sum() + (adapter.B * g_b).abs().sum()).item()
        return scores
