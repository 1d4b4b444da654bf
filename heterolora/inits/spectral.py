"""Initialisation from the directions that the spectral proxies score."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from heterolora.adapters.lora import LowRank, bound_at
from heterolora.errors import SettingError
from heterolora.linear import row_signs
from heterolora.proxies.evidence import InputMoments, Statistic, TokenMapGradient, Values
from heterolora.proxies.spectral import inverse_root
from heterolora.sites import Site

_NONE = 1e-7
"""Singular values below this share of the largest are rounding in float32."""


@dataclass(frozen=True)
class SpectralInit:
    """A's rows are the directions in which a step against the gradient reads its inputs; B = 0.

    They are the first right singular vectors v of G: no other rank-r adapter has a larger gradient of B, for rows of a
    given size (Eckart-Young), and where ``proxy=spectral`` says how much the k-th unit of rank gains, row k is the
    direction that gains it. Whitened, they are ``C^(-1/2) v`` with v those of ``G C^(-1/2)``: the row space of the best
    update of rank r in the linear model with squared error (reduced-rank regression; Lin 2026, SYSTEMS.md 15), as
    ``proxy=spectral_inputs`` scores. The largest entry of each row is positive.

    Args:
        whiten: by the second moment C of the inputs.
        damping: added to C before it is inverted, as a share of its mean eigenvalue.
        size: of each row. ``norm``: the root mean square norm of LoRA's own rows. ``response``: its products with the
            inputs have the mean square that those of LoRA's own rows have on average, so that a first step of given
            size changes no more of what the site adds; gradients often point along the inputs' mean, which is long.
    """

    whiten: bool
    damping: float
    size: Literal["norm", "response"]

    keeps_function = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise SettingError("init.damping", self.damping, "a number above 0")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """G from real tokens, and the inputs' moments where they are asked."""
        moments: tuple[Statistic, ...] = (InputMoments(),) if self.whiten or self.size == "response" else ()
        return (TokenMapGradient(), *moments)

    @torch.no_grad()
    def fill(self, site: Site, adapter: LowRank, values: Sequence[Values]) -> None:
        """A, from a singular value decomposition; B stays 0.

        Raises:
            SettingError: if the gradient has a lower rank than the adapter.
        """
        matrix = values[0][0].double()
        moment = None
        if len(values) > 1:
            squares, _, tokens = values[1]
            moment = squares.double() / tokens
        root = inverse_root(moment, self.damping) if self.whiten and moment is not None else None
        _, strengths, rows = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
        usable = int((strengths > _NONE * strengths[0]).sum())
        if usable < adapter.rank:
            raise SettingError(
                "init",
                "spectral",
                f"the gradient at {site.name} has rank {usable}, its adapter {adapter.rank}; "
                "more probe.batches, or less rank",
            )
        rows = rows[: adapter.rank] if root is None else rows[: adapter.rank] @ root
        rows = rows * row_signs(rows)
        square = bound_at(site) ** 2 / 3  # the mean square of an entry of LoRA's own A
        if self.size == "norm" or moment is None:
            sizes = rows.norm(dim=1) / math.sqrt(square * site.in_features)
        else:
            sizes = (((rows @ moment) * rows).sum(1) / (square * moment.trace())).sqrt()
        adapter.A.copy_(rows / sizes[:, None])
