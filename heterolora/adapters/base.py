"""What a family of adapters must offer: maps for sites, their scale, and what an allocation of them costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import nn

from heterolora.cost import Cost
from heterolora.sites import Site

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""An adapter's trained tensors, by the names of its ``named_parameters``."""

Switching: TypeAlias = Literal["ranks", "sites", "never"]


class Adapter(Protocol):
    """A trainable map at one site; an ``nn.Module`` whose forward gives the delta.

    Attributes:
        scale: what the product of its factors is multiplied with.
        dropout: probability with which an input feature is dropped in training.
        units: trained tensor -> the dimensions that count units of rank, in which those of a smaller rank come first.
        undecayed: trained tensors that take no weight decay, which would pull them away from 1.
        shared: the module, one of its own, that it has in common with adapters of other sites; None: nothing.
    """

    scale: float
    dropout: float
    units: ClassVar[Mapping[str, tuple[int, ...]]]
    undecayed: ClassVar[frozenset[str]]
    shared: Any

    @property
    def rank(self) -> int:
        """Units of rank."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The delta, ``[..., in] -> [..., out]``."""

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """Its trained tensors, with those that are shared."""

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """``down`` ``[rank, in]`` and ``up`` ``[out, rank]``, whose product times ``scale`` is the map.

        Args:
            values: taken for the trained tensors, of which both are differentiable functions.
        """

    def delta_weight(self) -> torch.Tensor:
        """The map as one matrix ``[out, in]``, in float32 at least."""


def speaks(adapter: Adapter) -> bool:
    """Whether its delta can be anything but zero."""
    down, up = plain_factors(adapter)
    return bool(down.any()) and bool(up.any())


def plain_factors(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """``Adapter.factors`` as they are now."""
    with torch.no_grad():
        down, up = adapter.factors(adapter.trained)
    return down.detach(), up.detach()


def pulled_back(
    adapter: Adapter, down: torch.Tensor, up: torch.Tensor, of_down: torch.Tensor, of_up: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients with respect to the trained tensors, from those with respect to the two factors.

    A tensor that is shared counts here for this site alone, as a copy of its own would.

    Args:
        adapter: the adapter.
        down: what ``plain_factors`` gives.
        up: likewise.
        of_down: gradient with respect to it.
        of_up: likewise.
    """
    trained = adapter.trained
    tensors = list(trained.values())
    if [(t.data_ptr(), t.shape) for t in tensors] == [(t.data_ptr(), t.shape) for t in (down, up)]:
        return of_down, of_up  # the factors are what is trained
    with torch.enable_grad():
        leaves = {name: value.detach().to(of_down.dtype).requires_grad_() for name, value in trained.items()}
        factors = adapter.factors(leaves)
    pairs = [(f, g) for f, g in zip(factors, (of_down, of_up), strict=True) if f.requires_grad]
    return torch.autograd.grad(
        [factor for factor, _ in pairs],
        list(leaves.values()),
        [gradient.to(factor.dtype) for factor, gradient in pairs],
        materialize_grads=True,
        allow_unused=True,
    )


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


@dataclass(frozen=True)
class Surroundings:
    """What an adapter may ask when it is made.

    Attributes:
        weight: site name -> the frozen weight ``[out, in]`` that acts there, None where nothing does.
        ranks: all sites for which adapters are made together -> their ranks.
        made: where a family keeps what those of them share.
    """

    weight: Callable[[str], torch.Tensor | None]
    ranks: Mapping[Site, int]
    made: dict[Any, nn.Module] = field(default_factory=dict)


class AdapterFamily(Protocol):
    """One family of adapters with its settings.

    Attributes:
        switching: what may change while training goes on: ``ranks`` (the first units of an adapter are an adapter of
            lower rank); ``sites``, on and off as they are; ``never`` (sites share what is trained).
    """

    switching: ClassVar[Switching]

    @property
    def needs_weights(self) -> bool:
        """Whether adapters are made from the frozen weight, so that a site without one can have none."""

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> nn.Module:
        """A fresh adapter whose delta is zero, drawn from ``(seed, site.name)`` and nested in the rank.

        In float32 on the CPU; the model moves it to where its backbone is.
        """

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> nn.Module:
        """An adapter for scoring: all that is trained from N(0, std^2), from ``(seed, site.name)``, nested likewise."""

    def scale_at(self, site: Site, rank: int) -> float:
        """What the product of the factors is multiplied with."""

    def cost(self, sites: Sequence[Site]) -> Cost:
        """What an allocation over these sites costs."""


def tensors_once(adapters: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of some adapters: ``<site>.<tensor>``, and once ``shared.<name>.<tensor>`` for what sites share.

    Args:
        adapters: site name -> adapter.
    """
    seen: set[str] = set()
    for name, adapter in adapters.items():
        for key, value in adapter.state_dict().items():
            if not key.startswith("shared."):
                yield f"{name}.{key}", value
        if adapter.shared is not None and adapter.shared.name not in seen:
            seen.add(adapter.shared.name)
            for key, value in adapter.shared.state_dict().items():
                yield f"shared.{adapter.shared.name}.{key}", value
