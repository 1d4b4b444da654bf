"""Many runs in few processes: each process loads once, each finished run becomes a row."""

import fcntl
import gc
import hashlib
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from heterolora.allocation import Allocation, read_ranks
from heterolora.errors import ProcessLostError, SettingError
from heterolora.export import NO_EXPORT
from heterolora.parts import config_hash, make_parts
from heterolora.provenance import code_version
from heterolora.proxies.base import DegenerateScores
from heterolora.quiet import quieten
from heterolora.report.files import write_json
from heterolora.results import ROWS, RowFile, method_hash, section_name
from heterolora.shelf import Shelf
from heterolora.training import run_training, without_nan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run of many.

    Attributes:
        key: names the run among all of its folder; letters, digits, ``-_.=``.
        group: the method; cells of one group differ in the seed alone.
        stage: ``run``, ``control`` (repeats another cell and must agree bit for bit) or ``tuning`` (chooses settings).
        config: the resolved config of ``train.py``.
        choices: group -> option.
        command: what repeats it.
        held: least and most parameters that it may hold; None: not known beforehand.
    """

    key: str
    group: str
    stage: str
    config: Mapping[str, Any]
    choices: Mapping[str, Any]
    command: str
    held: tuple[int, int] | None


def pending(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """Those that no finished row of the folder holds.

    Raises:
        SettingError: if a row has the key of a cell, but another config.
    """
    done = {row.get("key"): row for row in RowFile(folder / ROWS).rows() if row.get("state") == "finished"}
    for cell in cells:
        if cell.key in done and done[cell.key].get("config_hash") != config_hash(cell.config):
            raise SettingError("rows", folder / ROWS, f"{cell.key} was run with another config; give a new folder")
    return [cell for cell in cells if cell.key not in done]


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    workers: int | None,
    keep: bool,
    on_row: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Run what is not done yet, and append a row for each run as it ends.

    A run that fails becomes a row that says why, and stops no other; the next call tries it again.

    Args:
        cells: the runs; all have the same ``trainer.threads``.
        folder: for ``rows.jsonl``, and the runs' own folders below ``runs``.
        workers: processes; None: as many as the cores allow.
        keep: keep the runs' folders; otherwise the row is all that stays.
        on_row: told about each new row.

    Returns:
        The newest row of every cell, in the order of the cells.

    Raises:
        SettingError: if another process is at it, or the processes would fight for cores.
        ProcessLostError: if a process of the pool was killed.
    """
    keys = [cell.key for cell in cells]
    if len(set(keys)) < len(keys):
        raise ValueError(f"keys are not unique: {sorted(key for key in keys if keys.count(key) > 1)[:3]}")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        todo = pending(cells, folder)
        count = processes(workers, cells)
        _log.info(
            "%d runs, %d of them done; %d processes; rows in %s", len(cells), len(cells) - len(todo), count, folder
        )
        file = RowFile(folder / ROWS)
        start = time.monotonic()
        with closing(_outcomes(todo, folder, min(count, len(todo)), keep)) as outcomes:
            for number, row in enumerate(outcomes, 1):
                file.append(row)
                on_row(row)
                left = (time.monotonic() - start) / number * (len(todo) - number)
                _log.info("%d of %d: %s; about %.0f min left", number, len(todo), _told(row), left / 60)
        rows = {row["key"]: row for row in file.rows()}
    return [rows[cell.key] for cell in cells]


def _told(row: Mapping[str, Any]) -> str:
    if row["state"] != "finished":
        return f"{row['key']} {row['state']}: {row['error']}"
    (name, value), *_ = row["metrics"]["validation"].items()
    shown = "not defined" if value is None else f"{value:.4f}"
    return f"{row['key']}: validation/{name} {shown}, {row['parameters']['held']:,} held, {row['seconds']['all']:.0f} s"


def processes(asked: int | None, cells: Sequence[Cell]) -> int:
    """How many processes run these cells; None: as many as the cores allow.

    Raises:
        SettingError: if they would fight for cores, or their threads are not fixed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {cell.config["trainer"]["threads"] for cell in cells}
    if len(threads) > 1 or None in threads:
        raise SettingError("trainer.threads", sorted(map(str, threads)), "one number for all runs: bits depend on it")
    each = max(threads, default=1)
    if asked is None:
        return max(1, cores // each)
    if asked < 1 or (asked > 1 and asked * each > cores):
        raise SettingError("workers", asked, f"1 to {max(1, cores // each)}: {cores} cores, {each} threads a run")
    return asked


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The lock goes away with the process, however that ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingError("folder", folder, "another process is at it") from error
        yield


def _outcomes(cells: Sequence[Cell], folder: Path, workers: int, keep: bool) -> Generator[dict[str, Any], None, None]:
    """Rows in the order in which runs end."""
    if not cells:
        return
    commit = code_version()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    waiting = list(reversed(cells))
    running: dict[Future[dict[str, Any]], Cell] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:  # few at a time, so that what waits is known
                cell = waiting.pop()
                running[pool.submit(_run_cell, cell, folder, keep)] = cell
            ended = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(ended, key=lambda future: future.exception() is not None):  # rows before errors
                yield _row(running[future], future.result(), commit)
                running.pop(future)
        pool.shutdown()
    except BrokenProcessPool as error:
        keys = ", ".join(cell.key for cell in running.values())
        raise ProcessLostError(
            f"a process was killed while at {keys} (out of memory?); finished runs are in {folder / ROWS}, "
            "and the same command goes on from there"
        ) from error
    finally:  # an interrupt must not wait for runs that go on for minutes
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _row(cell: Cell, outcome: Mapping[str, Any], commit: str | None) -> dict[str, Any]:
    return {
        "key": cell.key,
        "section": section_name(cell.choices),
        "group": cell.group,
        "stage": cell.stage,
        "seed": cell.config["seed"],
        **outcome,
        "config_hash": config_hash(cell.config),
        "method_hash": method_hash(cell.config),
        "command": cell.command,
        "commit": commit,
        "host": platform.node(),
    }


# -- inside a worker ---------------------------------------------------------------------------------------------------

_shelf: Shelf | None = None


def _start_worker(parent: int) -> None:
    """Keep what is loaded, and end with the parent, however it ends."""
    global _shelf
    _shelf = Shelf(keep=True)
    quieten()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_cell(cell: Cell, folder: Path, keep: bool) -> dict[str, Any]:
    """Run one cell in a folder of its own; what the row says of it."""
    if keep:
        place = folder / "runs" / cell.key
        shutil.rmtree(place, ignore_errors=True)  # of a run that was broken off
        place.mkdir(parents=True)
    else:
        place = Path(tempfile.mkdtemp(prefix=f"{cell.key}-"))
    times = {"started": _now()}
    begin = time.monotonic()
    try:
        with (place / "log.txt").open("a") as log, redirect_stdout(log), _logging_to(place / "log.txt"):
            outcome = _attempt(cell, place)
        outcome["seconds"] = {**outcome.get("seconds", {}), "all": round(time.monotonic() - begin, 2)}
        write_json(place / "status.json", {"state": outcome["state"], "config_hash": config_hash(cell.config), **times})
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
        gc.collect()  # trainer and module hold each other, and a model is large
    return {**outcome, **times, "ended": _now()}


def _attempt(cell: Cell, place: Path) -> dict[str, Any]:
    try:
        parts = replace(make_parts(cell.config, cell.choices), export=NO_EXPORT)  # a row is what is kept
        summary = run_training(parts, cell.config, place, None, _shelf, partial(_accept, cell))
    except FloatingPointError as error:
        return {"state": "failed", "error": str(error), "diverged": True}
    except (SettingError, DegenerateScores) as error:
        return {"state": "failed", "error": str(error)}
    except SystemExit:  # Lightning's answer to SIGTERM; the parent must see a lost process, and not end as if asked to
        os._exit(143)
    except Exception as error:  # one run must not stop the others; its log has the whole story
        _log.exception("failed")
        return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    return {
        "state": "finished",
        "metrics": without_nan(summary["metrics"]),
        "collapsed": summary["collapsed"],
        "parameters": summary["parameters"],
        "ranks": {name: rank for name, rank in read_ranks(place / "allocation.json").items() if rank},
        "steps": summary["steps"],
        "seconds": {key: round(value, 2) for key, value in summary["seconds"].items()},
        "data": {key: summary["data"][key] for key in ("sizes", "sha256")},
        "backbone": summary["backbone"],
        "digest": _digest(place / "adapter.safetensors"),
        "versions": summary["versions"],
    }


def _accept(cell: Cell, allocation: Allocation) -> None:
    """Refuse an allocation that holds more or less than the others, before it is trained."""
    if cell.held is not None and not cell.held[0] <= allocation.spent <= cell.held[1]:
        least, most = cell.held
        raise SettingError(
            "held", allocation.spent, f"{cell.group} must hold {least} to {most} parameters to be compared"
        )


def _digest(path: Path) -> str:
    """SHA-256 over names and bits of everything that was trained."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
