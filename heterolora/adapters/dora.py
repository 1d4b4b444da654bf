"""DoRA (Liu et al., ICML 2024, arXiv 2402.09353): the weight's direction moves by LoRA, its rows' lengths are trained.

``W' = diag(m / ||W + scale B A||) (W + scale B A)``, the norm of each row taken as a constant in the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from heterolora.adapters.base import Surroundings, Switching, Tensors
from heterolora.adapters.lora import LowRank, normal_factors, uniform_rows
from heterolora.adapters.scaling import Scaling
from heterolora.cost import CurvedCost
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.sites import Site


class Decomposed(LowRank):
    """The map ``x -> diag(m / ||V||) V x - W x`` with ``V = W + scale B A``.

    Args:
        A: ``[rank, in]``.
        B: ``[out, rank]``.
        m: ``[out]``, lengths of the new weight's rows; None: those of W.
        weight: gives W, ``[out, in]``.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    units: ClassVar = {"A": (0,), "B": (1,), "m": ()}

    def __init__(
        self,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        m: torch.Tensor | None,
        weight: Callable[[], torch.Tensor],
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(A, B, scale, dropout)
        self._weight = weight
        if m is None:
            held = weight()
            m = held.to(torch.promote_types(held.dtype, torch.float32)).norm(dim=1).cpu()
        self.m = nn.Parameter(m)

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """A, B and m."""
        return {"A": self.A, "B": self.B, "m": self.m}

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """A and ``diag(m / ||V||) B``, lengths as constants: of the map, the part that is of low rank."""
        with torch.no_grad():
            lengths = values["m"] / self._moved(values["A"], values["B"])[1]
        return values["A"], lengths[:, None] * values["B"]

    def _moved(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
        """V ``[out, in]``, and the length of each of its rows; as constants."""
        with torch.no_grad():
            moved = self._weight().to(A.dtype) + self.scale * (B @ A)
            return moved, moved.norm(dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The delta, ``[..., in] -> [..., out]``."""
        x = x.to(self.A.dtype)
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        stretch = self.m / self._moved(self.A, self.B)[1]
        base = functional.linear(x, self._weight().to(x.dtype))
        low = functional.linear(functional.linear(x, self.A) * self.scale, self.B)
        return (stretch - 1) * base + stretch * low

    @property
    def down(self) -> torch.Tensor | None:
        """None: it is no product of two parts."""
        return None

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """``diag(m / ||V||) V - W`` ``[out, in]``, in float32 at least."""
        moved, lengths = self._moved(self.A, self.B)
        weight: torch.Tensor = self._weight().to(moved.dtype)
        return (self.m / lengths)[:, None] * moved - weight


@dataclass(frozen=True)
class DoRA(Scaling):
    """LoRA with trained row lengths, at sites where a frozen weight acts; as PEFT has it.

    Scored by its low-rank factors: proxies take the lengths as constants.
    """

    switching: ClassVar[Switching] = "ranks"
    needs_weights: ClassVar[bool] = True

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> Decomposed:
        """A and B as LoRA's, m the lengths of the weight's rows."""
        rows = uniform_rows(rank, site.in_features, derive(seed, "adapter", site.name))
        zeros = torch.zeros(site.out_features, rank)
        return Decomposed(rows, zeros, None, self._weight(site, around), self.scale_at(site, rank), self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> Decomposed:
        """A and B from N(0, std^2), m the lengths of the weight's rows."""
        a, b = normal_factors(site, rank, std, derive(seed, "probe", site.name))
        return Decomposed(a, b, None, self._weight(site, around), self.scale_at(site, rank), 0.0)

    def _weight(self, site: Site, around: Surroundings) -> Any:
        if site.lookup:
            raise SettingError("adapter", "dora", f"multiplies vectors, {site.name} reads ids; exclude it (role embed)")
        if around.weight(site.name) is None:
            raise SettingError("adapter", "dora", f"no frozen weight acts at {site.name}; use search_space=lora_all")
        return partial(around.weight, site.name)

    def cost(self, sites: Sequence[Site]) -> CurvedCost:
        """``rank * (in + out) + out`` for each site."""
        return CurvedCost({site.name: partial(_price, site) for site in sites})


def _price(site: Site, rank: int) -> int:
    return rank * (site.in_features + site.out_features) + site.out_features
