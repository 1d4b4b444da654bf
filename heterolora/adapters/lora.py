"""LoRA (Hu et al. 2021, arXiv 2106.09685): ``delta(x) = scale * B A x``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from heterolora.cost import AdditiveCost
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.sites import Kind, Site


class LowRank(nn.Module):
    """The map ``x -> scale * B (A dropout(x))``.

    Args:
        A: ``[rank, in]``.
        B: ``[out, rank]``.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> None:  # noqa: N803
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """Units of rank held."""
        return self.A.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The delta, ``[..., in] -> [..., out]``, in the factors' dtype (under autocast: in its dtype)."""
        x = x.to(self.A.dtype)
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        narrow = functional.linear(x, self.A)
        if torch.is_autocast_enabled(x.device.type) or not _plain():
            return functional.linear(narrow * self.scale, self.B)
        return _widened(None, narrow, self.B, self.scale)

    @property
    def down(self) -> torch.Tensor | None:
        """``A``, unless dropout comes first, or a derivative is not taken by a plain backward pass."""
        return None if (self.dropout and self.training) or not _plain() else self.A

    def add(self, value: torch.Tensor, narrow: torch.Tensor, in_place: bool) -> torch.Tensor:
        """``value + scale * narrow B^T`` as one product."""
        return _widened(value if in_place else value.clone(), narrow, self.B, self.scale)


def _plain() -> bool:
    """Whether a backward pass is all that may come: no compilation, transform of torch.func or forward derivative."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and torch.autograd.forward_ad._current_level < 0


def _widened(value: torch.Tensor | None, narrow: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: N803
    """``scale * narrow B^T``, added to a value, which is overwritten."""
    wide: torch.Tensor = _Widen.apply(value, narrow, B, scale)  # type: ignore[no-untyped-call]
    return wide


class _Widen(torch.autograd.Function):
    """``value + scale * narrow B^T``, written over ``value`` if there is one.

    What autograd makes of the plain operations is several times slower, for two reasons. A product whose long side is
    strided, as ``gradient^T narrow`` is, takes 7 times as long on a CPU as its transpose. And an in-place operation on
    what a linear layer gives, which is a view, copies its gradient: here the result is a tensor of its own that shares
    the value's memory and version, so that whoever saved the value for a backward pass is still found out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor | None,
        narrow: torch.Tensor,
        B: torch.Tensor,  # noqa: N803
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(narrow, B)
        ctx.scale = scale
        if value is None:
            return functional.linear(narrow * scale, B)
        out = value.detach()
        out.view(-1, out.shape[-1]).addmm_(_rows(narrow), B.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, (narrow, B) = gradients[0], ctx.saved_tensors  # noqa: N806
        for_narrow = for_b = None  # of plain operations, so that grasp can differentiate again
        if ctx.needs_input_grad[1]:
            for_narrow = (functional.linear(_rows(gradient), B.t().contiguous()) * ctx.scale).view(narrow.shape)
        if ctx.needs_input_grad[2]:
            for_b = torch.mm(_rows(narrow).t(), _rows(gradient)).t() * ctx.scale
        return gradient if ctx.needs_input_grad[0] else None, for_narrow, for_b, None


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])


@dataclass(frozen=True)
class LoRA:
    """LoRA with one scale rule for all sites.

    Args:
        scaling: ``constant`` (the same scale whatever the rank), ``alpha_over_r`` (LoRA's own rule) or
            ``alpha_over_sqrt_r`` (rsLoRA, arXiv 2312.03732); under the last two, ``scale`` is alpha.
        scale: the scale, or alpha; one number, or one for each kind of site, e.g. ``{lora: 2.0, shortcut: 1.0}``.
        dropout: probability with which an adapter's input feature is dropped in training.
    """

    scaling: Literal["constant", "alpha_over_r", "alpha_over_sqrt_r"]
    scale: float | Mapping[str, float]
    dropout: float

    def __post_init__(self) -> None:
        scales = self.scale if isinstance(self.scale, Mapping) else {"scale": self.scale}
        if not scales or not all(math.isfinite(value) and value != 0 for value in scales.values()):
            raise SettingError("scale", self.scale, "a finite number other than 0")
        if isinstance(self.scale, Mapping) and (unknown := sorted(self.scale.keys() - set(get_args(Kind)))):
            raise SettingError("scale", unknown, f"no such kinds of site; possible: {list(get_args(Kind))}")
        if not 0 <= self.dropout < 1:
            raise SettingError("dropout", self.dropout, "a probability from 0 up to, not including, 1")

    def scale_at(self, site: Site, rank: int) -> float:
        """Factor of ``B A`` at this site and rank."""
        if isinstance(self.scale, Mapping):
            if site.kind not in self.scale:
                raise SettingError(
                    "adapter.scale", dict(self.scale), f"a scale for sites of kind {site.kind} is missing"
                )
            alpha = self.scale[site.kind]
        else:
            alpha = self.scale
        return alpha / {"constant": 1.0, "alpha_over_r": rank, "alpha_over_sqrt_r": math.sqrt(rank)}[self.scaling]

    def build(self, site: Site, rank: int, seed: int) -> LowRank:
        """``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0`` (LoRA's initialisation), in float32 on the CPU.

        Row k of A is drawn from ``(seed, site, k)`` alone, so that two allocations differ only where ranks differ.
        """
        generator = torch.Generator().manual_seed(derive(seed, "adapter", site.name))
        bound = 1 / math.sqrt(site.in_features)
        # Drawn row by row, whatever the rank: numbers of a uniform draw come one after the other.
        rows = torch.empty(rank, site.in_features).uniform_(-bound, bound, generator=generator)
        zeros = torch.zeros(site.out_features, rank)
        return LowRank(rows, zeros, self.scale_at(site, rank), self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int) -> LowRank:
        """A and B from N(0, std^2)."""
        generator = torch.Generator().manual_seed(derive(seed, "probe", site.name))
        units = [
            torch.empty(site.in_features + site.out_features).normal_(0, std, generator=generator) for _ in range(rank)
        ]
        factors = torch.stack(units)
        a, b = factors[:, : site.in_features].contiguous(), factors[:, site.in_features :].T.contiguous()
        return LowRank(a, b, self.scale_at(site, rank), 0.0)

    def cost(self, sites: Sequence[Site]) -> AdditiveCost:
        """``rank * (in + out)`` for each site."""
        return AdditiveCost({site.name: site.in_features + site.out_features for site in sites})
