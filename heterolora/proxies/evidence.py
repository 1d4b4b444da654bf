"""The one gradient pass that all first-order proxies share.

Let G = sum over tokens of (loss gradient at the sink)(source value)^T, ``[out, in]``: the gradient of the map that
would be added at the site (for a LoRA site: the gradient of its frozen weight). It exists at every site, with an
adapter or without, and everything first-order follows from it: ``g_B = scale G A^T``, ``g_A = scale B^T G``.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol, TypeAlias

import torch

from heterolora.adapters.base import Adapter, plain_factors, pulled_back
from heterolora.errors import SettingError
from heterolora.linear import outer, reads
from heterolora.model import AdaptedModel, adapter_dtype
from heterolora.processes import ALONE, Processes
from heterolora.sites import Site

Batch: TypeAlias = Mapping[str, torch.Tensor]
Loss: TypeAlias = Callable[[AdaptedModel, Batch], torch.Tensor]
"""A scalar loss of a model on a batch."""

Values: TypeAlias = tuple[torch.Tensor, ...]

_MESSAGE = 2**20
"""Numbers of which processes make one message; a site's values are never parted."""

ByBatch: TypeAlias = Literal["exact", "projected", "never"]


class Track(Protocol):
    """Shows how far a loop is; yields what it is given."""

    def __call__(self, items: Iterable[Any], description: str, count: int) -> Iterable[Any]:
        """The same items, with progress shown."""


@dataclass(frozen=True)
class Observation:
    """What one call of one site shows.

    Attributes:
        adapter: the probe's factors at the site.
        source: what the site reads, ``[tokens, in]``; where it reads ids, those, ``[tokens]``.
        gradient: the loss gradient at its sink, ``[tokens, out]``; None in a pass without a backward.
        real: which rows are tokens and no padding, ``[tokens]``; None if the rows are no tokens of the batch (deberta
            sends its table of relative positions through the same layers).
        find_weight: gives the frozen weight that acts at the site, ``[out, in]``, or None where nothing does.
        width: in.
    """

    adapter: Adapter
    source: torch.Tensor
    gradient: torch.Tensor | None
    real: torch.Tensor | None
    find_weight: Callable[[], torch.Tensor | None]
    width: int = 0

    @property
    def map_gradient(self) -> torch.Tensor:
        """G, ``[out, in]``."""
        return outer(self.flow, self.source, self.width or self.source.shape[-1])

    @property
    def flow(self) -> torch.Tensor:
        """The gradient, for statistics that ask for one."""
        assert self.gradient is not None  # the pass had a backward, since the statistic needs it
        return self.gradient

    @cached_property
    def factor_gradients(self) -> Values:
        """Of every trained tensor, computed once for all that ask; of LoRA: ``scale B^T G`` and ``scale G A^T``.

        Without forming G: the two factors' gradients are such products, and what is trained follows from these.
        """
        factors = plain_factors(self.adapter)
        scale, gradient = self.adapter.scale, self.flow
        down, up = (factor.to(gradient.dtype) for factor in factors)
        of_down = outer(scale * (gradient @ up), self.source, down.shape[1])
        of_up = scale * gradient.T @ reads(self.source, down)
        return pulled_back(self.adapter, *factors, of_down, of_up)


class Statistic(Protocol):
    """Something summed over batches at each site; hashable, so that equal ones of two proxies are gathered once.

    Attributes:
        needs_gradient: whether a forward pass alone would not do.
        by_batch: whether the values of each single batch can be kept: ``exact``, since they are few; ``projected``: of
            sources and gradients that were projected to few dimensions; or ``never``.
        takes_ids: whether sources may be ids, too; sites that read ids are refused otherwise.
    """

    needs_gradient: bool = True
    by_batch: ByBatch = "never"
    takes_ids: bool = False

    def observe(self, seen: Observation) -> Values | None:
        """One call's contribution, summed over the calls of a batch; None: this call has none."""

    def numbers(self, site: Site) -> int:
        """How many numbers are held for a site over the whole pass; here: too few to count."""
        return 0

    def settle(self, values: Values) -> Values:
        """What a batch contributes, from the sum over its calls; here: that sum."""
        return values


@dataclass(frozen=True)
class FactorGradients(Statistic):
    """Of every trained tensor of the adapter that stands, or would stand, at the site: ``g_A``, ``g_B`` of LoRA."""

    by_batch = "exact"
    takes_ids = True

    def observe(self, seen: Observation) -> Values:
        """A copy, for it may be written to."""
        return tuple(part.clone() for part in seen.factor_gradients)


@dataclass(frozen=True)
class SquaredFactorGradients(Statistic):
    """The squares of each batch's gradients of the trained tensors, entry by entry."""

    by_batch = "exact"
    takes_ids = True

    def observe(self, seen: Observation) -> Values:
        """The gradients; a batch's are complete only after all calls."""
        return FactorGradients().observe(seen)

    def settle(self, values: Values) -> Values:
        """Their squares."""
        return tuple(part.square() for part in values)


@dataclass(frozen=True)
class MapGradient(Statistic):
    """G itself, ``[out, in]``."""

    by_batch = "projected"
    takes_ids = True

    def observe(self, seen: Observation) -> Values:
        """The call's G."""
        return (seen.map_gradient,)

    def numbers(self, site: Site) -> int:
        """A matrix."""
        return site.out_features * site.in_features


@dataclass(frozen=True)
class TokenMapGradient(Statistic):
    """The part of G that comes from real tokens, ``[out, in]``: what moments over tokens can be set against."""

    by_batch = "projected"
    takes_ids = True

    def observe(self, seen: Observation) -> Values | None:
        """Nothing of rows that are no tokens."""
        if seen.real is None:
            return None
        return (outer(seen.flow[seen.real], seen.source[seen.real], seen.width or seen.source.shape[-1]),)

    def numbers(self, site: Site) -> int:
        """A matrix."""
        return site.out_features * site.in_features


@dataclass(frozen=True)
class InputMoments(Statistic):
    """``sum x x^T`` ``[in, in]``, ``sum x`` ``[in]`` and the number of tokens, over real tokens, in float64."""

    needs_gradient = False
    by_batch = "projected"

    def observe(self, seen: Observation) -> Values | None:
        """Nothing of rows that are no tokens."""
        if seen.real is None:
            return None
        x = seen.source[seen.real].double()
        return x.T @ x, x.sum(0), x.new_tensor([len(x)])

    def numbers(self, site: Site) -> int:
        """A matrix, in numbers of twice the size."""
        return 2 * site.in_features**2


@dataclass(frozen=True)
class GradientMoment(Statistic):
    """``sum d d^T`` ``[out, out]`` over the gradients at the sink at real tokens, in float64."""

    by_batch = "projected"
    takes_ids = True

    def observe(self, seen: Observation) -> Values | None:
        """Nothing of rows that are no tokens."""
        if seen.real is None:
            return None
        gradient = seen.flow[seen.real].double()
        return (gradient.T @ gradient,)

    def numbers(self, site: Site) -> int:
        """A matrix, in numbers of twice the size."""
        return 2 * site.out_features**2


class Measure(Protocol):
    """A number that says how well a model predicts, such as a task's first metric.

    Attributes:
        name: what it is called.
        mode: whether a larger or a smaller one is better.
    """

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller one is better."""

    def outputs(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """What the number is computed from, of one batch."""

    def value(self, outputs: Sequence[torch.Tensor], batches: Sequence[Batch]) -> float:
        """The number, from the outputs for all batches; NaN where it is not defined."""

    def of_a_constant(self, batches: Sequence[Batch]) -> float | None:
        """The best that a model reaches which answers the same to every example; None: not known."""


@dataclass(frozen=True)
class MeanLoss:
    """The mean of the batches' losses, where no metric is known.

    Attributes:
        loss: scalar loss of a model on a batch.
    """

    loss: Loss
    name: str = "loss"
    mode: Literal["max", "min"] = "min"

    def outputs(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """The loss."""
        return self.loss(model, batch)

    def value(self, outputs: Sequence[torch.Tensor], batches: Sequence[Batch]) -> float:
        """Their mean."""
        return float(torch.stack([value.double() for value in outputs]).mean())

    def of_a_constant(self, batches: Sequence[Batch]) -> None:
        """Not known."""
        return None


@dataclass(frozen=True)
class Bench:
    """Everything that a pass over a model needs; a proxy with a pass of its own finds it here.

    Attributes:
        model: the adapted model; its own adapters take part in the forward unless ``live`` replaces them.
        batches: what the loss is taken on, in this order.
        loss: scalar loss of the model on a batch.
        live: put the probe's deltas into the forward.
        reduction: ``sum`` of the batches' gradients, or their ``mean``.
        track: shows progress over the batches.
        measure: says how well the model predicts; None: the loss is all that is known.
        notes: where a proxy with a pass of its own leaves plain values for the record, such as what it cost.
        processes: those that share the pass which proxies have in common; a proxy's own pass each of them makes whole.
    """

    model: AdaptedModel
    batches: Sequence[Batch]
    loss: Loss
    live: bool
    reduction: Literal["mean", "sum"]
    track: Track
    measure: Measure | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    processes: Processes = ALONE

    @property
    def share(self) -> float:
        """What a batch counts in a sum over batches."""
        return 1 / len(self.batches) if self.reduction == "mean" else 1.0

    def checked_loss(self, number: int, batch: Batch) -> torch.Tensor:
        """The loss of a batch.

        Raises:
            FloatingPointError: if it is not finite.
        """
        value = self.loss(self.model, batch)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss of scoring batch {number} is {value.item()}")
        return value


@dataclass(frozen=True)
class Evidence:
    """What proxies score from.

    Attributes:
        sites: the candidates, in the space's order.
        adapters: the probe's factors at each site.
        gathered: statistic -> site name -> its values.
        families: site name -> what it has in common with sites of other layers, e.g. all ``q`` are one family.
        bench: for proxies with a pass of their own.
        seed: for proxies that draw.
    """

    sites: Sequence[Site]
    adapters: Mapping[str, Adapter]
    gathered: Mapping[Statistic, Mapping[str, Values]]
    families: Mapping[str, str]
    bench: Bench
    seed: int

    def weight(self, name: str) -> torch.Tensor | None:
        """The frozen weight ``[out, in]`` that acts at a site; None where nothing does."""
        return self.bench.model.frozen_weight(name)


class Collector(Protocol):
    """Looks over the shoulder of a pass."""

    def observe(self, site: Site, seen: Observation) -> None:
        """One call of one site."""

    def end_batch(self) -> None:
        """All calls of a batch were shown."""


def gather(
    bench: Bench,
    adapters: Mapping[str, Any],
    statistics: Iterable[Statistic],
    collector: Collector | None = None,
    hold: Callable[[Statistic], MutableMapping[str, Values]] = lambda statistic: {},
) -> dict[Statistic, MutableMapping[str, Values]]:
    """Run the pass: one forward for each batch, and one backward if any statistic needs it, in evaluation mode.

    It leaves no gradient behind.

    Args:
        bench: model, batches and loss.
        adapters: the probe's factors, by site name; these sites are observed.
        statistics: what to gather.
        collector: is shown everything that is observed.
        hold: where the values of a statistic are held.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    wanted = tuple(dict.fromkeys(statistics))
    divided = len(bench.batches) >= bench.processes.size
    numbered = list(enumerate(bench.batches))
    mine = bench.processes.mine(numbered) if divided else numbered  # too few batches: every process looks at all
    backward = any(statistic.needs_gradient for statistic in wanted)
    sums: dict[Statistic, MutableMapping[str, Values]] = {statistic: hold(statistic) for statistic in wanted}
    # A second copy of the values is held only where a batch's are not just added to the others'.
    unsettled: dict[Statistic, MutableMapping[str, Values]] = {
        s: {} for s in wanted if type(s).settle is not Statistic.settle
    }
    tokens: torch.Tensor | None = None
    dtype = adapter_dtype(bench.model.backbone)

    def observe(site: Site, source: torch.Tensor, gradient: torch.Tensor | None) -> None:
        adapter = adapters[site.name]
        seen = Observation(
            adapter,
            source.reshape(-1) if site.lookup else source.reshape(-1, site.in_features).to(dtype),
            None if gradient is None else gradient.reshape(-1, site.out_features).to(dtype),
            _real_rows(source, tokens),
            partial(bench.model.frozen_weight, site.name),
            site.in_features,
        )
        for statistic in wanted:
            if (values := statistic.observe(seen)) is not None:
                add((unsettled if statistic in unsettled else sums)[statistic], site.name, values)
        if collector is not None:
            collector.observe(site, seen)

    def run() -> None:
        nonlocal tokens
        with model.probing(observe, adapters, backward) as zero:
            for number, batch in bench.track(mine, "scoring", len(mine)):
                tokens = _tokens(batch)
                with torch.set_grad_enabled(backward):
                    value = bench.checked_loss(number, batch)
                if backward:
                    torch.autograd.grad(value, zero)
                _settle(unsettled, sums)
                if collector is not None:
                    collector.end_batch()

    model = bench.model
    was_training = model.training
    model.eval()
    try:
        if bench.live:
            with model.swapped(adapters):
                run()
        else:
            run()
    finally:
        model.train(was_training)
    _check_all_seen(sums, adapters)
    if divided:
        _join(sums, bench.processes)
    _scale(sums, bench.share)
    return sums


def check_ids(setting: str, given: str, statistics: Iterable[Statistic], sites: Iterable[Site]) -> None:
    """Refuse what is computed from vectors for sites that read ids.

    Args:
        setting: what chose the statistics.
        given: its value.
        statistics: what would be gathered.
        sites: where.

    Raises:
        SettingError: naming the first such site.
    """
    if all(statistic.takes_ids for statistic in statistics):
        return
    for name in (site.name for site in sites if site.lookup):
        raise SettingError(
            setting, given, f"is computed from vectors, and {name} reads ids; exclude the role embed, or take another"
        )


def _settle(
    unsettled: Mapping[Statistic, MutableMapping[str, Values]], sums: Mapping[Statistic, MutableMapping[str, Values]]
) -> None:
    """What a batch has come to joins the others."""
    for statistic, found in unsettled.items():
        for name, values in found.items():
            add(sums[statistic], name, statistic.settle(values))
        found.clear()


def _join(sums: Mapping[Statistic, MutableMapping[str, Values]], processes: Processes) -> None:
    """What all processes saw, a few sites at a time."""
    if processes.alone:
        return
    for values in sums.values():
        some: dict[str, Values] = {}
        for name in (names := sorted(values)):
            some[name] = values[name]
            if name == names[-1] or sum(part.numel() for parts in some.values() for part in parts) > _MESSAGE:
                joined = iter(processes.summed_each([part for parts in some.values() for part in parts]))
                for known, parts in some.items():
                    values[known] = tuple(next(joined) for _ in parts)
                some = {}


def _scale(sums: Mapping[Statistic, MutableMapping[str, Values]], share: float) -> None:
    for values in sums.values():
        for name in list(values):
            values[name] = tuple(part.mul_(share) for part in values[name])


def _check_all_seen(sums: Mapping[Statistic, Mapping[str, Values]], names: Iterable[str]) -> None:
    for statistic, values in sums.items():
        if unseen := [name for name in names if name not in values]:
            raise SettingError(
                "search_space",
                unseen[:3],
                f"{type(statistic).__name__} saw nothing there: the layer was not called, or what it reads are not the "
                "batch's tokens (chunks, padding of its own, a decoder of another length); exclude these sites",
            )


def _tokens(batch: Batch) -> torch.Tensor | None:
    """Which tokens of a batch are real, ``[rows, tokens]``; None: it does not say what its tokens are."""
    if (mask := batch.get("attention_mask")) is not None:
        return mask.bool()
    return None if (ids := batch.get("input_ids")) is None else torch.ones_like(ids, dtype=torch.bool)


def _real_rows(source: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Which rows of a source are real tokens, if they are tokens at all."""
    if not source.is_floating_point():  # ids, not vectors
        source = source.unsqueeze(-1)
    rows = source.reshape(-1, source.shape[-1]).shape[0]
    if tokens is None:
        return torch.ones(rows, dtype=torch.bool, device=source.device)
    if source.shape[:-1] == tokens.shape or (source.dim() == 2 and rows == tokens.numel()):
        return tokens.reshape(-1).to(source.device)
    return None


def add(sums: MutableMapping[str, Values], name: str, new: Values) -> None:
    """Add to what is held, in place; what comes first is kept as it is, and may be written to."""
    if name in sums:
        new = tuple(held.add_(part) for held, part in zip(sums[name], new, strict=True))
    sums[name] = new
