"""What a task is, and what all tasks share."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import pandas as pd
import torch
from torchmetrics import MetricCollection

from heterolora.data.sources import Source
from heterolora.errors import SettingError


class Task(Protocol):
    """A data set with a loss and metrics.

    Attributes:
        name: short name, used in folder names and tables.
        source: where the labelled text comes from.
        metrics: names of the metrics; the first one is the task's result.
        mode: whether a larger or a smaller first metric is better.
        max_length: tokens after which inputs are cut.
    """

    name: str
    source: Source
    metrics: Sequence[str]
    mode: Literal["max", "min"]
    max_length: int

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The model inputs that an example makes, as text columns: one, or one for each alternative.

        A batch holds the alternatives of an example one after the other: ``[examples * alternatives, tokens]``.
        """

    @property
    def outputs(self) -> int:
        """Outputs that the model's head needs for one input."""

    @property
    def labels(self) -> Sequence[str] | None:
        """Names of the classes; None where labels are numbers, or before ``completed`` has found them."""

    def completed(self, labels: pd.Series, place: str) -> Self:
        """The task with what its config leaves to the data: names of the classes.

        Args:
            labels: of the training set, as they were read.
            place: where they stand, for messages.
        """

    def encode_labels(self, labels: pd.Series, coded: bool, place: str) -> pd.Series:
        """Labels as batches hold them: codes or numbers.

        Args:
            labels: as they were read.
            coded: whether they may be codes in place of names.
            place: where they stand, for messages.

        Raises:
            SettingError: for a label that cannot be read.
        """

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's outputs, one row an example."""

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A scalar."""

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """One prediction an example, comparable with the labels."""

    def make_metrics(self) -> MetricCollection:
        """Fresh metrics, fed with predictions and labels; one that is not defined for them computes to NaN.

        They take what they are fed for all there is, and ask no other process (``sync_on_compute=False``).
        """

    def collapsed(self, predictions: torch.Tensor, labels: torch.Tensor) -> bool:
        """Whether the predictions say nothing about the examples."""

    def prediction_table(self, found: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        """Predictions for people, one row an example, with names for codes.

        Args:
            found: ``index``, ``prediction``, ``logits``, and ``labels`` where they are known.
        """


def text_columns(inputs: Sequence[Sequence[str]]) -> list[str]:
    """Every text column that some input uses, each once."""
    return list(dict.fromkeys(column for columns in inputs for column in columns))


def check_task(
    inputs: Sequence[Sequence[str]],
    metrics: Sequence[str],
    known: Mapping[str, Literal["max", "min"]],
    mode: str,
    max_length: int,
) -> None:
    """Refuse settings that no task could use.

    Args:
        inputs: text columns of the model inputs.
        metrics: names of the metrics.
        known: the metrics that there are, and which direction of each is the better one.
        mode: the direction that the config gives for the first.
        max_length: tokens after which inputs are cut.

    Raises:
        SettingError: for the first that is wrong.
    """
    for columns in inputs:
        if not 1 <= len(set(columns)) == len(columns) <= 2:
            raise SettingError("text", list(columns), "one text column, or two different ones for a pair")
    if "label" in text_columns(inputs):
        raise SettingError("text", text_columns(inputs), "label is what the labels' column is called")
    if unknown := [metric for metric in metrics if metric not in known]:
        raise SettingError("metrics", unknown, f"possible: {list(known)}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise SettingError("metrics", list(metrics), "at least one, each named once; the first is the task's result")
    if mode != known[metrics[0]]:
        raise SettingError("mode", mode, f"{known[metrics[0]]}, for that is the better {metrics[0]}")
    if max_length < 4:
        raise SettingError("max_length", max_length, "at least 4 tokens")


def model_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[inputs, outputs]``; the model sees neither labels nor rows, or it would choose a loss of its own."""
    logits: torch.Tensor = model(**model_inputs(batch)).logits
    return logits


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch is the model's."""
    return {key: value for key, value in batch.items() if key not in ("labels", "index", "share")}


def precise(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least, for losses."""
    return logits if logits.dtype == torch.float64 else logits.float()


def one_for_all(predictions: torch.Tensor, labels: torch.Tensor) -> bool:
    """The same class is predicted for all examples although there are several."""
    return len(torch.unique(predictions)) == 1 and len(torch.unique(labels)) > 1


def class_table(found: Mapping[str, torch.Tensor], names: Sequence[str]) -> pd.DataFrame:
    """``index``, ``label`` (where known), ``prediction``, and ``logit_<name>`` for every class."""
    columns: dict[str, Any] = {"index": found["index"].numpy()}
    for key, title in (("labels", "label"), ("prediction", "prediction")):
        if key in found:
            columns[title] = [names[code] for code in found[key].tolist()]
    logits = {f"logit_{name}": found["logits"][:, code].numpy() for code, name in enumerate(names)}
    return pd.DataFrame(columns | logits)
