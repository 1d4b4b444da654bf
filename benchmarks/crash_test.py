"""``python -m benchmarks.crash_test``: kill runs with SIGKILL at random moments, go on, and compare every bit.

Static and dynamic runs of ``train.py`` on a tiny model take turns. Each is run once without a break; then, for each
point, the same command is killed at a random moment, and given again with ``resume=true`` until it ends. One kill in
four comes before the first checkpoint, mostly while sites are scored; the others between it and the end of training.
What must be equal: all trained tensors, metrics, curves, predictions, ranks, and the history of decisions.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from heterolora.checkpoints import FOLDER, newest_first
from heterolora.history import HISTORY, read_history
from heterolora.resume import STATUS

COMMON = (
    "model=tiny_bert",
    "data.limit=256",
    "data.batch_size=8",
    "task.max_length=32",
    "probe.batches=8",
    "probe.head_warmup_steps=10",
    "trainer.max_epochs=4",
    "trainer.checkpoint_every=5",
    "trainer.threads=1",
    "adapter.dropout=0.1",
    "optimizer.lr=1e-2",
    "export.peft=false",
)

KINDS: Mapping[str, Sequence[str]] = {
    "static": (),
    "dynamic": ("allocation=dynamic", "allocation.every=7", "allocator=top", "allocator.rank=4", "proxy=grad_norm"),
    "dynamic_all_held": (
        "allocation=dynamic",
        "allocation.every=0.2",
        "allocation.held=all",
        "allocator=top",
        "allocator.mode=separate",
        "budget=fraction",
        "proxy=snip",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every run that was killed ended as the one that was not."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.crash_test", description=__doc__)
    made.add_argument("--points", type=int, default=20, help="kills (20)")
    made.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    given = made.parse_args(arguments)
    if given.points < 1:
        made.error("--points: at least 1")
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="heterolora-crash-") as place:
        same = _all_points(Path(place), given.points, draw)
    sys.stdout.write(f"{same} of {given.points} identical\n")
    return 0 if same == given.points else 1


def _all_points(place: Path, points: int, draw: random.Random) -> int:
    kinds = list(KINDS)[: min(points, len(KINDS))]
    expected, times = {}, {}
    for kind in kinds:
        times[kind] = _undisturbed(place / kind, kind)
        expected[kind] = what_came_out(place / kind / "whole")
        first, rest = times[kind].first, times[kind].rest
        sys.stdout.write(f"{kind}, not broken off: first checkpoint after {first:.1f} s, last one {rest:.1f} s later\n")
        sys.stdout.flush()
    same = 0
    for point in range(points):
        kind = kinds[point % len(kinds)]
        outputs = place / f"point_{point}"
        kills = _killed(outputs, kind, times[kind], draw)
        differing = _differing(expected[kind], what_came_out(outputs / "last"))
        same += not differing
        result = "identical" if not differing else f"DIFFERS in {', '.join(differing)}"
        sys.stdout.write(f"{point + 1:2d}  {kind:16s} killed {'; '.join(kills)}: {result}\n")
        sys.stdout.flush()
    return same


@dataclass(frozen=True)
class Times:
    """Of a run that is not broken off.

    Attributes:
        first: seconds from its start to its first checkpoint.
        rest: seconds from there to its last one.
    """

    first: float
    rest: float


def _undisturbed(outputs: Path, kind: str) -> Times:
    start = time.monotonic()
    process = _start(outputs, "whole", kind)
    folder = outputs / "whole" / FOLDER
    _until_checkpoint(process, folder)
    first, clock = time.monotonic() - start, time.time()
    _wait(process, outputs / "whole.log")
    return Times(first, max(path.stat().st_mtime for path in newest_first(folder)) - clock)


def _until_checkpoint(process: subprocess.Popen[bytes], folder: Path) -> None:
    while process.poll() is None and not any(folder.glob("*.sha256")):
        time.sleep(0.005)


def _killed(outputs: Path, kind: str, times: Times, draw: random.Random) -> list[str]:
    """Kill a run, and in one of three cases the one that goes on with it, too; then let it end."""
    kills = []
    for attempt in range(2 if draw.random() < 1 / 3 else 1):
        name = f"broken_{attempt}"
        process = _start(outputs, name, kind)
        early = draw.random() < 1 / 4
        # Imports come first, when there is nothing to lose.
        after = draw.uniform(0.5, 1.0) * times.first if early else draw.uniform(0.0, 1.0) * times.rest
        if not early:
            _until_checkpoint(process, outputs / name / FOLDER)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        run = outputs / name
        last = next(newest_first(run / FOLDER), None)
        ended = (run / STATUS).exists() and json.loads((run / STATUS).read_text())["state"] == "finished"
        where = "after its end" if ended else f"after {last.stem}" if last else "before its first checkpoint"
        kills.append(f"{after:.2f} s after its {'start' if early else 'first checkpoint'}, {where}")
        if ended:  # nothing is left to go on with: the same command again would start anew
            break
    _wait(_start(outputs, "last", kind), outputs / "last.log")
    return kills


def _start(outputs: Path, name: str, kind: str) -> subprocess.Popen[bytes]:
    outputs.mkdir(parents=True, exist_ok=True)
    given = [*COMMON, *KINDS[kind], f"outputs={outputs}", f"hydra.run.dir={outputs / name}", "resume=true"]
    with (outputs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "train.py", *given], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"a run that was not killed failed:\n{log.read_text(errors='replace')[-3000:]}")


def what_came_out(run: Path) -> dict[str, Any]:
    """Everything that a run leaves and that does not depend on the clock or on its folder."""
    summary = json.loads((run / "summary.json").read_text())
    curves = pd.read_csv(run / "metrics.csv")
    tensors = load_file(run / "adapter.safetensors")
    return {
        "tensors": {name: value.numpy().tobytes() for name, value in tensors.items()},
        "metrics": summary["metrics"],
        "parameters": summary["parameters"],
        "steps": summary["steps"],
        "curves": curves[sorted(curves, key=str)].to_csv(index=False),
        "predictions": [path.read_text() for path in sorted(run.glob("predictions_*.csv"))],
        "ranks": json.loads((run / "allocation.json").read_text())["ranks"],
        "history": [decision.as_dict() for decision in read_history(run / HISTORY)],
    }


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [key for key in expected if expected[key] != found[key]]


if __name__ == "__main__":
    raise SystemExit(main())
