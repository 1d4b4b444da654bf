"""Checkpoints that are whole, and known to be.

A checkpoint is ``step_00000120.ckpt`` and, written after it, ``step_00000120.ckpt.sha256``. Both are moved into place
in one step each; one without the other, or whose digest differs, is no checkpoint. The last two are kept, so that there
is an older one where the newest turns out to be damaged.
"""

import hashlib
import logging
import os
import pickle
import random
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from heterolora.report.files import write_text, write_whole

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"

CURVES = ("metrics_earlier.csv", "metrics.csv")
"""Files of a run's curves: what it took over from the run that it goes on with, and its own."""

FORMAT = 3
"""Of what a checkpoint holds; it changes when that does."""

_KEPT = 2


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints so that they are whole or not there, whatever happens meanwhile."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """The file, then its digest."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())

        write_whole(path, write)
        write_text(digest_of(path), f"{_sha256(path)}  {path.name}\n")


class KeepCheckpoints(Checkpoint):
    """A checkpoint at the end of each epoch, every so many optimizer steps, and when SIGTERM asks a run to end.

    Args:
        folder: the run's.
        every: optimizer steps between checkpoints within an epoch; None: none there.
        saves_at_end: whether SIGTERM is answered by a checkpoint after the step that is under way; with several
            processes, which get it at different steps, it ends the run at once.
    """

    def __init__(self, folder: Path, every: int | None, saves_at_end: bool) -> None:
        self.folder = folder / FOLDER
        self.every = every
        self.saves_at_end = saves_at_end and threading.current_thread() is threading.main_thread()
        self._last = -1
        self._step = -1
        self._asked_to_end = False
        self._random: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run goes on with the random numbers; what it starts from is kept already, where it was."""
        self._last = self._step = trainer.global_step
        if self._random is not None:
            restore_random_states(self._random)
            self._random = None
        if self.saves_at_end:
            # A scheduler may send several. Lightning puts back what was there before the fit.
            def after_this_step(number: int, frame: FrameType | None) -> None:
                if not self._asked_to_end:
                    _log.info("SIGTERM: saving after this step, then ending")
                self._asked_to_end = True

            signal.signal(signal.SIGTERM, after_this_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step; at the last batch of an epoch, its end comes soon enough."""
        step, whole = trainer.global_step, trainer.global_step != self._step
        self._step = step
        if trainer.is_last_batch or not whole:
            return
        if self._asked_to_end:
            self._save_and_end(trainer)
        if self.every is not None and step != self._last and step % self.every == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation of the epoch is over."""
        if self._asked_to_end:
            self._save_and_end(trainer)
        self._save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """How much of the curves, and which random numbers, came before it."""
        checkpoint["format"] = FORMAT
        checkpoint["curves"] = sum(_rows(self.folder.parent / name) for name in CURVES)
        checkpoint["random"] = random_states()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The generators go on when training does: what is set up before may draw."""
        self._random = checkpoint["random"]

    def _save_and_end(self, trainer: L.Trainer) -> NoReturn:
        self._save(trainer)
        raise SystemExit(128 + signal.SIGTERM)

    def _save(self, trainer: L.Trainer) -> None:
        self._last = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # what was logged before a checkpoint is never lost to one who resumes from it
        trainer.save_checkpoint(self.folder / f"step_{self._last:08d}.ckpt")
        if trainer.is_global_zero:
            for path in list(newest_first(self.folder))[_KEPT:]:
                digest_of(path).unlink(missing_ok=True)  # first, so that nothing trusts what is about to go
                path.unlink()


def newest_first(folder: Path) -> Iterator[Path]:
    """Files of checkpoints in a folder, whatever is in them."""
    yield from sorted(folder.glob("step_*.ckpt"), key=lambda path: path.name, reverse=True)


def digest_of(path: Path) -> Path:
    """The file that holds a checkpoint's digest."""
    return path.with_name(f"{path.name}.sha256")


def newest_good(run: Path, settings: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that can be trusted, and what is wrong with those that are newer.

    Args:
        run: the run's folder.
        settings: hash of the config that the checkpoint must belong to.
    """
    wrong: list[str] = []
    for path in newest_first(run / FOLDER):
        if (reason := why_not(path, settings)) is None:
            return path, wrong
        wrong.append(f"{path.name} {reason}")
    return None, wrong


def why_not(path: Path, settings: str) -> str | None:
    """Why a file is no checkpoint to go on from; None if it is one.

    Args:
        path: the file.
        settings: hash of the config that it must belong to.
    """
    try:
        expected = digest_of(path).read_text(encoding="utf-8").split()
        found = _sha256(path)
    except (OSError, UnicodeDecodeError):
        return "was not written to its end"
    if expected[:1] != [found]:
        return "is torn: its digest is another than when it was written"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        return "is no checkpoint"
    identity = content.get("identity") if isinstance(content, Mapping) else None
    if not isinstance(identity, Mapping) or "settings" not in identity:
        return "is no checkpoint of ours"
    if content.get("format") != FORMAT:
        return "was written by another version of this program"
    if identity["settings"] != settings:
        return f"belongs to another config (hash {identity['settings']})"
    return None


def random_states() -> dict[str, Any]:
    """States of the global generators, as plain values and tensors, which load without running code."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators where they were."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


def _rows(table: Path) -> int:
    """Rows of a CSV file, without its head."""
    if not table.exists():
        return 0
    with table.open("rb") as file:
        return max(0, sum(1 for _ in file) - 1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
