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
from collections import Counter
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
from heterolora.layouts import HookPoint
from heterolora.model import AdaptedModel
from heterolora.proxies.evidence import Batch, Loss, Track
from heterolora.report.files import read_json, write_json
from heterolora.scoring import untouched, untracked
from heterolora.sites import Port, Site
from heterolora.space import Survey
from heterolora.step_time import StepLimit, StepTimes, kind_of, times_from

_log = logging.getLogger(__name__)

FORMAT = 2
"""Of a kept calibration, and of how it is made: another number makes all kept ones void."""

_SECONDS = 12.0
"""How long is measured, if that is neither too few nor too many rounds."""

_ROUNDS = (3, 9)
"""At least and at most so many steps of each placement, after one that warms up."""

_LOOKS = 5
"""Forward passes in which blocks are timed."""

_DEPTHS = 3
"""Places in each stream where the backward pass is made to end."""

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
    if path.is_dir():
        raise SettingError("data.cache_dir", cache, f"step times cannot be kept there ({path} is a folder)")
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
        if content.get("of") != described:
            reason = "it is of something else than its name says"
        elif content["sha256"] != _digest(content["times"]):
            reason = "its numbers were changed"
        else:
            return times_from(content["times"])
    except (SettingError, KeyError, ValueError, RecursionError) as error:
        reason = str(error)
    _log.warning("kept step times in %s are damaged (%s); measuring anew", path, reason)
    path.unlink(missing_ok=True)
    return None


def _keep(path: Path, described: Mapping[str, Any], times: StepTimes) -> StepTimes:
    """Write the file whole, unless another process was faster: then its times are everybody's."""
    scratch = path.with_name(f".{path.stem}-{os.getpid()}.json")
    try:
        values = json.loads(json.dumps(times.as_dict()))  # as they will be read
        write_json(scratch, {"of": described, "times": values, "sha256": _digest(values)})
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
        "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()),
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
        clock = _Clock(wide, loss, batch)
        plan = _Plan.of(wide.space.sites, wide.space.survey, clock.look(), bool(wide.head))
        return plan.solve(clock.steps(plan.placements, track))


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


@dataclass(frozen=True)
class _Look:
    """What forward passes without adapters show.

    Attributes:
        forward: stream -> seconds of each block; streams in the order in which they run.
        shares: kind of site -> share of the block in which it joins that lies before that place.
        whole: seconds of the pass; more than the sum of blocks.
    """

    forward: Mapping[str, Sequence[float]]
    shares: Mapping[str, float]
    whole: float


@dataclass(frozen=True)
class _Plan:
    """What is timed, and how unknown seconds follow from it.

    Attributes:
        sites: the candidates.
        blocks: sort of each block, in running order; blocks with linear layers of the same widths are alike.
        shapes: kind of site -> number of its shape.
        widths: for each shape, what a unit of rank costs in comparison: in + out, times calls.
        placements: what is timed.
        look: gives levels.
    """

    sites: Mapping[str, Site]
    blocks: Sequence[int]
    shapes: Mapping[str, int]
    widths: Sequence[int]
    placements: Sequence[Placement]
    look: _Look

    @classmethod
    def of(cls, sites: Sequence[Site], survey: Survey, look: _Look, head: bool) -> "_Plan":
        """The plan for these sites; with a head, a step without adapters has something to train."""
        scale = _scale(look)
        lowest: dict[tuple[str, int], Site] = {}
        for site in sorted(sites, key=scale.level):
            lowest.setdefault((site.stream, site.joins), site)
        ends: list[Site] = []
        for stream in look.forward:
            ends += _spread(
                [s for (of, joins), s in lowest.items() if of == stream and joins < survey.depth(of)], _DEPTHS
            )
        alike: dict[tuple[int, int, int], list[Site]] = {}
        for site in sites:
            alike.setdefault((site.in_features, site.out_features, _calls(site, survey)), []).append(site)
        some = [_spread(group, _SITES) for group in alike.values()]
        few, many = _RANKS
        first = {ends[0].name: min(few, _widest(ends[0]))}
        placements: list[Placement] = [{}] if head else []
        placements += [{site.name: min(few, _widest(site))} for site in ends]
        placements += [first | {site.name: min(few, _widest(site)) for site in group} for group in some]
        placements.append({site.name: min(many, _widest(site)) for group in [ends[:1], *some] for site in group})
        return cls(
            {site.name: site for site in sites},
            _sorts(survey, list(look.forward)),
            {kind_of(site): number for number, group in enumerate(alike.values()) for site in group},
            [(wide_in + wide_out) * calls for wide_in, wide_out, calls in alike],
            placements,
            look,
        )

    def rows(self) -> list[list[float]]:
        """For each placement how often it takes each unknown.

        The constant part, the backward pass of each sort of block, an adapter of each shape, and a unit of rank.
        """
        scale, depth = _scale(self.look), len(self.blocks)
        found = []
        for placement in self.placements:
            active = [(self.sites[name], rank) for name, rank in placement.items()]
            lowest = min((scale.level(site) for site, _ in active), default=depth)
            through = [min(max(block + 1 - lowest, 0.0), 1.0) for block in range(depth)]
            shapes = [self.shapes[kind_of(site)] for site, _ in active]
            units = sum(rank * self.widths[shape] for shape, (_, rank) in zip(shapes, active, strict=True))
            sorts = [
                sum(part for part, sort in zip(through, self.blocks, strict=True) if sort == number)
                for number in range(max(self.blocks) + 1)
            ]
            adapters = [float(shapes.count(number)) for number in range(len(self.widths))]
            found.append([1.0, *sorts, *adapters, float(units)])
        return found

    def solve(self, seconds: Sequence[float]) -> StepTimes:
        """The non-negative seconds that explain those of the placements best."""
        rows = np.array(self.rows())
        scales = np.maximum(rows.max(axis=0), 1.0)
        found = [float(value) for value in nnls(rows / scales, np.array(seconds))[0] / scales]
        sorts = max(self.blocks) + 1
        constant, each, fixed, unit = found[0], found[1 : 1 + sorts], found[1 + sorts : -1], found[-1]
        blocks = [each[sort] for sort in self.blocks]
        backward, start = {}, 0
        for stream, of in self.look.forward.items():
            backward[stream] = blocks[start : start + len(of)]
            start += len(of)
        part = min(1.0, constant / self.look.whole)  # the two were not timed in the same steps
        forward = {stream: [part * value for value in of] for stream, of in self.look.forward.items()}
        return StepTimes(
            max(constant - sum(map(sum, forward.values())), 0.0),
            forward,
            backward,
            {kind: (fixed[shape], unit * self.widths[shape]) for kind, shape in self.shapes.items()},
            self.look.shares,
        )


def _scale(look: _Look) -> StepTimes:
    """Times of which levels alone are asked."""
    return StepTimes(0.0, look.forward, look.forward, {}, look.shares)


def _sorts(survey: Survey, order: Sequence[str]) -> list[int]:
    """Number of each block's sort, in running order."""
    inside: dict[str, list[tuple[int, int]]] = {}
    for site in survey.lora_sites:
        block = survey.stacks[site.stream].blocks[site.layer]
        inside.setdefault(block, []).append((site.in_features, site.out_features))
    known: dict[Any, int] = {}
    blocks = [(stream, block) for stream in order for block in survey.stacks[stream].blocks]
    return [known.setdefault((stream, tuple(inside.get(block, ()))), len(known)) for stream, block in blocks]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them: the first, the last, and others at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _typical(values: Sequence[float]) -> float:
    """The lower quartile: whatever else runs on a machine only ever adds to a time."""
    return sorted(values)[round((len(values) - 1) / 4)]


def _joint(site: Site, survey: Survey) -> HookPoint:
    """Where its delta joins."""
    if isinstance(site.sink, Port):
        return HookPoint(site.sink.module, "post", None)
    return survey.write(site.sink, site.span or 0).points[0]


def _spans(blocks: Sequence[str], moments: Mapping[tuple[str, str], Sequence[float]]) -> list[tuple[float, float]]:
    """Start and end of each block's run; blocks that share a module take its calls in turn."""
    calls: Counter[str] = Counter()
    spans = []
    for block in blocks:
        starts, ends = moments[block, "pre"][calls[block] :], moments[block, "post"][calls[block] :]
        calls[block] += 1
        spans.append((starts[0], ends[0]) if starts and ends else (0.0, 0.0))  # a block that was dropped takes no time
    return spans


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
        """Seconds of a step with each placement; all take turns, so that what comes and goes hits all alike."""
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
        return [_typical(values) for values in found]

    def look(self) -> _Look:
        """Forward passes without adapters, block by block."""
        survey = self.model.space.survey
        order: list[str] = []
        blocks: dict[str, list[list[float]]] = {s: [[] for _ in stack.blocks] for s, stack in survey.stacks.items()}
        shares: dict[str, list[float]] = {}
        points = {site.name: _joint(site, survey) for site in self.sites.values()}
        wholes = []
        for _ in range(_LOOKS):
            began = self._now()
            moments = self._moments({(point.module, point.side) for point in points.values()})
            wholes.append(self._now() - began)
            order = sorted(survey.stacks, key=lambda stream: moments[survey.stacks[stream].blocks[0], "pre"][:1])
            spans = {stream: _spans(stack.blocks, moments) for stream, stack in survey.stacks.items()}
            for stream, of in spans.items():
                for values, (start, end) in zip(blocks[stream], of, strict=True):
                    values.append(end - start)
            for site in self.sites.values():
                share = 0.0  # of whoever joins between blocks
                if site.joins < len(spans[site.stream]):
                    start, end = spans[site.stream][site.joins]
                    point = points[site.name]
                    inside = [at for at in moments[point.module, point.side] if start < at < end]
                    share = (inside[0] - start) / (end - start) if inside else 0.0
                shares.setdefault(kind_of(site), []).append(share)
        forward = {stream: [_typical(values) for values in blocks[stream]] for stream in order}
        return _Look(forward, {kind: median(values) for kind, values in shares.items()}, _typical(wholes))

    def _moments(self, points: set[tuple[str, str]]) -> dict[tuple[str, str], list[float]]:
        """When each of these points, and each block's start and end, is passed in one forward pass."""
        stacks = self.model.space.survey.stacks.values()
        wanted = points | {(block, side) for stack in stacks for block in stack.blocks for side in ("pre", "post")}
        moments: dict[tuple[str, str], list[float]] = {point: [] for point in wanted}

        def note(point: tuple[str, str], *given: Any) -> None:
            moments[point].append(self._now())

        handles = []
        for point in sorted(wanted):
            module = self.model.backbone.get_submodule(point[0])
            hook = module.register_forward_pre_hook if point[1] == "pre" else module.register_forward_hook
            handles.append(hook(partial(note, point)))
        try:
            with torch.no_grad():
                self.loss(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        return moments

    def _step(self, placement: Placement) -> float:
        """Seconds of one training step: forward, backward, clipping and update, at a rate of 0."""
        adapters = self.model.fresh(placement, 0)
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
