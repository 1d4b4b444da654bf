"""AdaLoRA's parametrisation (Zhang et al., ICLR 2023, arXiv 2303.10512): ``delta(x) = scale * P diag(E) Q x``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from heterolora.adapters.base import Surroundings, Switching, Tensors
from heterolora.adapters.factored import Factored
from heterolora.adapters.lora import normal_factors
from heterolora.adapters.scaling import Scaling
from heterolora.cost import AdditiveCost
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.sites import Site


class Triplets(Factored):
    """The map ``x -> scale * B diag(E) A x``; unit k of rank is the triplet of B's column, E's entry and A's row k.

    Args:
        A: ``[rank, in]``, Q in the paper.
        E: ``[rank]``, the singular values.
        B: ``[out, rank]``, P in the paper.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    units: ClassVar = {"A": (0,), "E": (0,), "B": (1,)}

    def __init__(
        self,
        A: torch.Tensor,  # noqa: N803
        E: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(scale, dropout)
        self.A, self.E, self.B = nn.Parameter(A), nn.Parameter(E), nn.Parameter(B)

    @property
    def first(self) -> torch.Tensor:
        """A."""
        return self.A

    @property
    def last(self) -> torch.Tensor:
        """B."""
        return self.B

    def middle(self, narrow: torch.Tensor) -> torch.Tensor:
        """E."""
        return narrow * self.E

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """A and ``B diag(E)``."""
        return values["A"], values["B"] * values["E"]


@dataclass(frozen=True)
class SVD(Scaling):
    """Factors of a singular value decomposition, whose singular values can be set to 0 one by one.

    Args:
        std: A and B are drawn from N(0, std^2) (the authors' code: 0.02); E is 0.
    """

    std: float

    switching: ClassVar[Switching] = "ranks"
    needs_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.std < 1:
            raise SettingError("std", self.std, "a number above 0 and below 1")

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> Triplets:
        """A and B from N(0, std^2), E = 0."""
        a, b = normal_factors(site, rank, self.std, derive(seed, "adapter", site.name))
        return Triplets(a, torch.zeros(rank), b, self.scale_at(site, rank), self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> Triplets:
        """All three from N(0, std^2)."""
        a, b = normal_factors(site, rank, std, derive(seed, "probe", site.name))
        generator = torch.Generator().manual_seed(derive(seed, "probe", "E", site.name))
        e = torch.empty(rank).normal_(0, std, generator=generator)
        return Triplets(a, e, b, self.scale_at(site, rank), 0.0)

    def cost(self, sites: Sequence[Site]) -> AdditiveCost:
        """``rank * (in + out + 1)`` for each site."""
        return AdditiveCost({site.name: site.in_features + site.out_features + 1 for site in sites})
