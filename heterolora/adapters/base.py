"""What a family of adapters must offer: maps for sites, their scale, and what an allocation of them costs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from heterolora.cost import Cost
from heterolora.sites import Site


class Adapter(Protocol):
    """A trainable map at one site; an ``nn.Module`` whose forward gives the delta."""

    rank: int
    scale: float
    A: nn.Parameter
    B: nn.Parameter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The delta, ``[..., in] -> [..., out]``."""


def speaks(adapter: Adapter) -> bool:
    """Whether its delta can be anything but zero."""
    return bool(adapter.A.any()) and bool(adapter.B.any())


class TwoPartAdapter(Adapter, Protocol):
    """An adapter that the model may compute in two parts: faster, and a product that sites of one source share.

    Any adapter may offer it. It is used where nothing is in the way: other dtypes, autocast, a norm behind the sum.
    """

    @property
    def down(self) -> torch.Tensor | None:
        """What first multiplies the source, ``[narrow, in]``; None: nothing plain does now, as with dropout."""

    def add(self, value: torch.Tensor, narrow: torch.Tensor, in_place: bool) -> torch.Tensor:
        """The sink's value ``[..., out]`` plus the delta.

        Args:
            value: what the delta joins.
            narrow: the source times ``down``, ``[..., narrow]``.
            in_place: overwrite ``value``, which nobody else holds and no backward pass needs.
        """


class AdapterFamily(Protocol):
    """One family of adapters with its settings."""

    def build(self, site: Site, rank: int, seed: int) -> nn.Module:
        """A fresh adapter whose delta is zero, drawn from ``(seed, site.name)`` and nested in the rank.

        In float32 on the CPU; the model moves it to where its backbone is.
        """

    def probe(self, site: Site, rank: int, std: float, seed: int) -> nn.Module:
        """An adapter for scoring: all factors from N(0, std^2), from ``(seed, site.name)``, nested in the rank."""

    def scale_at(self, site: Site, rank: int) -> float:
        """What the product of the factors is multiplied with."""

    def cost(self, sites: Sequence[Site]) -> Cost:
        """What an allocation over these sites costs."""
