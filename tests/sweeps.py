"""Sweeps of tiny runs in processes of their own, which a test can hold up at a batch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from benchmarks.crash_test import what_came_out
from tests.jobs import TINY, WaitFor

ROOT = Path(__file__).parents[1]

_SETTINGS = (*TINY, "trainer.max_epochs=3", "trainer.threads=1", "adapter.dropout=0.1")


class Sweep:
    """``train.py -m`` in a process of its own.

    Args:
        outputs: where its folder goes.
        name: of the sweep.
        overrides: besides those of a tiny run.
        held_up: seeds of runs that wait in the middle of their second epoch until ``release``.
        environment: what is added to it.
    """

    def __init__(
        self,
        outputs: Path,
        name: str,
        *overrides: str,
        held_up: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = outputs / "multirun" / name
        self._signs = outputs / f"{name}_signs"
        self._signs.mkdir(parents=True, exist_ok=True)
        wait = {"seed": list(held_up), "epoch": 1, "batch": 2, "folder": str(self._signs)}
        arguments = [f"+callbacks.wait._target_={WaitFor.__module__}.WaitFor"]
        arguments += [f"+callbacks.wait.{key}={value}".replace(" ", "") for key, value in wait.items()]
        arguments += [f"outputs={outputs}", f"sweep.name={name}", *overrides, "-m"]
        self._process = subprocess.Popen(
            [sys.executable, "train.py", *_SETTINGS, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, *seeds: int) -> None:
        """Until these runs are held up."""
        until(lambda: all((self._signs / f"{seed}.here").exists() for seed in seeds), 120)

    def release(self, *seeds: int) -> None:
        """Let them go on."""
        for seed in seeds:
            (self._signs / f"{seed}.go").touch()

    @property
    def pid(self) -> int:
        """Of the process that launches."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """To this process; from the keyboard (SIGINT) to all, as a terminal does."""
        (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)

    def kill(self) -> None:
        """As a machine that goes down does: this process and all that it started."""
        for pid in [*_descendants(self.pid), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()

    def end(self, seconds: float = 240) -> tuple[int, str]:
        """Exit code and what was said."""
        try:
            said, _ = self._process.communicate(timeout=seconds)
        finally:
            self._process.kill()
        return self._process.returncode, said

    def runs(self) -> dict[int, Path]:
        """Seed -> folder of every run that has finished."""
        folders = [path.parent for path in sorted(self.folder.glob("*/summary.json"))]
        return {yaml.safe_load((folder / "config.yaml").read_text())["seed"]: folder for folder in folders}

    def results(self) -> dict[int, dict]:
        """Seed -> all bits that the run left."""
        return {seed: what_came_out(folder) for seed, folder in self.runs().items()}

    def statuses(self) -> dict[str, dict]:
        """Name -> status of every job that began."""
        paths = sorted(self.folder.glob("*/status.json"))
        return {path.parent.name: json.loads(path.read_text()) for path in paths}


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [*(later for child in found for later in _descendants(child)), *found]


def until(ready: Callable[[], bool], seconds: float) -> None:
    """Wait, and fail if it takes longer."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
