"""Regression: a number for a sentence or a pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch.nn import functional
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from heterolora.data.labels import numbers
from heterolora.data.sources import Source
from heterolora.tasks.base import check_task, model_logits, precise

_METRICS: dict[str, Literal["max", "min"]] = {"pearson": "max", "spearman": "max", "mse": "min"}
_COLLAPSED = 1e-3  # spread of the predictions, as a share of the labels', below which they count as one value


class _Correlation(Metric):
    """Correlation of all values, kept as they are; NaN where predictions are constant but for rounding, or labels are.

    In float64 and in two passes: sums of batches lose the digits of labels that are large and alike, such as dates.

    Args:
        ranks: Spearman's, of the ranks; False: Pearson's, of the values.
    """

    full_state_update = False
    predictions: list[torch.Tensor]
    labels: list[torch.Tensor]

    def __init__(self, ranks: bool) -> None:
        super().__init__(sync_on_compute=False)
        self.ranks = ranks
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep a batch."""
        self.predictions.append(predictions)
        self.labels.append(labels)

    def compute(self) -> torch.Tensor:
        """A scalar."""
        given, labels = dim_zero_cat(self.predictions), dim_zero_cat(self.labels).double()
        predictions = given.double()
        rounding = torch.finfo(given.dtype).eps * predictions.mean().abs()  # of batches of other shapes
        if bool(predictions.std(correction=0) <= rounding) or bool((labels == labels[0]).all()):
            return torch.full((), torch.nan, device=self.device)
        first, second = (self._direction(values) for values in (predictions, labels))
        product: torch.Tensor = first @ second
        return product.clamp(-1, 1).float()

    def _direction(self, values: torch.Tensor) -> torch.Tensor:
        """Centred, of length 1."""
        if self.ranks:
            values = values.new_tensor(pd.Series(values.tolist()).rank().tolist())
        centred: torch.Tensor = values - values.mean()
        unit: torch.Tensor = centred / centred.norm()
        return unit


@dataclass(frozen=True)
class Regression:
    """Mean squared error between the model's one output and the label.

    Args:
        name: short name, used in folder names and tables.
        source: where the labelled text comes from.
        text: names of the text columns: one sentence or a pair.
        metrics: ``pearson``, ``spearman`` (correlations; not defined, and reported as null, where all predictions or
            all labels are equal), ``mse``; the first is the result.
        mode: whether a larger or a smaller first metric is better.
        max_length: tokens after which inputs are cut.
    """

    name: str
    source: Source
    text: Sequence[str]
    metrics: Sequence[str]
    mode: Literal["max", "min"]
    max_length: int

    def __post_init__(self) -> None:
        check_task(self.inputs, self.metrics, _METRICS, self.mode, self.max_length)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """One."""
        return (tuple(self.text),)

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    @property
    def labels(self) -> None:
        """There are no classes."""
        return None

    def completed(self, labels: pd.Series, place: str) -> "Regression":
        """Nothing is left to the data."""
        return self

    def encode_labels(self, labels: pd.Series, coded: bool, place: str) -> pd.Series:
        """Numbers."""
        return numbers(labels, place)

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[batch, 1]``."""
        return model_logits(model, batch)

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean squared error over the batch, in at least float32."""
        values = precise(logits).squeeze(-1)
        return functional.mse_loss(values, batch["labels"].to(values.dtype))

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """The number itself."""
        return precise(logits).squeeze(-1)

    def make_metrics(self) -> MetricCollection:
        """Fresh torchmetrics."""
        known: dict[str, Metric] = {
            "pearson": _Correlation(False),
            "spearman": _Correlation(True),
            "mse": MeanSquaredError(sync_on_compute=False),
        }
        return MetricCollection({name: known[name] for name in self.metrics})

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """The predictions are (nearly) one value: they spread less than a thousandth of what the labels do."""
        spread, wanted = (values.double().std(correction=0) for values in (predictions, labels))
        return bool(wanted > 0) and bool(spread < _COLLAPSED * wanted)

    def prediction_table(self, found: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        """``index``, ``label`` (where known) and ``prediction``."""
        titles = {"index": "index", "labels": "label", "prediction": "prediction"}
        return pd.DataFrame({title: found[key].numpy() for key, title in titles.items() if key in found})
