"""What is shown while a run goes on: bars on a terminal, one line an epoch elsewhere."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import track as rich_track

_log = logging.getLogger(__name__)


def track(items: Iterable[Any], description: str, count: int) -> Iterable[Any]:
    """A bar on a terminal, a line in the log elsewhere."""
    if sys.stdout.isatty():
        return rich_track(items, description, total=count)
    _log.info("%s (%d batches)", description, count)
    return items


class EpochLog(L.Callback):
    """One line in the log for each epoch."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The metrics so far."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("validation/")}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        _log.info(
            "epoch %d of %s, step %d: %s", trainer.current_epoch + 1, trainer.max_epochs, trainer.global_step, shown
        )


class TerminalBar(RichProgressBar):
    """Lightning's rich bar, on a terminal only."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        if not sys.stdout.isatty():
            self.disable()
