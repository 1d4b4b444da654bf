"""What a family of adapters must offer: maps for sites, their scale, and what an allocation of them costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from heterolora.sites import Site


class Cost(Protocol):
    """Trainable parameters of an allocation; joint where factors are shared between sites."""

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """Parameters that one more unit of rank at ``name`` would add."""


@dataclass(frozen=True)
class AdditiveCost:
    """Every unit of rank at a site costs the same, whatever the others have.

    Attributes:
        units: site name -> parameters of one unit of rank.
    """

    units: Mapping[str, int]

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""
        return sum(rank * self.units[name] for name, rank in ranks.items())

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """Parameters of one unit of rank at the site."""
        return self.units[name]


class Adapter(Protocol):
    """A trainable map at one site; an ``nn.Module`` whose forward gives the delta."""

    rank: int
    scale: float
    A: nn.Parameter
    B: nn.Parameter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The delta, ``[..., in] -> [..., out]``."""


class AdapterFamily(Protocol):
    """One family of adapters with its settings."""

    def build(self, site: Site, rank: int, seed: int) -> nn.Module:
        """A fresh adapter whose delta is zero, drawn from ``(seed, site.name)`` and nested in the rank."""

    def scale_at(self, site: Site, rank: int) -> float:
        """What the product of the factors is multiplied with."""

    def cost(self, sites: Sequence[Site]) -> Cost:
        """What an allocation over these sites costs."""
