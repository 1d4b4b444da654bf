"""Folders of runs as plain values: every run that has something to show, and the comparison of all of them."""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np

from heterolora.comparison import Section
from heterolora.errors import SettingError
from heterolora.page.record import Record, read_record, read_variants, record_of_row
from heterolora.results import ROWS, Result, RowFile, by_number, find_results
from heterolora.statistics import correlation
from heterolora.tables import FolderTable, TableSettings, tabulate

_SETTINGS = TableSettings(split=None, metric=None, baseline=None, primary=None, tolerance=0.01, unequal=True)
"""Of the comparison: a page marks what is unequal, and shows it."""

_NOTHING = ("planned", "continued")
"""States of folders that hold no results of their own: dry runs, and runs that were gone on with elsewhere."""

_MOST_NAMED = 10
"""Unfinished runs that are named one by one."""


@dataclass(frozen=True)
class Run:
    """A run on the page.

    Attributes:
        record: what its folder holds.
        name: short and unique on the page.
        result: how the comparison sees it; None if it takes no part.
    """

    record: Record
    name: str
    result: Result | None


@dataclass(frozen=True)
class Agreement:
    """How alike proxies rank the sites of one backbone.

    Attributes:
        section: task and backbone, or the titles of the searches.
        seeds: how many seeds were averaged.
        scores: proxy -> site -> score, of the first seed.
        spearman: (proxy, proxy) -> mean over the seeds of Spearman's correlation over sites; NaN where not defined.
    """

    section: str
    seeds: int
    scores: Mapping[str, Mapping[str, float]]
    spearman: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Collected:
    """Everything on a page.

    Attributes:
        folders: that were given.
        runs: in the order in which they were found.
        sections: of the comparison; empty if there is nothing to compare.
        agreements: of proxies, where several scored the same sites.
        notes: what a reader must know, one sentence each.
    """

    folders: tuple[Path, ...]
    runs: tuple[Run, ...]
    sections: tuple[Section, ...]
    agreements: tuple[Agreement, ...]
    notes: tuple[str, ...]


def collect(folders: Sequence[Path]) -> Collected:
    """Read all runs below folders.

    Raises:
        SettingError: if a folder does not exist, or none of them holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise SettingError("DIR", folder, "no such folder")
    records, notes = _records(folders)
    if not records:
        raise SettingError("DIR", " ".join(map(str, folders)), "holds no run: no status.json, no rows.jsonl")
    results, table, more = _compared(folders, records)
    by_place = {_place(result): result for result in results}
    names = _names([record.place for record in records])
    runs = tuple(
        Run(record, name, by_place.get(record.place.resolve())) for record, name in zip(records, names, strict=True)
    )
    sections = tuple(table.sections) if table is not None else ()
    return Collected(tuple(folders), runs, sections, tuple(_agreements(runs)), (*notes, *_unfinished(runs), *more))


def _records(folders: Sequence[Path]) -> tuple[list[Record], list[str]]:
    records: dict[Path, Record] = {}
    notes: list[str] = []
    for folder in folders:
        for place, files in _walk(folder):
            if ROWS in files:
                records |= {record.place.resolve(): record for record in _of_rows(place, notes)}
            if "status.json" in files:
                record = read_record(place)
                if not record.state.startswith(_NOTHING) and _has_something(record):
                    variants = read_variants(place, record)
                    records |= {one.place.resolve(): one for one in (record, *variants)}
    return list(records.values()), notes


def _has_something(record: Record) -> bool:
    """Whether there is something to show or to tell; a tournament's own log has nothing."""
    return bool(record.sites or record.summary or record.notes) or record.state != "finished"


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders with rows or a status, in the order of their numbers and names; nothing below a run is looked at."""
    for place, inner, files in os.walk(folder):
        inner.sort(key=by_number)
        yield Path(place), files
        if "status.json" in files and ROWS not in files:
            inner.clear()


def _of_rows(folder: Path, notes: list[str]) -> Iterator[Record]:
    """Runs of a tournament whose folders are gone; those that are there are found anyway, and say more."""
    try:
        rows = {row.get("key"): row for row in RowFile(folder / ROWS).rows()}
    except SettingError as error:
        notes.append(str(error))
        return
    for key, row in rows.items():
        place = folder / "runs" / str(key)
        if row.get("stage") != "run" or (place / "status.json").exists():
            continue
        record = record_of_row(place, row)
        if record is not None:
            yield record
        else:
            yield Record(place, f"{folder.name}: {key}", str(row.get("state", "state unknown")))


def _compared(
    folders: Sequence[Path], records: Sequence[Record]
) -> tuple[Sequence[Result], FolderTable | None, list[str]]:
    """The comparison of what is finished, or the sentence that says why there is none."""
    if not any(record.summary and record.state == "finished" for record in records):
        return (), None, []
    try:
        found = find_results(*folders)
    except SettingError as error:
        return (), None, [f"no comparison: {error}"]
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # values of a kind that no run writes
        return (), None, [f"no comparison: a run's files are damaged ({type(error).__name__}: {error})"]
    try:
        return found.results, tabulate(found, _SETTINGS), []
    except SettingError as error:
        return found.results, None, [f"no comparison: {error}"]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        return (), None, [f"no comparison: a run's metrics are damaged ({type(error).__name__}: {error})"]


def _place(result: Result) -> Path:
    """The folder of a run, which a tournament's rows name by their key."""
    rows, _, key = result.place.rpartition(": ")
    path = Path(rows).parent / "runs" / key if Path(rows).name == ROWS else Path(result.place)
    return path.resolve()


def _names(places: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others."""
    parts = [place.resolve().parts for place in places]
    names = []
    for own in parts:
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def _unfinished(runs: Sequence[Run]) -> list[str]:
    open_ones = [f"{run.name} is not finished ({run.record.state})" for run in runs if run.record.state != "finished"]
    more = len(open_ones) - _MOST_NAMED
    return open_ones[:_MOST_NAMED] + ([f"and {more} more runs are not finished"] if more > 0 else [])


def _agreements(runs: Sequence[Run]) -> list[Agreement]:
    """One for each backbone and task of which several proxies scored the same sites with the same seed."""
    scored: dict[tuple[str, tuple[str, ...]], dict[int, dict[str, Mapping[str, float]]]] = {}
    for run in runs:
        record, result = run.record, run.result
        if record.variant:
            continue
        section, seed = (record.title, 0) if result is None else (result.section, result.seed)
        key = section, tuple(site.name for site in record.sites)
        for proxy, scores in record.scores.items():
            scored.setdefault(key, {}).setdefault(seed, {}).setdefault(proxy, scores)
    found = []
    for (section, _), seeds in scored.items():
        several = {seed: proxies for seed, proxies in seeds.items() if len(proxies) > 1}
        if several:
            found.append(Agreement(section, len(several), next(iter(several.values())), _spearman(several.values())))
    return found


def _spearman(seeds: Collection[Mapping[str, Mapping[str, float]]]) -> dict[tuple[str, str], float]:
    proxies = dict.fromkeys(name for scores in seeds for name in scores)
    found = {}
    for pair in combinations(proxies, 2):
        values = [_correlation(scores[pair[0]], scores[pair[1]]) for scores in seeds if scores.keys() >= set(pair)]
        defined = [value for value in values if math.isfinite(value)]
        found[pair] = fmean(defined) if defined else math.nan
    return found


def _correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Over the sites that both score."""
    sites = [name for name in a if name in b]
    return correlation(np.array([a[name] for name in sites]), np.array([b[name] for name in sites]), "spearman")
