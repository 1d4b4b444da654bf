"""The page as one file that needs nothing from outside."""

import base64
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from heterolora import __version__
from heterolora.page.collect import Collected, collect
from heterolora.page.content import group_table, overview, run_content, run_table
from heterolora.report.files import write_text


def write_page(folders: list[Path], path: Path) -> Collected:
    """Write the page about all runs below these folders.

    Returns:
        What is on it.

    Raises:
        SettingError: if a folder does not exist, or none of them holds a run.
    """
    collected = collect(folders)
    write_text(path, render(collected))
    return collected


def render(collected: Collected) -> str:
    """The whole page as HTML.

    What belongs to one run is packed, and unpacked by the page when the run is looked at: that keeps pages of many
    runs small, and opening them quick.
    """
    runs = collected.runs
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_part("report.html"))
    alone = len(runs) == 1
    return template.render(
        title=runs[0].record.title if alone else ", ".join(folder.resolve().name for folder in collected.folders),
        version=__version__,
        folders=[str(folder) for folder in collected.folders],
        notes=[note for section in collected.sections for note in section.notes] + list(collected.notes),
        groups=None if alone else group_table(collected),
        table_of_runs=None if alone else run_table(runs),
        names=[run.name for run in runs],
        content=json_in_html(
            {
                "overview": _packed(overview(collected)),
                "runs": [_packed(run_content(run)) for run in runs],
                "first": next((number for number, run in enumerate(runs) if run.record.sites), 0),
            }
        ),
        style=Markup(_part("report.css")),  # ours, like the scripts: nothing of a user's in them
        script=Markup(_part("report.js")),
        plotly=Markup(get_plotlyjs().replace("</script", r"<\/script")),
    )


def json_in_html(value: Any) -> Markup:
    """JSON that may stand in a ``<script>``: no text in it can end the element or begin a comment.

    Raises:
        ValueError: for NaN and infinities, which are no JSON.
    """
    text = json.dumps(value, allow_nan=False)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def _packed(value: Any) -> str:
    """JSON, deflated, in base64."""
    return base64.b64encode(zlib.compress(json.dumps(value, allow_nan=False).encode(), 9)).decode()


def _part(name: str) -> str:
    return files("heterolora.page").joinpath(name).read_text(encoding="utf-8")
