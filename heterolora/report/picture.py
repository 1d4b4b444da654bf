"""The allocation as a picture: layers across, roles down, ranks as colour and number."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from heterolora.allocation import Allocation
from heterolora.history import Decision
from heterolora.report.files import write_whole
from heterolora.sites import Site
from heterolora.space import Space

HISTORY_PICTURE = "history.png"


def rank_grid(space: Space, allocation: Allocation) -> tuple[list[str], list[int], list[list[int | None]]]:
    """Rows (label: role, with its span if it is long), columns (layers), and the rank at each; None: no such site."""
    depth = space.survey.deepest
    rows: dict[str, list[int | None]] = {}
    for site in space.sites:
        rows.setdefault(site.label, [None] * depth)[site.layer] = allocation.ranks[site.name]
    labels = list(dict.fromkeys(site.label for site in sorted(space.sites, key=_family)))
    return labels, list(range(depth)), [rows[label] for label in labels]


def _family(site: Site) -> tuple[str, int]:
    return site.kind, site.span or 0


def draw_history(space: Space, history: Sequence[Decision], title: str, path: Path) -> None:
    """Write a PNG of ``history_figure``."""
    figure = history_figure(space, history, title)
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=130))


def history_figure(space: Space, history: Sequence[Decision], title: str) -> Figure:
    """Decisions across, by their steps; sites that ever had rank down, by kind, span and layer; rank as colour."""
    sites = [site for site in space.sites if any(decision.ranks[site.name] for decision in history)]
    sites.sort(key=lambda site: (_family(site), site.label, site.layer))
    values = np.array([[decision.ranks[site.name] for decision in history] for site in sites], dtype=float)
    height = max(0.11, min(0.22, 16 / len(sites)))
    size = (3.2 + max(4.0, min(14.0, 0.34 * len(history))), 1.6 + height * len(sites))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis_r"].with_extremes(under="#e6e6e6")
    image = axes.imshow(values, cmap=colours, vmin=0.5, vmax=max(1.0, values.max()), aspect="auto")
    axes.set_yticks(range(len(sites)), [site.name for site in sites], fontsize=min(8.0, 62 * height))
    shown = range(0, len(history), -(-len(history) // 20))
    axes.set_xticks(list(shown), [str(history[at].step) for at in shown], rotation=90, fontsize=8)
    axes.set_xlabel("optimizer step of the decision")
    for at in range(1, len(sites)):
        if sites[at].label != sites[at - 1].label:
            axes.axhline(at - 0.5, color="white", linewidth=2)
    figure.suptitle(textwrap.fill(title, 80), fontsize=9, x=0.02, ha="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, label="rank (grey: off)", shrink=0.9, ticks=MaxNLocator(integer=True))
    return figure


def draw_allocation(space: Space, allocation: Allocation, title: str, path: Path) -> None:
    """Write a PNG of ``allocation_figure``."""
    figure = allocation_figure(space, allocation, title)
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=130))


def allocation_figure(space: Space, allocation: Allocation, title: str) -> Figure:
    """Sites without rank are grey, places without a site stay white."""
    roles, layers, grid = rank_grid(space, allocation)
    values = np.array([[np.nan if rank is None else rank for rank in row] for row in grid], dtype=float)
    figure = Figure(figsize=(2.6 + 0.48 * max(len(layers), 8), 1.6 + 0.34 * len(roles)), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis_r"].with_extremes(under="#e6e6e6", bad="white")
    largest = max(1.0, float(np.nanmax(values)))
    image = axes.imshow(values, cmap=colours, vmin=0.5, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if value > 0:
            tone = "white" if value > 0.55 * largest else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=tone, fontsize=8)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(roles)), roles)
    axes.set_xlabel("layer")
    figure.suptitle(textwrap.fill(title, 80), fontsize=9, x=0.02, ha="left")
    for edge in range(len(layers) + 1):
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    for edge in range(len(roles) + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, label="rank", shrink=0.9, ticks=MaxNLocator(integer=True))
    return figure
