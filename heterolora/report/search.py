"""What a search found, on the terminal: ranks by layer and role, shares of the budget, agreement of proxies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from heterolora.adapters.base import AdapterFamily
from heterolora.agreement import Agreement
from heterolora.allocation import Allocation
from heterolora.report.picture import rank_grid
from heterolora.report.terminal import console
from heterolora.space import Space
from heterolora.statistics import Estimate
from heterolora.step_time import shown

_MEASURES = {"spearman": "Spearman", "kendall": "Kendall", "top_quarter": "top quarter shared"}


def print_search(
    space: Space,
    family: AdapterFamily,
    allocation: Allocation,
    agreement: Agreement | None,
    summary: Mapping[str, Any],
) -> None:
    """To the terminal.

    Args:
        space: the candidates.
        family: says what ranks cost.
        allocation: the main one.
        agreement: of the proxies; None: there is nothing to compare.
        summary: what ``search.json`` holds.
    """
    terminal = console()
    terminal.print(_ranks(space, family, allocation, summary["title"]))
    if agreement is not None and agreement.pairs:
        terminal.print(_pairs(agreement))
    if agreement is not None and agreement.stability:
        terminal.print(_stability(agreement))
    if len(summary["allocations"]) > 1:
        terminal.print(_allocations(summary["allocations"]))
    for line in _notes(allocation, summary):
        terminal.print(escape(line))


def _ranks(space: Space, family: AdapterFamily, allocation: Allocation, title: str) -> Table:
    """Layers down, roles across; at the margins the share of what is spent."""
    labels, layers, grid = rank_grid(space, allocation)
    cost = family.cost(space.sites)
    spent = {site.name: cost({site.name: allocation.ranks[site.name]}) for site in space.sites}
    whole = sum(spent.values())
    by_label = dict.fromkeys(labels, 0)
    by_layer = dict.fromkeys(layers, 0)
    for site in space.sites:
        by_label[site.label] += spent[site.name]
        by_layer[site.layer] += spent[site.name]
    table = Table(title=escape(title), title_justify="left", show_footer=True)
    table.add_column("layer", "share", justify="right")
    for label in labels:
        table.add_column(escape(label), _share(by_label[label], whole), justify="right")
    table.add_column("share", f"{whole:,}", justify="right", style="dim")
    for layer in layers:
        ranks = ["" if row[layer] is None else str(row[layer]) if row[layer] else "·" for row in grid]
        table.add_row(str(layer), *ranks, _share(by_layer[layer], whole))
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _pairs(agreement: Agreement) -> Table:
    table = Table(title="Agreement of proxies over sites [95 % of resampled batches]", title_justify="left")
    table.add_column("proxies")
    for name in _MEASURES.values():
        table.add_column(name, justify="right")
    for pair in agreement.pairs:
        table.add_row(f"{escape(pair.a)}, {escape(pair.b)}", *_estimates(pair.measures))
    return table


def _stability(agreement: Agreement) -> Table:
    table = Table(title="Stability: all batches against resampled ones, median [95 %]", title_justify="left")
    table.add_column("proxy")
    for name in _MEASURES.values():
        table.add_column(name, justify="right")
    for name, measures in agreement.stability.items():
        table.add_row(escape(name), *_estimates(measures))
    return table


def _estimates(measures: Mapping[str, Estimate]) -> list[str]:
    return [_estimate(measures[name]) for name in _MEASURES]


def _estimate(found: Estimate) -> str:
    if math.isnan(found.value):
        return "not defined"
    interval = "" if math.isnan(found.low) else rf" \[{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{interval}"


def _allocations(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Allocations", title_justify="left")
    for column in ("budget", "proxy"):
        table.add_column(column)
    timed = any("step_time" in row for row in rows)
    for column in ("parameters", "of", "sites", *(["step of uniform's"] if timed else [])):
        table.add_column(column, justify="right")
    table.add_column("folder", overflow="fold")
    for row in rows:
        allowed = "counts sites" if row["allowed"] is None else f"{row['allowed']:,}"
        cells = [row["budget"], row["proxy"], f"{row['parameters']:,}", allowed, str(row["sites"])]
        if timed:
            step = row.get("step_time")
            cells.append("no limit" if step is None else f"{step['predicted']:.2f}, limit {step['limit']:.2f}")
        cells.append(row["folder"])
        table.add_row(*map(escape, cells))
    return table


def _notes(allocation: Allocation, summary: Mapping[str, Any]) -> list[str]:
    main = summary["allocations"][0]
    allowed = "" if allocation.budget is None else f" of {allocation.budget:,}"
    lines = [
        f"allocation.json: {allocation.spent:,}{allowed} parameters at {len(allocation.active)} of {summary['sites']} "
        f"sites, by {main['proxy']} for {main['budget']}"
        + (f" ({shown(main['step_time'])})" if "step_time" in main else "")
    ]
    if left := summary["left_out_of_peft"]["sites"]:
        lines.append(
            f"adapter_config.json is for LoRA alone: PEFT cannot hold {len(left)} shortcut sites with "
            f"{summary['left_out_of_peft']['parameters']:,} parameters; train.py can (allocator=fixed)"
        )
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    memory = summary["memory_mib"]
    sizes = ", ".join(f"{name} {value:,.0f} MiB" for name, value in memory.items() if value is not None)
    lines += [line for line in (seconds, sizes, f"folder: {summary['folder']}") if line]
    return lines
