"""The control that looks at the frozen weights alone."""

from dataclasses import dataclass

from heterolora.proxies.base import weights_of
from heterolora.proxies.evidence import Evidence, Statistic


@dataclass(frozen=True)
class Magnitude:
    """Root mean square of the frozen weight; a cheap control without data."""

    control = False
    remedy = "the frozen weights are all zero"
    needs_weights = True

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """None: it looks at no data."""
        return ()

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site.

        Raises:
            SettingError: if there are sites without a frozen weight.
        """
        weights = weights_of(evidence, "magnitude")
        return {name: weight.double().square().mean().sqrt().item() for name, weight in weights.items()}
