"""Finished runs as rows: what a comparison needs of each, wherever it was written down."""

import hashlib
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
from heterolora.report.files import read_json

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
        code: commit and versions that made it; empty: not known.
        beyond: parameters held beyond its budget; 0, too, where the budget is no number of parameters.
    """

    section: str
    group: str
    seed: int
    metrics: Mapping[str, Mapping[str, float | None]]
    held: int
    steps: int
    place: str
    material: str = ""
    code: str = ""
    beyond: int = 0


@dataclass(frozen=True)
class Declared:
    """What a tournament said before its first run about the table of its rows."""

    baseline: str
    primary: str | None
    tolerance: float

    def order(self, result: Result) -> tuple[bool, bool, str, int]:
        """Sorts the baseline's runs first and the primary method's next: which run ended first is chance."""
        return result.group != self.baseline, result.group != self.primary, result.group, result.seed


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
        unfinished: place -> state of the others (running, failed, interrupted, or a damaged status).
        declared: section -> what was declared, of tournaments.
    """

    results: tuple[Result, ...]
    unfinished: Mapping[str, str]
    declared: Mapping[str, Declared]


def find_results(folder: Path, *more: Path) -> Found:
    """All runs below folders: run folders of ``train.py``, and the rows of tournaments, each a section of its own.

    Runs of one section are one group if their configs differ in the seed alone. A group's name is what tells it from
    the others; in a tournament, the name of the method.

    Raises:
        SettingError: if there is no such folder, no finished run in it, a file is damaged, or a control differs from
            the run that it repeats.
    """
    folders = (folder, *more)
    for given in folders:
        if not given.is_dir():
            raise SettingError("DIR", given, "no such folder")
    results: list[Result] = []
    unfinished: dict[str, str] = {}
    declared: dict[str, Declared] = {}
    runs: list[_Run] = []
    places = {path.resolve(): (path, kind) for given in folders for path, kind in _walk(given)}  # each counts once
    for path, kind in places.values():
        if kind == ROWS:
            name, said = _declaration(path)
            done, open_ones = _from_rows(path / ROWS, name)
            results += done if said is None else sorted(done, key=said.order)
            unfinished |= open_ones
            declared |= {result.section: said for result in done if said is not None}
            continue
        try:
            status = read_json(path / "status.json", "DIR")
        except SettingError:  # a process died, or the disk was full
            status = {"state": "damaged"}
        if status.get("state") not in ("finished", "planned", "continued", "skipped"):
            unfinished[str(path)] = str(status.get("state"))
        elif status["state"] == "finished" and (path / "summary.json").exists():  # a tournament's own log has none
            asked = status.get("overrides", [])
            runs.append(_Run(path, read_json(path / "summary.json", "DIR"), _read_yaml(path / "config.yaml"), asked))
    results += _from_runs(runs)
    if not results:
        states = f"; unfinished: {unfinished}" if unfinished else ""
        raise SettingError("DIR", " ".join(map(str, folders)), f"holds no finished run{states}")
    return Found(tuple(results), unfinished, declared)


def _declaration(folder: Path) -> tuple[str, Declared | None]:
    """The name of the tournament in a folder, and what it declared; empty and None where rows have none."""
    if not (folder / "declaration.json").exists():
        return "", None
    content = read_json(folder / "declaration.json", "DIR")
    try:
        return content["name"], Declared(content["baseline"], content["primary"], content["tolerance"])
    except KeyError as error:
        raise SettingError("DIR", folder / "declaration.json", f"lacks {error}") from error


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders with rows, whose own run folders are passed over, and run folders; jobs in the order of their number."""
    for place, inner, files in os.walk(folder):
        inner.sort(key=by_number)
        for kind in (ROWS, "status.json"):
            if kind in files:
                yield Path(place), kind
                inner.clear()
                break


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts names with the numbers in them as numbers: job 9 comes before job 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _from_rows(path: Path, tournament: str) -> tuple[list[Result], dict[str, str]]:
    """Runs count; those that only chose a learning rate do not, and controls must agree with what they repeat.

    Raises:
        SettingError: if a row lacks something, or runs of one group differ in more than the seed.
    """
    done, unfinished = [], {}
    newest = {row.get("key"): row for row in RowFile(path).rows()}
    methods: dict[str, str] = {}
    for key, row in newest.items():
        place = f"{path}: {key}"
        try:
            if row["stage"] != "run":
                continue
            if row["state"] != "finished":
                unfinished[place] = row["state"]
                continue
            if methods.setdefault(row["group"], row["method_hash"]) != row["method_hash"]:
                raise SettingError("rows", place, f"other runs of {row['group']} have another config, the seed apart")
            held, steps = row["parameters"]["held"], row["steps"]
            material, code = _material(row["data"]["sha256"], row["backbone"]), _code(row["commit"], row["versions"])
            section = f"{row['section']}; tournament {tournament}" if tournament else row["section"]
            metrics = row["metrics"]
            beyond = _beyond(row["parameters"])
            done.append(Result(section, row["group"], row["seed"], metrics, held, steps, place, material, code, beyond))
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
    done = [row for row in rows if row.get("state") == "finished"]
    runs = {(row["group"], row["seed"]): row for row in done if row["stage"] == "run"}
    seeds = []
    for row in done:
        other = runs.get((row["group"], row["seed"]))
        if row["stage"] != "control" or other is None:
            continue
        if wrong := [what for what in ("digest", "metrics", "ranks") if row.get(what) != other.get(what)]:
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
            section, held = section_name(choices), summary["parameters"]["held"]
            metrics, place = summary["metrics"], str(run.path)
            material = _material(summary["data"]["sha256"], summary["backbone"])
            code, steps = _code(summary.get("commit"), summary["versions"]), summary["steps"]
            beyond = _beyond(summary["parameters"])
            results.append(Result(section, name, summary["seed"], metrics, held, steps, place, material, code, beyond))
    except (KeyError, TypeError) as error:
        raise SettingError("DIR", [str(run.path) for run in runs][:1], f"a summary lacks {error}") from error
    return results


def section_name(choices: Mapping[str, Any]) -> str:
    """What a run is compared within, by its options: task and backbone."""
    return f"{choices['task']}, {choices['model']}"


def _beyond(parameters: Mapping[str, Any]) -> int:
    budget = parameters.get("budget")
    return 0 if budget is None else max(0, int(parameters["held"] - budget))


def _material(data: str, backbone: str) -> str:
    return f"data {data[:12]}, backbone {backbone[:12]}"


def _code(commit: str | None, versions: Mapping[str, str]) -> str:
    shown = " ".join(f"{name} {version}" for name, version in versions.items())
    return f"commit {commit}, {shown}" if commit else shown


_NO_METHOD = frozenset(
    {"seed", "resume", "outputs", "run", "logger", "sweep", "tournament", "table", "export"}
    | {"data.cache_dir", "data.root"}
)
"""Values that tell no method from another; seeds are repetitions."""

OFF = ("start_from", "budget.step_time", "init", "baseline", "allocator.groups")
"""Dotted keys that are null or empty where they change nothing: then they are as if they were not there."""

_APART = ("task", "model", "logger", "callbacks", "experiment")
"""Choices that name no method: the first two are the section, of the others the values count."""


def method_hash(config: Mapping[str, Any]) -> str:
    """Identifies runs that differ in the seed alone."""
    text = json.dumps(_flat(config, config.get("seed")), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def group_names(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Sequence[str]]]) -> list[str]:
    """What tells each run from the others; seed, task and backbone apart.

    Args:
        runs: for each the choices (group -> option), the resolved config, and the overrides that the user gave.

    Returns:
        Of each run: the options and values in which runs of its section differ, e.g. ``proxy=snip optimizer.lr=0.001``.
        Options come first, then every value that was given and differs, then what else is needed to tell configs
        apart; equal configs have equal names, however they were asked for. If runs differ in nothing: ``all runs``.
    """
    sections: dict[tuple[Any, Any], list[int]] = {}
    for index, (choices, _, _) in enumerate(runs):
        sections.setdefault((choices.get("task"), choices.get("model")), []).append(index)
    names: dict[int, str] = {}
    for members in sections.values():
        names |= dict(zip(members, _names_in_section([runs[index] for index in members]), strict=True))
    return [names[index] for index in range(len(runs))]


def _names_in_section(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Sequence[str]]]) -> list[str]:
    given = {text.partition("=")[0].lstrip("+~") for _, _, overrides in runs for text in overrides}
    flat = [_flat(config, config.get("seed"), given=given) for _, config, _ in runs]
    configs = [json.dumps(row, sort_keys=True, default=str) for row in flat]
    named = [{"method": chosen.get("method"), **chosen} for chosen, _, _ in runs]  # that name says it all
    choices = [{key: value for key, value in chosen.items() if key not in _APART} for chosen in named]
    user = [{key: value for key, value in row.items() if key in given} for row in flat]
    names: list[list[str]] = [[] for _ in runs]
    known: list[tuple[str, ...]] = [() for _ in runs]
    for table in (choices, user, flat):
        for key in dict.fromkeys(key for row in table for key in row):
            values = [json.dumps(row.get(key), sort_keys=True, default=str) for row in table]
            finer = len(set(zip(known, values, strict=True))) > len(set(known))
            follows = len(set(zip(configs, values, strict=True))) == len(set(configs))  # equal configs, equal values
            if follows and (finer or (table is user and len(set(values)) > 1)):
                known = [(*before, value) for before, value in zip(known, values, strict=True)]
                for name, row in zip(names, table, strict=True):
                    name.append(f"{key}={row.get(key)}")
    return [" ".join(name) or "all runs" for name in names]


def _flat(
    node: Mapping[str, Any], seed: Any, prefix: str = "", given: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    """Dotted names of the values on which results depend, but for the seed, which some nodes repeat."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in _NO_METHOD or (name in OFF and not value):
            continue
        if key == "seed" and value == seed and name not in given:
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, seed, f"{name}.", given)
        else:
            flat[name] = value
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingError("DIR", path, f"cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise SettingError("DIR", path, "holds no config")
    return found
