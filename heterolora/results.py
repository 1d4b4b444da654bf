"""Finished runs as rows: what a comparison needs of each, wherever it was written down."""

import json
import logging
import os
import re
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
        material: digests of the data and of the backbone's weights; empty: not known.
    """

    section: str
    group: str
    seed: int
    metrics: Mapping[str, Mapping[str, float | None]]
    held: int
    steps: int
    place: str
    material: str = ""


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
        SettingError: if there is no such folder, no finished run in it, a file is damaged, or a control differs from
            the run that it repeats.
    """
    if not folder.is_dir():
        raise SettingError("DIR", folder, "no such folder")
    results: list[Result] = []
    unfinished: dict[str, str] = {}
    runs: list[_Run] = []
    for path, kind in _walk(folder):
        if kind == ROWS:
            done, open_ones = _from_rows(path / ROWS)
            results += done
            unfinished |= open_ones
            continue
        status = _read_json(path / "status.json")
        if status.get("state") not in ("finished", "planned", "continued"):
            unfinished[str(path)] = str(status.get("state"))
        elif status["state"] == "finished" and (path / "summary.json").exists():  # a tournament's own log has none
            given = status.get("overrides", [])
            runs.append(_Run(path, _read_json(path / "summary.json"), _read_yaml(path / "config.yaml"), given))
    results += _from_runs(runs)
    if not results:
        states = f"; unfinished: {unfinished}" if unfinished else ""
        raise SettingError("DIR", folder, f"holds no finished run{states}")
    return Found(tuple(results), unfinished)


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders with rows, whose own run folders are passed over, and run folders; jobs in the order of their number."""
    for place, inner, files in os.walk(folder):
        inner.sort(
            key=lambda name: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
        )
        for kind in (ROWS, "status.json"):
            if kind in files:
                yield Path(place), kind
                inner.clear()
                break


def _from_rows(path: Path) -> tuple[list[Result], dict[str, str]]:
    """Runs count; those that only chose a learning rate do not, and controls must agree with what they repeat."""
    done, unfinished = [], {}
    newest = {row.get("key"): row for row in RowFile(path).rows()}
    for key, row in newest.items():
        place = f"{path}: {key}"
        try:
            if row["stage"] != "run":
                continue
            if row["state"] != "finished":
                unfinished[place] = row["state"]
                continue
            held, steps = row["parameters"]["held"], row["steps"]
            material = _material(row["data"]["sha256"], row["backbone"])
            done.append(Result(row["section"], row["group"], row["seed"], row["metrics"], held, steps, place, material))
        except (KeyError, TypeError) as error:
            raise SettingError("rows", place, f"lacks {error}") from error
    check_controls(list(newest.values()))
    return done, unfinished


def check_controls(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """A control must end with the very bits of the run that it repeats: everything trained, and every metric.

    Returns:
        The seeds of the controls that were compared.

    Raises:
        SettingError: if one differs.
    """
    done = [row for row in rows if row["state"] == "finished"]
    runs = {(row["group"], row["seed"]): row for row in done if row["stage"] == "run"}
    seeds = []
    for row in done:
        other = runs.get((row["group"], row["seed"]))
        if row["stage"] != "control" or other is None:
            continue
        if wrong := [what for what in ("digest", "metrics", "ranks") if row[what] != other[what]]:
            raise SettingError(
                "control",
                row["key"],
                f"is the same run as {other['key']}, but its {' and '.join(wrong)} differ: nothing there counts",
            )
        seeds.append(row["seed"])
    return seeds


@dataclass(frozen=True)
class _Run:
    """A run's folder, read."""

    path: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: Sequence[str]


def _from_runs(runs: Sequence[_Run]) -> list[Result]:
    results = []
    try:
        names = group_names([(run.summary["choices"], run.config, run.overrides) for run in runs])
        for name, run in zip(names, runs, strict=True):
            summary, choices = run.summary, run.summary["choices"]
            section, held = f"{choices['task']}, {choices['model']}", summary["parameters"]["held"]
            metrics, place = summary["metrics"], str(run.path)
            material = _material(summary["data"]["sha256"], summary["backbone"])
            results.append(Result(section, name, summary["seed"], metrics, held, summary["steps"], place, material))
    except (KeyError, TypeError) as error:
        raise SettingError("DIR", [str(run.path) for run in runs][:1], f"a summary lacks {error}") from error
    return results


def _material(data: str, backbone: str) -> str:
    return f"data {data[:12]}, backbone {backbone[:12]}"


_NO_METHOD = frozenset(
    {"seed", "resume", "outputs", "run", "logger", "callbacks", "tournament", "table", "data.cache_dir", "data.root"}
)
"""Values that tell no method from another; seeds are repetitions."""

_APART = ("task", "model", "logger", "callbacks")
"""Choices that tell no method from another: the first two are the section."""


def group_names(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Sequence[str]]]) -> list[str]:
    """What tells each run from the others; seed, task and backbone apart.

    Args:
        runs: for each the choices (group -> option), the resolved config, and the overrides that the user gave.

    Returns:
        Of each run: the options and values in which runs differ, e.g. ``proxy=snip optimizer.lr=0.001``. What follows
        from something named already is left out; options come first, then what was given, then the rest. If runs
        differ in nothing: ``all runs``.
    """
    names: list[list[str]] = [[] for _ in runs]
    known: list[tuple[Any, ...]] = [(choices.get("task"), choices.get("model")) for choices, _, _ in runs]
    flat = [_flat(config, config.get("seed")) for _, config, _ in runs]
    choices = [{key: value for key, value in given.items() if key not in _APART} for given, _, _ in runs]
    given = {text.partition("=")[0].lstrip("+~") for _, _, overrides in runs for text in overrides}
    user = [{key: value for key, value in row.items() if key in given} for row in flat]
    for table in (choices, user, flat):
        for key in dict.fromkeys(key for row in table for key in row):
            values = [json.dumps(row.get(key), sort_keys=True, default=str) for row in table]
            if len(set(zip(known, values, strict=True))) == len(set(known)):
                continue  # the same everywhere, or it follows from what is known
            known = [(*before, value) for before, value in zip(known, values, strict=True)]
            for name, row in zip(names, table, strict=True):
                name.append(f"{key}={row.get(key)}")
    return [" ".join(name) or "all runs" for name in names]


def _flat(node: Mapping[str, Any], seed: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of the values on which results depend, but for the seed, which some nodes repeat."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in _NO_METHOD or (key == "seed" and value == seed):
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, seed, f"{name}.")
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
