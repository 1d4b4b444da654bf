"""PRoLoRA (Wang et al., ACL 2024, arXiv 2402.16902): factors made of repeated, rotated chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from heterolora.adapters.base import Surroundings, Switching, Tensors
from heterolora.adapters.factored import Factored
from heterolora.adapters.lora import bound_at, uniform_rows
from heterolora.adapters.scaling import Scaling
from heterolora.cost import CurvedCost
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.sites import Site


class Rotated(Factored):
    """The map ``x -> scale * B A x`` with ``A = [own; m rolled chunks]`` and ``B = [own, n rolled chunks]``.

    Args:
        own_A: ``[own, in]``, not shared within the matrix.
        own_B: ``[out, own]``.
        chunk_A: ``[rank - own, ceil(in / m)]``.
        chunk_B: ``[ceil(out / n), rank - own]``.
        widths: in and out.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    def __init__(
        self,
        own_A: torch.Tensor,  # noqa: N803
        own_B: torch.Tensor,  # noqa: N803
        chunk_A: torch.Tensor,  # noqa: N803
        chunk_B: torch.Tensor,  # noqa: N803
        widths: tuple[int, int],
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(scale, dropout)
        self.own_A, self.own_B = nn.Parameter(own_A), nn.Parameter(own_B)
        self.chunk_A, self.chunk_B = nn.Parameter(chunk_A), nn.Parameter(chunk_B)
        self.widths = widths

    @property
    def rank(self) -> int:
        """Units of rank held."""
        return len(self.own_A) + len(self.chunk_A)

    @property
    def first(self) -> torch.Tensor:
        """A, expanded."""
        return torch.cat([self.own_A, expanded(self.chunk_A, self.widths[0])])

    @property
    def last(self) -> torch.Tensor:
        """B, expanded."""
        return torch.cat([self.own_B, expanded(self.chunk_B.T, self.widths[1]).T], 1)

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, expanded."""
        return (
            torch.cat([values["own_A"], expanded(values["chunk_A"], self.widths[0])]),
            torch.cat([values["own_B"], expanded(values["chunk_B"].T, self.widths[1]).T], 1),
        )


def expanded(chunk: torch.Tensor, width: int) -> torch.Tensor:
    """``[rank, width]``: a chunk ``[rank, part]`` side by side, copy i rolled by ``-i * stride`` along the rank.

    The stride is ``max(rank // copies, 1)``, the sign that of the authors' code, whose row k of copy i is the chunk's
    row ``(k + i * stride) mod rank``. What the last copy has beyond the width is cut off.
    """
    rank, part = chunk.shape
    if not rank:
        return chunk.new_zeros(0, width)
    copies = -(-width // part)
    stride = max(rank // copies, 1)
    return torch.cat([torch.roll(chunk, -i * stride, 0) for i in range(copies)], 1)[:, :width]


@dataclass(frozen=True)
class PRoLoRA(Scaling):
    """Broadcast along the features, rotation along the rank, and a few units of rank that are not shared.

    Args:
        sharing_in: m, copies of A's chunk along the inputs.
        sharing_out: n, copies of B's chunk along the outputs.
        unshared: u, units of rank with factors of their own, as in LoRA; the first ones of each site.
    """

    sharing_in: int
    sharing_out: int
    unshared: int

    switching: ClassVar[Switching] = "sites"
    needs_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sharing_in", 1), ("sharing_out", 1), ("unshared", 0)):
            if getattr(self, name) < least:
                raise SettingError(name, getattr(self, name), f"a whole number of at least {least}")

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> Rotated:
        """Both parts of A from ``U(-1/sqrt(in), 1/sqrt(in))``, whatever the chunk's width (the rectified
        initialisation); both parts of B are 0.
        """
        own = min(self.unshared, rank)
        bound = bound_at(site)
        a = uniform_rows(own, site.in_features, derive(seed, "adapter", site.name), bound)
        m, n = self._parts(site)
        chunk = uniform_rows(rank - own, m, derive(seed, "adapter", "chunk", site.name), bound)
        zeros = torch.zeros(site.out_features, own), torch.zeros(n, rank - own)
        return self._rotated(site, rank, (a, zeros[0], chunk, zeros[1]), self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> Rotated:
        """All four from N(0, std^2)."""
        own = min(self.unshared, rank)
        m, n = self._parts(site)
        generator = torch.Generator().manual_seed(derive(seed, "probe", site.name))
        widths = [(own, site.in_features), (own, site.out_features), (rank - own, m), (rank - own, n)]
        a, b, chunk_a, chunk_b = (torch.empty(*shape).normal_(0, std, generator=generator) for shape in widths)
        return self._rotated(site, rank, (a, b.T.contiguous(), chunk_a, chunk_b.T.contiguous()), 0.0)

    def _rotated(self, site: Site, rank: int, parts: tuple[torch.Tensor, ...], dropout: float) -> Rotated:
        a, b, chunk_a, chunk_b = parts
        widths = site.in_features, site.out_features
        return Rotated(a, b, chunk_a, chunk_b, widths, self.scale_at(site, rank), dropout)

    def _parts(self, site: Site) -> tuple[int, int]:
        """Widths of the chunks: rounded up, as in the authors' code."""
        return -(-site.in_features // self.sharing_in), -(-site.out_features // self.sharing_out)

    def cost(self, sites: Sequence[Site]) -> CurvedCost:
        """``u (in + out) + (rank - u) (ceil(in / m) + ceil(out / n))`` for each site."""
        return CurvedCost({site.name: partial(self._price, site) for site in sites})

    def _price(self, site: Site, rank: int) -> int:
        own = min(self.unshared, rank)
        return own * (site.in_features + site.out_features) + (rank - own) * sum(self._parts(site))
