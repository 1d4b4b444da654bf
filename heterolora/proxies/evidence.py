"""The one gradient pass that all first-order proxies share.

Let G = sum over tokens of (loss gradient at the sink)(source value)^T, ``[out, in]``: the gradient of the map that
would be added at the site (for a LoRA site: the gradient of its frozen weight). It exists at every site, with an
adapter or without, and everything first-order follows from it: ``g_B = scale G A^T``, ``g_A = scale B^T G``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch

from heterolora.adapters.base import Adapter
from heterolora.model import AdaptedModel
from heterolora.sites import Site

Batch: TypeAlias = Mapping[str, torch.Tensor]
Loss: TypeAlias = Callable[[AdaptedModel, Batch], torch.Tensor]
"""A scalar loss of a model on a batch."""

Values: TypeAlias = tuple[torch.Tensor, ...]


class Track(Protocol):
    """Shows how far a loop is; yields what it is given."""

    def __call__(self, items: Iterable[Any], description: str, count: int) -> Iterable[Any]:
        """The same items, with progress shown."""


class Statistic(Protocol):
    """Something summed over batches at each site; hashable, so that equal ones of two proxies are gathered once."""

    def observe(self, adapter: Adapter, source: torch.Tensor, gradient: torch.Tensor) -> Values:
        """One batch's contribution, from the source ``[tokens, in]`` and the sink's gradient ``[tokens, out]``."""


@dataclass(frozen=True)
class FactorGradients:
    """``g_A`` ``[rank, in]`` and ``g_B`` ``[out, rank]`` of the adapter that stands, or would stand, at the site."""

    def observe(self, adapter: Adapter, source: torch.Tensor, gradient: torch.Tensor) -> Values:
        """``scale B^T G`` and ``scale G A^T`` without forming G."""
        a, b = adapter.A.detach().to(source.dtype), adapter.B.detach().to(source.dtype)
        return adapter.scale * (gradient @ b).T @ source, adapter.scale * gradient.T @ (source @ a.T)


@dataclass(frozen=True)
class MapGradient:
    """G itself, ``[out, in]``."""

    def observe(self, adapter: Adapter, source: torch.Tensor, gradient: torch.Tensor) -> Values:
        """The batch's G."""
        return (gradient.T @ source,)


@dataclass(frozen=True)
class Evidence:
    """What proxies score from.

    Attributes:
        sites: the candidates, in the space's order.
        adapters: the probe's factors at each site.
        gathered: statistic -> site name -> its values.
        seed: for proxies that draw.
    """

    sites: Sequence[Site]
    adapters: Mapping[str, Adapter]
    gathered: Mapping[Statistic, Mapping[str, Values]]
    seed: int


def gather(
    model: AdaptedModel,
    adapters: Mapping[str, Any],
    batches: Sequence[Batch],
    loss: Loss,
    statistics: Iterable[Statistic],
    *,
    live: bool,
    reduction: Literal["mean", "sum"],
    track: Track,
) -> dict[Statistic, dict[str, Values]]:
    """Run the pass: one forward and one backward for each batch, in evaluation mode, leaving no gradient behind.

    Args:
        model: the adapted model; its own adapters take part in the forward unless ``live`` replaces them.
        adapters: the probe's factors, by site name; these sites are observed.
        batches: what the loss is taken on, in this order.
        loss: scalar loss of the model on a batch.
        statistics: what to gather.
        live: put the probe's deltas into the forward.
        reduction: ``sum`` of the batches' gradients, or their ``mean``.
        track: shows progress over the batches.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    wanted = tuple(dict.fromkeys(statistics))
    sums: dict[Statistic, dict[str, Values]] = {statistic: {} for statistic in wanted}

    def observe(site: Site, source: torch.Tensor, gradient: torch.Tensor) -> None:
        adapter = adapters[site.name]
        dtype = adapter.A.dtype
        source = source.reshape(-1, site.in_features).to(dtype)
        gradient = gradient.reshape(-1, site.out_features).to(dtype)
        for statistic in wanted:
            _add(sums[statistic], site.name, statistic.observe(adapter, source, gradient))

    def run() -> None:
        with model.probing(observe, adapters) as zero:
            for number, batch in enumerate(track(batches, "scoring", len(batches))):
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise FloatingPointError(f"the loss of scoring batch {number} is {value.item()}")
                torch.autograd.grad(value, zero)

    was_training = model.training
    model.eval()
    try:
        if live:
            with model.swapped(adapters):
                run()
        else:
            run()
    finally:
        model.train(was_training)
    if reduction == "mean":
        for part in (part for values in sums.values() for parts in values.values() for part in parts):
            part /= len(batches)
    return sums


def _add(sums: dict[str, Values], name: str, new: Values) -> None:
    if name not in sums:
        sums[name] = new
        return
    for held, part in zip(sums[name], new, strict=True):
        held += part
