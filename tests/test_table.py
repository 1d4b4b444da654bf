"""What a comparison looks like: every number where it belongs, names as they are, notes only where they apply."""

import csv
import html
import io
import re

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from heterolora.comparison import compare
from heterolora.report.table import as_frame, as_latex, as_markdown, print_table
from tests.test_comparison import draw, ladder, run, sweep

NAMES = [
    "proxy=grad_norm",
    "a|b",
    "50%",
    "[bold]",
    "[/red]",
    "*star*",
    "R&D #1 $x$",
    "__init__",
    "a__b",
    "{x}~^2",
    "<b>",
    "`code`",
    "back\\slash",
    "back\\|",
    "a\\",
    ":fire:",
    "größer",
]


def made(results, baseline="base", primary=None, **options):
    settings = {"split": None, "metric": None} | options
    return compare(results, baseline=baseline, primary=primary, **settings)


def seven(*groups, n=7):
    everything = set(range(7))
    found = {"base": [0.5] * 7, "all": ladder(everything), "but one": ladder(everything - {0})}
    return [r for group in groups for r in sweep(group, found[group][:n])]


def printed(sections, capsys, monkeypatch, width=None):
    if width is not None:
        monkeypatch.setattr("heterolora.report.terminal.Console", narrow(width))
    print_table(sections)
    return capsys.readouterr().out


def narrow(width):
    return lambda **options: Console(width=width)


def markdown_rows(text):
    """Cells of all tables as a reader sees them."""
    page = MarkdownIt("commonmark").enable("table").render(text)
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def latex_rows(text):
    inside = text.split(r"\toprule")[1].split(r"\bottomrule")[0].replace("\\midrule", "")
    rows = [line.strip() for line in inside.strip().split("\\\\\n") if line.strip()]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix("\\\\"))] for row in rows]


def terminal_rows(text):
    lines = [line.strip("│┃ ") for line in text.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in re.split("[│┃]", line)] for line in lines]


# -- numbers ----------------------------------------------------------------------------------------------------------

COLUMNS = ["section", "split", "metric", "baseline", "group", "n", "undefined", "mean", "sd", "low", "high"]
COLUMNS += ["held_min", "held_max", "steps_min", "steps_max", "unequal", "primary", "pairs", "unpaired", "difference"]
COLUMNS += ["difference_sd", "difference_low", "difference_high", "p", "p_exact", "p_holm"]


def test_the_frame_has_every_number_at_full_precision():
    a, b = draw(7, 0), draw(7, 1)
    sections = made([*sweep("base", b), *sweep("x", a, held=1003), run("x", 9, None)], primary="x")
    frame = as_frame(sections)
    assert list(frame.columns) == COLUMNS
    _, x = sections[0].rows
    found = frame.iloc[1]
    assert found["section"] == "mrpc, minilm"
    assert (found["split"], found["metric"], found["baseline"], found["group"]) == (
        "validation",
        "accuracy",
        "base",
        "x",
    )
    assert (found["n"], found["undefined"], found["unequal"], found["primary"]) == (7, 1, False, True)
    assert (found["mean"], found["sd"], found["low"], found["high"]) == (
        x.mean.value,
        x.mean.sd,
        x.mean.low,
        x.mean.high,
    )
    assert (found["held_min"], found["held_max"], found["steps_min"], found["steps_max"]) == (1000, 1003, 100, 100)
    assert (found["pairs"], found["unpaired"]) == (7, 0)
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    mean = x.difference.mean
    assert tuple(found[["difference_sd", "difference_low", "difference_high"]]) == (mean.sd, mean.low, mean.high)
    assert (found["p"], found["p_exact"]) == (x.difference.test.p, True)
    assert pd.isna(found["p_holm"])
    assert frame.iloc[0][COLUMNS[COLUMNS.index("pairs") :]].isna().all()
    assert not frame["primary"][0]


def test_a_csv_file_gives_the_same_numbers_back():
    sections = made(seven("base", "all", "but one") + sweep("50%, |x", [0.1, 0.2]))
    frame = as_frame(sections)
    again = list(csv.DictReader(io.StringIO(frame.to_csv(index=False))))
    assert [row["group"] for row in again] == ["base", "all", "but one", "50%, |x"]
    for column in COLUMNS:
        for value, text in zip(frame[column], (row[column] for row in again), strict=True):
            assert text == ("" if pd.isna(value) else str(value))  # Python's shortest text that is the same number


def test_columns_are_the_same_without_differences_and_without_sections():
    full, bare, empty = (as_frame(found) for found in (made(seven("base", "all")), made(seven("base"), None), []))
    assert list(full.columns) == list(bare.columns) == list(empty.columns) == COLUMNS
    assert (full.dtypes == bare.dtypes).all()
    assert (full.dtypes == empty.dtypes).all()
    assert bare[["baseline", "pairs", "difference", "p", "p_exact", "p_holm"]].isna().all(axis=None)


def test_sections_follow_each_other_in_the_frame():
    results = seven("base", "all") + sweep("base", [0.5, 0.6], section="rte")
    assert as_frame(made(results))[["section", "group"]].to_numpy().tolist() == [
        ["mrpc, minilm", "base"],
        ["mrpc, minilm", "all"],
        ["rte", "base"],
    ]


# -- cells, the same in all three -------------------------------------------------------------------------------------

HEAD = ["group", "n", "mean ± sd", "95 % interval", "held", "steps"]
MORE = ["pairs", "difference", "its 95 % interval", "p", "p (Holm)"]
# By hand: t(0.975, 1) = 12.7062 times sd / sqrt(2), which for two numbers is half of their distance.
TWO = sweep("base", [0.5, 0.6], held=12345) + sweep("x", [0.52, 0.6], held=12345)
CELLS = [
    ["base (baseline)", "2", "0.5500 ± 0.0707", "[-0.0853, 1.1853]", "12,345", "100", *"-----"],
    ["x", "2", "0.5600 ± 0.0566", "[0.0518, 1.0682]", "12,345", "100", "2", "+0.0100", "[-0.1171, +0.1371]", "-", "-"],
]


def test_cells_in_markdown():
    assert markdown_rows(as_markdown(made(TWO))) == [HEAD + MORE, *CELLS]


def test_cells_in_latex():
    found = latex_rows(as_latex(made(TWO)))
    assert found[0] == [cell.replace("±", r"$\pm$").replace("%", r"\%") for cell in HEAD + MORE]
    plain = [[cell.replace(r"$\pm$", "±").replace("$-$", "-") for cell in row] for row in found[1:]]
    assert plain == CELLS
    assert found[2][8] == "[$-$0.1171, +0.1371]"  # a minus, not a hyphen


def test_cells_in_the_terminal(capsys, monkeypatch):
    found = terminal_rows(printed(made(TWO), capsys, monkeypatch))
    assert found == [HEAD, *(row[:6] for row in CELLS), ["group", *MORE], ["x", *CELLS[1][6:]]]


def test_p_values_have_three_digits_and_the_primary_one_is_marked():
    table = markdown_rows(as_markdown(made(seven("base", "all", "but one"), primary="all")))
    assert [row[0] for row in table[1:]] == ["base (baseline)", "all (primary)", "but one"]
    assert [row[-2:] for row in table[1:]] == [["-", "-"], ["0.0156", "-"], ["0.0312", "0.0312"]]


def test_a_p_of_1_and_a_small_one_have_three_digits_too():
    results = sweep("base", [0.5] * 20) + sweep("same", [0.5] * 20) + sweep("more", [0.6] * 20)
    table = markdown_rows(as_markdown(made(results)))
    assert [row[-2:] for row in table[2:]] == [["1.00", "1.00"], ["1.91e-06", "3.81e-06"]]
    assert table[2][7] == "+0.0000"


def test_one_seed_has_a_value_and_no_interval():
    table = markdown_rows(as_markdown(made([run("base", 0, 0.5), run("x", 0, 0.25)])))
    assert table[2] == ["x", "1", "0.2500", "-", "1,000", "100", "1", "-0.2500", "-", "-", "-"]


def test_a_group_without_a_value_has_none():
    table = markdown_rows(as_markdown(made([run("base", 0, 0.5), run("x", 0, None)])))
    assert table[2] == ["x", "0 (1 undefined)", "-", "-", "1,000", "100", "0 (1 unpaired)", "-", "-", "-", "-"]


def test_budgets_that_vary_are_shown_from_least_to_most():
    results = [run("x", 0, held=1000, steps=5), run("x", 1, held=2500, steps=9), run("base", 0, held=1000, steps=5)]
    table = markdown_rows(as_markdown(made(results, allow_unequal=True)))
    assert [table[1][0], *table[1][4:6]] == ["x (unequal)", "1,000 to 2,500", "5 to 9"]


RENDERERS = {
    "markdown": lambda sections, capsys, monkeypatch: as_markdown(sections),
    "latex": lambda sections, capsys, monkeypatch: as_latex(sections).replace(r"\textless{}", "<").replace(r"\%", "%"),
    "terminal": lambda sections, capsys, monkeypatch: printed(sections, capsys, monkeypatch, width=250),
}


@pytest.fixture(params=list(RENDERERS))
def render(request, capsys, monkeypatch):
    """Text of the sections, with a few escapes of notes undone."""
    return lambda sections: RENDERERS[request.param](sections, capsys, monkeypatch).replace("\\<", "<")


def test_the_title_names_section_split_and_metric(render):
    both = {"validation": {"f1": 0.1}, "test": {"f1": 0.2}}
    text = render(made([run("base", 0, **both), run("base", 0, section="rte", **both)]))
    assert text.index("mrpc, minilm: test f1") < text.index("rte: test f1")
    assert "rte: validation f1" in render(made([run("base", 0, section="rte", **both)], split="validation"))


def test_differences_have_columns_only_with_a_baseline(render):
    assert "p (Holm)" in render(made(seven("base", "all")))
    text = render(made(seven("base", "all"), baseline=None))
    assert not [word for word in ("pairs", "difference", "p (Holm)", "sign-flip") if word in text]


# -- notes ------------------------------------------------------------------------------------------------------------

FEW = "fewer than 6 pairs, which cannot give p < 0.05"
HOLM = "corrected by Holm's method for the comparisons that have one here, {} in all"
PRIMARY = "primary: the one comparison chosen beforehand; its p is not corrected"
SAMPLED = "sampled: p from 100,000 random sign patterns"
UNPAIRED = "unpaired: seeds for which"
UNDEFINED = "undefined: runs whose metric"


def test_what_an_interval_is_always_stands_below(render):
    for baseline in ("base", None):
        assert "95 % interval: Student t over seeds" in render(made(seven("base", "all"), baseline))


def test_notes_appear_only_where_they_apply(render):
    plain = render(made(seven("base", "all", "but one")))
    assert HOLM.format(2) in plain
    assert "difference: mean of group minus base over pairs" in plain
    assert not [note for note in (FEW, PRIMARY, SAMPLED, UNPAIRED, UNDEFINED, "unequal") if note in plain]


@pytest.mark.parametrize(
    ("results", "options", "notes"),
    [
        (seven("base", "all", n=5), {}, [FEW]),
        (seven("base", "all", "but one"), {"primary": "all"}, [PRIMARY, HOLM.format(1)]),
        (sweep("base", draw(21, 0)) + sweep("x", draw(21, 1)), {}, [SAMPLED, " (sampled)"]),
        (seven("base") + seven("all", n=6), {}, [UNPAIRED, "6 (1 unpaired)"]),
        ([*seven("base", "all"), run("all", 9, None)], {}, [UNDEFINED, "7 (1 undefined)"]),
        ([run("base", 0), run("x", 0, held=1)], {"allow_unequal": True}, ["x (unequal)", "unequal: held parameters"]),
        ([run("base", 0), run("x", 0, held=1001)], {}, ["held parameters are equal within 1 %"]),
        ([run("base", 0), run("base", 0, place="twice")], {}, ["counted once", "twice"]),
    ],
    ids=["few", "primary", "sampled", "unpaired", "undefined", "unequal", "within", "repeated"],
)
def test_what_is_marked_is_explained(render, results, options, notes):
    text = render(made(results, **options))
    assert [note for note in notes if note not in text] == []


def test_without_any_p_there_is_no_word_about_its_correction(render):
    assert "Holm's method" not in render(made(seven("base", "all", n=5)))


# -- names ------------------------------------------------------------------------------------------------------------


def with_names(**options):
    results = [run(name, seed, 0.5 + seed / 10) for name in NAMES for seed in range(2)]
    return made(results, baseline=None, **options)


def test_names_in_markdown_are_read_as_they_are():
    assert [row[0] for row in markdown_rows(as_markdown(with_names()))[1:]] == NAMES
    assert "proxy=grad_norm |" in as_markdown(with_names())  # still readable without a renderer


def test_names_in_titles_and_notes_of_markdown_are_read_as_they_are():
    (name,) = (section.name for section in made([run("base", 0, section="a|_b_ <i>")]))
    page = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(
            as_markdown(
                made([run("base", 0, section=name), run("*x* <i>", 0, section=name, held=1)], allow_unequal=True)
            )
        )
    )
    assert "<h3>a|_b_ &lt;i&gt;: validation accuracy</h3>" in page
    assert "in *x* &lt;i&gt;</li>" in page


def test_names_in_latex_are_escaped():
    names = [row[0] for row in latex_rows(as_latex(with_names()))[1:]]
    assert dict(zip(NAMES, names, strict=True)) == {
        "proxy=grad_norm": r"proxy=grad\_norm",
        "a|b": r"a\textbar{}b",
        "50%": r"50\%",
        "[bold]": "{}[bold]",  # else an option of the line's end before it
        "[/red]": "{}[/red]",
        "*star*": "{}*star*",
        "R&D #1 $x$": r"R\&D \#1 \$x\$",
        "__init__": r"\_\_init\_\_",
        "a__b": r"a\_\_b",
        "{x}~^2": r"\{x\}\textasciitilde{}\textasciicircum{}2",
        "<b>": r"\textless{}b\textgreater{}",
        "`code`": "`code`",
        "back\\slash": r"back\textbackslash{}slash",
        "back\\|": r"back\textbackslash{}\textbar{}",
        "a\\": r"a\textbackslash{}",
        ":fire:": ":fire:",
        "größer": "größer",
    }


def test_titles_and_notes_in_latex_are_escaped():
    results = [run("base", 0, section="50%_x"), run("a_b&c", 0, section="50%_x", held=1)]
    text = as_latex(made(results, allow_unequal=True))
    assert r"\caption{50\%\_x: validation accuracy}" in text
    assert r"in a\_b\&c}" in text
    assert not re.search(r"(?<!\\)[%_#]", text)


def test_each_section_is_a_latex_table_with_booktabs():
    text = as_latex(made(seven("base", "all") + sweep("base", [0.5], section="rte")))
    for part in (r"\begin{table}", r"\caption{", r"\begin{tabular}", r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(part) == 2
    assert text.count(r"\end{tabular}") == text.count(r"\end{table}") == 2
    assert all(len(row) == 11 for row in latex_rows(text.split(r"\end{table}")[0]))
    assert text.count("{lrrrrrrrrrr}") == 2


def test_names_in_the_terminal_are_no_markup(capsys, monkeypatch):
    text = printed(with_names(), capsys, monkeypatch)
    inside = [line for line in text.splitlines() if line.startswith("│")]
    assert len(inside) == len(NAMES)
    assert all(line.startswith(f"│ {name} ") for name, line in zip(NAMES, inside, strict=True))


def test_titles_and_notes_in_the_terminal_are_no_markup(capsys, monkeypatch):
    results = [run("[/base]", 0, section="[bold]x"), run("[red]y[/]", 0, section="[bold]x", held=1)]
    text = printed(made(results, "[/base]", allow_unequal=True), capsys, monkeypatch)
    assert "[bold]x: validation accuracy" in text
    assert "difference from [/base]" in text
    assert "from those of [/base] (1,000) in [red]y[/]" in text


@pytest.mark.parametrize("width", [60, 80])
def test_no_number_is_cut_in_a_narrow_terminal(capsys, monkeypatch, width):
    text = printed(made(seven("base", "all") + sweep("n" * 70, draw(7, 5))), capsys, monkeypatch, width=width)
    assert "…" not in text
    assert text.count("n" * 8) >= 2
    for digits in ("0.5000", "0.5400", "+0.0400", "0.0156", "1,000"):
        assert digits in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_nothing_to_show_is_nothing(capsys):
    print_table([])
    assert (as_markdown([]), as_latex([]), capsys.readouterr().out) == ("", "", "")
