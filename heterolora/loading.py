"""A finished run, back in memory: the adapted model, shortcuts included, with its tokenizer and its task."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from safetensors import SafetensorError, safe_open

from heterolora.allocation import read_ranks
from heterolora.backbone import Backbone
from heterolora.build import build
from heterolora.data.module import Data, encode
from heterolora.errors import SettingError
from heterolora.lit import in_file_order
from heterolora.model import AdaptedModel
from heterolora.space import survey
from heterolora.tasks.base import Task, text_columns

_NODES = ("model", "task", "data", "search_space", "adapter")
_NEEDED = ("config.yaml", "allocation.json", "adapter.safetensors", "summary.json")


@dataclass(frozen=True)
class LoadedRun:
    """Everything that is needed to use a trained model.

    Attributes:
        folder: the run's folder.
        model: the adapted model in evaluation mode, adapters and head filled.
        tokenizer: the backbone's.
        positions: tokens that fit into the backbone; None: no limit.
        task: as it was trained, with the names of its classes.
        data: where its data come from, and batch sizes.
        precision: the trainer's; bf16-mixed models are evaluated under autocast, as they were.
        summary: what the run wrote down at its end.
    """

    folder: Path
    model: AdaptedModel
    tokenizer: Any
    positions: int | None
    task: Task
    data: Data
    precision: str
    summary: Mapping[str, Any]

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        """Predictions for new texts, one row for each row of the table.

        Args:
            table: the task's text columns; others are left alone.

        Returns:
            ``index``, ``prediction``, and the logits where the task has classes.

        Raises:
            SettingError: if a text column or a text is missing.
        """
        return self.task.prediction_table(self._outputs(table[[c for c in table if c != "label"]]))

    def evaluate(self, table: pd.DataFrame) -> dict[str, float]:
        """The task's metrics on a labelled table; NaN where one is not defined.

        Args:
            table: the task's text columns and ``label``: names of classes, or what ``task.encode_labels`` gives.

        Raises:
            SettingError: if there are no labels, or other ones than the task has.
        """
        if "label" not in table:
            raise SettingError("label", list(table), "the table has no column of this name")
        if table["label"].dtype.kind not in "iuf":
            table = table.assign(label=self.task.encode_labels(table["label"], False, "the table"))
        found = self._outputs(table)
        metrics = self.task.make_metrics()
        metrics.update(found["prediction"], found["labels"])
        return {name: value.item() for name, value in metrics.compute().items()}

    def split(self, name: str) -> pd.DataFrame:
        """A split of the data that the run was made with, labels encoded.

        Raises:
            SettingError: if the task has no such split, or the data are not there.
        """
        splits, _, _ = self.data.splits(self.task)
        if name not in splits.tables:
            raise SettingError("split", name, f"possible: {list(splits.tables)}")
        return splits.tables[name]

    @torch.no_grad()
    def _outputs(self, table: pd.DataFrame) -> dict[str, torch.Tensor]:
        device = next(self.model.parameters()).device
        halves = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        parts = []
        size, multiple = self.data.eval_batch_size, self.data.pad_to_multiple_of
        for batch in encode(table, self.task, self.tokenizer, self.positions, size, multiple):
            with torch.autocast(device.type, halves.get(self.precision), enabled=self.precision in halves):
                logits = self.task.logits(self.model, {key: value.to(device) for key, value in batch.items()})
            logits = logits.float().cpu()
            part = {"index": batch["index"], "prediction": self.task.predict(logits), "logits": logits}
            parts.append(part | ({"labels": batch["labels"]} if "labels" in batch else {}))
        return in_file_order(parts)


def load_run(run: str | Path, device: str = "cpu", data_root: str | None = None) -> LoadedRun:
    """Load a finished run.

    Args:
        run: its folder.
        device: where the model shall be.
        data_root: where local data sets are now; None: where they were.

    Raises:
        SettingError: if the folder holds no finished run, or the backbone is not the one that was trained.
    """
    files = run_files(run)
    _check_device(device)
    if data_root is not None and not Path(data_root).expanduser().is_dir():
        raise SettingError("data_root", data_root, "no such folder")
    objects = files.objects
    backbone = files.load_backbone()
    model = files.adapted(backbone).to(device).eval()
    data = replace(objects["data"], cache_dir=None)
    if data_root is not None:
        data = replace(data, root=data_root)
    precision = files.config["trainer"]["precision"]
    return LoadedRun(
        files.folder, model, backbone.tokenizer, backbone.positions, objects["task"], data, precision, files.summary
    )


@dataclass(frozen=True)
class RunFiles:
    """What a finished run's folder says, before any backbone is loaded.

    Attributes:
        folder: the run's.
        config: as it was resolved.
        summary: what the run wrote down at its end.
        ranks: site name -> rank.
        objects: what the config names: model, task, data, search_space, adapter.
        state: trained tensors, see ``AdaptedModel.trained_state_dict``.
        trained_on: fingerprint of the backbone.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    ranks: Mapping[str, int]
    objects: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    trained_on: str | None

    def load_backbone(self) -> Backbone:
        """The backbone that the config names, with a head as it was drawn."""
        backbone: Backbone = self.objects["model"].load(self.objects["task"].outputs, self.config["seed"])
        return backbone

    def adapted(self, backbone: Backbone) -> AdaptedModel:
        """The backbone with the run's adapters on it; its head is filled.

        Raises:
            SettingError: if the run was trained on another backbone.
        """
        if self.trained_on != backbone.fingerprint:
            raise SettingError(
                "run", self.folder, "model.path holds other backbone weights than the run was trained on"
            )
        space = self.objects["search_space"].resolve(survey(backbone.model, backbone.layout))
        model = AdaptedModel(backbone.model, space, self.objects["adapter"], backbone.head)
        model.enable(self.ranks, self.config["seed"])
        model.load_trained_state_dict(self.state)
        return model


def run_files(run: str | Path) -> RunFiles:
    """Read the folder of a finished run.

    Raises:
        SettingError: if it holds none.
    """
    folder = Path(run).expanduser()
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise SettingError("run", folder, f"no finished run: {missing} missing{_state(folder)}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        ranks = read_ranks(folder / "allocation.json")
        config["data"].setdefault("pad_to_multiple_of", 1)  # runs before there was this setting
        objects = {node: build(config[node], node) for node in _NODES}
    except (ValueError, yaml.YAMLError, KeyError, TypeError) as error:  # a SettingError is a ValueError
        raise SettingError("run", folder, f"its files are damaged: {' '.join(str(error).split())}") from error
    if config.get("baseline") is not None:
        raise SettingError("run", folder, "its adapters are PEFT's own: load RUN/peft by PeftModel.from_pretrained")
    path = folder / "adapter.safetensors"
    try:
        with safe_open(path, "pt") as file:
            trained_on = (file.metadata() or {}).get("backbone")
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise SettingError("run", folder, f"{path.name} cannot be read ({error})") from error
    return RunFiles(folder, config, summary, ranks, objects, state, trained_on)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or torch is built without it
        raise SettingError("device", device, str(error).splitlines()[0]) from error


def texts_table(task: Task, rows: list[list[str]]) -> pd.DataFrame:
    """New texts, one list for each example, as a table of the task's text columns.

    Raises:
        SettingError: if a row has another number of texts than the task has columns.
    """
    columns = text_columns(task.inputs)
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise SettingError("text", wrong[0], f"this task reads {len(columns)} texts for each example: {columns}")
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _state(folder: Path) -> str:
    path = folder / "status.json"
    try:
        return f"; its state is {json.loads(path.read_text())['state']}" if path.is_file() else ""
    except (ValueError, KeyError):
        return "; its status.json is damaged"
