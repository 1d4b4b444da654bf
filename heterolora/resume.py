"""Which earlier run is gone on with, and which runs are still at work."""

import json
import logging
import os
import socket
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

_DONE = ("finished", "continued")


@dataclass(frozen=True)
class Resume:
    """An earlier run that is gone on with.

    Attributes:
        run: its folder.
        checkpoint: the state to start from.
    """

    run: Path
    checkpoint: Path


def find_resume(config: Mapping[str, Any], folder: Path) -> Resume | None:
    """The run to go on with, if the config asks for one; None: start from the beginning.

    Args:
        config: the resolved config; ``resume`` is true, false or a folder.
        folder: of the run that is about to start.

    Raises:
        SettingError: if the given run had another config, is finished or at work, or its checkpoints are all damaged.
    """
    asked = config["resume"]
    if asked is False:
        return None
    wanted = config_hash(config)
    if asked is True:
        return _newest(Path(config["outputs"]), folder, wanted)
    if not isinstance(asked, str):
        raise SettingError("resume", asked, "true, false or the folder of a run")
    return _given(Path(asked).expanduser(), wanted)


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
    _log.info("resume=true: no unfinished run with this config has a checkpoint; starting anew")
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
    """What tells this process from all others, also from a later one with its number."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid())}


def is_running(status: Mapping[str, Any]) -> bool:
    """Whether another process of this machine is at it; this process runs one job at a time."""
    here = status.get("state") == "running" and status.get("host") == socket.gethostname()
    if not here or status["pid"] == os.getpid() or not _alive(status["pid"]):
        return False
    born = status.get("born")
    return born is None or born == _born(status["pid"])


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
