"""Judge every proxy on the rows there are: ``python -m benchmarks.allocation_table.judge``."""

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.allocation_table.agreement import (
    BASELINE,
    FEWEST_ALLOCATIONS,
    FEWEST_SITES,
    MULTI,
    WHERE,
    Metric,
    Scores,
    budgets_of,
    judge,
    order_of_proxies,
    prepared,
)
from benchmarks.allocation_table.allocations import Entry
from benchmarks.allocation_table.make import entries, read_table, sites_of_the_table
from benchmarks.allocation_table.scores import UNITS, Scored, complete, names_of_proxies
from heterolora.quiet import quieten
from heterolora.report.files import write_text, write_whole
from heterolora.report.terminal import console
from heterolora.sites import Site

_NONE = "-"
_ALPHA = 0.05
_CHANCE = math.log(2) - 0.003  # of the task's two classes; a head alone reaches less within the steps of the table
_NAMES = {"lora": "LoRA sites", "shortcut": "shortcuts", "all": "all sites"}


@dataclass(frozen=True)
class View:
    """A table as it is read.

    Attributes:
        title: what it shows.
        header: names of the columns.
        rows: as many cells as columns.
        notes: what a reader must know, one sentence each.
        numbers: whether all columns but the first hold numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    numbers: bool = True


def usable(scored: Mapping[str, Mapping[int, Scored]]) -> Scores:
    """The scores of all seeds at which a proxy has some."""
    return {name: {seed: s.scores for seed, s in seeds.items() if s.scores} for name, seeds in scored.items()}


def views(
    frame: pd.DataFrame,
    rows: pd.DataFrame,
    scored: Mapping[str, Mapping[int, Scored]],
    sites: Sequence[Site],
    planned: Sequence[Entry],
    metric: Metric = "validation_loss",
) -> list[View]:
    """The judgement as tables, in the order in which they are read.

    Args:
        frame: of ``agreement.judge``.
        rows: the rows that it was made from.
        scored: the scores, with reasons where there are none.
        sites: of the table.
        planned: what the table is to hold.
        metric: the result that was judged.
    """
    proxies = order_of_proxies(frame, list(scored))
    found = [
        _sites_view(frame, proxies, metric),
        _allocations_view(frame, proxies, metric),
        _made_view(frame, proxies, rows, metric),
        _scores_view(frame, proxies, scored, len(sites)),
    ]
    return [
        View("The rows", ("family", "trained", "by budget"), _counted(rows, planned), _remarks(rows, metric), False),
        *(view for view in found if view.rows or view.notes),
    ]


def _pick(frame: pd.DataFrame, **conditions: object) -> pd.DataFrame:
    for column, value in conditions.items():
        frame = frame[frame[column] == value]
    return frame


def _one(frame: pd.DataFrame, **conditions: object) -> Mapping[str, object]:
    """The finding that meets the conditions; empty if there is none."""
    records = _pick(frame, **conditions).to_dict("records")
    return {str(key): value for key, value in records[0].items()} if records else {}


def _number(finding: Mapping[str, object], name: str = "value") -> float | None:
    value = finding.get(name)
    return float(value) if isinstance(value, (int, float)) and not math.isnan(value) else None


def _short(value: float | None, form: str = ".2f") -> str:
    return _NONE if value is None else _signless(f"{value:{form}}")


def _signless(text: str) -> str:
    """No minus before what was rounded to zero."""
    return text if float(text) else text.replace("-", "")


def _estimate(finding: Mapping[str, object]) -> str:
    """``0.62 [0.40, 0.78]*``."""
    value, low, high = (_number(finding, name) for name in ("value", "low", "high"))
    if value is None:
        return _NONE
    p = _number(finding, "p_holm")
    interval = "" if low is None or high is None else f" [{_short(low)}, {_short(high)}]"
    return _short(value) + interval + ("*" if p is not None and p < _ALPHA else "")


def _count(number: float | None) -> str:
    return _NONE if number is None else f"{number:,.0f}"


# -- the rows ---------------------------------------------------------------------------------------------------------


def _counted(rows: pd.DataFrame, planned: Sequence[Entry]) -> tuple[tuple[str, ...], ...]:
    """Rows trained of those planned, for each family, by budget and seed."""
    there = set(rows["key"])
    groups: dict[str, dict[tuple[int, int], list[bool]]] = {}
    for entry in planned:
        groups.setdefault(entry.family, {}).setdefault((entry.budget, entry.seed), []).append(entry.key in there)
    counted = []
    for family, parts in groups.items():
        done = sum(map(sum, parts.values()))
        by_part: dict[str, list[str]] = {}
        for (budget, seed), flags in sorted(parts.items()):
            if any(flags):
                by_part.setdefault(f"{budget:,}", []).append(f"{sum(flags)} of {len(flags)} with seed {seed}")
        text = "; ".join(f"{budget}: {', '.join(seeds)}" for budget, seeds in by_part.items())
        counted.append((family, f"{done:,} of {sum(map(len, parts.values())):,}", text or _NONE))
    if more := there - {entry.key for entry in planned}:
        counted.append(("not planned", f"{len(more):,}", ", ".join(sorted(more)[:3])))
    return tuple(counted)


def _remarks(rows: pd.DataFrame, metric: Metric) -> tuple[str, ...]:
    remarks = [f"result: {metric.replace('_', ' ')}"]
    commits = {str(commit): keys["key"].tolist() for commit, keys in rows.groupby("commit")}
    remarks += [
        f"{len(keys)} rows were trained with uncommitted changes ({commit}), so with settings that nobody can look up: "
        + ", ".join(keys[:4])
        + (", ..." if len(keys) > 4 else "")
        for commit, keys in commits.items()
        if commit.endswith("+")
    ]
    blind = rows[rows["validation_loss"] >= _CHANCE]
    if not blind.empty:
        by_budget = {f"{budget:,}": len(part) for budget, part in blind.groupby("budget")}
        where = ", ".join(f"{count} at {budget}" for budget, count in by_budget.items())
        remarks.append(
            f"rows that learned nothing (a loss of {_CHANCE:.3f} or more; tossing a coin gives 0.693): {where}"
        )
    counts = budgets_of(prepared(rows, metric))
    few = [f"{budget:,} ({count})" for budget, count in counts.items() if count < FEWEST_ALLOCATIONS]
    if few:
        remarks.append(
            f"budgets with fewer than {FEWEST_ALLOCATIONS} different allocations are not judged: {', '.join(few)}"
        )
    if missing := [family for family in ("alone", *MULTI) if family not in set(rows["family"])]:
        remarks.append(f"not trained yet: {', '.join(missing)}")
    return tuple(remarks)


# -- the judgement ----------------------------------------------------------------------------------------------------


def _sites_view(frame: pd.DataFrame, proxies: Sequence[str], metric: Metric) -> View:
    part = _pick(frame, part="sites")
    sizes = {where: _most(_pick(part, where=where)) for where in WHERE}
    header = ["proxy"]
    for where in WHERE:
        header += [f"{_NAMES[where]} ({sizes[where]}): rho", "tau"]
    rows = [
        (
            proxy,
            *(
                cell
                for where in WHERE
                for cell in (
                    _estimate(_one(part, where=where, proxy=proxy, measure="spearman")),
                    _short(_number(_one(part, where=where, proxy=proxy, measure="kendall"))),
                )
            ),
        )
        for proxy in proxies
    ]
    notes = [
        "rho: Spearman, with a 95 % bootstrap interval over sites; tau: Kendall; "
        f"*: permutation p < {_ALPHA} after Holm over the proxies of the column; --csv has all p and intervals",
        "benefit of a site: minus the result of training it alone"
        if metric == "validation_loss"
        else "benefit of a site: the result of training it alone",
        "scores: mean over score seeds of the ranks within the column; a list counts as the sum of as many units as "
        "the rank that was trained",
        *_none_notes(part, f"fewer than {FEWEST_SITES}"),
        *_ceilings(_pick(frame, part="ceiling")),
    ]
    return View("Sites alone: scores against trained benefit", tuple(header), tuple(rows), tuple(notes))


def _most(part: pd.DataFrame) -> str:
    """Number of items of a column: of those that have scores and those that have none."""
    return _count(None if part.empty else float((part["n"] + part["left_out"]).max()))


def _ceilings(part: pd.DataFrame) -> list[str]:
    if part.empty:
        return ["no ceiling yet: it needs sites that two seeds have trained alone"]
    notes = []
    for where in WHERE:
        for found in _pick(part, where=where, measure="spearman").to_dict("records"):
            notes.append(f"ceiling, {_NAMES[where]} ({found['n']}): {found['note']} {_estimate(found)}")  # type: ignore[arg-type]
        limit = _one(part, where=where, measure="attainable")
        if limit:
            text = f"whoever knew the expected results would reach about {_short(_number(limit))} {limit['note']}"
            notes[-1] += f"; {text}"
    return notes


def _none_notes(part: pd.DataFrame, few: str) -> list[str]:
    """What - means, as far as it occurs."""
    noted = part[part["note"] != ""]
    found = []
    if (noted["note"] == "equal scores").any():
        found.append(
            f"{_NONE}: equal scores ({', '.join(sorted(set(noted.loc[noted['note'] == 'equal scores', 'proxy'])))})"
        )
    lacking = noted[noted["left_out"] > 0]
    if not lacking.empty:
        names = ", ".join(sorted(set(lacking["proxy"])))
        found.append(f"{_NONE}: not judged where some sites have no score ({names})")
    if (noted["note"] == few).any():
        found.append(f"{_NONE}: {few} to judge by")
    return found


def _allocations_view(frame: pd.DataFrame, proxies: Sequence[str], metric: Metric) -> View:
    part, regret = _pick(frame, part="allocations"), _pick(frame, part="regret")
    title = "Allocations: predicted value against trained result, and what choosing by it would lose"
    if part.empty:
        return View(title, ("proxy",), (), (f"no budget has {FEWEST_ALLOCATIONS} different allocations yet",))
    places = list(dict.fromkeys(part["where"]))
    header = ["proxy"]
    for place in places:
        header += [f"{int(place):,} ({_most(_pick(part, where=place))}): rho", "tau", "regret"]
    rows = []
    for proxy in proxies:
        cells = [proxy]
        for place in places:
            rho, tau = (_one(part, where=place, proxy=proxy, measure=kind) for kind in ("spearman", "kendall"))
            loss = _one(regret, where=place, proxy=proxy)
            cells += [_estimate(rho), _short(_number(tau)), _short(_number(loss), ".4f")]
        rows.append(tuple(cells))
    cells = ["(random choice)"]
    notes = [
        "budget in parameters (different allocations); value: sum over the units of rank held, s/k for the k-th unit "
        f"of a site with score s; of a list only the first {UNITS} units are kept, those beyond count 0; over score "
        "seeds the mean of the ranks",
        "regret: how much worse than the best of the budget the allocation is that is predicted best; those that "
        "proxies made are among them",
    ]
    for place in places:
        blind = _pick(regret[regret["proxy"].isna()], where=place).to_dict("records")[0]
        cells += [_NONE, _NONE, _short(float(blind["value"]), ".4f")]
        notes.append(f"{int(place):,}: {str(blind['note']).partition('; ')[2]}")
    rows.append(tuple(cells))
    return View(title, tuple(header), tuple(rows), (*notes, *_left_out(part)))


def _left_out(part: pd.DataFrame) -> list[str]:
    """Which proxies could not judge all allocations."""
    texts: dict[str, list[str]] = {}
    for found in _pick(part, measure="spearman").to_dict("records"):
        if found["left_out"]:
            text = f"{found['n']} of {found['n'] + found['left_out']} allocations at {int(found['where']):,}"
            texts.setdefault(text, []).append(str(found["proxy"]))
    return [f"{', '.join(names)}: judged by the {text} all of whose sites have scores" for text, names in texts.items()]


def _made_view(frame: pd.DataFrame, proxies: Sequence[str], rows: pd.DataFrame, metric: Metric) -> View:
    part = _pick(frame, part="made")
    title = f"What proxy and allocator made, trained: {metric.replace('_', ' ')}"
    if part.empty:
        return View(title, ("proxy",), (), ("no such row yet",))
    methods = list(dict.fromkeys(zip(part["where"], part["allocator"], strict=True)))
    header = ["proxy"]
    for place, allocator in methods:
        header += [f"{int(place):,} {allocator}", "- uniform", "regret"]
    lines = []
    for proxy in [*proxies, *sorted(set(part["proxy"]) - set(proxies))]:
        own = _pick(part, proxy=proxy)
        if own.empty:
            continue
        cells = [proxy]
        for place, allocator in methods:
            result, difference, regret = (
                _number(_one(own, where=place, allocator=allocator, measure=measure))
                for measure in ("result", "minus_uniform", "regret")
            )
            cells += [_short(result, ".4f"), _short(difference, "+.4f"), _short(regret, ".4f")]
        lines.append(tuple(cells))
    better = "below" if metric == "validation_loss" else "above"
    seeds = sorted({int(n) for n in part["n"] if n})
    notes = [
        f"- uniform: minus the result of uniform {BASELINE} of the same budget and seed; {better} 0 is better",
        "regret: how much worse than the best row of the same budget and seed",
        f"training seeds of a cell: {' to '.join(map(str, sorted({seeds[0], seeds[-1]})))}",
        *_references(rows, sorted({int(place) for place, _ in methods}), metric),
    ]
    return View(title, tuple(header), tuple(lines), tuple(notes))


def _references(rows: pd.DataFrame, budgets: Sequence[int], metric: Metric) -> list[str]:
    """How well the baseline does, for each budget and seed."""
    found = []
    for budget in budgets:
        uniform = _pick(rows, family="uniform", name=BASELINE, budget=budget)
        values = [f"{value:.4f} (seed {seed})" for value, seed in zip(uniform[metric], uniform["seed"], strict=True)]
        if values:
            found.append(f"{budget:,}: uniform {BASELINE} {', '.join(values)}")
    return found


def _scores_view(
    frame: pd.DataFrame, proxies: Sequence[str], scored: Mapping[str, Mapping[int, Scored]], count: int
) -> View:
    part = _pick(frame, part="stability")
    rows = []
    for proxy in proxies:
        sites, rho, overlap = (
            _number(_one(part, proxy=proxy, measure=measure)) for measure in ("sites", "spearman", "top_overlap")
        )
        seeds = sum(bool(given.scores) for given in scored[proxy].values())
        rows.append((proxy, f"{_count(sites)} of {count}", str(seeds), _short(rho), _short(overlap)))
    reasons = {
        given.reason: name for name, seeds in scored.items() for given in seeds.values() if given.reason is not None
    }
    notes = [
        "rho: mean Spearman between score seeds (other batches, other random factors, another head); top quarter: "
        "share of the best quarter of sites that two seeds have in common; a list counts as its sum",
        *reasons,
    ]
    return View("The scores", ("proxy", "sites scored", "seeds", "rho", "top quarter"), tuple(rows), tuple(notes))


# -- printing ---------------------------------------------------------------------------------------------------------


def show(found: Sequence[View]) -> None:
    """To the terminal."""
    terminal = console()
    for view in found:
        table = Table(
            title=Text(view.title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1),
            pad_edge=False,
        )
        for index, name in enumerate(view.header):
            table.add_column(Text(name), justify="right" if index and view.numbers else "left", overflow="fold")
        for row in view.rows:
            table.add_row(*map(Text, row))
        if view.rows:
            terminal.print(table)
        else:
            terminal.print(Text(view.title, style="bold"))
        for note in view.notes:
            terminal.print(Text(note), highlight=False)
        terminal.print()


def as_markdown(found: Sequence[View]) -> str:
    """A heading, a table and a list of notes for each view."""
    lines: list[str] = []
    for view in found:
        lines += [f"### {view.title}", ""]
        if view.rows:
            rules = ["---:" if index and view.numbers else "---" for index in range(len(view.header))]
            lines += [f"| {' | '.join(map(_escaped, row))} |" for row in (view.header, rules, *view.rows)] + [""]
        lines += [f"- {_escaped(note)}" for note in view.notes] + [""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the rows there are; scores that are missing are computed first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, help="write every number there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--metric", choices=["validation_loss", "validation_accuracy"], default="validation_loss")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    quieten()
    rows, sites = read_table(), sites_of_the_table()
    scored = complete(names_of_proxies())
    frame = judge(rows, usable(scored), sites, given.metric)
    found = views(frame, rows, scored, sites, entries(sites), given.metric)
    show(found)
    if given.csv:
        write_whole(given.csv, partial(frame.to_csv, index=False))
    if given.markdown:
        write_text(given.markdown, as_markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
