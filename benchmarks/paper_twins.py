"""The twins of the paper's tables beside its own runs: ``python -m benchmarks.paper_twins SWEEP --write FOLDER``.

SWEEP is the folder of ``train.py experiment=paper_TASK_minilm``, or the ``runs.csv`` that this made of one; the paper's
runs are ``reference/results.csv`` below the data root (what its authors' logs hold).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats  # type: ignore[import-untyped]

from heterolora.errors import SettingError
from heterolora.report.files import read_json, write_text

PAPERS_RATES = {"mrpc": (2e-4, 2e-4), "rte": (4e-4, 2e-4), "sst2": (1e-4, 1e-4), "boolq": (2e-4, 2e-4)}
"""Task -> learning rate of LoRA alone, and of all else, in the paper's runs."""

_ROW = ["method", "seed", "validation", "test", "active", "held", "task"]
_EPOCHS = {"mrpc": 20, "rte": 20, "sst2": 10, "boolq": 20}
_SEEDS = (0, 13, 42)


@dataclass(frozen=True)
class Method:
    """One of the paper's methods.

    Attributes:
        shown: what the paper calls it.
        kind: the paper's runs: ``lora_uniform``, ``ags_uniform`` or ``ags_dyn``.
        mode: of dynamic ones.
        rank: of LoRA, and of shortcuts where there are any.
        baseline: the method with as many parameters on.
    """

    shown: str
    kind: str
    mode: str | None
    rank: int
    baseline: str


METHODS = {
    f"{name}_r{ranks[large]}": Method(shown, kind, mode, ranks[large], f"lora_r{(6, 24)[large]}")
    for large in (0, 1)
    for name, shown, kind, mode, ranks in (
        ("lora", "LoRA on q, v", "lora_uniform", None, (6, 24)),
        ("shortcuts", "LoRA and shortcuts, uniform", "ags_uniform", None, (2, 8)),
        ("combined", "dynamic HeteroLoRA, combined", "ags_dyn", "combined", (8, 32)),
        ("separate", "dynamic HeteroLoRA, separate", "ags_dyn", "separated", (8, 32)),
    )
}
"""By the name of ``conf/method``."""


def papers(runs: pd.DataFrame, task: str) -> pd.DataFrame:
    """The paper's runs of these methods on OPT-350M: ``method, seed, best, last`` (validation accuracy in %).

    Repetitions of a run, unfinished runs, and those from before its initialisation was mended do not count.
    """
    whole = runs[runs["complete"] & runs["dup_of"].isna() & (runs["init_era"] == "post-fix")]
    whole = whole[(whole["dataset"] == task) & whole["seed"].isin(_SEEDS) & (whole["epochs"] == _EPOCHS[task])]
    found = []
    for name, method in METHODS.items():
        mine = whole[(whole["method"] == method.kind) & (whole["r_lora"] == method.rank)]
        mine = mine[mine["learning_rate"] == PAPERS_RATES[task][method.kind != "lora_uniform"]]
        if method.kind == "lora_uniform":
            mine = mine[mine["model"] == "opt_lora"]
        else:
            alpha = mine["shortcut_alpha"].isna() | (mine["shortcut_alpha"] == 4)  # others were tried for one seed
            mine = mine[(mine["r_short"] == method.rank) & (mine["model"] == "opt_lora_ags") & alpha]
        if method.mode is not None:
            how = (mine["mode"] == method.mode) & (mine["saliency"] == "grad_norm")
            mine = mine[how & (mine["realloc_N"] == 0.2) & (mine["turn_on_percentile"] == 0.25)]
        values = mine.groupby("seed")[["best_val_acc", "last_val_acc"]].mean() * 100
        found += [(name, int(seed), *row) for seed, *row in values.itertuples()]
    return pd.DataFrame(found, columns=["method", "seed", "best", "last"])


def twins(sweep: Path) -> pd.DataFrame:
    """The finished runs of a sweep: ``method, seed, validation, test`` (accuracy in %), ``active``, ``held``, ``task``.

    Args:
        sweep: its folder, or a file of such rows.

    Raises:
        SettingError: if there is none.
    """
    if sweep.suffix == ".csv":
        return _read_rows(sweep)
    rows = []
    for path in sorted(sweep.glob("*/summary.json")):
        summary = read_json(path, "SWEEP")
        accuracy = {split: values["accuracy"] * 100 for split, values in summary["metrics"].items()}
        sizes, name = summary["parameters"], str(summary["choices"]["method"]).removesuffix("_rte")
        row = (name, summary["seed"], accuracy["validation"], accuracy.get("test"), sizes["active"], sizes["held"])
        rows.append((*row, summary["choices"]["task"]))
    if not rows:
        raise SettingError("SWEEP", sweep, "holds no finished run of experiment=paper_TASK_minilm")
    found = pd.DataFrame(rows, columns=_ROW)
    if others := sorted(set(found["method"]) - set(METHODS)):
        raise SettingError("SWEEP", sweep, f"holds runs of method={others[0]}; those of the paper: {list(METHODS)}")
    return found.sort_values(["method", "seed"], key=lambda column: column.map(_place), ignore_index=True)


def _place(value: Any) -> int:
    """Methods in the order of the table, seeds by number."""
    return list(METHODS).index(value) if isinstance(value, str) else int(value)


def _read_rows(path: Path) -> pd.DataFrame:
    try:
        found = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise SettingError("SWEEP", path, f"cannot be read ({error})") from error
    if list(found.columns) != _ROW or found.empty:
        raise SettingError("SWEEP", path, f"has no rows of {', '.join(_ROW)}")
    return found


def mean_sd(values: Sequence[float]) -> str:
    """Mean, sample standard deviation and how many; a dash where there is nothing."""
    given = pd.Series(values, dtype=float).dropna()
    if given.empty:
        return "-"
    spread = "" if len(given) == 1 else f" ± {given.std():.2f}"
    return f"{given.mean():.2f}{spread} ({len(given)})"


def difference(runs: pd.DataFrame, method: str, baseline: str, column: str) -> str:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t."""
    both = runs[runs["method"] == method].merge(runs[runs["method"] == baseline], on="seed")
    gaps = (both[f"{column}_x"] - both[f"{column}_y"]).dropna()
    if method == baseline or gaps.empty:
        return ""
    if len(gaps) == 1:
        return f"{gaps.mean():+.2f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5
    return f"{gaps.mean():+.2f} [{gaps.mean() - half:+.2f}, {gaps.mean() + half:+.2f}]"


def table(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Both, in Markdown."""
    split = "test" if ours["test"].notna().any() else "validation"
    lines = [
        f"| method | on | held | MiniLM, {split}, last epoch | minus LoRA at equal parameters on "
        "| OPT-350M, validation, best epoch | last epoch | best minus LoRA's best |",
        "|---|---:|---:|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        mine, paper = ours[ours["method"] == name], theirs[theirs["method"] == name]
        sizes = [f"{int(mine[key].iloc[0]):,}" if len(mine) else "-" for key in ("active", "held")]
        cells = [
            f"{method.shown}, r = {method.rank}",
            *sizes,
            mean_sd(list(mine[split])),
            difference(ours, name, method.baseline, split),
            mean_sd(list(paper["best"])),
            mean_sd(list(paper["last"])),
            difference(theirs, name, method.baseline, "best"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the table; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", metavar="SWEEP", type=Path)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("HETEROLORA_DATA", "../shared/data"))
    parser.add_argument("--write", metavar="FOLDER", type=Path, help="for table.md and runs.csv (default: stdout)")
    given = parser.parse_args(arguments)
    reference = Path(given.data_root) / "reference" / "results.csv"
    try:
        if not reference.exists():
            raise SettingError("--data-root", given.data_root, "holds no reference/results.csv, the paper's runs")
        ours = twins(given.sweep)
        tasks = list(ours["task"].unique())
        if len(tasks) > 1 or tasks[0] not in PAPERS_RATES:
            raise SettingError("SWEEP", given.sweep, f"has runs on {tasks}; one task of {list(PAPERS_RATES)} at a time")
        (task,) = tasks
        text = table(ours, papers(pd.read_csv(reference, low_memory=False), task))
    except SettingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if given.write is None:
        sys.stdout.write(text)
    else:
        given.write.mkdir(parents=True, exist_ok=True)
        write_text(given.write / "table.md", text)
        write_text(given.write / "runs.csv", ours.to_csv(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
