"""The spectrum of the gradient of the map that would be added."""

from dataclasses import dataclass

import torch

from heterolora.proxies.evidence import Evidence, MapGradient, Statistic


@dataclass(frozen=True)
class Spectral:
    """Squared singular values of G: one value for each unit of rank.

    The sum of the first r is the most that a gradient step confined to rank r can gain to first order, for a step of
    given size (Eckart-Young), so the k-th value is what the k-th unit of rank adds.
    """

    control = False
    remedy = "no gradient reaches the sites: check probe.batches, and probe.head_warmup_steps for a head that is zero"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """G at each site."""
        return (MapGradient(),)

    def score(self, evidence: Evidence) -> dict[str, list[float]]:
        """min(in, out) values for each site, largest first."""
        return {
            site.name: squared_singular_values(*evidence.gathered[MapGradient()][site.name]) for site in evidence.sites
        }


def squared_singular_values(matrix: torch.Tensor) -> list[float]:
    """Eigenvalues of the smaller Gram matrix, in float64: far faster than an SVD, exact to 1e-15 of the largest."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if not torch.isfinite(gram).all():
        return [float("nan")] * gram.shape[0]
    values: list[float] = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).tolist()
    return values
