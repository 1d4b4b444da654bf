"""Plain values -> plotly figures, as the JSON that plotly.js draws.

Texts of figures are a kind of HTML to plotly, so every name that a user may have chosen is escaped. A figure's
``layout.meta`` says how wide it must be at least to be read, in pixels; in a narrower place it scrolls.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from heterolora.analysis import Spectrum, shares_by_label, site_frequency
from heterolora.history import Decision
from heterolora.page.record import Place

Figure: TypeAlias = dict[str, Any]

NO_RANK = "#e3e6ea"
"""Of a site that exists and got nothing; where there is no site the page shows through."""

RANKS = "Viridis_r"
SCORES = "Cividis_r"
_INK, _LINES = "#1d2733", "#dfe3e8"
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D00")
"""Okabe and Ito's colours, which colour-blind readers can tell apart (the yellow, too light for lines, darkened)."""

_SHARES: Sequence[Sequence[Any]] = [
    [0, NO_RANK],
    [0.001, NO_RANK],
    [0.001, "#fdea9b"],
    [0.5, "#7b7a78"],
    [1, "#00204d"],
]
"""Of shares: nothing is grey, then Cividis, light to dark."""

_CELL, _NARROW, _ROW = 34, 27, 27
"""Pixels of a map's cell: across, across where there are more than 16 layers, and down."""

_WIDE_RANGE = 50
"""Positive scores whose largest is more than so many times their smallest are shown in powers of ten."""


class Grid:
    """Where each site stands on a map: layers across, families of sites down.

    Args:
        sites: of one run.
    """

    def __init__(self, sites: Sequence[Place]) -> None:
        self.sites = sites
        self.layers = list(range(max((site.layer for site in sites), default=-1) + 1))
        families = list(dict.fromkeys(site.family for site in sites))
        order = sorted(sites, key=lambda site: families.index(site.family))
        self.labels = list(dict.fromkeys(site.label for site in order))

    def spread(self, value: Callable[[Place], Any]) -> list[list[Any]]:
        """``[labels][layers]``: the value of each site, None where there is none."""
        rows: list[list[Any]] = [[None] * len(self.layers) for _ in self.labels]
        for site in self.sites:
            rows[self.labels.index(site.label)][site.layer] = value(site)
        return rows

    def figure(
        self, z: Callable[[Place], Any], shown: Callable[[Place], str], tooltips: Mapping[str, str], **trace: Any
    ) -> Figure:
        """A map.

        Args:
            z: a site's place on the colour scale; None: no colour.
            shown: what is written in its cell.
            tooltips: site -> its text.
            trace: further settings of the heatmap.
        """
        heatmap = go.Heatmap(
            x=self.layers,
            y=[escape(label, quote=False) for label in self.labels],
            z=self.spread(z),
            text=[["" if text is None else text for text in row] for row in self.spread(shown)],
            hovertext=self.spread(lambda site: tooltips[site.name]),
            texttemplate="%{text}",
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            **trace,
        )
        longest = max(map(len, self.labels), default=0)
        layout = _layout(
            height=_ROW * len(self.labels) + 74,
            least=7 * longest + (_CELL if len(self.layers) <= 16 else _NARROW) * len(self.layers) + 92,
            margin={"l": 7 * longest + 18, "r": 8, "t": 6, "b": 44},
            xaxis={"title": {"text": "layer"}, "tickmode": "array", "tickvals": self.layers, "showgrid": False},
            yaxis={"autorange": "reversed", "showgrid": False, "ticklabelstandoff": 4},
        )
        return _figure([heatmap], layout)


def tips(sites: Sequence[Place], budget: int | None, scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """What a tooltip says of each site: name, rank, parameters, share of the budget, scores with their places."""
    whole = budget or sum(site.parameters or 0 for site in sites)
    places = {proxy: _places(of) for proxy, of in scores.items()}
    found = {}
    for site in sites:
        lines = [f"<b>{escape(site.name, quote=False)}</b>", f"rank {site.rank}"]
        if site.parameters is not None:
            share = f", {100 * site.parameters / whole:.3g} % of {'the budget' if budget else 'all'}" if whole else ""
            lines.append(f"{site.parameters:,} parameters{share}")
        for proxy, of in scores.items():
            if site.name in of:
                name = escape(proxy, quote=False)
                lines.append(f"{name} {of[site.name]:.4g} (place {places[proxy][site.name]} of {len(of)})")
        found[site.name] = "<br>".join(lines)
    return found


def rank_map(sites: Sequence[Place], tooltips: Mapping[str, str]) -> Figure:
    """The allocation. Colours follow the logarithm of the rank, so that 1 and 2 differ as much as 16 and 32."""
    top = max(1, *(site.rank for site in sites)) if sites else 1
    highest = _height(top)
    ticks: list[int] = [0, *(2**power for power in range(math.floor(math.log2(top)) + 1))]
    if top not in ticks and top > 1.25 * ticks[-1]:
        ticks.append(top)
    return Grid(sites).figure(
        lambda site: _height(site.rank),
        lambda site: str(site.rank or "·"),
        tooltips,
        zmin=0,
        zmax=highest,
        colorscale=_rank_scale(highest),
        colorbar=_bar([_height(tick) for tick in ticks], [str(tick) for tick in ticks]),
    )


def _height(rank: int) -> float:
    """0 for no rank, 1 for rank 1, and one more for each doubling."""
    return 1 + math.log2(rank) if rank else 0.0


def _rank_scale(highest: float) -> list[list[Any]]:
    """Colours of heights: grey below rank 1, whose height is 1, and from there to the largest those of ``RANKS``."""
    first, split = 1 / highest, 0.75 / highest  # no height lies between them
    steps = [index / 16 for index in range(17)]
    colours = sample_colorscale(RANKS, steps)
    above = [[first + step * (1 - first), colour] for step, colour in zip(steps, colours, strict=True)]
    return [[0.0, NO_RANK], [split, NO_RANK], [split, colours[0]], *above]


def score_map(sites: Sequence[Place], scores: Mapping[str, float], tooltips: Mapping[str, str]) -> Figure:
    """The scores of one proxy, in powers of ten if they are all positive and far apart."""
    powers = in_powers(scores.values())
    trace: dict[str, Any] = {"colorscale": SCORES, "colorbar": _bar()}
    if powers:
        low, high = math.log10(min(scores.values())), math.log10(max(scores.values()))
        ticks: list[float] = [*range(math.ceil(low), math.floor(high) + 1)] or [round(low, 1)]
        ticks = ticks[:: -(-len(ticks) // 7)]
        trace["colorbar"] = _bar(ticks, [f"1e{tick}" for tick in ticks])
    return Grid(sites).figure(
        lambda site: _powered(scores[site.name], powers) if site.name in scores else None,
        lambda site: "",
        tooltips,
        **trace,
    )


def in_powers(values: Any) -> bool:
    """Whether numbers are all positive and so far apart that only their logarithms can be seen."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) / min(known) > _WIDE_RANGE


def _powered(value: float, powers: bool) -> float:
    return math.log10(value) if powers else value


def parameters_by_layer(sites: Sequence[Place]) -> Figure:
    """What each layer holds, one colour a family of sites."""
    traces = []
    for number, family in enumerate(dict.fromkeys(site.family for site in sites)):
        held: dict[int, int] = dict.fromkeys((site.layer for site in sites), 0)
        for site in sites:
            if site.family == family:
                held[site.layer] += site.parameters or 0
        traces.append(
            go.Bar(
                x=list(held),
                y=list(held.values()),
                name=escape(family or "sites", quote=False),
                marker={"color": _SERIES[number % len(_SERIES)]},
                hovertemplate="layer %{x}: %{y:,} parameters<extra>%{fullData.name}</extra>",
            )
        )
    layout = _layout(
        height=330,
        barmode="stack",
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        bargap=0.25,
        xaxis={"title": {"text": "layer"}, "dtick": 1 if len({site.layer for site in sites}) <= 16 else 4},
        yaxis={"title": {"text": "parameters"}, "tickformat": ",d"},
        showlegend=len(traces) > 1,
    )
    return _figure(traces, layout)


def score_and_rank(sites: Sequence[Place], scores: Mapping[str, float], tooltips: Mapping[str, str]) -> Figure:
    """Every site by its score and its rank; one colour a family, one shape too."""
    families = dict.fromkeys(site.family for site in sites)
    traces = []
    for number, family in enumerate(families):
        own = [site for site in sites if site.family == family and site.name in scores]
        traces.append(
            go.Scatter(
                x=[scores[site.name] for site in own],
                y=[site.rank for site in own],
                hovertext=[tooltips[site.name] for site in own],
                hovertemplate="%{hovertext}<extra></extra>",
                name=escape(family or "sites", quote=False),
                mode="markers",
                marker=_marker(number),
            )
        )
    axis = {"type": "log", "exponentformat": "power", "dtick": 1} if in_powers(scores.values()) else {}
    layout = _layout(
        height=330,
        xaxis={"title": {"text": "score"}, **axis},
        yaxis={"title": {"text": "rank"}, "rangemode": "tozero", "zeroline": False},
        showlegend=len(families) > 1,
    )
    return _figure(traces, layout)


def curves(of: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[str, Figure]]:
    """Metric -> figure with one line for each split: ``train/loss_epoch`` and ``validation/loss`` share one."""
    panels: dict[str, list[tuple[str, Sequence[tuple[int, float]]]]] = {}
    for name, points in of.items():
        metric = name.rpartition("/")[2]
        panels.setdefault(metric.removesuffix("_epoch").removesuffix("_step") or name, []).append((name, points))
    colours = {"validation": _SERIES[1], "train": _SERIES[0]}
    figures = []
    for metric, lines in panels.items():
        traces = []
        for number, (name, points) in enumerate(lines):
            steps = name.endswith("_step")
            traces.append(
                go.Scatter(
                    x=[step for step, _ in points],
                    y=[value for _, value in points],
                    name=escape(_curve_name(name), quote=False),
                    mode="lines" if len(points) > 40 else "lines+markers",
                    opacity=0.35 if steps else 1,
                    line={
                        "color": colours.get(name.partition("/")[0], _SERIES[(2 + number) % len(_SERIES)]),
                        "width": 1.5 if steps else 2.5,
                    },
                )
            )
        layout = _layout(
            height=290,
            xaxis={"title": {"text": "optimizer steps"}, "rangemode": "tozero"},
            yaxis={"title": {"text": escape(metric, quote=False)}},
            hovermode="x unified",
        )
        figures.append((metric, _figure(traces, layout)))
    return figures


def _curve_name(name: str) -> str:
    split, _, metric = name.rpartition("/")
    for suffix, said in (("_epoch", "mean of the epoch"), ("_step", "batch")):
        if metric.endswith(suffix):
            return f"{split}, {said}" if split else said
    return split or metric


def all_curves(runs: Sequence[tuple[str, str, Sequence[tuple[int, float]]]], metric: str) -> Figure:
    """One line a run, one colour a group.

    Args:
        runs: name, group and (step, value) of each.
        metric: what the values are.
    """
    groups = list(dict.fromkeys(group for _, group, _ in runs))
    seen: set[str] = set()
    traces = []
    for name, group, points in runs:
        number = groups.index(group)
        traces.append(
            go.Scatter(
                x=[step for step, _ in points],
                y=[value for _, value in points],
                name=escape(group, quote=False),
                legendgroup=str(number),
                showlegend=group not in seen,
                mode="lines+markers",
                marker={"size": 5},
                line={
                    "width": 1.8,
                    "color": _SERIES[number % len(_SERIES)],
                    "dash": ("solid", "dash", "dot", "dashdot")[number // len(_SERIES) % 4],
                },
                hovertemplate=f"<b>{escape(name, quote=False)}</b><br>step %{{x}}: %{{y:.4f}}<extra></extra>",
            )
        )
        seen.add(group)
    layout = _layout(
        height=340 + 16 * max(0, len(groups) - 4),
        xaxis={"title": {"text": "optimizer steps"}, "rangemode": "tozero"},
        yaxis={"title": {"text": escape(metric, quote=False)}},
    )
    return _figure(traces, layout)


def agreement_map(
    proxies: Sequence[str], value: Mapping[tuple[str, str], float], text: Mapping[tuple[str, str], str], measure: str
) -> Figure:
    """How alike proxies rank sites, each against each: from -1 (orange) over 0 (white) to 1 (blue).

    Args:
        proxies: their names.
        value: (proxy, proxy) -> correlation; either order will do.
        text: (proxy, proxy) -> more about it, e.g. its interval; may be empty.
        measure: what the correlation is called.
    """

    def of(row: str, column: str, found: Mapping[tuple[str, str], Any], same: Any) -> Any:
        return same if row == column else found.get((row, column), found.get((column, row)))

    names = [escape(proxy, quote=False) for proxy in proxies]
    z: list[list[float | None]] = []
    said: list[list[str]] = []
    for row in proxies:
        numbers = [of(row, column, value, 1.0) for column in proxies]
        z.append([None if number is None or math.isnan(number) else number for number in numbers])
        said.append([of(row, column, text, "") or "" for column in proxies])
    heatmap = go.Heatmap(
        x=names,
        y=names,
        z=z,
        customdata=said,
        zmin=-1,
        zmax=1,
        colorscale=[[0, "#b35806"], [0.25, "#fdb863"], [0.5, "#f7f7f7"], [0.75, "#8db3d9"], [1, "#1f5a99"]],
        texttemplate="%{z:.2f}",
        hovertemplate=f"<b>%{{y}}</b> and <b>%{{x}}</b><br>{measure} %{{z:.3f}}%{{customdata}}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        showscale=False,
    )
    longest = max(map(len, proxies))
    below = 7 * longest + 24 if len(proxies) > 3 else 34
    layout = _layout(
        height=34 * len(proxies) + below + 6,
        least=7 * longest + 46 * len(proxies) + 40,
        margin={"l": 7 * longest + 18, "r": 10, "t": 6, "b": below},
        xaxis={"tickangle": -90 if len(proxies) > 3 else 0, "showgrid": False, "type": "category"},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "category"},
    )
    return _figure([heatmap], layout)


def places_against(
    first: tuple[str, Mapping[str, float]], second: tuple[str, Mapping[str, float]], families: Mapping[str, str]
) -> Figure:
    """Every site by its place among the scores of two proxies; 1 is the best, and stands right and above.

    Args:
        first: a proxy's name and its scores.
        second: another's.
        families: site -> family; one colour each.
    """
    names = [name for name in first[1] if name in second[1]]
    across, up = (_places({name: of[name] for name in names}) for _, of in (first, second))
    traces = []
    for number, family in enumerate(dict.fromkeys(families.get(name, "") for name in names)):
        own = [name for name in names if families.get(name, "") == family]
        said = [
            "<br>".join(
                [f"<b>{escape(name, quote=False)}</b>"]
                + [
                    f"{escape(proxy, quote=False)} {of[name]:.4g}, place {place[name]}"
                    for (proxy, of), place in ((first, across), (second, up))
                ]
            )
            for name in own
        ]
        traces.append(
            go.Scatter(
                x=[across[name] for name in own],
                y=[up[name] for name in own],
                hovertext=said,
                hovertemplate="%{hovertext}<extra></extra>",
                name=escape(family or "sites", quote=False),
                mode="markers",
                marker=_marker(number),
            )
        )
    layout = _layout(
        height=360,
        xaxis={"title": {"text": f"place by {escape(first[0], quote=False)}"}, "autorange": "reversed"},
        yaxis={"title": {"text": f"place by {escape(second[0], quote=False)}"}, "autorange": "reversed"},
        showlegend=len(traces) > 1,
    )
    return _figure(traces, layout)


def _marker(number: int) -> dict[str, Any]:
    symbol = ("circle", "diamond", "square", "x")[number % 4]
    return {"size": 9, "color": _SERIES[number % len(_SERIES)], "symbol": symbol, "opacity": 0.75}


def effective_map(sites: Sequence[Place], spectra: Mapping[str, Spectrum]) -> Figure:
    """Effective rank of each trained delta over the rank that it was given: how much of it was used."""
    tooltips = {}
    for site in sites:
        text = f"<b>{escape(site.name, quote=False)}</b><br>"
        if site.name in spectra:
            found = spectra[site.name]
            text += (
                f"effective rank {found.effective_rank:.2f} of {site.rank}<br>stable rank {found.stable_rank:.2f}"
                f"<br>norm {found.norm:.4g}<br>singular values {_few(found.values)}"
            )
        else:
            text += "no trained delta"
        tooltips[site.name] = text
    return Grid(sites).figure(
        lambda site: spectra[site.name].effective_rank / max(1, site.rank) if site.name in spectra else 0.0,
        lambda site: f"{spectra[site.name].effective_rank:.1f}" if site.name in spectra else "·",
        tooltips,
        colorscale=_SHARES,
        zmin=0,
        zmax=1,
        colorbar=_bar([0, 0.5, 1], ["0 %", "50 %", "100 %"]),
    )


def _few(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:6])
    return f"{shown}, ... ({len(values)})" if len(values) > 6 else shown


def spectra_lines(sites: Sequence[Place], spectra: Mapping[str, Spectrum]) -> Figure:
    """Singular values of each trained delta, largest first; light: first layers, dark: last layers."""
    deepest = max((site.layer for site in sites), default=0)
    traces = []
    for layer in dict.fromkeys(site.layer for site in sites):
        x: list[int | None] = []
        y: list[float | None] = []
        names: list[str] = []
        for site in sites:
            if site.layer == layer and site.name in spectra:
                values = [value for value in spectra[site.name].values if value > 0]
                x += [*range(1, len(values) + 1), None]  # a gap between the lines of two sites
                y += [*(float(f"{value:.5g}") for value in values), None]
                names += [escape(site.name, quote=False)] * (len(values) + 1)
        colour = sample_colorscale(RANKS, [0.15 + 0.85 * layer / max(1, deepest)])[0]
        traces.append(
            go.Scatter(
                x=x,
                y=y,
                customdata=names,
                mode="lines+markers",
                marker={"size": 5},
                line={"width": 1.4, "color": colour},
                hovertemplate="<b>%{customdata}</b><br>value %{x}: %{y:.4g}<extra></extra>",
                showlegend=False,
            )
        )
    most = max((len(found.values) for found in spectra.values()), default=1)
    layout = _layout(
        height=330,
        xaxis={"title": {"text": "number of the singular value"}, "dtick": 1 if most <= 12 else 4},
        yaxis={"title": {"text": "singular value"}, "type": "log", **_log_ticks(spectra.values())},
    )
    return _figure(traces, layout)


def _log_ticks(spectra: Iterable[Spectrum]) -> dict[str, Any]:
    """1, 2 and 5 times the powers of ten that positive values span; powers alone if these are many."""
    values = [value for found in spectra for value in found.values if value > 0]
    if not values:
        return {}
    powers = range(math.floor(math.log10(min(values))), math.floor(math.log10(max(values))) + 2)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def history_map(sites: Sequence[Place], history: Sequence[Decision]) -> Figure:
    """Rank of each site after each decision; sites that never had rank are left out."""
    shown = [site.name for site in sites if any(decision.ranks.get(site.name) for decision in history)]
    top = max((decision.ranks[name] for decision in history for name in shown), default=1)
    heatmap = go.Heatmap(
        x=[str(decision.step) for decision in history],
        y=[escape(name, quote=False) for name in shown],
        z=[[_height(decision.ranks[name]) for decision in history] for name in shown],
        customdata=[
            [f"rank {decision.ranks[name]}<br>{escape(decision.reason, quote=False)}" for decision in history]
            for name in shown
        ],
        hovertemplate="<b>%{y}</b>, from step %{x} on<br>%{customdata}<extra></extra>",
        zmin=0,
        zmax=_height(top),
        colorscale=_rank_scale(_height(top)),
        showscale=False,
        xgap=1,
        ygap=1,
    )
    longest = max(map(len, shown), default=0)
    layout = _layout(
        height=max(160, 17 * len(shown) + 60),
        least=7 * longest + 14 * len(history) + 60,
        margin={"l": 7 * longest + 18, "r": 10, "t": 44, "b": 6},  # steps above: tall ones scroll in their box
        xaxis={"title": {"text": "from step"}, "side": "top", "type": "category", "showgrid": False, "nticks": 12},
        yaxis={"autorange": "reversed", "type": "category", "showgrid": False, "tickfont": {"size": 11}, "dtick": 1},
    )
    return _figure([heatmap], layout)


def frequency_map(sites: Sequence[Place], history: Sequence[Decision]) -> Figure:
    """Share of the decisions that switched each site on."""
    often = site_frequency([decision.ranks for decision in history])
    tooltips = {
        site.name: f"<b>{escape(site.name, quote=False)}</b><br>on after {100 * often.get(site.name, 0):.3g} % of "
        f"{len(history)} decisions"
        for site in sites
    }
    return Grid(sites).figure(
        lambda site: often.get(site.name, 0.0),
        lambda site: f"{100 * often[site.name]:.0f}" if often.get(site.name) else "·",
        tooltips,
        colorscale=_SHARES,
        zmin=0,
        zmax=1,
        colorbar=_bar([0, 0.5, 1], ["0 %", "50 %", "100 %"]),
    )


def share_areas(sites: Sequence[Place], history: Sequence[Decision], end: int) -> Figure | None:
    """Share of the parameters at each family of sites over time; None where costs are not known.

    Args:
        sites: of the run.
        history: its decisions.
        end: the run's last step, until which the last decision was in force.
    """
    units = {site.name: site.unit for site in sites if site.unit is not None}
    names = history[0].ranks.keys() if history else set()
    if not names or names - units.keys():
        return None
    shares = shares_by_label([d.ranks for d in history], units, {site.name: site.family for site in sites})
    steps = [decision.step for decision in history]
    steps.append(max(end, steps[-1]))
    traces = [
        go.Scatter(
            x=steps,
            y=[None if math.isnan(share) else share for share in (*values, values[-1])],
            name=escape(label, quote=False),
            stackgroup="all",
            mode="lines",
            line={"shape": "hv", "width": 1, "color": _SERIES[number % len(_SERIES)]},
            hovertemplate="%{y:.1%}",
        )
        for number, (label, values) in enumerate(shares.items())
    ]
    layout = _layout(
        height=290,
        xaxis={"title": {"text": "optimizer steps"}},
        yaxis={"title": {"text": "share of the parameters"}, "range": [0, 1], "tickformat": ".0%"},
        hovermode="x unified",
        showlegend=True,
    )
    return _figure(traces, layout)


def _places(scores: Mapping[str, float]) -> dict[str, int]:
    return {name: place for place, name in enumerate(sorted(scores, key=lambda name: -scores[name]), 1)}


def _bar(values: Sequence[float] | None = None, texts: Sequence[str] | None = None) -> dict[str, Any]:
    bar: dict[str, Any] = {"thickness": 10, "outlinewidth": 0, "xpad": 6}
    return bar if values is None else {**bar, "tickmode": "array", "tickvals": list(values), "ticktext": texts}


def _layout(height: int, least: int = 300, **more: Any) -> dict[str, Any]:
    axis: dict[str, Any] = {"gridcolor": _LINES, "linecolor": _LINES, "zerolinecolor": _LINES, "ticks": ""}
    axis |= {"fixedrange": True, "automargin": True}
    layout = {
        "height": height,
        "meta": {"least": least},
        "margin": {"l": 60, "r": 12, "t": 8, "b": 44},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "hoverlabel": {
            "align": "left",
            "bgcolor": "#ffffff",
            "bordercolor": "#8793a1",
            "font": {"size": 13, "color": _INK},
        },
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
        "template": go.layout.Template(),  # plotly's own is 7 kB a figure
    }
    for name in ("xaxis", "yaxis"):
        own = more.pop(name, {})
        title = {**own.get("title", {}), "font": {"size": 13}}
        layout[name] = {**axis, **own, "title": title}
    return layout | more


def _figure(traces: Sequence[Any], layout: Mapping[str, Any]) -> Figure:
    figure: Figure = go.Figure(list(traces), dict(layout)).to_plotly_json()
    return figure
