"""Measuring what the parts of a training step take, here and now; and keeping it, so that later runs decide alike.

Steps with adapters at a few well chosen places are timed in turn, and the times of blocks and adapters are the
non-negative numbers that explain them best.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[import-untyped]
from torch import nn

from heterolora.budget import Budget
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel, adapter_dtype
from heterolora.proxies.evidence import Batch, Loss, Track
from heterolora.report.files import read_json, write_json
from heterolora.scoring import untouched, untracked
from heterolora.sites import Port, Site
from heterolora.space import Survey
from heterolora.step_time import StepLimit, StepTimes, kind_of, times_from

_log = logging.getLogger(__name__)

FORMAT = 1
"""Of a kept calibration, and of how it is made: another number makes all kept ones void."""

_SECONDS = 12.0
"""How long is measured, if that is neither too few nor too many rounds."""

_ROUNDS = (3, 9)
"""At least and at most so many steps of each placement, after one that warms up."""

_DEPTHS = 4
"""Places in each stream where the backward pass is made to end; between two of them, blocks are taken as equal."""

_SITES = 24
"""At most so many adapters of one shape at a time: enough to be seen in the time of a step."""

_RANKS = (2, 16)
"""Ranks at which adapters of each shape are timed."""

Placement: TypeAlias = dict[str, int]
"""Site name -> rank; sites that are not named hold nothing."""


def step_limit(budget: Budget, survey: Survey, times: Callable[[], StepTimes]) -> StepLimit | None:
    """What a budget's ``step_time`` means in seconds; None: it sets no limit.

    Args:
        budget: says the share, and the uniform allocation that it is a share of.
        survey: the backbone.
        times: measures, or reads what was measured; not asked where there is no limit.
    """
    if (share := getattr(budget, "step_time", None)) is None:
        return None
    measured = times()
    return StepLimit(measured, share, measured.predict(survey.lora_sites, budget.reference(survey)))


def kept_step_times(
    model: AdaptedModel, loss: Loss, batch: Batch, cache: Path | None, track: Track = untracked
) -> StepTimes:
    """The times of a step that were measured here before, or else measured now, and kept.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batch: of typical shape.
        cache: folder that calibrations are kept in; None: measure anew, and keep nothing.
        track: shows progress.

    Raises:
        SettingError: if nothing can be kept there.
    """
    if cache is None:
        _log.info("data.cache_dir=null: step times are measured anew, and another run may decide otherwise by its own")
        return calibrate(model, loss, batch, track)
    described = description(model, batch)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    path = cache.expanduser() / "step_times" / f"{digest}.json"
    if (found := _kept(path, described)) is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _keep(path, described, calibrate(model, loss, batch, track))
        except OSError as error:
            raise SettingError("data.cache_dir", cache, f"step times cannot be kept there ({error})") from error
        _log.info("step times are kept in %s; without that file they are measured anew", path)
    else:
        _log.info("step times from %s", path)
    return found


def _kept(path: Path, described: Mapping[str, Any]) -> StepTimes | None:
    """What the file holds, if it is whole and says what it is asked for; another one goes away, with a warning."""
    if not path.exists():
        return None
    try:
        content = read_json(path, "data.cache_dir")
        if content.get("of") == described:
            return times_from(content["times"])
        reason = "it is of something else than its name says"
    except (SettingError, KeyError, ValueError) as error:
        reason = str(error)
    _log.warning("kept step times in %s are damaged (%s); measuring anew", path, reason)
    path.unlink(missing_ok=True)
    return None


def _keep(path: Path, described: Mapping[str, Any], times: StepTimes) -> StepTimes:
    """Write the file whole, unless another process was faster: then its times are everybody's."""
    scratch = path.with_name(f".{path.stem}-{os.getpid()}.json")
    try:
        write_json(scratch, {"of": described, "times": times.as_dict()})
        os.link(scratch, path)
    except FileExistsError:
        return _kept(path, described) or times
    finally:
        scratch.unlink(missing_ok=True)
    return _kept(path, described) or times  # as it reads, so that this run and later ones see the same numbers


def description(model: AdaptedModel, batch: Batch) -> dict[str, Any]:
    """Plain values: everything on which the time of a step depends here."""
    backbone = model.backbone
    parameters = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in backbone.named_parameters()]
    config = getattr(backbone, "config", None)
    settings: dict[str, Any] = {} if config is None else dict(config.to_dict())
    for place in ("_name_or_path", "transformers_version"):
        settings.pop(place, None)
    device = next(backbone.parameters()).device
    return {
        "format": FORMAT,
        "backbone": type(backbone).__name__,
        "parameters_sha256": _digest(parameters),
        "config_sha256": _digest(settings),
        "head": sorted(model.head),
        "sites_sha256": _digest([site.as_dict() for site in model.space.sites]),
        "renorm": model.space.renorm,
        "adapter": repr(model.family),
        "batch": {key: [*value.shape] for key, value in sorted(batch.items()) if isinstance(value, torch.Tensor)},
        "checkpointing": bool(getattr(backbone, "is_gradient_checkpointing", False)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": cpu_model(),
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def calibrate(model: AdaptedModel, loss: Loss, batch: Batch, track: Track = untracked) -> StepTimes:
    """Measure the parts of a training step on this machine; the model is as before afterwards.

    Every linear layer of the backbone is covered, also those that are no sites of the model's space, so that any
    uniform allocation can be predicted, too.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batch: of typical shape, on the model's device.
        track: shows progress.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: eager steps are measured
    with (
        untouched(model),
        model.swapped({}),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        _widened(model) as wide,
    ):
        wide.train()
        plan = _Plan.of(wide.space.sites, wide.space.survey, _running_order(wide, loss, batch), bool(wide.head))
        clock = _Clock(wide, loss, batch)
        return plan.solve(clock.steps(plan.placements, track), clock.forward())


@contextmanager
def _widened(model: AdaptedModel) -> Iterator[AdaptedModel]:
    """The model with every linear layer of its backbone among its sites, LoRA sites first."""
    lora = model.space.survey.lora_sites
    names = {site.name for site in lora}
    sites = (*lora, *(site for site in model.space.sites if site.name not in names))
    groups = dict.fromkeys((site.name for site in sites), "all")
    checkpointing = _checkpoints(model)
    wide = AdaptedModel(model.backbone, replace(model.space, sites=sites, groups=groups), model.family, model.head)
    if checkpointing:
        wide.gradient_checkpointing()
    try:
        yield wide
    finally:
        wide.enable({}, 0)
        if checkpointing:
            model.gradient_checkpointing()


def _checkpoints(model: AdaptedModel) -> bool:
    """Whether this model had its backbone recompute activations."""
    functions = (getattr(block, "_gradient_checkpointing_func", None) for block in model.backbone.modules())
    contexts = [getattr(function, "keywords", {}).get("context_fn") for function in functions]
    return any(getattr(context, "__self__", None) is model for context in contexts)


def _running_order(model: AdaptedModel, loss: Loss, batch: Batch) -> list[str]:
    """The streams in the order in which they run."""
    stacks, order = model.space.survey.stacks, dict[str, None]()
    handles = [
        model.backbone.get_submodule(stack.blocks[0]).register_forward_pre_hook(
            lambda module, args, stream=stream: order.setdefault(stream)
        )
        for stream, stack in stacks.items()
    ]
    try:
        with torch.no_grad():
            loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [*order, *(stream for stream in stacks if stream not in order)]


@dataclass(frozen=True)
class _Plan:
    """What is timed, and how unknown seconds follow from it.

    Attributes:
        depths: stream -> number of blocks, in running order.
        cuts: levels where a backward pass is made to end, ascending; blocks from one to the next are taken as equal.
        shapes: kind of site -> number of its shape.
        placements: what is timed.
        rows: for each, how often it takes each of the unknown: the constant part, the backward pass of the blocks from
            each cut to the next, and of each shape the fixed part and that per unit of rank.
    """

    depths: Mapping[str, int]
    cuts: Sequence[int]
    shapes: Mapping[str, int]
    placements: Sequence[Placement]
    rows: Sequence[Sequence[float]]

    @classmethod
    def of(cls, sites: Sequence[Site], survey: Survey, order: Sequence[str], head: bool) -> "_Plan":
        """The plan for these sites; with a head, a step without adapters has something to train."""
        depths = {stream: survey.depth(stream) for stream in order}
        scale = StepTimes(0.0, {s: [0.0] * n for s, n in depths.items()}, {}, {})  # levels alone are asked of it
        first: dict[int, Site] = {}
        for site in sites:
            first.setdefault(scale.level(site), site)
        cuts: list[int] = []
        for stream in order:
            found = sorted(level for level, site in first.items() if site.stream == stream and level < scale.blocks)
            cuts += _spread(found, _DEPTHS)
        alike: dict[tuple[int, int, int], list[Site]] = {}
        for site in sites:
            alike.setdefault((site.in_features, site.out_features, _calls(site, survey)), []).append(site)
        shapes = {kind_of(site): number for number, group in enumerate(alike.values()) for site in group}
        placements: list[Placement] = [{}] if head else []
        placements += [{first[cut].name: min(_RANKS[0], _widest(first[cut]))} for cut in cuts]
        lowest = placements[1 if head else 0]
        for group in alike.values():
            some = _spread(group, _SITES)
            for rank in dict.fromkeys(min(rank, *map(_widest, some)) for rank in _RANKS):
                placements.append(lowest | {site.name: rank for site in some})
        by_name = {site.name: site for site in sites}
        rows = []
        for placement in placements:
            active = [(by_name[name], rank) for name, rank in placement.items()]
            reached = min((scale.level(site) for site, _ in active), default=scale.blocks)
            ends = [*cuts[1:], scale.blocks]
            row = [1.0, *(max(0, end - max(cut, reached)) / (end - cut) for cut, end in zip(cuts, ends, strict=True))]
            for number in range(len(alike)):
                ranks = [rank for site, rank in active if shapes[kind_of(site)] == number]
                row += [float(len(ranks)), float(sum(ranks))]
            rows.append(row)
        return cls(depths, cuts, shapes, placements, rows)

    def solve(self, seconds: Sequence[float], forward: Mapping[str, Sequence[float]]) -> StepTimes:
        """The non-negative seconds that explain the measured ones best.

        Args:
            seconds: of a step with each placement.
            forward: stream -> seconds of each block's forward.
        """
        found = [float(value) for value in nnls(np.array(self.rows), np.array(seconds))[0]]
        constant, segments, adapters = found[0], found[1 : 1 + len(self.cuts)], found[1 + len(self.cuts) :]
        blocks = [0.0] * sum(self.depths.values())
        for cut, end, whole in zip(self.cuts, [*self.cuts[1:], len(blocks)], segments, strict=True):
            blocks[cut:end] = [whole / (end - cut)] * (end - cut)
        backward, start = {}, 0
        for stream, depth in self.depths.items():
            backward[stream] = blocks[start : start + depth]
            start += depth
        whole = sum(map(sum, forward.values()))
        part = min(1.0, constant / whole) if whole else 1.0  # the two were not timed in the same steps
        return StepTimes(
            constant - part * whole,
            {stream: [part * value for value in forward[stream]] for stream in self.depths},
            backward,
            {kind: (adapters[2 * shape], adapters[2 * shape + 1]) for kind, shape in self.shapes.items()},
        )


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them: the first, the last, and others at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _widest(site: Site) -> int:
    return min(site.in_features, site.out_features)


def _calls(site: Site, survey: Survey) -> int:
    """How often a step computes the site: more than once where blocks share their modules."""
    if not isinstance(site.sink, Port):
        return 1
    return sum(site.sink.module.startswith(f"{block}.") for block in survey.stacks[site.stream].blocks)


class _Clock:
    """Times steps and blocks of one model on one batch."""

    def __init__(self, model: AdaptedModel, loss: Loss, batch: Batch) -> None:
        self.model = model
        self.loss = loss
        self.batch = batch
        self.sites = {site.name: site for site in model.space.sites}
        parameter = next(model.backbone.parameters())
        self.cuda = parameter.device.type == "cuda"

    def steps(self, placements: Sequence[Placement], track: Track) -> list[float]:
        """Median seconds of a step with each placement; all take turns, so that what comes and goes hits all alike."""
        start = time.perf_counter()
        for placement in placements:
            self._step(placement)
        least, most = _ROUNDS
        rounds = min(max(round(_SECONDS / (time.perf_counter() - start)), least), most)
        turns = [(turn, number) for turn in range(rounds) for number in range(len(placements))]
        found: list[list[float]] = [[] for _ in placements]
        for turn, number in track(turns, "measuring training steps", len(turns)):
            place = number if turn % 2 else len(placements) - 1 - number
            found[place].append(self._step(placements[place]))
        return [median(values) for values in found]

    def forward(self) -> dict[str, list[float]]:
        """Median seconds of each block's forward, by stream."""
        stacks = self.model.space.survey.stacks
        found: dict[str, list[list[float]]] = {stream: [[] for _ in stack.blocks] for stream, stack in stacks.items()}
        for _ in range(_ROUNDS[0]):
            calls = self._calls()
            for stream, stack in stacks.items():
                for values, block in zip(found[stream], stack.blocks, strict=True):
                    values.append(calls[block].pop(0) if calls[block] else 0.0)
        return {stream: [median(values) for values in each] for stream, each in found.items()}

    def _calls(self) -> dict[str, list[float]]:
        """Block -> seconds of each of its calls in one forward pass."""
        seconds: dict[str, list[float]] = {}
        started: dict[str, float] = {}
        handles = []

        def before(block: str, module: nn.Module, args: Any) -> None:
            started[block] = self._now()

        def after(block: str, module: nn.Module, args: Any, output: Any) -> None:
            seconds[block].append(self._now() - started[block])

        for block in dict.fromkeys(b for stack in self.model.space.survey.stacks.values() for b in stack.blocks):
            seconds[block] = []
            module = self.model.backbone.get_submodule(block)
            handles.append(module.register_forward_pre_hook(partial(before, block)))
            handles.append(module.register_forward_hook(partial(after, block)))
        try:
            with torch.no_grad():
                self.loss(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        return seconds

    def _step(self, placement: Placement) -> float:
        """Seconds of one training step: forward, backward, clipping and update, at a rate of 0."""
        parameter = next(self.model.backbone.parameters())
        dtype = adapter_dtype(self.model.backbone)
        adapters = {
            name: self.model.family.build(self.sites[name], rank, 0).to(device=parameter.device, dtype=dtype)
            for name, rank in placement.items()
        }
        with self.model.swapped(adapters):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.0)
            for value in trained:
                value.grad = torch.zeros_like(value)
            optimizer.step()  # its state is made in the first one
            start = self._now()
            optimizer.zero_grad()
            self.loss(self.model, self.batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            seconds = self._now() - start
            optimizer.zero_grad()
        return seconds

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
