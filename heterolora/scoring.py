"""The search: where proxy, allocator and model meet.

It leaves no trace: model, head, gradients, modes and random state are exactly as before.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch

from heterolora.adapters.base import AdapterFamily, speaks
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, Gains, favoured, parameters_only
from heterolora.allocators.timed import allocate_in_time
from heterolora.budget import Budget, SiteCount
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel, adapter_dtype
from heterolora.processes import ALONE, Processes
from heterolora.proxies.base import Proxy, Score, check_scores, check_weights, looks_at_batches, needs_trained
from heterolora.proxies.evidence import (
    Batch,
    Bench,
    Evidence,
    Loss,
    Measure,
    Statistic,
    Track,
    Values,
    check_ids,
    gather,
)
from heterolora.report.memory import kept_mib
from heterolora.resampling import BatchValues, Resampled, Resampling, can_be_resampled, resampled_scores
from heterolora.scratch import ScratchValues
from heterolora.sites import Site
from heterolora.space import Space
from heterolora.step_time import StepLimit
from heterolora.warmup import warm_up_adapters, warm_up_head

_log = logging.getLogger(__name__)

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
        rank: rank of the probe's factors, and of adapters that are warmed up.
        batches: batches of the training split that are scored.
        reduction: over batches, ``mean`` or ``sum`` of the gradients.
        head_warmup_steps: train the head alone for so many steps before scoring (it is put back afterwards): a
            gradient through a random head is mostly noise.
        head_warmup_lr: AdamW's learning rate for that.
        adapter_warmup_steps: then train fresh adapters (always initialised as by ``lora``) at all candidate sites,
            together with the head, for so many steps on the batches that follow. They and their head are what proxies
            that need trained adapters see, in place of what the model holds; with ``live``, every proxy does.
        adapter_warmup_lr: AdamW's learning rate of these adapters; the head's stays ``head_warmup_lr``.
    """

    init: Literal["random", "lora"]
    live: bool
    std: float
    rank: int
    batches: int
    reduction: Literal["mean", "sum"]
    head_warmup_steps: int
    head_warmup_lr: float
    adapter_warmup_steps: int
    adapter_warmup_lr: float

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise SettingError("std", self.std, "a number above 0")
        for name, least in (("rank", 1), ("batches", 1), ("head_warmup_steps", 0), ("adapter_warmup_steps", 0)):
            if getattr(self, name) < least:
                raise SettingError(name, getattr(self, name), f"a whole number of at least {least}")
        for rate in ("head_warmup_lr", "adapter_warmup_lr"):
            if not 0 < getattr(self, rate) < math.inf:
                raise SettingError(rate, getattr(self, rate), "a number above 0")

    def trains_adapters(self, proxies: Iterable[Proxy]) -> bool:
        """Whether adapters are warmed up for one of these proxies."""
        seeing = [proxy for proxy in proxies if needs_trained(proxy) or (self.live and looks_at_batches(proxy))]
        return bool(self.adapter_warmup_steps and seeing)


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
    measure: Measure | None = None,
    processes: Processes = ALONE,
) -> SearchResult:
    """Score the sites of the model's space and allocate the budget; nothing is enabled, nothing is changed.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batches: what is scored, on the model's device.
        warmup: batches for the warm-up of head and adapters, repeated as often as needed.
        proxy: scores the sites.
        allocator: turns gains into ranks.
        budget: how much may be held.
        probe: how the proxy looks.
        seed: for random factors and proxies that draw.
        proxy_name: what to call the proxy in messages.
        track: shows progress.
        limit: measures what the budget's ``step_time`` means (``calibration.step_limit``), on the model as it is.
        standing: what is trained already, for a search in the middle of training; None: nothing is.
        measure: says how well the model predicts, for proxies that ask; None: they take the loss.
        processes: all that search, each with the same model and batches.

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
        found = score_all(
            model,
            loss,
            batches,
            warmup,
            proxies={name: proxy},
            probe=probe,
            seed=seed,
            track=track,
            measure=measure,
            own=standing is not None and standing.own,
            processes=processes,
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
    measure: Measure | None = None,
) -> Mapping[str, Score]:
    """Scores of all sites of the model's space; see ``search``."""
    name = proxy_name or type(proxy).__name__.lower()
    found = score_all(
        model, loss, batches, warmup, proxies={name: proxy}, probe=probe, seed=seed, track=track, measure=measure
    )
    return found.scores[name]


@dataclass(frozen=True)
class Scored:
    """Scores by several proxies.

    Attributes:
        scores: proxy -> site -> score.
        resampled: proxy -> scores of all batches, and of each resample; of those proxies that can be resampled.
        scratch: whether values were held on disk.
        seconds: proxy -> what it took beside the one pass.
        notes: proxy -> plain values that it left about a pass of its own.
    """

    scores: dict[str, Mapping[str, Score]]
    resampled: Mapping[str, Resampled]
    scratch: bool
    seconds: Mapping[str, float]
    notes: Mapping[str, Mapping[str, Any]]


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
    measure: Measure | None = None,
    processes: Processes = ALONE,
) -> Scored:
    """Scores by several proxies, from one pass over the batches for all that share it; see ``search``.

    Proxies that need trained adapters come last, when these have been warmed up (``Probe.adapter_warmup_steps``).

    What is held beside the model stays within what a training step on the largest batch would need: where the values
    that proxies score from are more, they are summed in a scratch file, and scored a few sites at a time.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batches: what is scored, on the model's device.
        warmup: batches for the warm-up of head and adapters, repeated as often as needed.
        proxies: name -> proxy.
        probe: how proxies look.
        seed: for random factors and proxies that draw.
        track: shows progress.
        resampling: score again from resampled batches; None: do not.
        numbers: how many numbers may be held for the sites; None: as many as a training step leaves room for.
        own: sites whose adapter was trained are scored by its factors, and not by the probe's.
        measure: says how well the model predicts, for proxies that ask; None: they take the loss.
        processes: all that score, each with the same model and batches; resampling is for one alone.

    Raises:
        DegenerateScores: if the scores of a proxy rank nothing.
        SettingError: if a proxy cannot score this space, or has no trained adapters to look at.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("scoring needs gradients: leave torch.inference_mode() first")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: a pass is not worth a compilation
    sites = model.space.sites
    for name, proxy in proxies.items():
        check_ids("proxy", name, proxy.statistics, sites)
        if getattr(proxy, "needs_weights", False):
            check_weights(name, [site.name for site in sites if model.frozen_weight(site.name) is None])
    check_trained(proxies, probe, model)
    looking = [name for name, proxy in proxies.items() if looks_at_batches(proxy)]
    if looking and not batches:
        raise SettingError("probe.batches", 0, f"proxy={','.join(looking)} needs batches to score")
    later = {name: proxy for name, proxy in proxies.items() if needs_trained(proxy) or _sees_trained(probe)}
    now = {name: proxy for name, proxy in proxies.items() if name not in later}
    coming = cycle(warmup)
    made = partial(
        Bench, model, batches, loss, reduction=probe.reduction, track=track, measure=measure, processes=processes
    )
    with untouched(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        if any(sees_head(proxy) for proxy in proxies.values()) or probe.trains_adapters(later.values()):
            warm_up_head(model, loss, coming, probe.head_warmup_steps, probe.head_warmup_lr, track)
        found = []
        if now:
            bench = made(live=probe.live)
            adapters = _probe_adapters(model, probe, seed)
            if own:
                held: dict[str, Any] = {name: model.adapter(name) for name in model.held}
                adapters |= {name: adapter for name, adapter in held.items() if speaks(adapter)}
            one = _Pass(bench, adapters, now, seed, resampling)
            found.append(one.scored(numbers))
        if later:
            adapters = _probe_adapters(model, probe, seed)
            if probe.trains_adapters(later.values()):
                adapters = _fresh_everywhere(model, probe, seed)
                steps, rates = probe.adapter_warmup_steps, (probe.adapter_warmup_lr, probe.head_warmup_lr)
                warm_up_adapters(model, loss, coming, adapters, steps, *rates, track)
            bench = made(live=bool(probe.adapter_warmup_steps))
            found.append(_Pass(bench, adapters, later, seed, resampling).scored(numbers))
    return _joined(found, list(proxies))


def _sees_trained(probe: Probe) -> bool:
    """Whether every proxy sees adapters that were warmed up."""
    return probe.live and probe.adapter_warmup_steps > 0


def _joined(found: Sequence[Scored], names: Sequence[str]) -> Scored:
    """What passes found, in the order of the proxies."""
    scores = {name: values for part in found for name, values in part.scores.items()}
    seconds = {name: value for part in found for name, value in part.seconds.items()}
    return Scored(
        {name: scores[name] for name in names},
        {name: values for part in found for name, values in part.resampled.items()},
        any(part.scratch for part in found),
        {name: seconds[name] for name in names},
        {name: values for part in found for name, values in part.notes.items()},
    )


def check_trained(proxies: Mapping[str, Proxy], probe: Probe, model: AdaptedModel) -> None:
    """Refuse proxies that need trained adapters where there will be none.

    Raises:
        SettingError: naming the setting that trains some.
    """
    needing = [name for name, proxy in proxies.items() if needs_trained(proxy)]
    steps = probe.adapter_warmup_steps
    if steps and not needing and not probe.live and any(looks_at_batches(proxy) for proxy in proxies.values()):
        _log.warning(
            "probe.adapter_warmup_steps=%d: plays no part, for proxy=%s looks at the pretrained function; "
            "probe.live=true would show it the trained adapters",
            steps,
            ",".join(proxies),
        )
    active: Iterable[Any] = filter(None, map(model.active_adapter, model.held))
    if needing and not steps and not any(map(speaks, active)):
        raise SettingError(
            "probe.adapter_warmup_steps",
            0,
            f"proxy={','.join(needing)} needs trained adapters; the paper: 32",
        )


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
        self.notes: dict[str, dict[str, Any]] = {}
        self._local = {n: p for n, p in proxies.items() if getattr(p, "local", False) and p.statistics}
        self._kept: dict[Statistic, Mapping[str, Values]] = {
            s: {} for n, p in proxies.items() if n not in self._local for s in p.statistics
        }

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Of all proxies, each once."""
        return tuple(dict.fromkeys(statistic for proxy in self.proxies.values() for statistic in proxy.statistics))

    def _run(self, numbers: int | None) -> None:
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

    def scored(self, numbers: int | None) -> Scored:
        """Gather if anything must be, score, and check everything."""
        if self.statistics:
            self._run(numbers)
        others = {name: proxy for name, proxy in self.proxies.items() if name not in self._local}
        self._score(others, self.sites, self._kept)
        for name, proxy in self.proxies.items():
            check_scores(name, proxy, self.found[name], [site.name for site in self.sites])
        return Scored(dict(self.found), self.resampled, self.scratch, self.seconds, self.notes)

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
            if self.bench.notes:
                self.notes[name] = dict(self.bench.notes)
                self.bench.notes.clear()

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
        return int(max(_SLACK * step - kept, 0.0) * 2**20 / adapter_dtype(model.backbone).itemsize)


def needs_head(statistics: Iterable[Statistic]) -> bool:
    """Whether any of them sees a gradient, which comes through the head: a forward pass alone does not."""
    return any(statistic.needs_gradient for statistic in statistics)


def sees_head(proxy: Proxy) -> bool:
    """Whether it is warmed up for this proxy."""
    return needs_trained(proxy) or needs_head(proxy.statistics)


def _probe_adapters(model: AdaptedModel, probe: Probe, seed: int) -> dict[str, Any]:
    if probe.init == "lora":
        return _fresh_everywhere(model, probe, seed)
    return model.probes(probe.rank, probe.std, seed)


def _fresh_everywhere(model: AdaptedModel, probe: Probe, seed: int) -> dict[str, Any]:
    return model.fresh({site.name: probe.rank for site in model.space.sites}, seed)


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
