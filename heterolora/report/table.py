"""A comparison as a table: for the terminal, for Markdown, for LaTeX, and as numbers for a CSV file."""

import math
import re
from collections.abc import Sequence

import pandas as pd
from rich.table import Table
from rich.text import Text

from heterolora.comparison import Difference, Row, Section
from heterolora.report.terminal import console
from heterolora.statistics import DRAWS, FEWEST_PAIRS, Estimate

_DTYPES = {
    "section": "string",
    "split": "string",
    "metric": "string",
    "baseline": "string",
    "group": "string",
    "n": "int64",
    "undefined": "int64",
    "mean": "float64",
    "sd": "float64",
    "low": "float64",
    "high": "float64",
    "held_min": "int64",
    "held_max": "int64",
    "steps_min": "int64",
    "steps_max": "int64",
    "unequal": "bool",
    "primary": "bool",
    "pairs": "Int64",
    "unpaired": "Int64",
    "difference": "float64",
    "difference_sd": "float64",
    "difference_low": "float64",
    "difference_high": "float64",
    "p": "float64",
    "p_exact": "boolean",
    "p_holm": "float64",
}


def as_frame(sections: Sequence[Section]) -> pd.DataFrame:
    """One row for each group of each section, numbers as they are; what does not apply is missing (empty in a CSV).

    Columns: section, split, metric, baseline, group, n, undefined, mean, sd, low and high (95 % interval of the mean),
    held_min, held_max, steps_min, steps_max, unequal, primary, pairs, unpaired, difference, difference_sd,
    difference_low, difference_high, p, p_exact, p_holm. They are always the same.
    """
    rows = [_numbers(section, row) for section in sections for row in section.rows]
    return pd.DataFrame(rows, columns=list(_DTYPES)).astype(_DTYPES)


def _numbers(section: Section, row: Row) -> dict[str, object]:
    numbers: dict[str, object] = {
        "section": section.name,
        "split": section.split,
        "metric": section.metric,
        "baseline": section.baseline,
        "group": row.group,
        "n": row.mean.n,
        "undefined": row.undefined,
        "mean": row.mean.value,
        "sd": row.mean.sd,
        "low": row.mean.low,
        "high": row.mean.high,
        "held_min": row.held[0],
        "held_max": row.held[1],
        "steps_min": row.steps[0],
        "steps_max": row.steps[1],
        "unequal": row.unequal,
        "primary": row.group == section.primary,
    }
    if (found := row.difference) is not None:
        numbers |= {
            "pairs": found.mean.n,
            "unpaired": found.unpaired,
            "difference": found.mean.value,
            "difference_sd": found.mean.sd,
            "difference_low": found.mean.low,
            "difference_high": found.mean.high,
            "p": None if found.test is None else found.test.p,
            "p_exact": None if found.test is None else found.test.exact,
            "p_holm": found.p_holm,
        }
    return numbers


def as_markdown(sections: Sequence[Section]) -> str:
    """A heading, a table and a list of notes for each section; characters that Markdown reads as marks are escaped."""
    parts = []
    for section in sections:
        rows = _cells(section)
        rules = ["---" if column == _GROUP else "---:" for column in rows[0]]
        lines = [
            [_markdown(text) for text in cells] for cells in (list(rows[0]), *(list(row.values()) for row in rows))
        ]
        table = [f"| {' | '.join(cells)} |" for cells in (lines[0], rules, *lines[1:])]
        notes = [f"- {_markdown(note)}" for note in _notes(section)]
        parts.append("\n".join([f"### {_markdown(_title(section))}", "", *table, "", *notes, ""]))
    return "\n".join(parts)


def _markdown(text: str) -> str:
    """Underscores between letters or digits are no marks and stay readable."""
    return re.sub(r"[\\|*`<~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def as_latex(sections: Sequence[Section]) -> str:
    """A table environment for each section, with rules of the package booktabs and the notes under the rows."""
    parts = []
    for section in sections:
        rows = _cells(section)
        texts = [[_latex_cell(column, text) for column, text in row.items()] for row in rows]
        frame = pd.DataFrame(texts, columns=[_latex(column) for column in rows[0]])
        tabular = frame.to_latex(index=False, escape=False, column_format="l" + "r" * (len(rows[0]) - 1))
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(_title(section))}}}", tabular.rstrip("\n")]
        lines += [rf"\par {{\footnotesize {_latex(note)}}}" for note in _notes(section)]
        parts.append("\n".join([*lines, r"\end{table}", ""]))
    return "\n".join(parts)


# The last ones are other characters in LaTeX's oldest font encoding, which is still its default.
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def _latex_cell(column: str, text: str) -> str:
    if column != _GROUP:
        return re.sub(r"(?<![\w.])-(?=\d)", "$-$", _latex(text))  # a minus, no hyphen
    # After the end of a line of a table, [ and * are options of that end.
    return ("{}" if text.startswith(("[", "*")) else "") + _latex(text)


def print_table(sections: Sequence[Section]) -> None:
    """To the terminal; differences are a table of their own, so that no column is squeezed.

    Names are given as ``Text``, in which brackets and colons are no markup.
    """
    terminal = console()
    for section in sections:
        terminal.print(_table(_title(section), [_named(section, row) | _values(row) for row in section.rows]))
        others = [_named(section, row) | _compared(row.difference) for row in section.rows if row.difference]
        if others:
            terminal.print(_table(f"difference from {section.baseline}", others))
        for note in _notes(section):
            terminal.print(Text(note), highlight=False)
        terminal.print()


def _table(title: str, rows: Sequence[dict[str, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == _GROUP else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text) for text in row.values()))
    return table


_GROUP = "group"
_NONE = "-"


def _title(section: Section) -> str:
    return f"{section.name}: {section.split} {section.metric}"


def _cells(section: Section) -> list[dict[str, str]]:
    """Column -> text, of each row."""
    return [
        _named(section, row) | _values(row) | ({} if section.baseline is None else _compared(row.difference))
        for row in section.rows
    ]


def _named(section: Section, row: Row) -> dict[str, str]:
    marks = {
        "baseline": row.group == section.baseline,
        "primary": row.group == section.primary,
        "unequal": row.unequal,
    }
    shown = ", ".join(name for name, applies in marks.items() if applies)
    return {_GROUP: f"{row.group} ({shown})" if shown else row.group}


def _values(row: Row) -> dict[str, str]:
    found = row.mean
    value = _NONE if math.isnan(found.value) else f"{found.value:.4f}"
    return {
        "n": f"{found.n}" + (f" ({row.undefined} undefined)" if row.undefined else ""),
        "mean ± sd": value if math.isnan(found.sd) else f"{value} ± {found.sd:.4f}",
        "95 % interval": _interval(found, ".4f"),
        "held": _span(row.held),
        "steps": _span(row.steps),
    }


def _compared(difference: Difference | None) -> dict[str, str]:
    columns = "pairs", "difference", "its 95 % interval", "p", "p (Holm)"
    if difference is None:
        return dict.fromkeys(columns, _NONE)
    found, test, corrected = difference.mean, difference.test, difference.p_holm
    sampled = "" if test is None or test.exact else " (sampled)"
    texts = (
        f"{found.n}" + (f" ({difference.unpaired} unpaired)" if difference.unpaired else ""),
        _NONE if math.isnan(found.value) else f"{found.value:+.4f}",
        _interval(found, "+.4f"),
        _NONE if test is None else f"{test.p:#.3g}{sampled}",
        _NONE if corrected is None else f"{corrected:#.3g}",
    )
    return dict(zip(columns, texts, strict=True))


def _interval(found: Estimate, form: str) -> str:
    return _NONE if math.isnan(found.low) else f"[{found.low:{form}}, {found.high:{form}}]"


def _span(span: tuple[int, int]) -> str:
    low, high = span
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _notes(section: Section) -> list[str]:
    """The section's own notes, then what the columns and marks mean, as far as they occur."""
    differences = [row.difference for row in section.rows if row.difference is not None]
    tests = [difference.test for difference in differences]
    family = sum(difference.p_holm is not None for difference in differences)
    explained = {
        "95 % interval: Student t over seeds; sd: standard deviation over seeds (n - 1)": True,
        f"difference: mean of group minus {section.baseline} over pairs of runs with one seed; "
        "p: two-sided sign-flip test of it": bool(differences),
        f"p (Holm): corrected by Holm's method for the comparisons that have one here, {family} in all": family > 0,
        "primary: the one comparison chosen beforehand; its p is not corrected": section.primary is not None,
        f"p is {_NONE} where there are fewer than {FEWEST_PAIRS} pairs, which cannot give p < 0.05": None in tests,
        f"sampled: p from {DRAWS:,} random sign patterns; elsewhere from all": any(t and not t.exact for t in tests),
        "unpaired: seeds for which only one of the two groups has a value": any(d.unpaired for d in differences),
        "undefined: runs whose metric is not defined; they are in no mean and no pair": any(
            row.undefined for row in section.rows
        ),
    }
    return [*section.notes, *(text for text, applies in explained.items() if applies)]
