"""How the processes of one run come about: started by this command, by torchrun or by SLURM's srun.

``train.py`` asks before Hydra reads the arguments, so nothing here needs torch.
"""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterolora.errors import SettingError

_log = logging.getLogger(__name__)

_STARTER = "HETEROLORA_STARTED_BY"
"""Environment variable: number of the process that started this one."""

_FOLLOWER = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout")
"""Only the first process of a run has a folder; Hydra makes none for the others, and writes nothing."""

_GRACE = 20.0
"""Seconds in which a process that waits for one that is gone should have noticed by itself."""

_HINT = "Set the environment variable HYDRA_FULL_ERROR=1"
"""What Hydra says after every error."""

OURS = "trainer.devices"
"""The starter of processes that this command started itself."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number among those of its machine.
        local_size: how many its machine has.
        address: of the first one's machine; None: torchrun's agent knows.
        port: at which the first one listens.
        starter: what started them.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    port: int
    starter: str


def find_place(environ: Mapping[str, str]) -> Place | None:
    """What torchrun, srun or our own starter left in the environment; None: this process was started alone.

    Raises:
        SettingError: if SLURM put different numbers of tasks on its nodes.
    """
    if int(environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in environ:
        rank, size, local_rank, local_size = (
            int(environ.get(key, default))
            for key, default in (
                ("RANK", ""),
                ("WORLD_SIZE", ""),
                ("LOCAL_RANK", environ["RANK"]),
                ("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]),
            )
        )
        ours = _STARTER in environ
        address = None if "TORCHELASTIC_USE_AGENT_STORE" in environ else environ.get("MASTER_ADDR", "127.0.0.1")
        port = int(environ.get("MASTER_PORT", 29500))
        return Place(rank, size, local_rank, local_size, address, port, OURS if ours else "torchrun")
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm(environ)
    return None


def _slurm(environ: Mapping[str, str]) -> Place:
    """A task of a step that srun started."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])  # "2(x3)", or "2,1"
    if "," in per_node:
        raise SettingError("srun", per_node, "every node needs as many tasks as the others: --ntasks-per-node")
    return Place(
        rank=int(environ["SLURM_PROCID"]),
        size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        local_size=int(per_node.partition("(")[0]),
        address=_first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        port=20000 + (int(environ["SLURM_JOB_ID"]) * 64 + int(environ.get("SLURM_STEP_ID", 0))) % 20000,
        starter="srun",
    )


def _first_host(nodes: str) -> str:
    """Of ``a1``, ``a1,b2`` or ``a[01-03,07]-x,b2``: the first name."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^\[,]*))?", nodes)
    if found is None:
        raise SettingError("SLURM_STEP_NODELIST", nodes, "names no node")
    return "".join(part or "" for part in found.groups())


def arguments(given: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What Hydra shall read: as it was given, and for all processes but the first without a folder.

    Raises:
        SystemExit: for several processes that would each hold a sweep of their own, or that SLURM spread unevenly.
    """
    try:
        place = find_place(environ)
    except SettingError as error:
        raise SystemExit(str(error)) from None
    if place is None:
        return list(given)
    if {"-m", "--multirun"} & set(given):
        raise SystemExit(
            f"-m: {place.starter} started {place.size} processes, each of which would run the whole sweep; "
            "give it one run at a time"
        )
    return [*given, *(_FOLLOWER if place.rank else ())]


class Followers:
    """The other processes of a run that this command starts on its own machine, by repeating itself.

    They write to ``process_1.log``, ... in the run's folder. When one of them is lost, or this process is, none of the
    others waits for it: connections end with the process, and beyond that both sides look after each other.

    Args:
        count: how many.
        folder: the run's.
        port: at which the first process listens.
        waiting: says for how many seconds this process has been waiting for others.

    Raises:
        SettingError: if this process is not one whose command could be repeated.
    """

    def __init__(self, count: int, folder: Path, port: int, waiting: Callable[[], float]) -> None:
        command = own_command()
        if command is None:
            raise SettingError(
                "trainer.devices", count + 1, "processes are started by repeating the command python train.py ..."
            )
        self._logs = [folder / f"process_{rank}.log" for rank in range(1, count + 1)]
        self._waiting = waiting
        self._started: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Event()
        size = str(count + 1)
        for rank, log in enumerate(self._logs, 1):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), _STARTER: str(os.getpid())}
            with log.open("wb") as out:  # a session of its own: an interrupt from the keyboard comes to the first alone
                self._started.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | place,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        threading.Thread(target=self._watch, daemon=True).start()

    def lost(self) -> str | None:
        """Which process ended before its time, and its last words; None: none did."""
        for rank, (process, log) in enumerate(zip(self._started, self._logs, strict=True), 1):
            if process.poll():
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                said = [line for line in lines if not line.startswith(_HINT)]
                last = f": {said[-1]}" if said else ""
                return f"process {rank} of {len(self._started) + 1} ended with code {process.returncode}{last} ({log})"
        return None

    def lost_soon(self, seconds: float = 5.0) -> str | None:
        """As ``lost``, given time for a broken connection to be followed by the end of its process."""
        until = time.monotonic() + seconds
        while (found := self.lost()) is None and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def end(self, finished: bool) -> None:
        """Wait for those that have finished, and stop all others."""
        self._ending.set()
        if not finished:
            for process in self._started:
                if process.poll() is None:
                    process.terminate()
        for process in self._started:
            try:
                process.wait(60 if finished else 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            if finished and not log.stat().st_size:
                log.unlink()

    def _watch(self) -> None:
        """End this process if it waits for one that is gone, which some ways to communicate let it do for long."""
        while not self._ending.wait(1.0):
            if self._waiting() > _GRACE and (lost := self.lost()) is not None:
                _log.error("%s", lost)
                os._exit(1)  # nothing less ends a wait in a library; a run whose process is gone can be gone on with


def own_command() -> list[str] | None:
    """What repeats this process: python train.py with its arguments; None: it is something else."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return [sys.executable, *sys.orig_argv[1:]] if main is not None and Path(main).name == "train.py" else None


def leave_with_starter(environ: Mapping[str, str]) -> None:
    """End this process when the one that started it ends, however that comes."""
    starter = environ.get(_STARTER)
    if starter is None:
        return

    def watch() -> None:
        while os.getppid() == int(starter):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
