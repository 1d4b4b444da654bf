"""Finished runs as rows: what a comparison needs of each, wherever it was written down."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterolora.errors import SettingError

_log = logging.getLogger(__name__)

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Result:
    """One finished run, as a comparison sees it.

    Attributes:
        section: what is compared only with itself: task and backbone, e.g. ``mrpc, minilm``.
        group: what was done, e.g. ``proxy=snip`` or a tournament's method; its seeds are its repetitions.
        seed: of the run; runs of two groups with one seed are a pair (same data order, dropout, head).
        metrics: split -> metric -> value, None where it is not defined; the task's first metric comes first, ``loss``
            last.
        held: trainable adapter parameters in memory.
        steps: optimizer steps.
        place: where it was read, for messages.
    """

    section: str
    group: str
    seed: int
    metrics: Mapping[str, Mapping[str, float | None]]
    held: int
    steps: int
    place: str


class RowFile:
    """Rows of JSON, one a line, that are appended whole.

    What a process that died has left of a row is no row, and goes away with the next append.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, in the order in which they were written.

        Raises:
            SettingError: if a line is no JSON object.
        """
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")  # behind the last line's end: nothing, or a torn row
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SettingError("rows", f"{self.path}, line {number}", f"is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise SettingError("rows", f"{self.path}, line {number}", "is no JSON object")
            rows.append(row)
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, and wait until it is on the disk; NaN is refused."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self.path.open("ab") as file:
            _drop_torn(self.path)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _drop_torn(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        _log.warning("%s: an unfinished row is dropped", path)
        os.truncate(path, whole)


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        results: of the finished runs.
        unfinished: place -> state of the others (running, failed, interrupted).
        first: the metrics of each section, in the task's order.
    """

    results: tuple[Result, ...]
    unfinished: Mapping[str, str]


def find_results(folder: Path) -> Found:
    """All runs below a folder: run folders of ``train.py``, and the rows of tournaments.

    Runs are one group if their configs differ in the seed alone. A group's name is what tells it from the others.

    Raises:
        SettingError: if there is no such folder, no finished run in it, or a file is damaged.
    """
    if not folder.is_dir():
        raise SettingError("DIR", folder, "no such folder")
    results: list[Result] = []
    unfinished: dict[str, str] = {}
    runs: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    for path, kind in _walk(folder):
        if kind == ROWS:
            done, open_ones = _from_rows(path / ROWS)
            results += done
            unfinished |= open_ones
        elif (state := _read_json(path / "status.json").get("state")) not in ("finished", "planned", "continued"):
            unfinished[str(path)] = str(state)
        elif state == "finished":
            summary = _read_json(path / "summary.json")
            runs.append((path, summary, _read_yaml(path / "config.yaml")))
    results += _from_runs(runs)
    if not results:
        states = f"; unfinished: {unfinished}" if unfinished else ""
        raise SettingError("DIR", folder, f"holds no finished run{states}")
    return Found(tuple(results), unfinished)


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders with rows, whose own run folders are passed over, and run folders."""
    for place, inner, files in os.walk(folder):
        inner.sort()
        for kind in (ROWS, "status.json"):
            if kind in files:
                yield Path(place), kind
                inner.clear()
                break


def _from_rows(path: Path) -> tuple[list[Result], dict[str, str]]:
    """Runs and controls count; those that only chose a learning rate do not."""
    done, unfinished = [], {}
    newest = {row.get("key"): row for row in RowFile(path).rows()}
    for key, row in newest.items():
        place = f"{path}: {key}"
        try:
            if row["stage"] == "tuning":
                continue
            if row["state"] != "finished":
                unfinished[place] = row["state"]
                continue
            done.append(
                Result(
                    row["section"],
                    row["group"],
                    row["seed"],
                    row["metrics"],
                    row["parameters"]["held"],
                    row["steps"],
                    place,
                )
            )
        except (KeyError, TypeError) as error:
            raise SettingError("rows", place, f"lacks {error}") from error
    return done, unfinished


def _from_runs(runs: Sequence[tuple[Path, dict[str, Any], dict[str, Any]]]) -> list[Result]:
    try:
        names = group_names([(summary["choices"], config) for _, summary, config in runs])
        return [
            Result(
                f"{summary['choices']['task']}, {summary['choices']['model']}",
                name,
                summary["seed"],
                summary["metrics"],
                summary["parameters"]["held"],
                summary["steps"],
                str(path),
            )
            for name, (path, summary, _) in zip(names, runs, strict=True)
        ]
    except (KeyError, TypeError) as error:
        raise SettingError("DIR", [str(path) for path, _, _ in runs][:1], f"a summary lacks {error}") from error


_NOT_METHOD = frozenset({"seed", "resume", "outputs", "run"})
_SECTION = ("task", "model")


def group_names(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """What tells each run from the others, the seed, the task and the backbone apart.

    Args:
        runs: for each the choices (group -> option) and the resolved config.

    Returns:
        Of each run: the options and values in which runs differ, e.g. ``proxy=snip optimizer.lr=0.001``. A value that
        follows from an option named already is left out. If runs differ in nothing: ``all runs``.
    """
    names: list[list[str]] = [[] for _ in runs]
    sections = [tuple(choices.get(key) for key in _SECTION) for choices, _ in runs]
    known: list[tuple[Any, ...]] = list(sections)
    flat = [_flat(config) for _, config in runs]
    choices = [{k: v for k, v in given.items() if k not in (*_SECTION, "logger", "callbacks")} for given, _ in runs]
    for table in (choices, flat):
        for key in dict.fromkeys(key for row in table for key in row):
            values = [json.dumps(row.get(key), sort_keys=True, default=str) for row in table]
            if len(set(zip(known, values, strict=True))) == len(set(known)):
                continue  # the same everywhere, or it follows from what is known
            known = [(*before, value) for before, value in zip(known, values, strict=True)]
            for name, row in zip(names, table, strict=True):
                name.append(f"{key}={row.get(key)}")
    return [" ".join(name) or "all runs" for name in names]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values on which results depend."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if not prefix and key in (*_NOT_METHOD, "logger", "callbacks", "tournament"):
            continue
        if name in ("data.cache_dir", "data.root"):
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError("DIR", path, f"cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise SettingError("DIR", path, "is no JSON object")
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingError("DIR", path, f"cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise SettingError("DIR", path, "holds no config")
    return found
