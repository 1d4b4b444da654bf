"""A training step, ours beside PEFT's and beside what no method can do without."""

import logging
from collections.abc import Mapping, Sequence

from benchmarks.speed.bench import Bench
from benchmarks.speed.pairs import Times, alternate
from benchmarks.speed.peers import PEFT, check_drops, check_equal, check_same_parameters, check_same_start, peft
from benchmarks.speed.results import Found, Row, compared
from benchmarks.speed.subjects import (
    ALL_R2,
    ALL_R8,
    DROPOUT,
    FULL,
    QV_R8,
    Batch,
    Learner,
    Placement,
    lower_bound,
    ours,
    random_batch,
)
from heterolora.model import AdaptedModel

_log = logging.getLogger(__name__)

BOUND = "lower bound"

TO_PEFT = {QV_R8.name: 0.97, ALL_R2.name: 0.92}
TO_BOUND = {QV_R8.name: 1.06}
"""Targets: placement -> largest ratio."""


def encoder(bench: Bench) -> Found:
    """MiniLM, 16 x 64 tokens."""
    return measure(bench, bench.encoder, bench.size(16, 64), (QV_R8, ALL_R2, ALL_R8, FULL, DROPOUT))


def decoder(bench: Bench) -> Found:
    """SmolLM2, 8 x 64 tokens."""
    return measure(bench, bench.decoder, bench.size(8, 64), (QV_R8, ALL_R2, ALL_R8, FULL))


def measure(bench: Bench, model: str, size: tuple[int, int], placements: Sequence[Placement]) -> Found:
    """Rows of all placements on one model."""
    rows: list[Row] = []
    checks: list[str] = []
    for placement in placements:
        _log.info("  %s, %s", model, placement.name)
        learners, batch, found = together(bench, model, size, placement, bound=placement in (QV_R8, ALL_R2))
        checks += [f"{placement.name}: {text}" for text in found]
        times = alternate({who: learner.stepping(batch) for who, learner in learners.items()}, bench.repeats)
        rows += _rows(placement, times, learners)
    return Found(rows, checks, {"model": model, "batch": list(size)})


def together(
    bench: Bench, model: str, size: tuple[int, int], placement: Placement, bound: bool = False
) -> tuple[dict[str, Learner], Batch, list[str]]:
    """Ours, PEFT's (with LoRA on q and v where ours has shortcuts) and, if asked for, the bound; proved equal.

    Raises:
        WrongResultError: if they compute different things.
    """
    mine = ours(bench.shelf.backbone(model), placement, model, bench.seed)
    batch = random_batch(bench.shelf.backbone(model), *size, bench.seed)
    theirs = _peer(bench, model, placement, mine)
    if placement.rank is None:  # PEFT has no shortcuts: as many parameters at q and v, and the same function at B = 0
        check_same_parameters(mine, theirs)
        checks = [check_same_start(mine, theirs, batch)]
    else:
        checks = check_equal(mine, theirs, batch)
    if placement.dropout:
        checks += [check_drops(learner, batch) for learner in (mine, theirs)]
    learners = {"ours": mine, PEFT: theirs}
    if bound:
        learners[BOUND] = lower_bound(bench.shelf.backbone(model), placement, model)
        checks.append(check_same_start(mine, learners[BOUND], batch))
    return learners, batch, checks


def _peer(bench: Bench, model: str, placement: Placement, mine: Learner) -> Learner:
    sites, same = mine.model, placement
    if placement.rank is None:
        same = QV_R8
        sites = ours(bench.shelf.backbone(model), same, model, bench.seed).model
    assert isinstance(sites, AdaptedModel)
    return peft(bench.shelf.backbone(model), same, sites)


def _rows(placement: Placement, times: Times, learners: Mapping[str, Learner]) -> list[Row]:
    mine, theirs = times.seconds["ours"], times.seconds[PEFT]
    peer = "PEFT, q,v r=8" if placement.rank is None else PEFT
    rows = [compared(placement.name, mine, theirs, peer, target=TO_PEFT.get(placement.name))]
    if BOUND in learners:
        least = times.seconds[BOUND]
        rows.append(
            compared(f"{placement.name}: ours to the bound", mine, least, BOUND, target=TO_BOUND.get(placement.name))
        )
        rows.append(compared(f"{placement.name}: PEFT to the bound", theirs, least, BOUND))
    return rows
