"""Runs of train.py inside the test's process, on tiny models and few sentences."""

import errno
import json
import math
import signal
import time
from pathlib import Path

import lightning as L
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from heterolora.run import train

CONF = Path(__file__).parents[1] / "conf"

TINY = (
    "model=tiny_bert",
    "data.limit=48",
    "data.batch_size=8",
    "data.cache_dir=null",
    "task.max_length=24",
    "probe.batches=2",
    "probe.head_warmup_steps=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "export.peft=false",
)


def compose_job(*overrides: str, config: str = "train"):
    """The config of a job, Hydra's part included."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, overrides=list(overrides), return_hydra_config=True)


def run_job(folder: Path, *overrides: str) -> dict:
    """Run a job whose folder is ``folder``; its summary."""
    folder.mkdir(parents=True)
    value = train(prepare(folder, *overrides))
    summary = json.loads((folder / "summary.json").read_text())
    first = next(iter(summary["metrics"]["validation"]))
    written = summary["metrics"]["validation"][first]
    assert value == written or (written is None and math.isnan(value))
    return summary


def prepare(folder: Path, *overrides: str, config: str = "train") -> DictConfig:
    """The job's config, with Hydra told where it runs."""
    cfg = compose_job(*TINY, f"outputs={folder.parent}", *overrides, config=config)
    cfg.hydra.runtime.output_dir = str(folder)
    cfg.hydra.runtime.cwd = str(Path.cwd())
    cfg.hydra.overrides.task = list(overrides)
    HydraConfig.instance().set_config(cfg)
    cfg = cfg.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def write_copa(root: Path) -> None:
    """A task whose examples are two inputs each."""
    folder = root / "superglue" / "COPA"
    folder.mkdir(parents=True)
    for name, count in (("train", 80), ("val", 20)):
        rows = [
            {"premise": f"It was {row}.", "choice1": "a" * (row % 5 + 1), "choice2": "b", "label": row % 2}
            | {"question": ("cause", "effect")[row % 2], "idx": row}
            for row in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class StopAt(L.Callback):
    """Breaks off when an epoch starts, as a crash would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("broken off by the test")


class StopBefore(L.Callback):
    """Breaks off before a batch, as a crash would.

    Args:
        epoch: the epoch, from 0.
        batch: the batch in it, from 0.
    """

    def __init__(self, epoch: int, batch: int) -> None:
        self.place = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            raise RuntimeError("broken off by the test")


class SignalAt(L.Callback):
    """Sends this process a signal in the middle of a batch.

    Args:
        epoch: the epoch, from 0.
        batch: the batch in it, from 0.
        number: of the signal.
    """

    def __init__(self, epoch: int, batch: int, number: int) -> None:
        self.place, self.number = (epoch, batch), number

    def on_before_backward(self, trainer, pl_module, loss):
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.place and trainer.training:
            signal.raise_signal(self.number)


class WaitFor(L.Callback):
    """Makes a file before a batch, and waits there until another one is made.

    Args:
        seed: of the run that does.
        epoch: the epoch, from 0.
        batch: the batch in it, from 0.
        folder: of both files: ``SEED.here`` and ``SEED.go``.
    """

    def __init__(self, seed: list[int], epoch: int, batch: int, folder: str) -> None:
        self.seeds, self.place, self.folder = seed, (epoch, batch), Path(folder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seed = pl_module.seed
        if seed in self.seeds and (trainer.current_epoch, batch_idx) == self.place:
            (self.folder / f"{seed}.here").touch()
            until = time.monotonic() + 120
            while not (self.folder / f"{seed}.go").exists() and time.monotonic() < until:
                time.sleep(0.05)


class FullDisk(L.Callback):
    """Fails as a write to a full disk does."""

    def on_train_start(self, trainer, pl_module):
        raise OSError(errno.ENOSPC, "No space left on device")


class FailsInFollower(L.Callback):
    """Fails in every process of a run but the first."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank:
            raise FloatingPointError("the loss is lost")
