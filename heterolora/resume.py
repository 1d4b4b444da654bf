"""Which earlier run is gone on with, and which runs are still at work."""

import json
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterolora.checkpoints import FOLDER, newest_first, newest_good
from heterolora.errors import SettingError
from heterolora.parts import config_hash
from heterolora.report.files import write_json

_log = logging.getLogger(__name__)

STATUS = "status.json"

ATTEMPTS = "attempts"
"""Folder in a run's folder, for what earlier attempts at the same run left there."""

_DONE = ("finished", "continued", "skipped")


@dataclass(frozen=True)
class Resume:
    """An earlier run that is gone on with.

    Attributes:
        run: its folder.
        checkpoint: the state to start from.
    """

    run: Path
    checkpoint: Path


def find_resume(config: Mapping[str, Any], folder: Path, scope: Path | None = None) -> Resume | None:
    """The run to go on with, if there is one to be asked for; None: start from the beginning.

    An earlier attempt in the run's own folder comes first.

    Args:
        config: the resolved config; ``resume`` is true, false or a folder.
        folder: of the run that is about to start.
        scope: of a sweep that is gone on with: where its jobs are.

    Raises:
        SettingError: if the given run had another config, is finished or at work, or its checkpoints are all damaged.
    """
    asked = config["resume"]
    wanted = config_hash(config)
    for attempt in _numbered(folder, newest_first=True):
        if (found := _of_attempt(attempt, wanted)) is not None:
            return found
    if scope is not None:
        return _newest(scope, folder, wanted)
    if asked is False:
        return None
    if asked is True:
        return _newest(Path(config["outputs"]), folder, wanted)
    if not isinstance(asked, str):
        raise SettingError("resume", asked, "true, false or the folder of a run")
    return _given(Path(asked).expanduser(), wanted)


def _of_attempt(attempt: Path, wanted: str) -> Resume | None:
    """What an earlier attempt in this folder leaves to go on from."""
    checkpoint, wrong = newest_good(attempt, wanted)
    _say(attempt, wrong)
    if checkpoint is None:
        return None
    _log.info("going on from %s", checkpoint)
    return Resume(attempt, checkpoint)


def make_room(folder: Path, restart: bool) -> bool:
    """Put what an earlier attempt at a run left in its folder aside, for another one.

    Args:
        folder: the run's.
        restart: whether this is asked for, as with a sweep that is gone on with; a job that its scheduler starts again
            always is.

    Returns:
        Whether the run in the folder is finished; otherwise there is room.

    Raises:
        SettingError: if the folder holds a run that is not this job's to go on with, or that is at work.
    """
    torn = next(folder.glob(f"{ATTEMPTS}/.*"), None)  # who put things there was stopped halfway
    if not (folder / STATUS).exists():
        if torn is not None:
            torn.rename(torn.with_name(torn.name[1:]))
        return False
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = {}
    again = status.get("job") is not None and status.get("job") == this_process()["job"]
    if not (restart or again):
        raise SettingError("hydra.run.dir", folder, "holds another run; give a new folder")
    if status.get("state") == "finished":
        return True
    elsewhere = status.get("host") != socket.gethostname()
    if is_running(status) and not (again and elsewhere):  # a queue starts a job on another machine when it is gone here
        raise SettingError("hydra.run.dir", folder, f"is still at work ({_where(status)})")
    number = 1 + max((int(path.name) for path in _numbered(folder)), default=0)
    aside = torn or folder / ATTEMPTS / f".{number}"
    aside.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATUS):  # last, what says that there is more
        if path.name not in (ATTEMPTS, ".hydra") and path.suffix != ".log":
            path.rename(aside / path.name)
    aside.rename(aside.with_name(aside.name[1:]))  # whole, or not there
    return False


def _numbered(folder: Path, newest_first: bool = False) -> list[Path]:
    """Earlier attempts, by number."""
    found = [path for path in folder.glob(f"{ATTEMPTS}/*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=newest_first)


def find_finished(scope: Path, wanted: str) -> Path | None:
    """A run with this config hash that a sweep's folder holds already."""
    for path in sorted(scope.glob(f"*/{STATUS}")):
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if status.get("config_hash") == wanted and status.get("state") == "finished":
            return path.parent
    return None


def _newest(outputs: Path, folder: Path, wanted: str) -> Resume | None:
    """Of the unfinished runs with this config, the one that wrote last and has something to go on from."""
    unfinished = [path.parent for path in outputs.glob(f"**/{STATUS}") if _is_unfinished(path, wanted)]
    unfinished = [run for run in unfinished if run.resolve() != folder.resolve()]
    for run in sorted(unfinished, key=_written, reverse=True):
        checkpoint, wrong = newest_good(run, wanted)
        _say(run, wrong)
        if checkpoint is not None:
            _log.info("resuming %s", checkpoint)
            return Resume(run, checkpoint)
    _log.info("no unfinished run with this config has a checkpoint; starting anew")
    return None


def _given(run: Path, wanted: str) -> Resume | None:
    if not (run / STATUS).is_file():
        raise SettingError("resume", run, "no checkpoint there; give the folder of a run, or true, or false")
    try:
        status = json.loads((run / STATUS).read_text(encoding="utf-8"))
        given, state = status.get("config_hash"), status["state"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SettingError("resume", run, f"its {STATUS} is damaged ({error})") from error
    if given != wanted:
        raise SettingError("resume", run, f"that run had another config (hash {given}, this one's is {wanted})")
    if state in _DONE or is_running(status):
        raise SettingError("resume", run, f"that run is {state}")
    checkpoint, wrong = newest_good(run, wanted)
    _say(run, wrong)
    if checkpoint is None and any(newest_first(run / FOLDER)):
        raise SettingError("resume", run, f"none of its checkpoints can be used: {'; '.join(wrong)}")
    if checkpoint is None:
        _log.info("resume=%s: that run was stopped before its first checkpoint; starting anew", run)
        return None
    _log.info("resuming %s", checkpoint)
    return Resume(run, checkpoint)


def _say(run: Path, wrong: list[str]) -> None:
    for reason in wrong:
        _log.warning("%s: %s; an older one is looked for", run / FOLDER, reason)


def _written(run: Path) -> float:
    return max((path.stat().st_mtime for path in newest_first(run / FOLDER)), default=0.0)


def _is_unfinished(status_file: Path, wanted: str) -> bool:
    try:
        status = json.loads(status_file.read_text(encoding="utf-8"))
        mine = status.get("config_hash") == wanted and status.get("state") not in _DONE
    except (OSError, ValueError, AttributeError):
        return False
    return mine and not is_running(status)


def this_process() -> dict[str, Any]:
    """What tells this process from all others, also from a later one with its number.

    ``job`` is its name in a queue, where a queue started it: that stays when the job is queued again.
    """
    job = None
    if "SLURM_JOB_ID" in os.environ:
        job = f"SLURM {os.environ['SLURM_JOB_ID']}"
    elif "SUBMITIT_LOCAL_JOB_ID" in os.environ:
        job = f"submitit {socket.gethostname()} {os.environ['SUBMITIT_LOCAL_JOB_ID']}"
    return {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid()), "job": job}


def is_running(status: Mapping[str, Any]) -> bool:
    """Whether another process is at it: one of this machine, or a job that SLURM has not ended."""
    if status.get("state") != "running":
        return False
    if status.get("host") != socket.gethostname():
        return _in_queue(str(status.get("job")))
    if status["pid"] == os.getpid() or not _alive(status["pid"]):
        return False
    born = status.get("born")
    return born is None or born == _born(status["pid"])


def _in_queue(job: str) -> bool:
    """Whether SLURM runs a job, or will; false where there is no SLURM to ask."""
    name, _, number = job.partition(" ")
    if name != "SLURM" or shutil.which("squeue") is None:
        return False
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={number}"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())


def _where(status: Mapping[str, Any]) -> str:
    return status.get("job") or f"process {status.get('pid')} on {status.get('host')}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _born(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where the system does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if state == "Z" else int(fields[18])  # a dead one that nobody has asked after yet
    except (OSError, ValueError, IndexError):
        return None


def mark_continued(run: Path, by: Path) -> None:
    """The broken-off run, and those that it went on with, are done with: another folder holds their result."""
    earlier: str | None = str(run)
    while earlier is not None:
        path = Path(earlier) / STATUS
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            _log.warning("%s cannot be marked as continued: it was moved, or is damaged", path)
            return
        write_json(path, status | {"state": "continued", "continued_in": str(by)})
        earlier = status.get("resumed_from")
