"""The search: where proxy, allocator and model meet.

It leaves no trace: model, head, gradients, modes and random state are exactly as before.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch

from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, parameters_only
from heterolora.budget import Budget, SiteCount
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel, adapter_dtype
from heterolora.proxies.base import Proxy, Score, check_scores, check_weights
from heterolora.proxies.evidence import Batch, Bench, Evidence, Loss, Statistic, Track, gather
from heterolora.sites import Site


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
    """

    scores: Mapping[str, Score] | None
    allocation: Allocation
    seconds: float


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

    Raises:
        DegenerateScores: if the scores rank nothing.
        SettingError: if budget and allocator cannot go together.
    """
    start = time.perf_counter()
    space = model.space
    resolved = budget.resolve(space)
    check_budget(allocator, resolved, model)
    rehearse(allocator, resolved, model)
    scores: Mapping[str, Score] | None = None
    rule = allocator.gain_rule
    if rule is None:
        gains = no_gains(space.sites)
    else:
        scores = score(
            model, loss, batches, warmup, proxy=proxy, probe=probe, seed=seed, proxy_name=proxy_name, track=track
        )
        gains = rule.gains(scores, space.sites, space.groups)
    allocation = allocator.allocate(gains, model.family.cost(space.sites), resolved, space.groups)
    if not allocation.active:
        raise SettingError("budget", resolved, "pays for no adapter at any site; give more")
    return SearchResult(scores, allocation, time.perf_counter() - start)


def check_budget(allocator: Allocator, budget: int | SiteCount, model: AdaptedModel) -> None:
    """Refuse before scoring what would be refused after it.

    Raises:
        SettingError: if the budget buys nothing, or the allocator cannot read it.
    """
    cost = model.family.cost(model.space.sites)
    cheapest = min(cost({site.name: 1}) for site in model.space.sites)
    if isinstance(budget, int) and budget < cheapest:
        raise SettingError("budget", budget, f"one unit of rank at the cheapest site costs {cheapest}")
    if not allocator.counts_sites:
        parameters_only(budget, type(allocator).__name__.lower())


def rehearse(allocator: Allocator, budget: int | SiteCount, model: AdaptedModel) -> None:
    """Allocate by equal scores, so that what the allocator cannot keep to is refused before anything is computed.

    Raises:
        SettingError: what the allocator refuses.
    """
    space, rule = model.space, allocator.gain_rule
    if rule is None:
        gains = no_gains(space.sites)
    else:
        gains = rule.gains({site.name: 1.0 for site in space.sites}, space.sites, space.groups)
    allocator.allocate(gains, model.family.cost(space.sites), budget, space.groups)


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
    return score_all(model, loss, batches, warmup, proxies={name: proxy}, probe=probe, seed=seed, track=track)[name]


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
) -> dict[str, Mapping[str, Score]]:
    """Scores by several proxies, from one pass over the batches for all that share it; see ``search``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("scoring needs gradients: leave torch.inference_mode() first")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: a pass is not worth a compilation
    sites = model.space.sites
    for name, proxy in proxies.items():
        if getattr(proxy, "needs_weights", False):
            check_weights(name, [site.name for site in sites if model.frozen_weight(site.name) is None])
    statistics = tuple(statistic for proxy in proxies.values() for statistic in proxy.statistics)
    found = {}
    with untouched(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        adapters = _probe_adapters(model, probe, seed)
        bench = Bench(model, batches, loss, probe.live, probe.reduction, track)
        gathered: Mapping[Any, Any] = {}
        if statistics:
            if not batches:
                needing = [name for name, proxy in proxies.items() if proxy.statistics]
                raise SettingError("probe.batches", 0, f"proxy={','.join(needing)} needs batches to score")
            if needs_head(statistics):
                _warm_up_head(model, loss, warmup, probe, track)
            gathered = gather(bench, adapters, statistics)
        evidence = Evidence(sites, adapters, gathered, model.space.families, bench, seed)
        for name, proxy in proxies.items():
            model.eval()
            found[name] = proxy.score(evidence)
            check_scores(name, proxy, found[name], [site.name for site in sites])
    return found


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
