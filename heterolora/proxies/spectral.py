"""The spectrum of the gradient of the map that would be added."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from heterolora.errors import SettingError
from heterolora.proxies.base import NO_GRADIENT
from heterolora.proxies.evidence import (
    Evidence,
    GradientMoment,
    InputMoments,
    MapGradient,
    Statistic,
    TokenMapGradient,
)


@dataclass(frozen=True)
class Spectral:
    """Squared singular values of G: one value for each unit of rank.

    The sum of the first r is the most that a gradient step confined to rank r can gain to first order, for a step of
    given size (Eckart-Young), so the k-th value is what the k-th unit of rank adds.
    """

    control = False
    local = True
    remedy = NO_GRADIENT

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """G at each site."""
        return (MapGradient(),)

    def score(self, evidence: Evidence) -> dict[str, list[float]]:
        """min(in, out) values for each site, largest first."""
        return {
            site.name: squared_singular_values(*evidence.gathered[MapGradient()][site.name]) for site in evidence.sites
        }


@dataclass(frozen=True)
class WhitenedSpectral:
    """Squared singular values of a whitened G: sizes of G at different sites, made comparable.

    They can be compared only if a step of one size means the same at both. Whitened by the second moment C of the
    inputs, ``M = G C^(-1/2)``, it does: in the linear model with squared error, the best update of rank r removes
    exactly half the sum of the r largest squared singular values of M (Lin 2026, SYSTEMS.md 15). Whitened by the sums
    of squares of the sink's gradients d and of the inputs x, ``(sum d d^T)^(-1/2) G (sum x x^T)^(-1/2)`` holds the
    canonical correlations of the two, from 0 to 1 whatever their scales (not centred).

    Args:
        by: ``inputs``, or ``both`` (over real tokens).
        damping: added to each moment, as a share of its mean eigenvalue.
    """

    by: Literal["inputs", "both"]
    damping: float

    control = False
    local = True
    remedy = NO_GRADIENT

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise SettingError("damping", self.damping, "a number above 0")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """G from real tokens at each site, and the moments that whiten it."""
        moments: tuple[Statistic, ...] = (InputMoments(), GradientMoment()) if self.by == "both" else (InputMoments(),)
        return (TokenMapGradient(), *moments)

    def score(self, evidence: Evidence) -> dict[str, list[float]]:
        """min(in, out) values for each site, largest first."""
        scores = {}
        for site in evidence.sites:
            (matrix,) = evidence.gathered[TokenMapGradient()][site.name]
            squares, _, tokens = evidence.gathered[InputMoments()][site.name]
            # Sums against sums for correlations; else the moment, which does not grow with the batches.
            moment = squares if self.by == "both" else squares / tokens
            matrix = matrix.double() @ inverse_root(moment, self.damping)
            if self.by == "both":
                (squares,) = evidence.gathered[GradientMoment()][site.name]
                matrix = inverse_root(squares, self.damping) @ matrix
            scores[site.name] = squared_singular_values(matrix)
        return scores


def inverse_root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """``(moment + damping * mean eigenvalue * I)^(-1/2)``; zero if the moment is zero."""
    values, vectors = torch.linalg.eigh(moment.double())
    damped = values.clamp(min=0) + damping * values.clamp(min=0).mean()
    roots = torch.where(damped > 0, damped, torch.inf).rsqrt()
    root: torch.Tensor = (vectors * roots) @ vectors.T
    return root


def squared_singular_values(matrix: torch.Tensor) -> list[float]:
    """Eigenvalues of the smaller Gram matrix, in float64: far faster than an SVD, exact to 1e-15 of the largest."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if not torch.isfinite(gram).all():
        return [float("nan")] * gram.shape[0]
    values: list[float] = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).tolist()
    return values
