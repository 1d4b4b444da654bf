"""A task's first metric, as proxies ask for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from heterolora.tasks.base import Task


@dataclass(frozen=True)
class FirstMetric:
    """The first metric of a task.

    Attributes:
        task: with its labels known.
    """

    task: Task

    @property
    def name(self) -> str:
        """As the config names it."""
        return self.task.metrics[0]

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller one is better."""
        return self.task.mode

    def outputs(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits, one row an example."""
        return self.task.logits(model, batch)

    def value(self, outputs: Sequence[torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
        """The metric of all batches together; NaN where it is not defined."""
        return self._of([self.task.predict(logits) for logits in outputs], batches)

    def of_a_constant(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
        """By the best class, or the mean of the numbers; 0 for a metric that is not defined then (a correlation)."""
        labels = torch.cat([batch["labels"] for batch in batches])
        if self.task.labels is None:
            answers = [labels.double().mean().to(labels.dtype)]
        else:
            answers = [labels.new_tensor(code) for code in range(len(self.task.labels))]
        given = [[answer.expand(batch["labels"].shape) for batch in batches] for answer in answers]
        values = [self._of(predictions, batches) for predictions in given]
        defined = [0.0 if math.isnan(value) else value for value in values]
        return max(defined) if self.mode == "max" else min(defined)

    def _of(self, predictions: Sequence[torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
        metric: Any = self.task.make_metrics()[self.name]
        metric = metric.to(predictions[0].device)
        for given, batch in zip(predictions, batches, strict=True):
            metric.update(given, batch["labels"])
        return float(metric.compute())
