"""Classification of a sentence or a pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy

from heterolora.data.sources import Source
from heterolora.errors import SettingError

_METRICS = ("accuracy", "f1")


@dataclass(frozen=True)
class Classification:
    """Cross-entropy over classes.

    Args:
        name: short name, used in folder names and tables.
        source: where the labelled text comes from.
        text: names of the text columns: one sentence or a pair.
        labels: names of the classes, in the order of their codes.
        metrics: ``accuracy``, ``f1`` (of class 1, as GLUE has it; for two classes); the first is the result.
        mode: whether a larger or a smaller first metric is better.
        max_length: tokens after which inputs are cut.
    """

    name: str
    source: Source
    text: Sequence[str]
    labels: Sequence[str]
    metrics: Sequence[str]
    mode: Literal["max", "min"]
    max_length: int

    def __post_init__(self) -> None:
        if not 1 <= len(set(self.text)) == len(self.text) <= 2:
            raise SettingError("text", list(self.text), "one text column, or two different ones for a pair")
        if not 2 <= len(set(self.labels)) == len(self.labels):
            raise SettingError("labels", list(self.labels), "at least two classes, each named once")
        if unknown := [metric for metric in self.metrics if metric not in _METRICS]:
            raise SettingError("metrics", unknown, f"possible: {list(_METRICS)}")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise SettingError("metrics", [], "at least one, each named once; the first is the task's result")
        if "f1" in self.metrics and len(self.labels) != 2:
            raise SettingError("metrics", list(self.metrics), "f1 is for two classes")
        if self.max_length < 4:
            raise SettingError("max_length", self.max_length, "at least 4 tokens")

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[batch, classes]``."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        logits: torch.Tensor = model(**inputs).logits
        return logits

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the batch, in at least float32."""
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(precise, batch["labels"])

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Code of the most likely class."""
        return logits.argmax(-1)

    def make_metrics(self) -> MetricCollection:
        """Fresh torchmetrics."""
        accuracy = MulticlassAccuracy(len(self.labels), average="micro")
        known: dict[str, Metric] = {"accuracy": accuracy, "f1": BinaryF1Score()}
        return MetricCollection({name: known[name] for name in self.metrics})

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """One class is predicted for all examples although there are several."""
        return len(torch.unique(predictions)) == 1 and len(torch.unique(labels)) > 1
