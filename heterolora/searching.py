"""One search without fine-tuning: score, allocate under every budget, and write everything down."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import nn

from heterolora.adapters.lora import LoRA
from heterolora.agreement import Agreement, agree
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, placed
from heterolora.backbone import outside_base
from heterolora.budget import Budget, SiteCount
from heterolora.calibration import kept_step_times, step_limit
from heterolora.callbacks.progress import track
from heterolora.data.module import TextData
from heterolora.errors import SettingError
from heterolora.export import config_to_train
from heterolora.findings import Scores, read_scores, write_findings
from heterolora.model import AdaptedModel
from heterolora.parts import Parts
from heterolora.peft_config import CONFIG, module_of
from heterolora.provenance import provenance
from heterolora.proxies.base import Proxy, check_scores, leading, looks_at_batches, total
from heterolora.report.files import write_json, write_text, write_whole
from heterolora.report.memory import now_mib, peak_mib, reset_peak
from heterolora.report.search import print_search
from heterolora.resampling import Resampled, Resampling
from heterolora.scoring import allocate, check_budget, check_trained, rehearse, score_all
from heterolora.space import Space, survey
from heterolora.step_time import StepLimit, StepTimes, in_short
from heterolora.tasks.base import Task
from heterolora.tasks.measure import FirstMetric
from heterolora.training import for_the_record

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """What one search is asked.

    Attributes:
        proxies: name -> proxy; all are scored.
        first: the proxy that ``allocation.json`` is made with.
        budgets: name -> budget; the first is that of ``allocation.json``.
        nodes: ``proxy`` and ``budget`` -> name -> config node, for the record.
        scores: a ``scores.json``, or the folder of one, to allocate from; None: score.
        resamples: how often batches are drawn again.
    """

    proxies: Mapping[str, Proxy]
    first: str
    budgets: Mapping[str, Budget]
    nodes: Mapping[str, Mapping[str, Any]]
    scores: Path | None
    resamples: int


@dataclass(frozen=True)
class _Found:
    """Scores, and what is known about them.

    Attributes:
        backbone: with weights or without.
        head: names of its parameters that are trained with the task.
        times: what the parts of a step take; None: no budget asks.
        notes: proxy -> what it left about a pass of its own, such as its cost.
    """

    space: Space
    backbone: nn.Module
    head: Sequence[str]
    scores: Scores | None
    agreement: Agreement | None
    fingerprint: str | None
    seconds: Mapping[str, float]
    memory: Mapping[str, float | None]
    times: StepTimes | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def run_search(parts: Parts, config: Mapping[str, Any], folder: Path, asked: Questions) -> dict[str, Any]:
    """Search, print and write; nothing is trained but a head for scoring, which is dropped.

    Args:
        parts: the objects.
        config: the resolved config, for the record.
        folder: of the search; nothing is written before all settings have proved usable.
        asked: proxies and budgets.

    Returns:
        What is also written to ``search.json``.

    Raises:
        SettingError: for anything that a user can mend.
    """
    threads = torch.get_num_threads()
    if parts.trainer.threads is not None:
        torch.set_num_threads(parts.trainer.threads)
    try:
        found, config = _given(parts, config, asked) if asked.scores else _scored(parts, config, asked)
    finally:
        torch.set_num_threads(threads)
    allocations = _allocations(parts, config, asked, found)
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    for (budget, proxy), allocation in allocations.items() if len(allocations) > 1 else ():
        inner = folder / "allocations" / budget / proxy
        inner.mkdir(parents=True)
        _write(inner, parts, found, allocation, proxy, _title(parts, budget, proxy))
    (budget, proxy), main = next(iter(allocations.items()))
    _write(folder, parts, found, main, proxy, _title(parts, budget, proxy))
    if found.scores is not None:
        table = _score_table(found.space, found.scores)
        write_whole(folder / "scores.csv", partial(table.to_csv, index=False))
    if found.agreement is not None:
        write_json(folder / "agreement.json", found.agreement.as_dict())
    summary = {
        "title": _title(parts, budget, proxy),
        "seed": parts.seed,
        "choices": dict(parts.choices),
        "backbone": found.fingerprint,
        "sites": len(found.space.sites),
        "seconds": dict(found.seconds),
        "memory_mib": dict(found.memory),
        "notes": dict(found.notes),
        "allocations": [
            {
                "budget": budget,
                "proxy": proxy,
                "parameters": allocation.spent,
                "allowed": allocation.budget,
                "sites": len(allocation.active),
                "folder": f"allocations/{budget}/{proxy}" if len(allocations) > 1 else ".",
                **in_short(allocation.provenance),
            }
            for (budget, proxy), allocation in allocations.items()
        ],
        "left_out_of_peft": _left_out(found.space, parts, main),
        "folder": str(folder),
    }
    write_json(folder / "search.json", summary)
    print_search(found.space, parts.adapter, main, found.agreement, summary)
    return summary


def _given(parts: Parts, config: Mapping[str, Any], asked: Questions) -> tuple[_Found, Mapping[str, Any]]:
    """Scores of an earlier search; neither weights nor data are read."""
    assert asked.scores is not None
    start = time.perf_counter()
    path = asked.scores / "scores.json" if asked.scores.is_dir() else asked.scores
    if timed := [name for name, budget in asked.budgets.items() if budget.step_time is not None]:
        raise SettingError(
            "budget.step_time",
            asked.budgets[timed[0]].step_time,
            "is timed on the model, of which scores=... reads no weights; leave scores away, or give null here",
        )
    scores = read_scores(path, "scores")
    skeleton = parts.model.skeleton(2)  # the head has no sites
    space = parts.search_space.resolve(survey(skeleton.model, skeleton.layout))
    _check(parts, space, asked)
    names = [site.name for site in space.sites]
    for name, proxy in asked.proxies.items():
        if name not in scores.scores:
            raise SettingError(
                "scores", path, f"has no scores of proxy={name}; give proxy= or proxies= of {list(scores.scores)}"
            )
        if missing := [site for site in names if site not in scores.scores[name]]:
            raise SettingError(
                "scores", path, f"lacks sites of this space: {missing[:3]} ({len(missing)} of {len(names)})"
            )
        check_scores(name, proxy, {site: scores.scores[name][site] for site in names}, names)
    chosen = {name: {site: scores.scores[name][site] for site in names} for name in asked.proxies}
    same = scores.model is not None and dict(scores.model) == config["model"]
    if not same:
        _log.warning(
            "scores=%s: made with other model settings; only the names of the sites were compared with this model's",
            path,
        )
    fingerprint = scores.backbone if same else None
    kept = Scores(asked.first, chosen, scores.rows, fingerprint, config["model"] if same else scores.model)
    agreement = agree(_vectors(parts.allocator, space, kept), {}) if len(chosen) > 1 else None
    seconds = {"reading": time.perf_counter() - start}
    head = outside_base(skeleton.model)
    return _Found(space, skeleton.model, head, kept, agreement, fingerprint, seconds, {}), config


def _scored(parts: Parts, config: Mapping[str, Any], asked: Questions) -> tuple[_Found, Mapping[str, Any]]:
    """Load and score."""
    start = time.perf_counter()
    looked = [name for name, proxy in asked.proxies.items() if looks_at_batches(proxy)]
    splits, _, task = parts.data.splits(parts.task)
    config = for_the_record(config, task)
    backbone = parts.model.load(task.outputs, parts.seed)
    space = parts.search_space.resolve(survey(backbone.model, backbone.layout))
    _check(parts, space, asked)
    model = AdaptedModel(backbone.model, space, parts.adapter, backbone.head).to(_device(parts.trainer.accelerator))
    if backbone.gradient_checkpointing:
        model.gradient_checkpointing()
    check_trained(asked.proxies, parts.probe, model)
    data = TextData(splits, task, backbone.tokenizer, backbone.positions, parts.data, parts.seed)
    batches, rows = data.scoring_batches(parts.probe.batches) if looked else ([], [])
    ready = time.perf_counter()
    scores, agreement, seconds = None, None, {"loading": ready - start}
    notes: Mapping[str, Any] = {}
    device = next(model.backbone.parameters()).device
    times = _times(parts, asked, model, task, data)
    if times is not None:
        seconds["step times"] = time.perf_counter() - ready
    loaded, ready = now_mib(), time.perf_counter()
    reset_peak()
    if asked.proxies:
        resampling = None
        if asked.resamples and len(batches) > 1:
            resampling = Resampling(asked.resamples, _units(parts.allocator), parts.seed)
        elif asked.resamples and batches:
            _log.warning("probe.batches=1: a single batch cannot be drawn in two ways, so there are no intervals")
        result = score_all(
            model,
            lambda m, batch: task.loss(task.logits(m, batch), batch),
            [{key: value.to(device) for key, value in batch.items()} for batch in batches],
            ({key: value.to(device) for key, value in batch.items()} for batch in data.warmup_batches()),
            proxies=asked.proxies,
            probe=parts.probe,
            seed=parts.seed,
            track=track,
            resampling=resampling,
            measure=FirstMetric(task),
        )
        notes = result.notes
        scores = Scores(asked.first, result.scores, rows, backbone.fingerprint, config["model"])
        agreement = _agreement(parts.allocator, space, scores, result.resampled)
        seconds |= {"scoring": time.perf_counter() - ready, **{f"of it {n}": s for n, s in result.seconds.items()}}
    memory = {"process, model loaded": loaded, "peak above it": None if loaded is None else peak_mib() - loaded}
    fingerprint, head = backbone.fingerprint, backbone.head
    return _Found(space, backbone.model, head, scores, agreement, fingerprint, seconds, memory, times, notes), config


def _times(parts: Parts, asked: Questions, model: AdaptedModel, task: Task, data: TextData) -> StepTimes | None:
    """What a step takes, if a budget limits it; what no allocation can keep to is refused."""
    parts.prefix.check(model)
    if all(budget.step_time is None for budget in asked.budgets.values()):
        return None
    device = next(model.backbone.parameters()).device
    found = kept_step_times(
        model,
        lambda m, batch: task.loss(task.logits(m, batch), batch),
        {key: value.to(device) for key, value in data.typical_batch().items()},
        None if parts.data.cache_dir is None else Path(parts.data.cache_dir),
        track,
    )
    _check(parts, model.space, asked, found)
    return found


def _limit(parts: Parts, budget: Budget, space: Space, times: StepTimes | None) -> StepLimit | None:
    limit = None if times is None else step_limit(budget, space.survey, lambda: times)
    return limit and replace(limit, cached=parts.prefix.cache)


def _check(parts: Parts, space: Space, asked: Questions, times: StepTimes | None = None) -> None:
    """Every budget, before anything is computed, and again once times of a step are known."""
    for name, budget in asked.budgets.items():
        try:
            resolved = budget.resolve(space)
            check_budget(parts.allocator, resolved, space, parts.adapter)
            limit = _limit(parts, budget, space, times)
            rehearse(placed(parts.allocator, space.sites), resolved, space, parts.adapter, limit)
        except SettingError as error:
            if len(asked.budgets) == 1:
                raise
            raise SettingError("budgets", name, str(error)) from error


def _device(accelerator: str) -> torch.device:
    """Where a training run with this accelerator would be."""
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if on_gpu else "cpu")


def _units(allocator: Allocator) -> int:
    """How many units of rank of a score may matter."""
    rule = allocator.gain_rule
    return 32 if rule is None else rule.max_rank


def _vectors(allocator: Allocator, space: Space, scores: Scores) -> dict[str, Any]:
    units = _units(allocator)
    return {
        proxy: np.array([leading(found[site.name], units) for site in space.sites])
        for proxy, found in scores.scores.items()
    }


def _agreement(
    allocator: Allocator, space: Space, scores: Scores, resampled: Mapping[str, Resampled]
) -> Agreement | None:
    if len(scores.scores) < 2 and not resampled:
        return None
    return agree(_vectors(allocator, space, scores), resampled)


def _allocations(
    parts: Parts, config: Mapping[str, Any], asked: Questions, found: _Found
) -> dict[tuple[str, str], Allocation]:
    """Under every budget, by every proxy: the first of both comes first."""
    names = [asked.first, *(name for name in asked.proxies if name != asked.first)]
    if parts.allocator.gain_rule is None:  # all proxies would lead to the same
        names = [str(parts.choices.get("allocator", "allocator"))]
    allocations = {}
    for name, budget in asked.budgets.items():
        resolved: int | SiteCount = budget.resolve(found.space)
        limit = _limit(parts, budget, found.space, found.times)
        for proxy in names:
            scores = found.scores.scores[proxy] if parts.allocator.gain_rule is not None and found.scores else None
            rule = placed(parts.allocator, found.space.sites)
            got = allocate(rule, scores, resolved, found.space, parts.adapter, limit)
            timed = {} if limit is None else {"step_time": limit.record(found.space.sites, got.ranks)}
            origin = provenance(
                config,
                found.fingerprint,
                None if scores is None or found.scores is None else found.scores.rows,
                proxy=None if scores is None else asked.nodes["proxy"][proxy],
                budget=asked.nodes["budget"][name],
                scores=None if asked.scores is None else str(asked.scores),
                **timed,
            )
            allocations[name, proxy] = Allocation(got.ranks, got.spent, got.budget, origin)
    return allocations


def _write(folder: Path, parts: Parts, found: _Found, allocation: Allocation, proxy: str, title: str) -> None:
    scores = found.scores
    if scores is not None and proxy in scores.scores:
        scores = replace(scores, proxy=proxy)
    write_findings(folder, found.space, scores, allocation, parts.adapter, title)
    if not isinstance(parts.adapter, LoRA):
        _log.info("no %s: PEFT trains LoRA, and adapter=%s is none", CONFIG, parts.choices.get("adapter", "?"))
    elif set(allocation.active) - set(_left_out(found.space, parts, allocation)["sites"]):
        config = config_to_train(found.backbone, found.head, found.space, allocation.ranks, parts.adapter)
        write_json(folder / CONFIG, config)


def _left_out(space: Space, parts: Parts, allocation: Allocation) -> dict[str, Any]:
    """Sites with rank that PEFT cannot hold, and their parameters."""
    names = [name for name in allocation.active if module_of(space[name]) is None]
    cost = parts.adapter.cost(space.sites)
    return {"sites": names, "parameters": cost({name: allocation.ranks[name] for name in names})}


def _score_table(space: Space, scores: Scores) -> pd.DataFrame:
    """One row a site, one column a proxy: the sum over units of rank."""
    columns: dict[str, Sequence[Any]] = {"site": [site.name for site in space.sites]}
    for proxy, found in scores.scores.items():
        columns[proxy] = [float(total(found[site.name])) for site in space.sites]
    return pd.DataFrame(columns)


def _title(parts: Parts, budget: str, proxy: str) -> str:
    chosen = [str(parts.choices.get(key, "?")) for key in ("model", "search_space")]
    allocator = str(parts.choices.get("allocator", "?"))
    names = dict.fromkeys([*chosen, proxy, allocator, budget])
    return f"{parts.task.name}: {', '.join(names)}, seed {parts.seed}"
