"""The table at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Metrics, parameters, times and peak memory of one run."""
    table = Table(title=escape(summary["title"]), title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    for split in ("validation", "test"):
        for name, value in summary["metrics"][split].items():
            table.add_row(f"{split} {name}", f"{value:.4f}")
        if summary["collapsed"][split]:
            table.add_row(f"{split} COLLAPSED", "one class is predicted for every example", style="red")
    table.add_section()
    parameters = summary["parameters"]
    table.add_row("adapter parameters, held", f"{parameters['held']:,}")
    table.add_row("adapter parameters, active", f"{parameters['active']:,}")
    budget = "counts sites" if parameters["budget"] is None else f"{parameters['budget']:,}"
    table.add_row("budget", budget)
    if parameters["unspent"] is not None:
        table.add_row("unspent", f"{parameters['unspent']:,}")
    table.add_row("head parameters (apart)", f"{parameters['head']:,}")
    table.add_row("sites with rank", f"{summary['sites']['active']} of {summary['sites']['candidates']}")
    table.add_section()
    table.add_row("search", _duration(summary["seconds"]["search"]))
    table.add_row("training", _duration(summary["seconds"]["training"]))
    table.add_row("peak memory", f"{summary['peak_memory_mib']:,.0f} MiB")
    table.add_section()
    table.add_row("splits", escape(summary["data"]["note"]))
    table.add_row("folder", escape(summary["folder"]))
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s"


def print_summary(summary: Mapping[str, Any]) -> None:
    """To the terminal; wide enough for paths where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(summary_table(summary))
