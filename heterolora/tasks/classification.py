"""Classification of a sentence or a pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from heterolora.data.labels import class_codes, class_names, label_name
from heterolora.data.sources import Source
from heterolora.errors import SettingError
from heterolora.tasks.base import check_task, class_table, model_logits, one_for_all, precise

_METRICS: dict[str, Literal["max", "min"]] = {"accuracy": "max", "f1": "max", "f1_macro": "max", "matthews": "max"}


class _Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation, 0 where only one class is predicted or there is only one.

    That is the convention of scikit-learn, which GLUE uses; torchmetrics gives other values for two classes then.
    """

    def compute(self) -> torch.Tensor:
        """A scalar."""
        classes = [int((self.confmat.sum(dim) > 0).sum()) for dim in (0, 1)]
        return super().compute() if min(classes) > 1 else torch.zeros((), device=self.confmat.device)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy over classes.

    Args:
        name: short name, used in folder names and tables.
        source: where the labelled text comes from.
        text: names of the text columns: one sentence or a pair.
        labels: names of the classes, in the order of their codes, read as labels are: 1, 1.0 and "1" are one name, True
            and "TRUE" another; null: the distinct labels of the training set, sorted as text.
        metrics: ``accuracy``, ``f1`` (of class 1, as GLUE has it; for two classes), ``f1_macro`` (mean over classes),
            ``matthews`` (correlation; 0 where one class is predicted for all); the first is the result.
        mode: whether a larger or a smaller first metric is better.
        max_length: tokens after which inputs are cut.
    """

    name: str
    source: Source
    text: Sequence[str]
    labels: Sequence[Any] | None
    metrics: Sequence[str]
    mode: Literal["max", "min"]
    max_length: int

    def __post_init__(self) -> None:
        if self.labels is not None:
            object.__setattr__(self, "labels", self._read_names(self.labels))
        check_task(self.inputs, self.metrics, _METRICS, self.mode, self.max_length)
        if "f1" in self.metrics and self.labels is not None and len(self.labels) != 2:
            raise SettingError("metrics", list(self.metrics), f"f1 is for two classes, not {list(self.labels)}")

    @staticmethod
    def _read_names(labels: Sequence[Any]) -> tuple[str, ...]:
        try:
            names = tuple(map(label_name, labels))
        except TypeError as error:
            raise SettingError("labels", list(labels), f"{error}; a name, and in quotes where in doubt") from None
        if not 2 <= len(set(names)) == len(names):
            raise SettingError("labels", list(labels), "at least two classes, each named once")
        return names

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """One."""
        return (tuple(self.text),)

    @property
    def outputs(self) -> int:
        """One for each class."""
        return len(self._names)

    @property
    def _names(self) -> Sequence[str]:
        if self.labels is None:
            raise SettingError("task.labels", None, "not known before the training set is read")
        return self.labels

    def completed(self, labels: pd.Series, place: str) -> "Classification":
        """With the names of the classes, if the config gives none."""
        if self.labels is not None:
            return self
        names = class_names(labels, place)
        try:
            return replace(self, labels=names)
        except SettingError as error:
            raise error.under("task") from None

    def encode_labels(self, labels: pd.Series, coded: bool, place: str) -> pd.Series:
        """Codes of the classes."""
        return class_codes(labels, self._names, coded, place)

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[batch, classes]``."""
        return model_logits(model, batch)

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the batch, in at least float32."""
        return functional.cross_entropy(precise(logits), batch["labels"])

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Code of the most likely class."""
        return logits.argmax(-1)

    def make_metrics(self) -> MetricCollection:
        """Fresh torchmetrics."""
        count = len(self._names)
        known: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(count, average="micro", sync_on_compute=False),
            "f1": BinaryF1Score(sync_on_compute=False),
            "f1_macro": MulticlassF1Score(count, average="macro", sync_on_compute=False),
            "matthews": _Matthews(count, sync_on_compute=False),
        }
        return MetricCollection({name: known[name] for name in self.metrics})

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """One class is predicted for all examples although there are several."""
        return one_for_all(predictions, labels)

    def prediction_table(self, found: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        """Names of the classes, and a logit for each."""
        return class_table(found, self._names)
