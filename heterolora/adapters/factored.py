"""What all low-rank maps have in common: a product of factors, computed fast, added in one step where it can be."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from heterolora.adapters.base import Tensors
from heterolora.linear import reads


class Factored(nn.Module):
    """The map ``x -> scale * last middle(first dropout(x))``; a subclass says what the three are.

    Where ids are read, x is the unit vector of each, and dropout drops whole ids: the rest of the vector is 0 anyway.

    Args:
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    units: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    undecayed: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.shared: Any = None  # a module, if a subclass has one in common with adapters of other sites
        self.scale = scale
        self.dropout = dropout

    @property
    def first(self) -> torch.Tensor:
        """What multiplies the source, ``[rank, in]``."""
        raise NotImplementedError

    @property
    def last(self) -> torch.Tensor:
        """What widens it again, ``[out, rank]``."""
        raise NotImplementedError

    def middle(self, narrow: torch.Tensor) -> torch.Tensor:
        """What happens between, ``[..., rank] -> [..., rank]``; nothing."""
        return narrow

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Adapter.factors``."""
        raise NotImplementedError

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """Its trained tensors, with those that are shared."""
        return dict(self.named_parameters())

    @property
    def rank(self) -> int:
        """Units of rank held."""
        return self.first.shape[0]

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """``scale * up down`` ``[out, in]``, in float32 at least."""
        down, up = self.factors(self.trained)
        precise = torch.promote_types(down.dtype, torch.float32)
        return self.scale * (up.to(precise) @ down.to(precise))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The delta, ``[..., in] -> [..., out]``, in the factors' dtype (under autocast: in its dtype).

        Args:
            x: ``[..., in]``, or ids ``[...]``.
        """
        first = self.first
        ids = not x.is_floating_point()
        x = x if ids else x.to(first.dtype)
        drops = self.dropout and self.training
        if drops and not ids:
            x = functional.dropout(x, self.dropout)
        narrow = reads(x, first)
        if drops and ids:
            narrow = narrow * functional.dropout(narrow.new_ones(*x.shape, 1), self.dropout)
        narrow = self.middle(narrow)
        if torch.is_autocast_enabled(x.device.type) or not _plain():
            return functional.linear(narrow * self.scale, self.last)
        return _widened(None, narrow, self.last, self.scale)

    @property
    def down(self) -> torch.Tensor | None:
        """``first``, unless dropout comes before it, or a derivative is not taken by a plain backward pass."""
        return None if (self.dropout and self.training) or not _plain() else self.first

    def add(self, value: torch.Tensor, narrow: torch.Tensor, in_place: bool) -> torch.Tensor:
        """``value + scale * middle(narrow) last^T``, the second product and the sum as one."""
        return _widened(value if in_place else value.clone(), self.middle(narrow), self.last, self.scale)


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
