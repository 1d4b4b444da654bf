"""Training of PEFT's adapters: as of ours, and what a method of PEFT's does beside."""

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from heterolora.baselines.model import PeftBaseline
from heterolora.lit import LitAdapted


class LitBaseline(LitAdapted):
    """Adds the method's penalty to what is differentiated, and tells it about every optimizer step.

    Curves show the task's loss, without the penalty, so that they can be compared.
    """

    @property
    def baseline(self) -> PeftBaseline:
        """The model."""
        assert isinstance(self.model, PeftBaseline)
        return self.model

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As for all.

        Raises:
            RuntimeError: if the method was told another number of steps than will be made.
        """
        if (steps := int(self.trainer.estimated_stepping_batches)) != self.baseline.steps:
            raise RuntimeError(f"{steps} optimizer steps will be made, the baseline was told {self.baseline.steps}")
        return super().configure_optimizers()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss, and the penalty."""
        loss = super().training_step(batch, batch_idx)
        penalty = self.baseline.penalty()
        return loss if penalty is None else loss + penalty

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step, whose gradients are there until the next batch; not between accumulated batches."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            self.baseline.after_step(self.trainer.global_step)
