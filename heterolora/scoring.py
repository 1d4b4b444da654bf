"""The search: where proxy, allocator and model meet.

It leaves no trace: model, head, gradients, modes and random state are exactly as before.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal

import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, Gains, favoured, parameters_only
from heterolora.allocators.timed import allocate_in_time
from heterolora.budget import Budget, SiteCount
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel, adapter_dtype
from heterolora.proxies.base import Proxy, Score, check_scores, check_weights
from heterolora.proxies.evidence import Batch, Bench, Evidence, Loss, Statistic, Track, Values, gather
from heterolora.report.memory import kept_mib
from heterolora.resampling import BatchValues, Resampled, Resampling, can_be_resampled, resampled_scores
from heterolora.scratch import ScratchValues
from heterolora.sites import Site
from heterolora.space import Space
from heterolora.step_time import StepLimit

_FEW = 2**18
"""Numbers that are not worth a look at what a training step needs."""

_WORK = 3
"""Matrices of the size of one site's values that its score may need meanwhile: copies, eigenvectors."""

_SLACK = 1.05
"""Memory that scoring may take, as a share of a training step's; half of what is promised, for what is not counted."""


@dataclass(frozen=True)
class Probe:
    """How proxies look at the model.

    Args:
        init: factors of the probe at each site: ``random`` (both from N(0, std^2)) or ``lora`` (the adapter's own
            initialisation, B = 0).
        live: put the probe's deltas into the forward; otherwise gradients are those at the pretrained function.
        std: standard deviation of random factors.
        rank: rank of the probe's factors.
        batches: batches of the training split that are scored.
        reduction: over batches, ``mean`` or ``sum`` of the gradients.
        head_warmup_steps: train the head alone for so many steps before scoring (it is put back afterwards): a
            gradient through a random head is mostly noise.
        head_warmup_lr: AdamW's learning rate for that.
    """

    init: Literal["random", "lora"]
    live: bool
    std: float
    rank: int
    batches: int
    reduction: Literal["mean", "sum"]
    head_warmup_steps: int
    head_warmup_lr: float

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise SettingError("std", self.std, "a number above 0")
        for name, least in (("rank", 1), ("batches", 1), ("head_warmup_steps", 0)):
            if getattr(self, name) < least:
                raise SettingError(name, getattr(self, name), f"a whole number of at least {least}")
        if not 0 < self.head_warmup_lr < math.inf:
            raise SettingError("head_warmup_lr", self.head_warmup_lr, "a number above 0")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        scores: site -> score, as the proxy gave it; None if the allocator looks at no scores.
        allocation: the ranks.
        seconds: how long it took.
        step_time: what a step is predicted to take, and why (``StepLimit.record``); None: the budget sets no limit.
    """

    scores: Mapping[str, Score] | None
    allocation: Allocation
    seconds: float
    step_time: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Standing:
    """What is trained already when a search comes in the middle of training.

    Attributes:
        ranks: site -> units that are trained.
        margin: how much more their gains count (``allocators.base.favoured``).
        own: score trained sites by their own factors, all others by the probe's; otherwise all by the probe's.
    """

    ranks: Mapping[str, int]
    margin: float
    own: bool


def untracked(items: Iterable[Any], description: str, count: int) -> Iterable[Any]:
    """No progress shown."""
    return items


def search(
    model: AdaptedModel,
    loss: Loss,
    batches: Sequence[Batch],
    warmup: Iterable[Batch],
    *,
    proxy: Proxy,
    allocator: Allocator,
    budget: Budget,
    probe: Probe,
    seed: int,
    proxy_name: str | None = None,
    track: Track = untracked,
    limit: Callable[[], StepLimit | None] | None = None,
    standing: Standing | None = None,
) -> SearchResult:
    """Score the sites of the model's space and allocate the budget; nothing is enabled, nothing is changed.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batches: what is scored, on the model's device.
        warmup: batches for the head's warm-up, repeated as often as needed.
        proxy: scores the sites.
        allocator: turns gains into ranks.
        budget: how much may be held.
        probe: how the proxy looks.
        seed: for random factors and proxies that draw.
        proxy_name: what to call the proxy in messages.
        track: shows progress.
        limit: measures what the budget's ``step_time`` means (``calibration.step_limit``), on the model as it is.
        standing: what is trained already, for a search in the middle of training; None: nothing is.

    Raises:
        DegenerateScores: if the scores rank nothing.
        SettingError: if budget and allocator cannot go together, or nothing keeps to the budget's ``step_time``.
    """
    start = time.perf_counter()
    space = model.space
    resolved = budget.resolve(space)
    check_budget(allocator, resolved, space, model.family)
    rehearse(allocator, resolved, space, model.family)
    most = None if limit is None else limit()
    if most is not None:  # refused before scoring, too
        rehearse(allocator, resolved, space, model.family, most)
    scores: Mapping[str, Score] | None = None
    if allocator.gain_rule is not None:
        name = proxy_name or type(proxy).__name__.lower()
        own = standing is not None and standing.own
        found = score_all(
            model, loss, batches, warmup, proxies={name: proxy}, probe=probe, seed=seed, track=track, own=own
        )
        scores = found.scores[name]
    allocation = allocate(allocator, scores, resolved, space, model.family, most, standing)
    record = None if most is None else most.record(space.sites, allocation.ranks)
    return SearchResult(scores, allocation, time.perf_counter() - start, record)


def allocate(
    allocator: Allocator,
    scores: Mapping[str, Score] | None,
    budget: int | SiteCount,
    space: Space,
    family: AdapterFamily,
    limit: StepLimit | None = None,
    standing: Standing | None = None,
) -> Allocation:
    """Ranks from scores, which an allocator that looks at none does not need; within the limit on a step, if any.

    Args:
        allocator: turns gains into ranks.
        scores: site -> score; None for an allocator that looks at none.
        budget: how much may be held.
        space: the candidates.
        family: says what ranks cost.
        limit: on the time of a step; None: none.
        standing: what is trained already, and counts for more; None: nothing is.

    Raises:
        SettingError: if the allocator refuses, or no site gets any rank.
    """
    rule = allocator.gain_rule
    gains = rule.gains(scores, space.sites, space.groups) if rule and scores else no_gains(space.sites)
    if standing is not None:
        gains = favoured(gains, standing.ranks, standing.margin)
    allocation = _within(allocator, gains, budget, space, family, limit)
    if not allocation.active:
        raise SettingError("budget", budget, "pays for no adapter at any site; give more")
    return allocation


def _within(
    allocator: Allocator,
    gains: Gains,
    budget: int | SiteCount,
    space: Space,
    family: AdapterFamily,
    limit: StepLimit | None,
) -> Allocation:
    cost = family.cost(space.sites)
    if limit is None:
        return allocator.allocate(gains, cost, budget, space.groups)
    allowed = parameters_only(budget, "with budget.step_time")
    return allocate_in_time(allocator, gains, cost, allowed, space.groups, space.sites, limit)


def check_budget(allocator: Allocator, budget: int | SiteCount, space: Space, family: AdapterFamily) -> None:
    """Refuse before scoring what would be refused after it.

    Raises:
        SettingError: if the budget buys nothing, or the allocator cannot read it.
    """
    cost = family.cost(space.sites)
    cheapest = min(cost({site.name: 1}) for site in space.sites)
    if isinstance(budget, int) and budget < cheapest:
        raise SettingError("budget", budget, f"one unit of rank at the cheapest site costs {cheapest}")
    if not allocator.counts_sites:
        parameters_only(budget, type(allocator).__name__.lower())


def rehearse(
    allocator: Allocator,
    budget: int | SiteCount,
    space: Space,
    family: AdapterFamily,
    limit: StepLimit | None = None,
) -> None:
    """Allocate by equal scores, so that what the allocator cannot keep to is refused before anything is computed.

    Raises:
        SettingError: what the allocator refuses.
    """
    rule = allocator.gain_rule
    if rule is None:
        gains = no_gains(space.sites)
    else:
        gains = rule.gains({site.name: 1.0 for site in space.sites}, space.sites, space.groups)
    _within(allocator, gains, budget, space, family, limit)


def no_gains(sites: Sequence[Site]) -> dict[str, list[float]]:
    """For allocators that look at no scores: how much rank each site can hold."""
    return {site.name: [0.0] * min(site.in_features, site.out_features) for site in sites}


def score(
    model: AdaptedModel,
    loss: Loss,
    batches: Sequence[Batch],
    warmup: Iterable[Batch],
    *,
    proxy: Proxy,
    probe: Probe,
    seed: int,
    proxy_name: str | None = None,
    track: Track = untracked,
) -> Mapping[str, Score]:
    """Scores of all sites of the model's space; see ``search``."""
    name = proxy_name or type(proxy).__name__.lower()
    found = score_all(model, loss, batches, warmup, proxies={name: proxy}, probe=probe, seed=seed, track=track)
    return found.scores[name]


@dataclass(frozen=True)
class Scored:
    """Scores by several proxies.

    Attributes:
        scores: proxy -> site -> score.
        resampled: proxy -> scores of all batches, and of each resample; of those proxies that can be resampled.
        scratch: whether values were held on disk.
        seconds: proxy -> what it took beside the one.
    """

    scores: dict[str, Mapping[str, Score]]
    resampled: Mapping[str, Resampled]
    scratch: bool
    seconds: Mapping[str, float]


def score_all(
    model: AdaptedModel,
    loss: Loss,
    batches: Sequence[Batch],
    warmup: Iterable[Batch],
    *,
    proxies: Mapping[str, Proxy],
    probe: Probe,
    seed: int,
    track: Track = untracked,
    resampling: Resampling | None = None,
    numbers: int | None = None,
    own: bool = False,
) -> Scored:
    """Scores by several proxies, from one pass over the batches for all that share it; see ``search``.

    What is held beside the model stays within what a training step on the largest batch would need: where the values
    that proxies score from are more, they are summed in a scratch file, and scored a few sites at a time.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batches: what is scored, on the model's device.
        warmup: batches for the head's warm-up, repeated as often as needed.
        proxies: name -> proxy.
        probe: how proxies look.
        seed: for random factors and proxies that draw.
        track: shows progress.
        resampling: score again from resampled batches; None: do not.
        numbers: how many numbers may be held for the sites; None: as many as a training step leaves room for.
        own: sites whose adapter was trained are scored by its factors, and not by the probe's.

    Raises:
        DegenerateScores: if the scores of a proxy rank nothing.
        SettingError: if a proxy cannot score this space.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("scoring needs gradients: leave torch.inference_mode() first")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: a pass is not worth a compilation
    sites = model.space.sites
    for name, proxy in proxies.items():
        if getattr(proxy, "needs_weights", False):
            check_weights(name, [site.name for site in sites if model.frozen_weight(site.name) is None])
    with untouched(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        adapters = _probe_adapters(model, probe, seed)
        if own:
            adapters |= {name: model.adapter(name) for name in model.held if _trained(model.adapter(name))}
        bench = Bench(model, batches, loss, probe.live, probe.reduction, track)
        one = _Pass(bench, adapters, proxies, seed, resampling)
        if one.statistics:
            if not batches:
                needing = [name for name, proxy in proxies.items() if proxy.statistics]
                raise SettingError("probe.batches", 0, f"proxy={','.join(needing)} needs batches to score")
            if needs_head(one.statistics):
                _warm_up_head(model, loss, warmup, probe, track)
            one.run(numbers)
        return one.scored()


class _Pass:
    """The pass that several proxies need, and what it leaves."""

    def __init__(
        self,
        bench: Bench,
        adapters: Mapping[str, Any],
        proxies: Mapping[str, Proxy],
        seed: int,
        resampling: Resampling | None,
    ) -> None:
        self.bench = bench
        self.adapters = adapters
        self.proxies = proxies
        self.seed = seed
        self.resampling = resampling
        self.sites = bench.model.space.sites
        self.scratch = False
        self.found: dict[str, dict[str, Score]] = {name: {} for name in proxies}
        self.resampled: dict[str, Resampled] = {}
        self.seconds = dict.fromkeys(proxies, 0.0)
        self._local = {n: p for n, p in proxies.items() if getattr(p, "local", False) and p.statistics}
        self._kept: dict[Statistic, Mapping[str, Values]] = {
            s: {} for n, p in proxies.items() if n not in self._local for s in p.statistics
        }

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Of all proxies, each once."""
        return tuple(dict.fromkeys(statistic for proxy in self.proxies.values() for statistic in proxy.statistics))

    def run(self, numbers: int | None) -> None:
        """Gather, and score what can be scored site by site."""
        again = {}
        if self.resampling is not None:
            again = {name: proxy for name, proxy in self._local.items() if can_be_resampled(proxy)}
        parts = self._parts(numbers)
        self.scratch = len(parts) > 1
        with ExitStack() as exits:
            collector = None
            if again and self.resampling is not None:
                wanted = dict.fromkeys(statistic for proxy in again.values() for statistic in proxy.statistics)
                collector = exits.enter_context(BatchValues(tuple(wanted), self.seed))
            hold = partial(self._hold, exits)
            held = gather(self.bench, self.adapters, self.statistics, collector, hold)
            for sites in parts:
                some = {s: {site.name: values[site.name] for site in sites} for s, values in held.items()}
                self._score(self._local, sites, some)
            for statistic in self._kept:
                self._kept[statistic] = held[statistic]
            if collector is not None and self.resampling is not None:
                families = self.bench.model.space.families
                self.resampled = resampled_scores(
                    collector, again, self.sites, self.adapters, families, self.bench, self.resampling
                )

    def _hold(self, exits: ExitStack, statistic: Statistic) -> MutableMapping[str, Values]:
        """On disk, if there is no room, what only is looked at a few sites at a time."""
        large = any(statistic.numbers(site) for site in self.sites)
        if self.scratch and large and statistic not in self._kept:
            return exits.enter_context(ScratchValues())
        return {}

    def scored(self) -> Scored:
        """Score what sees all sites at once, and check everything."""
        others = {name: proxy for name, proxy in self.proxies.items() if name not in self._local}
        self._score(others, self.sites, self._kept)
        for name, proxy in self.proxies.items():
            check_scores(name, proxy, self.found[name], [site.name for site in self.sites])
        return Scored(dict(self.found), self.resampled, self.scratch, self.seconds)

    def _score(self, proxies: Mapping[str, Proxy], sites: Sequence[Site], gathered: Mapping[Any, Any]) -> None:
        families = self.bench.model.space.families
        evidence = Evidence(sites, self.adapters, gathered, families, self.bench, self.seed)
        for name, proxy in proxies.items():
            start = time.perf_counter()
            if (
                self.bench.model.training
            ):  # a walk over all modules, which site by site would take longer than the score
                self.bench.model.eval()
            self.found[name].update(proxy.score(evidence))
            self.seconds[name] += time.perf_counter() - start

    def _parts(self, numbers: int | None) -> list[Sequence[Site]]:
        """All sites together if there is room for that, and for what is computed of one of them; or each alone."""
        sizes = [sum(s.numbers(site) for s in self.statistics if s not in self._kept) for site in self.sites]
        whole = sum(sizes) + _WORK * max(sizes)
        if numbers is None:
            numbers = whole if whole <= _FEW else self._room()
        return [tuple(self.sites)] if whole <= numbers else [(site,) for site in self.sites]

    def _room(self) -> int:
        """Numbers for which a training step with an adapter at every site has room, on the largest batch."""
        model = self.bench.model
        batch = max(self.bench.batches, key=batch_size)
        mib = []
        with model.swapped(self.adapters):
            for training in (True, False):
                model.train(training)
                mib.append(kept_mib(model, lambda: self.bench.loss(model, batch)))
        step, kept = mib
        if not needs_head(self.statistics):  # no backward, so that nothing is kept for it
            kept = 0.0
        return int(max(_SLACK * step - kept, 0.0) * 2**20 / next(iter(self.adapters.values())).A.element_size())


def needs_head(statistics: Iterable[Statistic]) -> bool:
    """Whether any of them sees a gradient, which comes through the head: a forward pass alone does not."""
    return any(statistic.needs_gradient for statistic in statistics)


def _probe_adapters(model: AdaptedModel, probe: Probe, seed: int) -> dict[str, Any]:
    device, dtype = next(model.backbone.parameters()).device, adapter_dtype(model.backbone)
    adapters = {}
    for site in model.space.sites:
        if probe.init == "lora":
            adapter = model.family.build(site, probe.rank, seed)
        else:
            adapter = model.family.probe(site, probe.rank, probe.std, seed)
        adapters[site.name] = adapter.to(device=device, dtype=dtype)
    return adapters


def _trained(adapter: Any) -> bool:
    """Whether it gives anything: one that never trained has B = 0, by which many a score is 0."""
    return bool(adapter.B.any())


def _warm_up_head(model: AdaptedModel, loss: Loss, warmup: Iterable[Batch], probe: Probe, track: Track) -> None:
    head = list(model.head_parameters.values())
    if not head or not probe.head_warmup_steps:
        return
    model.eval()
    optimizer = torch.optim.AdamW(head, lr=probe.head_warmup_lr, weight_decay=0.0)
    steps = 0
    with model.disabled():
        for batch in track(
            islice(cycle(warmup), probe.head_warmup_steps), "warming up the head", probe.head_warmup_steps
        ):
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
    if steps < probe.head_warmup_steps:
        raise SettingError(
            "probe.head_warmup_steps", probe.head_warmup_steps, "there are no batches to warm up on; use 0"
        )


def batch_size(batch: Batch) -> int:
    """Numbers that it holds."""
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


@contextmanager
def untouched(model: AdaptedModel) -> Iterator[None]:
    """Put back the head, gradients, train/eval modes and random state on exit, even after an error."""
    head = model.head_parameters
    values = {name: p.detach().clone() for name, p in head.items()}
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in head.items():
                    parameter.copy_(values[name])
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in modes:
                module.training = training
