"""The twins' table: the paper's half is what REFERENCE.md has, ours is what the runs left."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from benchmarks.paper_twins import METHODS, difference, main, mean_sd, papers, twins
from tests.conftest import SHARED
from tests.jobs import CONF

DATA = Path(os.environ.get("HETEROLORA_DATA") or SHARED / "data")

REFERENCE = {  # shared/docs/REFERENCE.md, section 3: best epoch, last epoch
    ("mrpc", "lora_r6"): ("84.48 ± 1.44", "82.68 ± 1.16"),
    ("mrpc", "shortcuts_r2"): ("83.74 ± 0.79", "81.62 ± 1.36"),
    ("mrpc", "combined_r8"): ("84.23 ± 1.02", "79.98 ± 0.62"),
    ("mrpc", "separate_r8"): ("83.66 ± 1.56", "80.96 ± 2.70"),
    ("mrpc", "lora_r24"): ("83.42 ± 1.11", "81.05 ± 1.87"),
    ("mrpc", "shortcuts_r8"): ("84.56 ± 0.49", "80.64 ± 1.23"),
    ("mrpc", "combined_r32"): ("85.05 ± 1.53", "83.99 ± 1.11"),
    ("mrpc", "separate_r32"): ("84.31 ± 0.88", "83.17 ± 0.71"),
    ("rte", "lora_r6"): ("72.18 ± 0.91", "68.94 ± 2.55"),
    ("rte", "shortcuts_r8"): ("73.50 ± 1.36", "70.02 ± 0.83"),
    ("rte", "combined_r32"): ("73.62 ± 1.10", "68.23 ± 2.91"),
    ("sst2", "lora_r24"): ("93.39 ± 0.40", "92.28 ± 0.66"),
    ("sst2", "combined_r8"): ("93.92 ± 0.46", "92.62 ± 0.59"),
    ("boolq", "combined_r32"): ("71.41 ± 0.90", "70.40 ± 0.78"),
}


@pytest.fixture(scope="module")
def logs():
    path = DATA / "reference" / "results.csv"
    if not path.exists():
        pytest.skip(f"no {path}")
    return pd.read_csv(path, low_memory=False)


@pytest.mark.parametrize(("task", "method"), REFERENCE)
def test_the_papers_numbers_are_those_of_its_logs(logs, task, method):
    found = papers(logs, task)
    mine = found[found["method"] == method]
    best, last = REFERENCE[task, method]
    assert mean_sd(list(mine["best"])).startswith(best)
    assert mean_sd(list(mine["last"])).startswith(last)


def test_every_method_has_its_preset():
    assert {f"{name}.yaml" for name in METHODS} <= {path.name for path in (CONF / "method").glob("*.yaml")}


def leave(folder, method, seed, test, task="mrpc"):
    run = folder / f"{method}_{seed}"
    run.mkdir(parents=True)
    summary = {
        "choices": {"method": method, "task": task},
        "seed": seed,
        "metrics": {"validation": {"accuracy": 0.5}, "test": {"accuracy": test}},
        "parameters": {"active": 10, "held": 40},
    }
    (run / "summary.json").write_text(json.dumps(summary))


def test_ours_are_what_the_runs_left(tmp_path, capsys, logs):
    for seed, (base, other) in enumerate([(0.70, 0.74), (0.72, 0.71), (0.71, 0.73)]):
        leave(tmp_path / "sweep", "lora_r6", seed, base)
        leave(tmp_path / "sweep", "combined_r8", seed, other)
    runs = twins(tmp_path / "sweep")
    interval = stats.ttest_rel([74, 71, 73], [70, 72, 71]).confidence_interval()
    assert difference(runs, "combined_r8", "lora_r6", "test") == f"+1.67 [{interval.low:+.2f}, {interval.high:+.2f}]"
    assert main([str(tmp_path / "sweep"), "--data-root", str(DATA)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| LoRA on q, v, r = 6 | 10 | 40 | 71.00 ± 1.00 (3) |  | 84.48")
    assert lines[3].split("|")[2].strip() == "-"  # not run


def test_the_table_is_made_again_from_its_rows(tmp_path, capsys, logs):
    for method in ("combined_r8", "lora_r6"):
        for seed in (13, 0):
            leave(tmp_path / "sweep", method, seed, 0.7 + 0.01 * seed)
    written = tmp_path / "written"
    assert main([str(tmp_path / "sweep"), "--data-root", str(DATA), "--write", str(written)]) == 0
    rows = pd.read_csv(written / "runs.csv")
    assert list(zip(rows["method"], rows["seed"], strict=True)) == [
        (method, seed) for method in ("lora_r6", "combined_r8") for seed in (0, 13)
    ]
    assert main([str(written / "runs.csv"), "--data-root", str(DATA)]) == 0
    assert capsys.readouterr().out == (written / "table.md").read_text()


def test_rows_of_something_else_are_refused(tmp_path, capsys, logs):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main([str(tmp_path / "other.csv"), "--data-root", str(DATA)]) == 1
    assert "has no rows of method, seed" in capsys.readouterr().err
    assert main([str(tmp_path / "none.csv"), "--data-root", str(DATA)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    leave(tmp_path / "sweep", "lora_r6", 0, 0.7, "mrpc")
    leave(tmp_path / "sweep", "lora_r6", 1, 0.7, "rte")
    assert main([str(tmp_path / "sweep"), "--data-root", str(DATA)]) == 1
    assert "one task of" in capsys.readouterr().err
    leave(tmp_path / "others", None, 0, 0.7)
    assert main([str(tmp_path / "others"), "--data-root", str(DATA)]) == 1
    assert "holds runs of method=None" in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path, capsys, logs):
    assert main([str(tmp_path), "--data-root", str(DATA)]) == 1
    assert "holds no finished run" in capsys.readouterr().err
    assert main([str(tmp_path), "--data-root", str(tmp_path)]) == 1
    assert "the paper's runs" in capsys.readouterr().err
