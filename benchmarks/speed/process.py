"""Commands in processes of their own, and what they took."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.machine import ROOT

_TAIL = 2000


class CommandFailedError(RuntimeError):
    """A command did not end well."""


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
        seconds: from before the process was made to after its end.
        started: the wall clock just before it was made (``time.time``).
        output: what it printed.
    """

    seconds: float
    started: float
    output: str


def python(arguments: Sequence[str], threads: int, more: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Done:
    """``python ARGUMENTS``, from the repository's root, without the hub.

    Args:
        arguments: after the interpreter's name.
        threads: of torch and the libraries below it.
        more: further environment variables.
        cwd: where to start it.

    Raises:
        CommandFailedError: if it does not end with 0; with the end of what it wrote.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
        **(more or {}),
    }
    command = [sys.executable, *arguments]
    started, start = time.time(), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise CommandFailedError(f"{' '.join(command)}: ended with {done.returncode}\n{done.stderr[-_TAIL:]}")
    return Done(seconds, started, done.stdout)
