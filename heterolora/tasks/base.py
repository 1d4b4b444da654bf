"""What a task is."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torchmetrics import MetricCollection

from heterolora.data.sources import Source


class Task(Protocol):
    """A data set with a loss and metrics.

    Attributes:
        name: short name, used in folder names and tables.
        source: where the labelled text comes from.
        text: names of the text columns.
        labels: names of the classes.
        metrics: names of the metrics; the first one is the task's result.
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

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's output ``[batch, ...]``."""

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A scalar."""

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """One prediction an example, comparable with the labels."""

    def make_metrics(self) -> MetricCollection:
        """Fresh metrics, fed with predictions and labels."""

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """Whether the predictions say nothing about the examples."""
