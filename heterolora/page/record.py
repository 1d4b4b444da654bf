"""One run's folder, read for people: whatever of it is there."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file

from heterolora.adapters.base import AdapterFamily
from heterolora.adapters.lora import LoRA
from heterolora.allocation import check_ranks, read_ranks
from heterolora.analysis import Spectrum, spectrum
from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.findings import read_scores
from heterolora.history import HISTORY, Decision, read_history
from heterolora.proxies.base import total
from heterolora.sites import Site, site_from, split_name

MOST_POINTS = 1000
"""Of a curve; longer ones are thinned, their last point stays."""

_ROW_ALONE = "its folder is gone, and its row names only sites with rank: blank places may be sites without"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """One site of a run, as the page shows it.

    Attributes:
        name: of the site.
        layer: number of its layer.
        label: what it has in common with sites of other layers; a row of the map.
        family: LoRA or shortcut; empty where only names are known.
        rank: units of rank that it got.
        parameters: what they cost; None if not known.
        unit: what one unit costs; None if not known.
    """

    name: str
    layer: int
    label: str
    family: str
    rank: int
    parameters: int | None
    unit: int | None


@dataclass(frozen=True)
class Record:
    """One allocation and what is known of the run around it.

    Attributes:
        place: where it was read.
        title: for people.
        state: finished, failed, ...; with the reason if one was written down.
        sites: all candidates in the order of the search space; empty if nothing was allocated.
        spent: adapter parameters of the allocation; None if not known.
        budget: parameters that were allowed; None if they were not counted or are not known.
        proxy: the one that the allocation was made with; None if it looked at no scores.
        scores: proxy -> site -> score, summed over units of rank.
        curves: metric, e.g. ``validation/loss`` -> (step, value), steps rising.
        history: the decisions of a dynamic run; empty for a static one.
        spectra: site -> spectrum of its trained delta.
        agreement: what a search said about its proxies; None without.
        summary: of a training run; empty without.
        search: of a search; empty without.
        notes: what could not be read, one sentence each.
        variant: whether it is a further allocation of a search, whose scores another record has too.
    """

    place: Path
    title: str
    state: str
    sites: tuple[Place, ...] = ()
    spent: int | None = None
    budget: int | None = None
    proxy: str | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    history: Sequence[Decision] = ()
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    agreement: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    variant: bool = False


def read_record(folder: Path) -> Record:
    """What the folder of a run or a search holds; what is damaged is noted, not raised.

    Args:
        folder: with a ``status.json`` or an ``allocation.json``.
    """
    read = _Reader()
    status = read.json(folder / "status.json")
    state = str(status.get("state", "damaged" if status else "state unknown"))
    error = f": {status['error']}" if status.get("error") else ""
    summary, search = read.json(folder / "summary.json"), read.json(folder / "search.json")
    title = str(summary.get("title") or search.get("title") or folder.name)
    sites = read.part(partial(_sites, folder / "sites.json")) or ()
    scores = read.part(partial(read_scores, folder / "scores.json", "scores")) if sites else None
    return replace(
        _allocated(folder, sites, read),
        title=title,
        state=state + error,
        proxy=None if scores is None else scores.proxy,
        scores={} if scores is None else {name: _totals(of, sites) for name, of in scores.scores.items()},
        curves=read.part(partial(_curves, folder / "metrics.csv")) or {},
        history=read.part(partial(read_history, folder / HISTORY)) or [],
        agreement=read.json(folder / "agreement.json") or None,
        summary=summary,
        search=search,
        notes=tuple(read.notes),
    )


def read_variants(folder: Path, record: Record) -> list[Record]:
    """The further allocations of a search: ``allocations/<budget>/<proxy>/allocation.json``.

    Args:
        folder: of the search.
        record: what was read of it.
    """
    found = []
    for path in sorted((folder / "allocations").glob("*/*/allocation.json")):
        budget, proxy = path.parts[-3:-1]
        read = _Reader()
        sites = read.part(partial(_sites, folder / "sites.json")) or ()
        one = _allocated(path.parent, sites, read)
        title = f"{record.title}; {budget}, {proxy}"
        known = proxy if proxy in record.scores else None
        one = replace(one, title=title, state=record.state, proxy=known, scores=record.scores)
        found.append(replace(one, notes=tuple(read.notes), variant=True))
    return found


def record_of_row(place: Path, row: Mapping[str, Any]) -> Record | None:
    """What a tournament's row alone tells about a run whose folder is gone; None if it has no ranks.

    Args:
        place: the run's folder, as it was.
        row: of ``rows.jsonl``.
    """
    try:
        sites = tuple(_named(check_ranks(row["ranks"])))
        held, budget = row["parameters"]["held"], row["parameters"].get("budget")
        title = f"{row['section']}: {row['key']}"
        return Record(place, title, row["state"], sites, held, budget, summary=row, notes=(_ROW_ALONE,))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


class _Reader:
    """Reads what can be read, and notes the rest."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def part(self, read: Callable[[], _T]) -> _T | None:
        """What ``read`` gives; None if there is no such file, or it is damaged, which is noted."""
        try:
            return read()
        except FileNotFoundError:
            return None
        except (SettingError, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                self.notes.append(" ".join(f"{error}".split()))
            return None

    def json(self, path: Path) -> Mapping[str, Any]:
        """A JSON object; empty if there is none, or one of its values is none of the kind that it must be."""
        found = self.part(partial(_json, path)) or {}
        wrong = [key for key, kinds in _KINDS.items() if not isinstance(found.get(key), (*kinds, type(None)))]
        if wrong:
            self.notes.append(f"{path}: {wrong[0]}={str(found[wrong[0]])[:60]} cannot be read; the file is left out")
            return {}
        return found


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("choices", "metrics", "versions", "seconds", "collapsed", "parameters", "data"), (dict,)),
    **dict.fromkeys(("provenance", "ranks", "memory_mib"), (dict,)),
    **dict.fromkeys(("seed", "steps", "spent", "budget"), (int,)),
    **dict.fromkeys(("title", "state", "error", "folder"), (str,)),
    "overrides": (list,),
    "peak_memory_mib": (int, float),
}
"""Of the values of a run's JSON files, by their keys, which mean the same in all of them."""


def _json(path: Path) -> Mapping[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no JSON object")
    return found


def _sites(path: Path) -> tuple[Site, ...]:
    text = path.read_text(encoding="utf-8")
    try:
        return tuple(site_from(values) for values in json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _totals(scores: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, float]:
    found = {site.name: float(total(scores[site.name])) for site in sites if site.name in scores}
    return {name: score for name, score in found.items() if math.isfinite(score)}


def _allocated(folder: Path, sites: Sequence[Site], read: _Reader) -> Record:
    """Ranks, what they cost, and the spectra of what was trained under them."""
    content = read.json(folder / "allocation.json")
    ranks = read.part(partial(_ranks, folder / "allocation.json"))
    empty = Record(folder, "", "")
    if ranks is None:
        return empty
    if missing := [site.name for site in sites if site.name not in ranks]:
        read.notes.append(f"{folder / 'allocation.json'}: gives no rank to {missing[:3]}")
    family = read.part(partial(_family, content))
    spectra: dict[str, Spectrum] = {}
    if isinstance(family, LoRA) and (path := folder / "adapter.safetensors").exists():
        spectra = read.part(partial(_spectra, path, sites, ranks, family)) or {}
    if sites:
        known = [site for site in sites if site.name in ranks]
        places = [_placed(site, ranks[site.name], family, known) for site in known]
    else:  # of a run that died early, or ranks that somebody wrote by hand
        places = read.part(partial(_named, ranks)) or []
    spent, budget = content.get("spent"), content.get("budget")
    return replace(empty, sites=tuple(places), spent=spent, budget=budget, spectra=spectra)


def _placed(site: Site, rank: int, family: AdapterFamily | None, sites: Sequence[Site]) -> Place:
    parameters = unit = None
    if family is not None:
        cost = family.cost(sites)
        parameters, unit = cost({site.name: rank}), cost({site.name: 1})
    return Place(site.name, site.layer, site.label, site.kind, rank, parameters, unit)


def _named(ranks: Mapping[str, int]) -> list[Place]:
    """All that names alone tell."""
    return [Place(name, *split_name(name), "", rank, None, None) for name, rank in ranks.items()]


def _ranks(path: Path) -> dict[str, int]:
    try:
        return read_ranks(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _family(allocation: Mapping[str, Any]) -> AdapterFamily | None:
    node = allocation.get("provenance", {}).get("adapter")
    return None if node is None else build(node, "adapter")


def _spectra(path: Path, sites: Sequence[Site], ranks: Mapping[str, int], family: AdapterFamily) -> dict[str, Spectrum]:
    """Of the sites whose adapter is a product of two factors A and B."""
    state = load_file(path)
    found = {}
    for site in sites:
        a, b = state.get(f"adapter.{site.name}.A"), state.get(f"adapter.{site.name}.B")
        if a is not None and b is not None:
            found[site.name] = spectrum(a, b, family.scale_at(site, ranks[site.name]))
    return found


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every column but those of test splits, which are one number at the end."""
    table = pd.read_csv(path)
    curves = {}
    for name in table.columns:
        if name in ("epoch", "step") or name.startswith("test"):
            continue
        known = table[["step", name]].dropna().sort_values("step", kind="stable")
        points = [(int(step), float(value)) for step, value in known.itertuples(index=False)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        every = -(-len(points) // MOST_POINTS)
        if points:
            curves[name] = [*points[:-1:every], points[-1]]
    return curves
