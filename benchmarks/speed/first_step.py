"""From the command to the first step, with cached tokens, beside the imports that no such command can do without."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed.bench import Bench
from benchmarks.speed.pairs import alternate
from benchmarks.speed.process import python
from benchmarks.speed.results import Found, WrongResultError, alone, compared

_log = logging.getLogger(__name__)

IMPORTS = "import torch, lightning, transformers"

TO_IMPORTS = 1.5
HELP_SECONDS = 2.0
"""Targets."""


def first_step(bench: Bench) -> Found:
    """``train.py`` to its first step, ``train.py --help``, and the imports alone, in turn."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        clock: list[float] = []
        things = {
            "ours": lambda: clock.append(_to_first_step(bench, folder, len(clock))),
            "imports": lambda: python(["-c", IMPORTS], bench.threads),
            "help": lambda: python(["train.py", "--help"], bench.threads),
        }
        warmup = 1
        seconds = alternate(things, bench.repeats, warmup=warmup).seconds
    found = clock[warmup:]
    _log.info("  first step after %.1f s", found[0])
    return Found(
        [
            compared("command to first step", found, seconds["imports"], IMPORTS, target=TO_IMPORTS),
            alone("train.py --help", seconds["help"], target=HELP_SECONDS),
        ],
        (),
        {"command": command(bench, folder)},
    )


def command(bench: Bench, folder: Path) -> list[str]:
    """What ``train.py`` is given; the tokens of the first time are there the next."""
    task = ["task=mrpc", f"data.root={bench.data_root}"] if bench.mrpc else ["task=rotten_tomatoes"]
    small = ["data.limit=64"] if bench.short else []
    return [
        "train.py",
        *task,
        *small,
        f"model={bench.encoder}",
        "allocator=uniform",
        "search_space=lora_qv",
        "trainer.max_steps=1",
        f"data.cache_dir={folder / 'tokens'}",
    ]


def _to_first_step(bench: Bench, folder: Path, number: int) -> float:
    stamp = folder / f"step_{number}"
    callback = f"+callbacks.first={{_target_: benchmarks.speed.callback.FirstStep, path: '{stamp}'}}"
    given = [*command(bench, folder), callback, f"hydra.run.dir={folder / f'run_{number}'}"]
    done = python(given, bench.threads)
    if not stamp.exists():
        raise WrongResultError(f"{' '.join(given)} ended without a step")
    return float(stamp.read_text()) - done.started
