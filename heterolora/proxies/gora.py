"""GoRA's importance (He et al., NeurIPS 2025, arXiv 2502.12171)."""

from dataclasses import dataclass

from heterolora.proxies.base import NO_GRADIENT, weights_of
from heterolora.proxies.evidence import Evidence, MapGradient, Statistic


@dataclass(frozen=True)
class Gora:
    """``mean |W o G|`` of the frozen weight and its gradient; for sites where a frozen weight acts."""

    control = False
    local = True
    remedy = NO_GRADIENT
    needs_weights = True

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """G at each site."""
        return (MapGradient(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site.

        Raises:
            SettingError: if there are sites without a frozen weight.
        """
        gathered = evidence.gathered[MapGradient()]
        return {
            name: (weight.to(gathered[name][0]) * gathered[name][0]).abs().mean().item()
            for name, weight in weights_of(evidence, "gora").items()
        }
