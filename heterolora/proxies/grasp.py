"""GraSP (Wang, Zhang, Grosse 2020, arXiv 2002.07376) on the adapter's factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from heterolora.adapters.base import Adapter, plain_factors
from heterolora.linear import reads
from heterolora.model import adapter_dtype
from heterolora.proxies.base import NO_GRADIENT
from heterolora.proxies.evidence import Evidence, FactorGradients, Statistic, Values


@dataclass(frozen=True)
class Grasp:
    """``+sum theta o (H g)`` over all that is trained, A and B of LoRA; higher means keep.

    How the gradient's norm would fall without them. (The paper scores ``-theta o H g`` and removes the largest.) It is
    a second derivative of the loss by two numbers: t, along which theta moves by ``t g`` at all sites, and u, along
    which it moves by ``u theta`` at one. It is exact, needs one more forward and one double backward for each batch,
    and exists at the pretrained function too (``probe.live=false``): there the map that theta makes is subtracted.
    """

    control = False
    remedy = NO_GRADIENT

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The factors' gradients; the second pass is this proxy's own."""
        return (FactorGradients(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site; it may be negative."""
        return _curvatures(evidence, evidence.gathered[FactorGradients()])


class _Bent(nn.Module):
    """``x -> inner(x) + (map of theta + t g + u theta)(x) - (map of theta)(x)``."""

    def __init__(self, adapter: Adapter, gradients: Values, inner: nn.Module | None, t: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.of = [adapter]  # in a list, so that it is no part of this module
        self.steps = list(zip(adapter.trained.items(), gradients, strict=True))
        self.t = t
        self.u = torch.zeros_like(t, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (adapter,) = self.of
        bent = {name: (1 + self.u) * value.detach() + self.t * step for (name, value), step in self.steps}
        delta = adapter.scale * (_through(x, *adapter.factors(bent)) - _through(x, *plain_factors(adapter)))
        return delta if self.inner is None else delta + self.inner(x)


def _through(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return linear(reads(x.to(down.dtype) if x.is_floating_point() else x, down), up)


def _curvatures(evidence: Evidence, gradients: Mapping[str, Values]) -> dict[str, float]:
    """d^2 loss / dt du at 0 for each site, over the batches as the gradients were taken."""
    bench = evidence.bench
    model = bench.model
    device = next(model.backbone.parameters()).device
    t = torch.zeros((), dtype=adapter_dtype(model.backbone), device=device, requires_grad=True)
    bent: dict[str, Any] = {}
    for site in evidence.sites:
        adapter: Any = evidence.adapters[site.name]
        inner = adapter if bench.live else model.active_adapter(site.name)
        bent[site.name] = _Bent(adapter, gradients[site.name], inner, t)
    u = [bent[site.name].u for site in evidence.sites]
    sums = [0.0] * len(u)
    with model.swapped(bent), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for number, batch in enumerate(bench.track(bench.batches, "second derivatives", len(bench.batches))):
            (slope,) = torch.autograd.grad(bench.checked_loss(number, batch), t, create_graph=True)
            mixed = torch.autograd.grad(slope, u, allow_unused=True)
            for index, value in enumerate(mixed):
                sums[index] += 0.0 if value is None else value.item() * bench.share
    return {site.name: value for site, value in zip(evidence.sites, sums, strict=True)}
