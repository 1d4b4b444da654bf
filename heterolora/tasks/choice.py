"""Choice between texts: which of several continues or answers the first?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from heterolora.data.labels import class_codes
from heterolora.data.sources import Source
from heterolora.errors import SettingError
from heterolora.tasks.base import check_task, class_table, model_logits, one_for_all, precise


@dataclass(frozen=True)
class Choice:
    """Cross-entropy over the choices: the model gives each one number, seeing the shared text and that choice.

    Args:
        name: short name, used in folder names and tables.
        source: where the labelled text comes from.
        text: name of the text column that all choices share, as a list; empty: there is none.
        choices: names of the text columns of the choices, in the order of their codes; they are the labels' names too.
        metrics: ``accuracy``.
        mode: whether a larger or a smaller first metric is better.
        max_length: tokens after which inputs are cut.
    """

    name: str
    source: Source
    text: Sequence[str]
    choices: Sequence[str]
    metrics: Sequence[str]
    mode: Literal["max", "min"]
    max_length: int

    def __post_init__(self) -> None:
        if len(self.text) > 1 or set(self.text) & set(self.choices):
            raise SettingError("text", list(self.text), "at most one text column, which is no choice")
        if not 2 <= len(set(self.choices)) == len(self.choices):
            raise SettingError("choices", list(self.choices), "at least two text columns, each named once")
        check_task(self.inputs, self.metrics, {"accuracy": "max"}, self.mode, self.max_length)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """One for each choice."""
        return tuple((*self.text, choice) for choice in self.choices)

    @property
    def outputs(self) -> int:
        """One: how well the choice fits."""
        return 1

    @property
    def labels(self) -> Sequence[str]:
        """The choices."""
        return self.choices

    def completed(self, labels: pd.Series, place: str) -> "Choice":
        """Nothing is left to the data."""
        return self

    def encode_labels(self, labels: pd.Series, coded: bool, place: str) -> pd.Series:
        """Codes of the right choices."""
        return class_codes(labels, self.choices, coded, place)

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[batch, choices]``."""
        return model_logits(model, batch).reshape(-1, len(self.choices))

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the batch, in at least float32."""
        return functional.cross_entropy(precise(logits), batch["labels"])

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Code of the choice that fits best."""
        return logits.argmax(-1)

    def make_metrics(self) -> MetricCollection:
        """Fresh torchmetrics."""
        accuracy = MulticlassAccuracy(len(self.choices), average="micro", sync_on_compute=False)
        return MetricCollection({"accuracy": accuracy})

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """The same choice is made for all examples although several are right."""
        return one_for_all(predictions, labels)

    def prediction_table(self, found: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        """Names of the choices, and a logit for each."""
        return class_table(found, self.choices)
