"""Peak memory of training, ours beside PEFT's, each in a process of its own."""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from benchmarks.speed.bench import Bench
from benchmarks.speed.peers import PEFT
from benchmarks.speed.process import python
from benchmarks.speed.results import Found, compared
from benchmarks.speed.steps import together
from benchmarks.speed.subjects import ALL_R2, ALL_R8, QV_R8, Placement

_log = logging.getLogger(__name__)

THRIFTY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes malloc give back at once what is freed, so that a peak is that of what is held."""

TARGET = 1.00

_AT_ONCE = 2
"""Processes; how many there are changes seconds, not what each holds."""


def training(bench: Bench) -> Found:
    """Rows of three placements."""
    rows, checks = [], []
    for placement in (QV_R8,) if bench.short else (QV_R8, ALL_R2, ALL_R8):
        _, _, found = together(bench, bench.encoder, bench.size(16, 64), placement)
        checks += [f"{placement.name}: {text}" for text in found]
        asked = [train(bench, who, placement) for _ in range(repeats(bench)) for who in ("ours", PEFT)]
        found_mib = peaks(asked)
        rows.append(compared(placement.name, found_mib[::2], found_mib[1::2], PEFT, unit="MiB", target=TARGET))
        _log.info("  %s: %.0f and %.0f MiB", placement.name, rows[-1].ours, rows[-1].peer)
    return Found(rows, checks, {"model": bench.encoder, "batch": list(bench.size(16, 64))})


def repeats(bench: Bench) -> int:
    """Processes for each number: peaks differ by less than half a MiB."""
    return 1 if bench.short else 4


def train(bench: Bench, who: str, placement: Placement) -> dict[str, Any]:
    """The question for ``peak`` about three training steps."""
    return {**_common(bench, placement), "what": "train", "who": who}


def score(bench: Bench, proxies: list[str]) -> dict[str, Any]:
    """The question for ``peak`` about a scoring pass."""
    return {**_common(bench, ALL_R8), "what": "score", "proxies": proxies}


def _common(bench: Bench, placement: Placement) -> dict[str, Any]:
    rows, tokens = bench.size(16, 64)
    common = {"model": bench.encoder, "placement": asdict(placement), "rows": rows, "tokens": tokens}
    return {**common, "seed": bench.seed, "threads": 1}


def peaks(asked: list[dict[str, Any]]) -> list[float]:
    """MiB for each question, a process each."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_peak, asked))


def _peak(asked: Mapping[str, Any]) -> float:
    done = python(["-m", "benchmarks.speed.peak", json.dumps(asked)], asked["threads"], THRIFTY)
    return float(json.loads(done.output.splitlines()[-1])["mib"])
