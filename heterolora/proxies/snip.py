"""SNIP (Lee et al. 2019, arXiv 1810.02340) on the adapter's factors."""

from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, FactorGradients, Statistic


@dataclass(frozen=True)
class Snip:
    """``sum |theta o g|`` of the summed gradient over all that is trained, A and B of LoRA; 0 everywhere if B = 0."""

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
            pairs = zip(adapter.trained.values(), evidence.gathered[FactorGradients()][site.name], strict=True)
            scores[site.name] = sum((value.detach() * gradient).abs().sum().item() for value, gradient in pairs)
        return scores
