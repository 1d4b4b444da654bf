"""The table at the end of a run."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from heterolora.report.terminal import console


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Metrics, parameters, times and peak memory of one run."""
    table = Table(title=escape(summary["title"]), title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    for split, metrics in summary["metrics"].items():
        for name, value in metrics.items():
            table.add_row(f"{split} {name}", _shown(value))
        if summary["collapsed"][split]:
            table.add_row(f"{split} COLLAPSED", "every example gets (nearly) the same prediction", style="red")
    table.add_section()
    parameters = summary["parameters"]
    more = parameters["budget"] is not None and parameters["held"] > parameters["budget"]
    held = f"{parameters['held']:,}" + (", MORE THAN THE BUDGET" if more else "")
    table.add_row("adapter parameters, held", held, style="red" if more else None)
    table.add_row("adapter parameters, active", f"{parameters['active']:,}")
    if parameters.get("frozen"):
        table.add_row("frozen factors (apart)", f"{parameters['frozen']:,}")
    budget = "counts sites" if parameters["budget"] is None else f"{parameters['budget']:,}"
    table.add_row("budget", budget)
    if parameters["unspent"] is not None:
        table.add_row("unspent", f"{parameters['unspent']:,}")
    if (baseline := summary.get("baseline")) is not None:
        table.add_row("baseline", f"{baseline['method']} of PEFT {baseline['peft']}")
    table.add_row("head parameters (apart)", f"{parameters['head']:,}")
    table.add_row("sites with rank", f"{summary['sites']['active']} of {summary['sites']['candidates']}")
    table.add_section()
    table.add_row("search", _duration(summary["seconds"]["search"]))
    table.add_row("training", _duration(summary["seconds"]["training"]))
    if (step := summary.get("step_time")) is not None:
        table.add_row("predicted step", f"{step['predicted']:.2f} of uniform's, limit {step['limit']:.2f}")
    table.add_row("peak memory", f"{summary['peak_memory_mib']:,.0f} MiB")
    table.add_section()
    if (export := summary.get("export")) is not None:
        table.add_row("for PEFT", _exported(export), style="red" if export["folder"] is None else None)
    table.add_row("splits", escape(summary["data"]["note"]))
    table.add_row("folder", escape(summary["folder"]))
    return table


def _exported(export: Mapping[str, Any]) -> str:
    if export["folder"] is None:
        return escape(f"nothing was exported: {export['error']}")
    without = f"; without {export['not_in_peft']} shortcuts, which PEFT cannot hold" if export["not_in_peft"] else ""
    return f"{export['folder']}: {export['modules']} modules, {export['parameters']:,} parameters{without}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s"


def print_summary(summary: Mapping[str, Any]) -> None:
    """To the terminal."""
    console().print(summary_table(summary))


def print_metrics(title: str, metrics: Mapping[str, float], recorded: Mapping[str, float | None]) -> None:
    """Metrics of an evaluation, beside those that the run wrote down for the same examples."""
    table = Table(title=escape(title), title_justify="left", show_header=bool(recorded))
    for column in ("metric", "now", *(["in the run"] if recorded else [])):
        table.add_column(column)
    for name, value in metrics.items():
        table.add_row(name, _shown(value), *([_shown(recorded.get(name))] if recorded else []))
    console().print(table)


def _shown(value: float | None) -> str:
    return "not defined" if value is None or math.isnan(value) else f"{value:.4f}"
