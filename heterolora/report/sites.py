"""The sites of a backbone, its taps and what rank costs, for people and for programs."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from heterolora.adapters.base import AdapterFamily
from heterolora.budget import SiteCount
from heterolora.report.terminal import console
from heterolora.sites import Tap
from heterolora.space import Space


def sites_report(space: Space, family: AdapterFamily, budget: int | SiteCount) -> dict[str, Any]:
    """Plain values: the backbone, its taps with the points where they are read and joined, and every site's cost."""
    survey, cost = space.survey, family.cost(space.sites)
    return {
        "model_type": survey.model_type,
        "backbone_parameters": survey.parameters,
        "roots": {stream: stack.root for stream, stack in survey.stacks.items()},
        "layers": {stream: survey.depth(stream) for stream in survey.stacks},
        "widths": dict(survey.widths),
        "no_shortcuts": survey.no_shortcuts,
        "budget": budget if isinstance(budget, int) else {"sites": dict(budget.counts), "rank": budget.rank},
        "taps": [
            _tap(space, Tap(index, stream))
            for stream, stack in survey.stacks.items()
            for index in range(stack.num_taps)
            if stack.has_tap(index)
        ],
        "sites": [site.as_dict() | {"rank_1_costs": cost({site.name: 1})} for site in space.sites],
    }


def _tap(space: Space, tap: Tap) -> dict[str, Any]:
    survey = space.survey
    joins = {
        key: [str(point) for point in survey.write(tap, span).points] if tap.index else []
        for key, span in (("joined_by_span_1", 1), ("joined_by_longer", 2))
    }
    return {"tap": str(tap), "read": str(survey.read(tap)), **joins}


def print_sites(report: Mapping[str, Any]) -> None:
    """Three tables: taps, sites, and the sum by family."""
    terminal = console()
    layers = ", ".join(f"{stream or 'layers'} {count}" for stream, count in report["layers"].items())
    terminal.print(
        f"{report['model_type']}: {report['backbone_parameters']:,} parameters, {layers}, "
        f"stream width {', '.join(map(str, report['widths'].values()))}"
    )
    if report["no_shortcuts"] is not None:
        terminal.print(f"no shortcuts: {escape(report['no_shortcuts'])}")
    roots = [f"{root}." for root in report["roots"].values() if root]
    terminal.print(f"paths below {', '.join(root[:-1] for root in roots) or 'the model'}:")
    if report["taps"]:
        terminal.print(_taps_table(report["taps"], roots))
    terminal.print(_sites_table(report["sites"], roots))
    terminal.print(_families_table(report["sites"]))
    terminal.print(_budget_line(report))


def _below(path: str, roots: list[str]) -> str:
    return next((path.removeprefix(root) for root in roots if path.startswith(root)), path)


def _taps_table(taps: list[dict[str, Any]], roots: list[str]) -> Table:
    table = Table(title="Taps of the residual stream", title_justify="left")
    for column in ("tap", "read at", "deltas join at"):
        table.add_column(column, overflow="fold")
    for tap in taps:
        single, longer = (
            " and ".join(_below(point, roots) for point in tap[key]) for key in ("joined_by_span_1", "joined_by_longer")
        )
        joins = single if single == longer else f"span 1: {single}\nlonger: {longer}"
        table.add_row(tap["tap"], escape(_below(tap["read"], roots)), escape(joins))
    return table


def _sites_table(sites: list[dict[str, Any]], roots: list[str]) -> Table:
    table = Table(title="Sites", title_justify="left")
    for column in ("site", "from its source to its sink"):
        table.add_column(column, overflow="fold")
    for column in ("in", "out", "rank 1 costs"):
        table.add_column(column, justify="right")
    for site in sites:
        source, sink = site["source"], site["sink"]
        inside = source.removesuffix(".in") == sink.removesuffix(".out")
        path = source.removesuffix(".in") if inside else f"{source} to {sink}"
        numbers = (str(site["in_features"]), str(site["out_features"]), f"{site['rank_1_costs']:,}")
        table.add_row(site["name"], _below(path, roots), *numbers)
    return table


def _families_table(sites: list[dict[str, Any]]) -> Table:
    table = Table(title="By kind and role", title_justify="left")
    table.add_column("sites of")
    for column in ("sites", "rank 1 everywhere costs"):
        table.add_column(column, justify="right")
    families: dict[str, list[int]] = {}
    for site in sites:
        stream = f"{site['stream']} " if site["stream"] else ""
        families.setdefault(f"{site['kind']}: {stream}{site['role']}", []).append(site["rank_1_costs"])
    for family, costs in families.items():
        table.add_row(family, str(len(costs)), f"{sum(costs):,}")
    table.add_section()
    table.add_row("all", str(len(sites)), f"{sum(site['rank_1_costs'] for site in sites):,}")
    return table


def _budget_line(report: Mapping[str, Any]) -> str:
    budget = report["budget"]
    if not isinstance(budget, int):
        return f"budget: {budget['sites']} sites of rank {budget['rank']}"
    return f"budget: {budget:,} parameters, {budget / report['backbone_parameters']:.3%} of the backbone"
