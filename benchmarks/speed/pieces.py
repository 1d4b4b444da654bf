"""Each thing that makes a step fast, left out alone: it stays only if leaving it out costs something."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from benchmarks.speed.bench import Bench
from benchmarks.speed.pairs import alternate
from benchmarks.speed.results import Found, Row, WrongResultError, compared
from benchmarks.speed.subjects import ALL_R2, QV_R8, Batch, Learner, Placement, ours, random_batch
from heterolora.model import AdaptedModel
from heterolora.prefix import Prefix, frozen_blocks

WHOLE = "as it is"

UPPER = Placement("q,v r=8, upper half", "lora_qv", 8)
"""What a cost-aware allocation may lead to."""


def pieces(bench: Bench) -> Found:
    """Steps with one piece left out, beside the step as it is."""
    rows, checks = [], []
    for placement in (QV_R8, ALL_R2):
        learners = {WHOLE: _ours(bench, placement)}
        with mock.patch("heterolora.model.output_is_free", return_value=False):
            learners["deltas added in place"] = _ours(bench, placement)
        apart = learners["one product for q, k and v"] = _ours(bench, placement)
        _adapted(apart)._sharing = {}
        plain = learners["adapters in two parts (all of the above, and products by rows)"] = _ours(bench, placement)
        _adapted(plain)._added = lambda *parts: None  # type: ignore[method-assign]
        for adapter in _adapted(plain).adapters.values():
            adapter.forward = partial(_textbook, adapter)
        loop = learners["AdamW as one kernel"] = _ours(bench, placement)
        for learner in learners.values():
            learner.optimizer = torch.optim.AdamW(
                learner.trained, lr=1e-7, weight_decay=0.01, fused=learner is not loop
            )
        batch = random_batch(bench.shelf.backbone(bench.encoder), *bench.size(16, 64), bench.seed)
        checks.append(f"{placement.name}: {_same_gradients(learners, batch)}")
        steps = {name: learner.stepping(batch) for name, learner in learners.items()}
        seconds = alternate(steps, bench.repeats).seconds
        rows += [
            compared(f"{placement.name}: {name}", seconds[WHOLE], seconds[name], "without it")
            for name in learners
            if name != WHOLE
        ]
    rows.append(_skipping(bench))
    return Found(rows, checks, {"model": bench.encoder})


def _skipping(bench: Bench) -> Row:
    """A step that starts above the frozen prefix, beside one that computes it."""
    learner = _ours(bench, UPPER)
    model = _adapted(learner)
    depth = model.space.survey.deepest // 2
    model.enable({site.name: 8 for site in model.space.sites if site.entry >= depth}, bench.seed)
    assert frozen_blocks(model) == depth
    learner.optimizer = torch.optim.AdamW(learner.trained, lr=1e-7, weight_decay=0.01, fused=True)
    batch = random_batch(bench.shelf.backbone(bench.encoder), *bench.size(16, 64), bench.seed)
    prefix = Prefix(model, depth)
    hidden = prefix.run(lambda: learner.loss(batch))

    def stepping(skip: bool) -> Callable[[], None]:
        def step() -> None:
            with prefix.entered(hidden) if skip else nullcontext():
                learner.step(batch)

        return step

    model.train()
    seconds = alternate({"skipped": stepping(True), "computed": stepping(False)}, bench.repeats).seconds
    return compared(f"{UPPER.name}: the frozen prefix is kept", seconds["skipped"], seconds["computed"], "without it")


def _textbook(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """What any implementation writes down first."""
    delta: torch.Tensor = functional.linear(functional.linear(x, adapter.A), adapter.B) * adapter.scale
    return delta


def _ours(bench: Bench, placement: Placement) -> Learner:
    return ours(bench.shelf.backbone(bench.encoder), placement, bench.encoder, bench.seed)


def _adapted(learner: Learner) -> AdaptedModel:
    assert isinstance(learner.model, AdaptedModel)
    return learner.model


def _same_gradients(learners: dict[str, Learner], batch: Batch) -> str:
    """All compute the same, or times mean nothing.

    Raises:
        WrongResultError: if not.
    """
    found = {}
    for name, learner in learners.items():
        with torch.no_grad():
            for _, b in learner.factors.values():
                b.fill_(0.01)
        learner.model.train()
        learner.backward(batch)
        found[name] = torch.cat([p.grad.flatten() for p in learner.trained if p.grad is not None])
        learner.optimizer.zero_grad()
    for name, gradient in found.items():
        off = ((gradient - found[WHOLE]).norm() / found[WHOLE].norm()).item()
        if not off < 1e-4:
            raise WrongResultError(f"without '{name}' gradients differ by {off:.1e} of their norm")
    return "gradients agree within 1e-4 of their norm, whatever is left out"
