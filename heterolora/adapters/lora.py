"""LoRA (Hu et al. 2021, arXiv 2106.09685): ``delta(x) = scale * B A x``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from heterolora.adapters.base import Surroundings, Switching, Tensors
from heterolora.adapters.factored import Factored
from heterolora.adapters.scaling import Scaling
from heterolora.cost import AdditiveCost
from heterolora.seeds import derive
from heterolora.sites import Site


class LowRank(Factored):
    """The map ``x -> scale * B (A dropout(x))``.

    Args:
        A: ``[rank, in]``.
        B: ``[out, rank]``.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    units: ClassVar = {"A": (0,), "B": (1,)}

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> None:  # noqa: N803
        super().__init__(scale, dropout)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    @property
    def first(self) -> torch.Tensor:
        """A."""
        return self.A

    @property
    def last(self) -> torch.Tensor:
        """B."""
        return self.B

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """A and B."""
        return {"A": self.A, "B": self.B}

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return values["A"], values["B"]


@dataclass(frozen=True)
class LoRA(Scaling):
    """LoRA, at any site; settings as ``Scaling`` has them."""

    switching: ClassVar[Switching] = "ranks"
    needs_weights: ClassVar[bool] = False

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> LowRank:
        """``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0`` (LoRA's initialisation), in float32 on the CPU.

        At an embedding ``A ~ U(-1, 1)``: of the vector that an id stands for one number is not 0, so that ``A x`` is of
        the size that it has at a linear layer whose inputs have variance 1.

        Row k of A is drawn from ``(seed, site, k)`` alone, so that two allocations differ only where ranks differ.
        """
        rows = uniform_rows(rank, site.in_features, derive(seed, "adapter", site.name), bound_at(site))
        return LowRank(rows, torch.zeros(site.out_features, rank), self.scale_at(site, rank), self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> LowRank:
        """A and B from N(0, std^2)."""
        a, b = normal_factors(site, rank, std, derive(seed, "probe", site.name))
        return LowRank(a, b, self.scale_at(site, rank), 0.0)

    def cost(self, sites: Sequence[Site]) -> AdditiveCost:
        """``rank * (in + out)`` for each site."""
        return AdditiveCost({site.name: site.in_features + site.out_features for site in sites})


def bound_at(site: Site) -> float:
    """``1/sqrt(fan-in)``: the numbers of a source vector that are not 0, one of them where it stands for an id."""
    return 1.0 if site.lookup else 1 / math.sqrt(site.in_features)


def uniform_rows(rank: int, width: int, seed: int, bound: float | None = None) -> torch.Tensor:
    """``[rank, width]`` from ``U(-bound, bound)``, else of ``1/sqrt(width)``: row k is the same whatever the rank."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(width) if bound is None else bound
    # Drawn row by row, whatever the rank: numbers of a uniform draw come one after the other.
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)


def normal_factors(site: Site, rank: int, std: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B from N(0, std^2), unit by unit, so that the first units are those of a lower rank."""
    generator = torch.Generator().manual_seed(seed)
    units = [
        torch.empty(site.in_features + site.out_features).normal_(0, std, generator=generator) for _ in range(rank)
    ]
    factors = torch.stack(units)
    return factors[:, : site.in_features].contiguous(), factors[:, site.in_features :].T.contiguous()
