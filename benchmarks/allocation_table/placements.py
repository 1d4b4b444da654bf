"""Placements of uniform rank at each budget: ``python -m benchmarks.allocation_table.placements``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.allocation_table.make import read_table
from heterolora.comparison import Section, compare
from heterolora.report.files import write_text
from heterolora.report.table import as_markdown, print_table
from heterolora.results import Result

STEPS = 100


def sections(table: pd.DataFrame, metric: str, baseline: str) -> list[Section]:
    """One section for each budget, one row for each placement, paired by seed with the baseline."""
    chosen = table[table["family"] == "uniform"].sort_values(["budget", "name", "seed"])
    names = dict.fromkeys([baseline, *chosen["name"]])  # the baseline first
    rows = [row for name in names for row in chosen[chosen["name"] == name].to_dict("records")]
    results = [
        Result(
            f"{row['budget']:,} parameters",
            str(row["name"]),
            int(row["seed"]),
            {"validation": {"accuracy": row["validation_accuracy"], "loss": row["validation_loss"]}},
            int(row["held"]),
            STEPS,
            str(row["key"]),
        )
        for row in sorted(rows, key=lambda row: int(row["budget"]))
    ]
    return compare(results, split="validation", metric=metric, baseline=baseline, primary=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison, or write it as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metric", choices=["accuracy", "loss"], default="loss")
    parser.add_argument("--baseline", default="all linears")
    parser.add_argument("--markdown", type=Path, help="file for it (default: the terminal)")
    given = parser.parse_args(arguments)
    found = sections(read_table(), given.metric, given.baseline)
    if given.markdown is None:
        print_table(found)
    else:
        write_text(given.markdown, as_markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
