"""``python -m heterolora table``: a folder of runs, compared."""

import json
from io import StringIO

import pandas as pd
import pytest

from heterolora.cli import main
from heterolora.results import ROWS, RowFile


@pytest.fixture
def folder(tmp_path):
    """Two methods of six seeds; the second's seventh run failed."""
    file = RowFile(tmp_path / ROWS)
    for group, gain in (("base", 0.0), ("better", 0.01)):
        for seed in range(6):
            metrics = {"accuracy": 0.8 + 0.001 * seed + gain, "loss": 0.5}
            file.append(
                {
                    "key": f"run-{group}-s{seed}",
                    "section": "mrpc, minilm",
                    "group": group,
                    "stage": "run",
                    "seed": seed,
                    "state": "finished",
                    "metrics": {"validation": metrics, "test": metrics},
                    "parameters": {"held": 1000 if group == "base" else 1005},
                    "ranks": {},
                    "steps": 10,
                    "digest": "",
                    "data": {"sha256": "a"},
                    "backbone": "b",
                    "method_hash": group,
                    "commit": "c1" if seed < 5 else "c2",
                    "versions": {"torch": "2"},
                }
            )
    file.append({"key": "run-better-s6", "stage": "run", "state": "failed", "group": "better", "seed": 6})
    return tmp_path


@pytest.mark.parametrize("form", ["terminal", "csv", "markdown", "latex"])
def test_every_format_shows_the_paired_difference_and_its_exact_p(folder, capsys, form):
    assert main(["table", str(folder), "--baseline", "base", "--primary", "better", "--format", form]) == 0
    out, err = capsys.readouterr()
    assert "0.0312" in out or "0.03125" in out  # 2 of 2^6 sign patterns
    assert "better" in out
    assert "0.5 %" in out or form in ("csv", "latex")  # held differs within the tolerance, and that is said
    assert "1 runs are not finished and not in the table" in err


def test_a_file_is_written_whole_and_reads_back(folder, capsys):
    path = folder / "out.csv"
    assert main(["table", str(folder), "--format", "csv", "--output", str(path), "--metric", "loss"]) == 0
    table = pd.read_csv(path)
    assert table["mean"].tolist() == [0.5, 0.5]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "nix"], "--baseline=nix: possible: ['base', 'better']"),
        (["--primary", "better"], "primary"),
        (["--metric", "f1"], "--metric=f1"),
        (["--split", "train"], "--split=train"),
        (["--tolerance", "0.001", "--baseline", "base"], "held="),
        (["--tolerance", "-1"], "--tolerance=-1.0: a share from 0 to 0.01"),
        (["--tolerance", "0.5"], "--tolerance=0.5: a share from 0 to 0.01"),
        (["--output", "/dev/null", "--format", "csv"], "needs the name of a file"),
        (["--output", "x.txt"], "needs --format"),
        (["--output", "missing/x.txt", "--format", "csv"], "folder that exists"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(folder, capsys, arguments, message):
    assert main(["table", str(folder), *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_unequal_budgets_are_mixed_only_on_request_and_marked(folder, capsys):
    assert main(["table", str(folder), "--tolerance", "0.001", "--baseline", "base", "--unequal"]) == 0
    assert "unequal" in capsys.readouterr().out


def test_other_data_under_the_same_name_are_refused(folder, capsys):
    file = RowFile(folder / ROWS)
    other = next(row for row in file.rows() if row["group"] == "better")
    file.append(other | {"key": "run-better-s9", "seed": 9, "data": {"sha256": "c"}})
    assert main(["table", str(folder)]) == 1
    assert "read other data or weights" in capsys.readouterr().err
    assert main(["table", str(folder), "--unequal"]) == 0
    assert "better (unequal)" in capsys.readouterr().out


def test_runs_of_several_versions_of_the_code_are_said_to_be_so(folder, capsys):
    assert main(["table", str(folder), "--format", "markdown"]) == 0
    assert "2 versions of the code: commit c1, torch 2; commit c2, torch 2" in capsys.readouterr().out


def test_a_tournament_is_shown_as_it_was_declared_and_in_no_other_way(folder, capsys):
    said = {"name": "t", "baseline": "base", "primary": "better", "tolerance": 0.01}
    (folder / "declaration.json").write_text(json.dumps(said))
    assert main(["table", str(folder), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "better (primary)" in out
    assert "mrpc, minilm; tournament t" in out
    assert main(["table", str(folder), "--baseline", "better", "--primary", "base"]) == 1
    assert capsys.readouterr().err == "--primary=base: the tournament declared better\n"
    assert main(["table", str(folder), "--baseline", "better", "--format", "csv"]) == 0  # a look, no claim
    assert "True" not in capsys.readouterr().out.splitlines()[1].split(",")[15:17]


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert main(["table", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"DIR={tmp_path}: holds no finished run\n"


def test_the_markdown_and_the_csv_say_the_same(folder, capsys):
    assert main(["table", str(folder), "--format", "csv"]) == 0
    means = pd.read_csv(StringIO(capsys.readouterr().out))["mean"]
    assert main(["table", str(folder), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert all(f"{mean:.4f}" in out for mean in means)
    assert json.dumps(means.round(4).tolist()) == "[0.8025, 0.8125]"
