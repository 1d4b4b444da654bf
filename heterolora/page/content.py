"""What stands on the page, block by block: plain values for the template and for its script."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

from heterolora.analysis import Spectrum, evenness, gini
from heterolora.comparison import Difference, Section
from heterolora.page import figures
from heterolora.page.collect import Agreement, Collected, Run
from heterolora.page.figures import Figure
from heterolora.page.record import Record

Cell: TypeAlias = dict[str, Any]
"""``text``, ``value`` (what the column is sorted by; None stands last), and sometimes ``run`` or ``interval``."""

Table: TypeAlias = dict[str, Any]
"""``caption``, ``columns`` (name, numeric, hint) and ``rows`` (lists of cells, one of each column)."""

Block: TypeAlias = dict[str, Any]
"""``title``, ``text``, and ``panels``: each a caption and choices, of which one figure is shown at a time."""


def run_content(run: Run) -> dict[str, Any]:
    """Everything about one run: title, facts, notes, blocks of figures, and the table of its sites."""
    record = run.record
    blocks = [_allocation(record), _training(record), _learned(record), _decisions(record), _search_agreement(record)]
    return {
        "name": run.name,
        "title": record.title,
        "facts": _facts(run),
        "notes": list(record.notes) if record.state == "finished" else [record.state, *record.notes],
        "blocks": [block for block in blocks if block is not None],
        "sites": site_table(record),
    }


def overview(collected: Collected) -> list[Block]:
    """What is about several runs: their curves, and their proxies against each other."""
    blocks = []
    curves = _all_curves(collected.runs)
    if curves:
        blocks.append(_block("Training of all runs", "One line a run, one colour a group.", ("", curves)))
    families = {site.name: site.family for run in collected.runs for site in run.record.sites}
    blocks += [_proxies(agreement, families) for agreement in collected.agreements]
    return blocks


# -- tables ------------------------------------------------------------------------------------------------------------


def group_table(collected: Collected) -> Table | None:
    """Means over seeds with their intervals; None without a comparison."""
    if not collected.sections:
        return None
    seconds = _seconds_by_group(collected.runs)
    several = len(collected.sections) > 1
    differences = any(row.difference for section in collected.sections for row in section.rows)
    columns = [_column("task, backbone")] if several else []
    columns += [
        _column("group"),
        _column("metric"),
        _column("seeds", True),
        _column("mean", True, "over seeds"),
        _column("95 % interval", True, "Student t over seeds; sorted by its lower end"),
    ]
    if differences:
        columns += [
            _column("difference", True, "from the baseline, over pairs of one seed, with its 95 % interval"),
            _column("p", True, "exact sign-flip test; corrected by Holm but for the primary comparison"),
        ]
    columns += [
        _column("parameters held", True),
        _column("steps", True),
        _column("training, s", True, "mean over seeds"),
    ]
    rows = []
    for section in collected.sections:
        for row in section.rows:
            cells = [_text(section.name)] if several else []
            cells += [
                _text(row.group + (" (unequal)" if row.unequal else "")),
                _text(f"{section.split} {section.metric}"),
                _number(row.mean.n, "d"),
                _number(row.mean.value, ".4f"),
                _interval(row.mean.low, row.mean.high, row.mean.value, section),
            ]
            if differences:
                cells += _difference(row.difference)
            cells += [_span(row.held), _span(row.steps), _number(seconds.get((section.name, row.group)), ".1f")]
            rows.append(cells)
    return {"caption": "Groups of runs", "columns": columns, "rows": rows}


def run_table(runs: Sequence[Run]) -> Table:
    """One row a run; columns in which no run has a value are left out."""
    named = {_first_metric(run.record)[0] for run in runs} - {""}
    suffix = f" {next(iter(named))}" if len(named) == 1 else ""
    sections = {run.result.section for run in runs if run.result}
    columns = [_column("run"), _column("state"), _column("task, backbone"), _column("group"), _column("seed", True)]
    columns += [_column(f"validation{suffix}", True), _column(f"test{suffix}", True)]
    columns += [
        _column("parameters held", True),
        _column("sites with rank", True),
        _column("Gini", True, "of parameters over sites: 0 even, 1 all at one site"),
        _column("evenness", True, "entropy of the parameters over sites, as a share of the largest possible"),
        _column("search, s", True),
        _column("training, s", True),
        _column("memory, MiB", True, "peak"),
    ]
    states = {run.record.state for run in runs}
    rows = [_run_row(number, run, states, sections, bool(suffix)) for number, run in enumerate(runs)]
    kept = [number for number in range(len(columns)) if any(row[number]["text"] for row in rows)]
    return {
        "caption": "Runs",
        "columns": [columns[number] for number in kept],
        "rows": [[row[number] for number in kept] for row in rows],
    }


def _run_row(number: int, run: Run, states: set[str], sections: set[str], one_metric: bool) -> list[Cell]:
    record, result = run.record, run.result
    metric, values = _first_metric(record)
    amounts = _amounts(record)
    on = sum(1 for site in record.sites if site.rank)
    seconds = record.summary.get("seconds") or record.search.get("seconds") or {}
    said = "" if one_metric or not metric else f" {metric}"
    return [
        {**_text(run.name), "run": number},
        _text("" if states == {"finished"} else record.state.partition(":")[0]),
        _text("" if result is None or len(sections) < 2 else result.section),
        _text("" if result is None else result.group),
        _number(None if result is None else result.seed, "d"),
        _number(values.get("validation"), ".4f", said),
        _number(values.get("test"), ".4f", said),
        _number(record.spent, ",d"),
        {"text": f"{on} of {len(record.sites)}" if record.sites else "", "value": on if record.sites else None},
        _number(gini(amounts) if amounts else None, ".3f"),
        _number(evenness(amounts) if amounts else None, ".3f"),
        _number(_plain(seconds.get("search")), ".1f"),
        _number(_plain(seconds.get("training")), ".1f"),
        _number(_plain(record.summary.get("peak_memory_mib")), ",.0f"),
    ]


def site_table(record: Record) -> Table | None:
    """One row a site; None where nothing was allocated."""
    if not record.sites:
        return None
    whole = record.budget or sum(site.parameters or 0 for site in record.sites)
    columns = [_column("site"), _column("layer", True), _column("role"), _column("rank", True)]
    columns += [_column("parameters", True), _column("share, %", True, "of the budget")]
    columns += [_column(proxy, True, "score, summed over units of rank") for proxy in record.scores]
    if record.spectra:
        columns += [
            _column("effective rank", True, "of the trained delta: exp of its singular values' entropy"),
            _column("stable rank", True, "squared Frobenius norm over squared largest singular value"),
            _column("largest value", True, "largest singular value of the trained delta"),
            _column("norm", True, "Frobenius norm of the trained delta"),
        ]
    rows = []
    for site in record.sites:
        share = None if site.parameters is None or not whole else 100 * site.parameters / whole
        cells = [_text(site.name), _number(site.layer, "d"), _text(site.label), _number(site.rank, "d")]
        cells += [_number(site.parameters, ",d"), _number(share, ".2f")]
        cells += [_number(scores.get(site.name), ".3g") for scores in record.scores.values()]
        if record.spectra:
            cells += _spectrum_cells(record.spectra.get(site.name))
        rows.append(cells)
    return {"caption": "Sites", "columns": columns, "rows": rows}


def _spectrum_cells(found: Spectrum | None) -> list[Cell]:
    if found is None:
        return [_text("")] * 4
    return [
        _number(found.effective_rank, ".2f"),
        _number(found.stable_rank, ".2f"),
        _number(max(found.values, default=0.0), ".3g"),
        _number(found.norm, ".3g"),
    ]


def _column(name: str, numeric: bool = False, hint: str = "") -> dict[str, Any]:
    return {"name": name, "numeric": numeric, "hint": hint}


def _text(text: str) -> Cell:
    return {"text": text, "value": text or None}


def _number(value: float | None, form: str, unit: str = "") -> Cell:
    if value is None or not math.isfinite(value):
        return {"text": "", "value": None}
    return {"text": format(value, form) + unit, "value": float(f"{value:.6g}")}


def _span(ends: tuple[int, int]) -> Cell:
    low, high = ends
    return {"text": f"{low:,}" if low == high else f"{low:,} to {high:,}", "value": high}


def _interval(low: float, high: float, middle: float, section: Section) -> Cell:
    """The ends as text, and as places from 0 to 100 on the scale of the section, for a small picture."""
    if not math.isfinite(low):
        return {"text": "", "value": None}
    ends = [end for row in section.rows for end in (row.mean.low, row.mean.high) if math.isfinite(end)]
    least, width = min(ends), (max(ends) - min(ends)) or 1.0
    places = [round(100 * (value - least) / width, 1) for value in (low, middle, high)]
    return {"text": f"[{low:.4f}, {high:.4f}]", "value": low, "interval": places}


def _difference(found: Difference | None) -> list[Cell]:
    if found is None:
        return [_text(""), _text("")]
    value, low, high = found.mean.value, found.mean.low, found.mean.high
    ends = f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else ""
    cell = _number(value, "+.4f", ends)
    p = None if found.test is None else found.test.p
    return [cell, _number(p if found.p_holm is None else found.p_holm, ".3g")]


def _seconds_by_group(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        seconds = _plain((run.record.summary.get("seconds") or {}).get("training"))
        if run.result is not None and seconds is not None:
            found.setdefault((run.result.section, run.result.group), []).append(seconds)
    return {group: math.fsum(values) / len(values) for group, values in found.items()}


def _amounts(record: Record) -> list[int]:
    """Parameters of each site; empty where they are not known."""
    return [site.parameters for site in record.sites if site.parameters is not None]


def _first_metric(record: Record) -> tuple[str, dict[str, float]]:
    """The task's first metric, and its value on each split that has one."""
    metrics = record.summary.get("metrics")
    if not isinstance(metrics, Mapping):
        return "", {}
    names = [name for values in metrics.values() for name in values]
    if not names:
        return "", {}
    found = {split: _plain(values.get(names[0])) for split, values in metrics.items()}
    return names[0], {split: value for split, value in found.items() if value is not None}


def _plain(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# -- blocks ------------------------------------------------------------------------------------------------------------


def _block(title: str, text: str, *panels: tuple[str, Sequence[tuple[str, Figure]]]) -> Block:
    shown = [
        {"caption": caption, "choices": [{"name": name, "figure": figure} for name, figure in choices]}
        for caption, choices in panels
        if choices
    ]
    return {"title": title, "text": text, "panels": shown}


def _facts(run: Run) -> list[tuple[str, str]]:
    record, (metric, values) = run.record, _first_metric(run.record)
    facts = [(f"{split} {metric}", f"{value:.4f}") for split, value in values.items()]
    if record.spent is not None:
        facts.append(("parameters held", f"{record.spent:,}"))
    if record.budget is not None:
        facts.append(("budget", f"{record.budget:,}"))
    if record.sites:
        on = sum(1 for site in record.sites if site.rank)
        facts.append(("sites with rank", f"{on} of {len(record.sites)}"))
    if any(amounts := _amounts(record)):
        facts.append(("Gini of parameters", f"{gini(amounts):.3f}"))
        if math.isfinite(even := evenness(amounts)):
            facts.append(("evenness", f"{even:.3f}"))
        facts += _family_shares(record)
    seconds = record.summary.get("seconds") or record.search.get("seconds") or {}
    for name in ("search", "training"):
        if (spent := _plain(seconds.get(name))) is not None:
            facts.append((name, f"{spent:,.1f} s"))
    if (memory := _plain(record.summary.get("peak_memory_mib"))) is not None:
        facts.append(("peak memory", f"{memory:,.0f} MiB"))
    collapsed = record.summary.get("collapsed") or {}
    if any(collapsed.values()):
        facts.append(("collapsed", ", ".join(split for split, value in collapsed.items() if value)))
    return facts


def _family_shares(record: Record) -> list[tuple[str, str]]:
    """Share of the parameters at each family of sites, if there are several."""
    spent: dict[str, int] = {}
    for site in record.sites:
        spent[site.family] = spent.get(site.family, 0) + (site.parameters or 0)
    whole = sum(spent.values())
    if len(spent) < 2 or not whole:
        return []
    return [(f"share of {family} sites", f"{100 * parameters / whole:.1f} %") for family, parameters in spent.items()]


def _allocation(record: Record) -> Block | None:
    if not record.sites:
        return None
    tooltips = figures.tips(record.sites, record.budget, record.scores)
    scored = {proxy: scores for proxy, scores in record.scores.items() if scores}
    ordered = sorted(scored, key=lambda proxy: proxy != record.proxy)  # the one that decided comes first
    maps = [(proxy, figures.score_map(record.sites, scored[proxy], tooltips)) for proxy in ordered]
    pairs = [(proxy, figures.score_and_rank(record.sites, scored[proxy], tooltips)) for proxy in ordered]
    return _block(
        "Where the budget went",
        "Grey: a site without rank. Blank: no such site.",
        ("Rank of each site", [("", figures.rank_map(record.sites, tooltips))]),
        ("Score of each site", maps),
        ("Score and rank", pairs),
        ("Parameters of each layer", [("", figures.parameters_by_layer(record.sites))] if _amounts(record) else []),
    )


def _pairs(scores: Mapping[str, Mapping[str, float]], families: Mapping[str, str]) -> list[tuple[str, Figure]]:
    """Places of the sites by two proxies, for each pair."""
    return [
        (f"{a} and {b}", figures.places_against((a, scores[a]), (b, scores[b]), families))
        for a, b in combinations(scores, 2)
    ]


def _training(record: Record) -> Block | None:
    if not record.curves:
        return None
    return _block("Training", "", *((metric, [("", figure)]) for metric, figure in figures.curves(record.curves)))


def _learned(record: Record) -> Block | None:
    if not record.spectra:
        return None
    return _block(
        "What was learned",
        "Effective rank: the exponential of the entropy of a delta's singular values, as shares of their sum.",
        ("Effective rank of each trained delta", [("", figures.effective_map(record.sites, record.spectra))]),
        (
            "Singular values of each trained delta (dark: last layers)",
            [("", figures.spectra_lines(record.sites, record.spectra))],
        ),
    )


def _decisions(record: Record) -> Block | None:
    if not record.history:
        return None
    end = max((points[-1][0] for points in record.curves.values()), default=0)
    areas = figures.share_areas(record.sites, record.history, end)
    return _block(
        "Decisions of the dynamic run",
        f"{len(record.history)} decisions. Sites that never had rank are left out of the history.",
        ("Rank of each site over time", [("", figures.history_map(record.sites, record.history))]),
        ("How often each site was on, %", [("", figures.frequency_map(record.sites, record.history))]),
        ("Where the parameters were", [] if areas is None else [("", areas)]),
    )


_MEASURES = {"spearman": "Spearman", "kendall": "Kendall", "top_quarter": "overlap of the best quarter"}


def _search_agreement(record: Record) -> Block | None:
    """What a search itself wrote about its proxies, intervals included."""
    pairs = (record.agreement or {}).get("pairs")
    if not isinstance(pairs, Sequence):
        return None
    known = [pair for pair in pairs if isinstance(pair, Mapping) and {"a", "b"} <= pair.keys()]
    choices = []
    for measure, name in _MEASURES.items():
        found = {(str(pair["a"]), str(pair["b"])): estimate for pair in known if (estimate := _estimate(pair, measure))}
        if found:
            proxies = list(dict.fromkeys(proxy for pair in found for proxy in pair))
            value = {pair: estimate[0] for pair, estimate in found.items()}
            intervals = {pair: _said(estimate) for pair, estimate in found.items()}
            choices.append((name, figures.agreement_map(proxies, value, intervals, name)))
    stability = (record.agreement or {}).get("stability")
    said = []
    for proxy, of in stability.items() if isinstance(stability, Mapping) else ():
        if isinstance(of, Mapping) and (estimate := _estimate(of, "spearman")):
            said.append(f"{proxy} {estimate[0]:.3f}{_said(estimate).replace('<br>95 % interval', '')}")
    text = "With other batches each proxy agrees with itself: " + "; ".join(said) + "." if said else ""
    return _block("Agreement of the proxies", text, ("", choices)) if choices or said else None


def _estimate(values: Mapping[str, Any], measure: str) -> tuple[float, float | None, float | None] | None:
    """Value, low and high; None where there is no value."""
    found = values.get(measure)
    parts = found if isinstance(found, Mapping) else {"value": found}
    value = _plain(parts.get("value"))
    return None if value is None else (value, _plain(parts.get("low")), _plain(parts.get("high")))


def _said(estimate: tuple[float, float | None, float | None]) -> str:
    _, low, high = estimate
    return "" if low is None or high is None else f"<br>95 % interval [{low:.3f}, {high:.3f}]"


def _all_curves(runs: Sequence[Run]) -> list[tuple[str, Figure]]:
    """Metrics on validation, one figure for each, if several runs have it; the task's first metric first."""
    lines: dict[str, list[tuple[str, str, Sequence[tuple[int, float]]]]] = {}
    for run in runs:
        group = "" if run.result is None else run.result.group
        section = f"{run.result.section}: " if run.result and _sections(runs) > 1 else ""
        for name, points in run.record.curves.items():
            if name.startswith("validation"):
                lines.setdefault(section + name, []).append((run.name, group, points))
    several = {name: found for name, found in lines.items() if len(found) > 1}
    ordered = sorted(several, key=lambda name: name.endswith("loss"))
    return [(name, figures.all_curves(several[name], name.rpartition(": ")[2])) for name in ordered]


def _sections(runs: Sequence[Run]) -> int:
    return len({run.result.section for run in runs if run.result})


def _proxies(agreement: Agreement, families: Mapping[str, str]) -> Block:
    proxies = list(agreement.scores)
    proxies += [name for pair in agreement.spearman for name in pair if name not in proxies]
    proxies = list(dict.fromkeys(proxies))
    seeds = f", mean over {agreement.seeds} seeds" if agreement.seeds > 1 else ""
    table = figures.agreement_map(proxies, agreement.spearman, {}, "Spearman")
    return _block(
        "Proxies against each other",
        f"{agreement.section}: how alike they rank the sites.",
        (f"Spearman's correlation over sites{seeds}", [("", table)]),
        ("Places of the sites (1: the highest score)", _pairs(agreement.scores, families)),
    )
