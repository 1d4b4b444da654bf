"""What a search costs: scoring passes beside training steps, in seconds and memory."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.speed import memory
from benchmarks.speed.bench import Bench
from benchmarks.speed.pairs import alternate
from benchmarks.speed.peak import plain_loss, probe
from benchmarks.speed.peers import PEFT
from benchmarks.speed.results import Found, Row, compared
from benchmarks.speed.steps import together
from benchmarks.speed.subjects import ALL_R8, Batch, Learner, random_batch, space_of
from heterolora.build import build
from heterolora.model import AdaptedModel
from heterolora.scoring import score_all
from heterolora.shipped import option, options

_log = logging.getLogger(__name__)

FIRST_ORDER = ("grad_norm", "snip", "fisher", "spectral", "gora")
"""Proxies that need one backward pass at the pretrained function, and share it."""

_LONG = 5.0
"""Seconds of a pass that is timed once: some proxies decompose large matrices."""

TOGETHER = 1.6
MEMORY = 1.10
"""Targets."""


def every_proxy(bench: Bench) -> Found:
    """Seconds of each proxy's pass beside one training step; peak memory of both, in processes of their own.

    Without alpha_test, which needs a trained model and reports its cost in forward passes itself.
    """
    names = list(FIRST_ORDER[:2]) if bench.short else [name for name in options("proxy") if name != "alpha_test"]
    count = 2 if bench.short else 4
    learners, batch, checks = together(bench, bench.encoder, bench.size(16, 64), ALL_R8)
    step = learners[PEFT].stepping(batch)
    step()
    model = bare(bench)
    batches = batches_of(bench, count)
    rows = []
    for name in names:
        score = scoring(model, [name], batches, bench.seed)
        start = time.perf_counter()
        score()  # the warm-up
        often = 1 if time.perf_counter() - start > _LONG else min(3, bench.repeats)
        times = alternate({"score": score, "step": step}, often, warmup=0)
        seconds = times.seconds
        rows.append(compared(f"{name}, {count} batches", seconds["score"], seconds["step"], "one step of PEFT"))
        _log.info("  %s: %.2f s", name, rows[-1].ours)
    return Found(rows + _memory(bench, names), checks, {"model": bench.encoder, "batches": count})


def _memory(bench: Bench, names: list[str]) -> list[Row]:
    """Rows of MiB; what is asked of all proxies together is asked of each."""
    step, *found = memory.peaks(
        [memory.train(bench, PEFT, ALL_R8), *(memory.score(bench, [name]) for name in names)]
    )  # fmt: skip
    return [
        compared(f"{name}, peak memory", [mib], [step], "training step of PEFT", unit="MiB", target=MEMORY)
        for name, mib in zip(names, found, strict=True)
    ]


def all_first_order(bench: Bench) -> Found:
    """All first-order proxies from one pass over 32 batches, beside as many passes of a plain LoRA model of PEFT's."""
    names, count = list(FIRST_ORDER), 3 if bench.short else 32
    learners, _, checks = together(bench, bench.encoder, bench.size(16, 64), ALL_R8)
    batches = batches_of(bench, count)
    things: dict[str, Callable[[], object]] = {
        "ours": scoring(bare(bench), names, batches, bench.seed),
        PEFT: partial(_passes, learners[PEFT], batches),
    }
    times = alternate(things, bench.repeats, warmup=1)
    what = f"{', '.join(names)} together, {count} batches"
    peer = f"{count} forward and backward passes of PEFT"
    seconds = times.seconds
    rows = [compared(what, seconds["ours"], seconds[PEFT], peer, target=TOGETHER)]
    asked = [memory.score(bench, names), memory.train(bench, PEFT, ALL_R8)]
    found = memory.peaks(asked * memory.repeats(bench))
    rows.append(
        compared("the same, peak memory", found[::2], found[1::2], "training step of PEFT", unit="MiB", target=MEMORY)
    )
    return Found(rows, checks, {"model": bench.encoder, "batches": count})


def bare(bench: Bench) -> AdaptedModel:
    """Our model with all linears as candidates and no adapter."""
    backbone = bench.shelf.backbone(bench.encoder)
    space, _, family = space_of(backbone, ALL_R8, bench.encoder)
    return AdaptedModel(backbone.model, space, family, backbone.head)


def batches_of(bench: Bench, count: int) -> list[dict[str, torch.Tensor]]:
    """Different batches of one size."""
    backbone = bench.shelf.backbone(bench.encoder)
    return [{**random_batch(backbone, *bench.size(16, 64), bench.seed + at)} for at in range(count)]


def scoring(
    model: AdaptedModel, names: list[str], batches: list[dict[str, torch.Tensor]], seed: int
) -> Callable[[], object]:
    """One call of ``score_all``, to be timed."""
    proxies = {name: build(option("proxy", name), "proxy") for name in names}
    return lambda: score_all(model, plain_loss, batches, [], proxies=proxies, probe=probe(len(batches)), seed=seed)


def _passes(learner: Learner, batches: Sequence[Batch]) -> None:
    learner.model.train()
    for batch in batches:
        learner.backward(batch)
        learner.optimizer.zero_grad()
