"""What grows with the number of sites, the length of a text and the rank."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.torch import save_file

from benchmarks.speed.bench import Bench
from benchmarks.speed.pairs import alternate
from benchmarks.speed.peers import PEFT
from benchmarks.speed.results import Found, Row, alone, compared
from benchmarks.speed.steps import together
from benchmarks.speed.subjects import CLASSES, QV_R8, SCALE, Placement
from heterolora.backbone import Backbone, Tiny
from heterolora.model import AdaptedModel
from heterolora.run import compose
from heterolora.scoring import allocate
from heterolora.seeds import derive
from heterolora.space import survey

_log = logging.getLogger(__name__)

LAYERS = (1, 3, 10, 32, 100, 316, 1000)
"""9 to 9,999 sites: six linears a layer, and four shortcuts, one less in the first."""

ATTACH_SECONDS = 2.0
EXPONENT = 1.1
"""Targets: of 10,000 sites; "linear" is an exponent of 1, and a tenth is left for noise."""

_LARGE = 300
"""Sites from which on the exponent is fitted: below, what does not depend on them is a good part."""

PHASES = ("attach", "scores", "greedy", "knapsack", "enable", "checkpoint")

_UNITS_A_SITE = 2
"""Of rank, that the budget pays for."""


def by_sites(bench: Bench) -> Found:
    """Seconds of everything that is done once a site, on models of width 8."""
    layers = LAYERS[:3] if bench.short else LAYERS
    repeats = 2 if bench.short else 3
    counts: list[int] = []
    found: dict[str, list[list[float]]] = {phase: [] for phase in PHASES}
    for number in layers:
        backbone = _narrow(number, bench.seed)
        runs = []
        for _ in range(repeats):
            sites, seconds = _phases(backbone.copy(bench.seed), bench)
            runs.append(seconds)
        counts.append(sites)
        for phase in PHASES:
            found[phase].append([seconds[phase] for seconds in runs])
        _log.info("  %d sites: %s", sites, {phase: round(min(found[phase][-1]), 3) for phase in PHASES})
    return Found(_site_rows(counts, found, bench.short), (), {"sites": counts, "seconds": found})


def _narrow(layers: int, seed: int) -> Backbone:
    """A random encoder of width 8."""
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    made = Tiny("bert", {**config, "max_position_embeddings": 16}, "float32", 0.0, None, False)
    return made.load(CLASSES, seed)


def _phases(backbone: Backbone, bench: Bench) -> tuple[int, dict[str, float]]:
    """Number of sites, and seconds of each phase."""
    greedy = compose(["model=tiny_bert", "search_space=full", "proxy=random", "allocator=greedy", "probe.batches=1"])
    knapsack = compose(["model=tiny_bert", "allocator=knapsack"])["allocator"]
    seconds: dict[str, float] = {}

    def timed(phase: str, thing: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = thing()
        seconds[phase] = time.perf_counter() - start
        return value

    def attach() -> AdaptedModel:
        space = greedy["search_space"].resolve(survey(backbone.model, backbone.layout))
        return AdaptedModel(backbone.model, space, greedy["adapter"], backbone.head)

    model: AdaptedModel = timed("attach", attach)
    sites = model.space.sites
    budget = _UNITS_A_SITE * sum(site.in_features + site.out_features for site in sites)
    scores = timed("scores", lambda: {s.name: (derive(bench.seed, s.name) % 997 + 1) / 997 for s in sites})
    ranks = timed("greedy", lambda: allocate(greedy["allocator"], scores, budget, model.space, model.family)).ranks
    best = timed("knapsack", lambda: allocate(knapsack, scores, budget, model.space, model.family))
    assert best.spent <= budget
    timed("enable", lambda: model.enable(ranks, bench.seed))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        timed("checkpoint", lambda: save_file(model.trained_state_dict(), path))
    return len(sites), seconds


def _site_rows(counts: Sequence[int], found: dict[str, list[list[float]]], short: bool) -> list[Row]:
    most = counts[-1]
    total = [list(map(sum, zip(*(found[p][at] for p in ("attach", "scores", "greedy")), strict=True)))
             for at in range(len(counts))]  # fmt: skip
    titles = {
        "attach": "find sites and attach",
        "scores": "(made-up scores)",
        "greedy": "scores to gains, greedy",
        "knapsack": "scores to gains, knapsack",
        "enable": "enable every site with rank",
        "checkpoint": "write the checkpoint",
    }
    rows = [alone(f"attach and allocate {most:,} sites", total[-1], target=ATTACH_SECONDS)]
    rows.append(_exponent("attach and allocate", counts, total, EXPONENT, short))
    for phase in ("attach", "greedy", "knapsack", "enable", "checkpoint"):
        rows.append(alone(f"{titles[phase]}, {most:,} sites", found[phase][-1]))
        rows.append(_exponent(titles[phase], counts, found[phase], None, short))
    return rows


def _exponent(
    what: str, counts: Sequence[int], seconds: Sequence[Sequence[float]], target: float | None, short: bool
) -> Row:
    least = 0 if short else _LARGE
    large = [(count, min(found)) for count, found in zip(counts, seconds, strict=True) if count >= least]
    value = exponent(*zip(*large, strict=True))
    span = f"{large[0][0]:,} to {large[-1][0]:,} sites"
    return alone(f"{what}: seconds grow with sites to the power of, {span}", [value], unit="exponent", target=target)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) on log(sizes)."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def by_length_and_rank(bench: Bench) -> Found:
    """A training step beside PEFT's, for lengths (q,v r=8) and for ranks (all linears)."""
    lengths, ranks = ((4, 8), (1, 2)) if bench.short else ((32, 64, 128, 256), (1, 2, 8, 32))
    rows, checks = [], []
    usual = bench.size(8, 64)[1]
    asked = [(f"{length} tokens, {QV_R8.name}", QV_R8, length) for length in lengths]
    for rank in ranks:
        placement = Placement(f"all linears r={rank}", "lora_all", rank)
        asked.append((f"{usual} tokens, {placement.name}", placement, usual))
    for what, placement, length in asked:
        size = bench.size(8, length)
        learners, batch, found = together(bench, bench.encoder, size, placement)
        checks += [f"{what}: {text}" for text in found]
        seconds = alternate({who: learners[who].stepping(batch) for who in learners}, bench.repeats).seconds
        rows.append(compared(what, seconds["ours"], seconds[PEFT], PEFT))
        _log.info("  %s: %.3f", what, rows[-1].estimate)
    return Found(rows, checks, {"model": bench.encoder, "rows": bench.size(8, 64)[0], "scale": SCALE})
