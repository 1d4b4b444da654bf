"""Train the table: ``python -m benchmarks.allocation_table.make``; it may be stopped and goes on where it was."""

import argparse
import csv
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.allocation_table import allocations
from benchmarks.allocation_table.allocations import Entry
from heterolora.build import find_target
from heterolora.farm import Cell, run_cells
from heterolora.report.files import write_whole
from heterolora.run import composer
from heterolora.sites import Site
from heterolora.space import survey
from heterolora.tournament import command, merged

HERE = Path(__file__).parent
SHARDS = HERE / "rows"

SETTINGS = (
    "model=minilm",
    "task=rotten_tomatoes",
    "search_space=full",
    "data.batch_size=8",
    "trainer.max_epochs=1",
    "trainer.max_steps=100",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
    "trainer.test=false",
    "optimizer.lr=4e-3",
    "optimizer.head_lr=3e-2",
    "adapter.scaling=constant",
    "adapter.scale=2.0",
    "logger=none",
)
"""The same for every row; what differs is the allocation and the seed."""

RATES = {331_776: "1e-3"}
"""Learning rates of budgets at which every placement collapses under that of ``SETTINGS``."""

COLUMNS = (
    "key",
    "family",
    "name",
    "budget",
    "held",
    "seed",
    "learning_rate",
    "validation_loss",
    "validation_accuracy",
    "ranks",
    "seconds",
    "digest",
    "config_hash",
    "commit",
    "versions",
)


def entries(sites: Sequence[Site]) -> list[Entry]:
    """All rows of the table, those first that are needed first."""
    proxies = {path.stem: _reads_weights(path) for path in sorted((HERE.parents[1] / "conf" / "proxy").glob("*.yaml"))}
    wide, narrow = 82_944, 9_216
    random, by_proxies = partial(allocations.random, sites), allocations.by_proxies
    return list(
        chain(
            allocations.alone(sites, 0),
            allocations.uniform(sites, 0),
            random(wide, range(20), 0),
            by_proxies(proxies, "greedy", wide, 0),
            *(allocations.uniform(sites, seed) for seed in (1, 2)),
            allocations.alone(sites, 1),
            random(narrow, range(20), 0),
            random(wide, range(20), 1),
            by_proxies(proxies, "greedy", narrow, 0),
            random(narrow, range(20), 1),
            by_proxies(proxies, "greedy", wide, 1),
            *(allocations.uniform(sites, seed) for seed in (3, 4, 5)),
            by_proxies(proxies, "proportional", wide, 0),
            by_proxies(proxies, "greedy", narrow, 1),
            by_proxies(proxies, "greedy", wide, 2),
        )
    )


def _reads_weights(config: Path) -> bool:
    target = yaml.safe_load(config.read_text())["_target_"]
    return bool(getattr(find_target(target, "proxy._target_"), "needs_weights", False))


def cells(chosen: Sequence[Entry]) -> Iterator[Cell]:
    """The runs of entries."""
    with composer() as compose:
        for entry in chosen:
            given = ["budget=params", f"budget.value={entry.budget}", f"seed={entry.seed}", *entry.overrides]
            if entry.budget in RATES:
                given.append(f"optimizer.lr={RATES[entry.budget]}")
            overrides = merged(SETTINGS, given)  # a method's own search space replaces that of all
            config, choices = compose(overrides)
            yield Cell(entry.key, f"{entry.family} {entry.name}", "run", config, choices, command(overrides), None)


def sites_of_the_table() -> Sequence[Site]:
    """Every site of the backbone."""
    from heterolora.run import compose

    parts = compose(list(SETTINGS))
    skeleton = parts["model"].skeleton(2)
    sites: Sequence[Site] = parts["search_space"].resolve(survey(skeleton.model, skeleton.layout)).sites
    return sites


def learning_rate(budget: int) -> float:
    """Of the rows of a budget."""
    (usual,) = (text.partition("=")[2] for text in SETTINGS if text.startswith("optimizer.lr="))
    return float(RATES.get(budget, usual))


def as_shard_row(entry: Entry, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is committed of a run."""
    found = row["metrics"]["validation"]
    return {
        "key": entry.key,
        "family": entry.family,
        "name": entry.name,
        "budget": entry.budget,
        "held": row["parameters"]["held"],
        "seed": entry.seed,
        "learning_rate": learning_rate(entry.budget),
        "validation_loss": found["loss"],
        "validation_accuracy": found["accuracy"],
        "ranks": " ".join(f"{name}:{rank}" for name, rank in row["ranks"].items()),
        "seconds": row["seconds"]["all"],
        "digest": row["digest"][:16],
        "config_hash": row["config_hash"],
        "commit": row["commit"],
        "versions": " ".join(f"{name}={version}" for name, version in row["versions"].items()),
    }


def read_table(folder: Path = SHARDS) -> pd.DataFrame:
    """All committed rows, in the order of their keys."""
    shards = [pd.read_csv(path, dtype={"name": str}) for path in sorted(folder.glob("*.csv"))]
    if not shards:
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.concat(shards, ignore_index=True).sort_values("key", ignore_index=True)


def write_shards(rows: Sequence[Mapping[str, Any]], folder: Path = SHARDS) -> None:
    """One CSV for each family, budget and seed, sorted; rows that are committed already stay as they are."""
    folder.mkdir(exist_ok=True)
    before = read_table(folder).to_dict("records")
    table = {str(row["key"]): row for row in rows} | {str(row["key"]): row for row in before}
    shards: dict[str, list[Mapping[Any, Any]]] = {}
    for key in sorted(table):
        row = table[key]
        shards.setdefault(f"{row['family']}_{row['budget']}_s{row['seed']}.csv", []).append(row)
    for name, content in shards.items():
        frame = pd.DataFrame(content, columns=list(COLUMNS))
        write_whole(folder / name, partial(frame.to_csv, index=False, quoting=csv.QUOTE_MINIMAL))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing; rows arrive in ``rows/`` as they end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="at most so many new rows")
    parser.add_argument("--workers", type=int, help="processes (default: as many as there are cores)")
    parser.add_argument("--only", help="only keys with this in them")
    parser.add_argument("--folder", type=Path, default=Path("outputs/allocation_table"), help="for rows in the making")
    parser.add_argument("--list", action="store_true", help="print what is missing, and stop")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    done = set(read_table()["key"])
    wanted = [e for e in entries(sites_of_the_table()) if e.key not in done and (given.only or "") in e.key]
    wanted = wanted[: given.limit]
    if given.list:
        sys.stdout.write(json.dumps([entry.key for entry in wanted], indent=1) + "\n")
        return 0
    if not wanted:
        return 0
    entry_of = {entry.key: entry for entry in wanted}
    found: list[dict[str, Any]] = []

    def on_row(row: Mapping[str, Any]) -> None:
        if row["state"] == "finished":
            found.append(as_shard_row(entry_of[row["key"]], row))
            write_shards(found)

    rows = run_cells(list(cells(wanted)), given.folder, workers=given.workers, keep=False, on_row=on_row)
    write_shards([as_shard_row(entry_of[row["key"]], row) for row in rows if row["state"] == "finished"])
    return 0 if all(row["state"] == "finished" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
