"""Regression: a number for a sentence or a pair."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch.nn import functional
from torchmetrics import MeanSquaredError, Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat

from heterolora.data.labels import numbers
from heterolora.data.sources import Source
from heterolora.tasks.base import check_task, model_logits, precise

_METRICS: dict[str, Literal["max", "min"]] = {"pearson": "max", "spearman": "max", "mse": "min"}
_COLLAPSED = 1e-3  # spread of the predictions, as a share of the labels', below which they count as one value


_ROUNDING = 1e-6  # share of their size in which equal predictions may differ: batches of other shapes round differently


class _Pearson(PearsonCorrCoef):
    """Pearson correlation; NaN, without a warning, where predictions or labels are constant but for rounding."""

    def compute(self) -> torch.Tensor:
        """A scalar."""
        for mean, squares in ((self.mean_x, self.var_x), (self.mean_y, self.var_y)):  # summed squares, not variances
            if bool(((squares / self.n_total).sqrt() <= _ROUNDING * mean.abs()).all()):
                return torch.full((), torch.nan, device=self.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*variance of predictions or target is close to zero")
            return super().compute()


class _Spearman(SpearmanCorrCoef):
    """Spearman rank correlation; NaN where predictions or labels are constant but for rounding."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*will save all targets and predictions")  # a run keeps them anyway
            super().__init__()

    def compute(self) -> torch.Tensor:
        """A scalar."""
        for values in map(dim_zero_cat, (self.preds, self.target)):
            if bool(values.std(correction=0) <= _ROUNDING * values.mean().abs()):
                return torch.full((), torch.nan, device=self.device)
        return super().compute()


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
        known: dict[str, Metric] = {"pearson": _Pearson(), "spearman": _Spearman(), "mse": MeanSquaredError()}
        return MetricCollection({name: known[name] for name in self.metrics})

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """The predictions are (nearly) one value: they spread less than a thousandth of what the labels do."""
        spread, wanted = (values.double().std(correction=0) for values in (predictions, labels))
        return bool(wanted > 0) and bool(spread < _COLLAPSED * wanted)

    def prediction_table(self, found: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        """``index``, ``label`` (where known) and ``prediction``."""
        titles = {"index": "index", "labels": "label", "prediction": "prediction"}
        return pd.DataFrame({title: found[key].numpy() for key, title in titles.items() if key in found})
