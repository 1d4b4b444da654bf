"""What a run would do and need, without training: ``run=dry``."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from heterolora.report.terminal import console


def print_plan(plan: Mapping[str, Any]) -> None:
    """Sites, budget, steps and expected memory."""
    table = Table(title=escape(plan["title"]), title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    for family, count in plan["sites"].items():
        table.add_row(f"sites {family}", str(count))
    table.add_section()
    budget = plan["budget"]
    table.add_row("budget", f"{budget:,}" if isinstance(budget, int) else escape(str(budget)))
    table.add_row("head parameters (apart)", f"{plan['head_parameters']:,}")
    table.add_row("backbone parameters", f"{plan['backbone_parameters']:,}")
    table.add_section()
    for split, size in plan["sizes"].items():
        table.add_row(f"{split} examples", f"{size:,}")
    for name, count in plan["steps"].items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name, mib in plan["memory_mib"].items():
        table.add_row(name, "unknown here" if mib is None else f"{mib:,.0f} MiB")
    table.add_section()
    table.add_row("splits", escape(plan["note"]))
    table.add_row("folder", escape(plan["folder"]))
    console().print(table)
