"""GraSP (Wang, Zhang, Grosse 2020, arXiv 2002.07376) on the adapter's factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from heterolora.adapters.base import Adapter
from heterolora.proxies.base import NO_GRADIENT
from heterolora.proxies.evidence import Evidence, FactorGradients, Statistic, Values


@dataclass(frozen=True)
class Grasp:
    """``+sum theta o (H g)`` over A and B: how the gradient's norm would fall without them; higher means keep.

    (The paper scores ``-theta o H g`` and removes the largest.) The loss depends on A and B through the map
    ``scale B A`` alone, so with G its gradient and ``D = scale (g_B A + B g_A)`` the step that g makes of the maps,

        ``sum theta o (H g) = ||g_A||^2 + ||g_B||^2 + 2 scale <B A, dG>``, dG the change of G along D at all sites,

    and the last term is a second derivative of the loss by two numbers: t that scales D everywhere, and u that scales
    ``scale B A`` at the site. It is exact, needs one more forward and one double backward for each batch, and exists
    at the pretrained function too (``probe.live=false``), where no adapter stands in the forward.
    """

    control = False
    remedy = NO_GRADIENT

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The factors' gradients; the second pass is this proxy's own."""
        return (FactorGradients(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site; it may be negative."""
        gradients = evidence.gathered[FactorGradients()]
        squares = {name: sum(part.square().sum().item() for part in parts) for name, parts in gradients.items()}
        curvatures = _curvatures(evidence, gradients)
        return {site.name: squares[site.name] + 2 * curvatures[site.name] for site in evidence.sites}


class _Bent(nn.Module):
    """``x -> inner(x) + t scale (g_B A + B g_A) x + u scale B A x``."""

    def __init__(self, adapter: Adapter, gradients: Values, inner: nn.Module | None, t: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.factors = (adapter.A.detach(), adapter.B.detach(), *gradients)
        self.scale = adapter.scale
        self.t = t
        self.u = torch.zeros_like(t, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, g_a, g_b = self.factors
        x = x.to(a.dtype)
        down = linear(x, a)
        step = linear(down, g_b) + linear(linear(x, g_a), b)
        delta = self.scale * (self.t * step + self.u * linear(down, b))
        return delta if self.inner is None else delta + self.inner(x)


def _curvatures(evidence: Evidence, gradients: Mapping[str, Values]) -> dict[str, float]:
    """``scale <B A, dG>`` at each site: d^2 loss / dt du at 0, over the batches as the gradients were taken."""
    bench = evidence.bench
    model = bench.model
    t = torch.zeros((), dtype=evidence.adapters[evidence.sites[0].name].A.dtype, requires_grad=True)
    t = t.to(next(model.backbone.parameters()).device).detach().requires_grad_(True)
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
