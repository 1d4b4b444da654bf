"""GoRA's initialisation (He et al., NeurIPS 2025, arXiv 2502.12171)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heterolora.adapters.lora import LowRank
from heterolora.errors import SettingError
from heterolora.proxies.evidence import MapGradient, Statistic, Values
from heterolora.sites import Site


@dataclass(frozen=True)
class GoraInit:
    """B is the best step of size ``gamma`` against the gradient within the row space of A, as A is drawn.

    ``B = -xi G A^T (A A^T)^-1`` so that the first delta is ``-gamma sqrt(in / rank) G P``, P the projection on A's
    rows, whatever the scale: a random projection keeps about rank / in of the energy, so its size is about
    ``gamma ||G||``. The minus is the paper's (a step down); the authors' code lost it. The model is not the backbone
    at step 0, by design; ``gamma = 0`` is plain LoRA.

    Args:
        gamma: size of the step, relative to the gradient of the mean loss.
    """

    gamma: float

    keeps_function = False

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise SettingError("init.gamma", self.gamma, "a number of at least 0")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """G at each site."""
        return (MapGradient(),)

    @torch.no_grad()
    def fill(self, site: Site, adapter: LowRank, values: Sequence[Values]) -> None:
        """B, by least squares."""
        ((gradient,),) = values
        rows = adapter.A.detach().double()
        # P G^T in the coordinates of A's rows: the least-squares solution, also where A A^T is badly conditioned.
        coordinates = torch.linalg.lstsq(rows.T.cpu(), gradient.double().T.cpu()).solution
        size = self.gamma * math.sqrt(site.in_features / adapter.rank) / adapter.scale
        adapter.B.copy_(-size * coordinates.T)
