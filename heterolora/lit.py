"""The one Lightning module of all tasks, and the optimizer."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.prefix_cache import FrozenPrefix
from heterolora.processes import ALONE, Processes
from heterolora.seeds import derive
from heterolora.switching import Switch, trained_parameters
from heterolora.tasks.base import Task

LOG_EVERY = 10
"""Optimizer steps between two points of the curve of training."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with its own rate for the task's head.

    Args:
        lr: peak learning rate of the adapters.
        head_lr: peak learning rate of the head.
        weight_decay: decoupled weight decay of both.
        warmup: share of the steps over which the rate rises linearly from 0.
        schedule: afterwards: ``linear`` down to 0 at the last step, or ``constant``.
        clip: largest norm of the whole gradient; null: no clipping.
    """

    lr: float
    head_lr: float
    weight_decay: float
    warmup: float
    schedule: Literal["linear", "constant"]
    clip: float | None

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(name, getattr(self, name), "a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingError("weight_decay", self.weight_decay, "a number of at least 0")
        if not 0 <= self.warmup < 1:
            raise SettingError("warmup", self.warmup, "a share from 0 up to, not including, 1")
        if self.clip is not None and not self.clip > 0:
            raise SettingError("clip", self.clip, "a number above 0, or null")

    def factor(self, step: int, total: int) -> float:
        """Learning rate of a step (from 0) as a share of the peak rate."""
        rise = round(self.warmup * total)
        if step < rise:
            return step / rise
        if self.schedule == "constant":
            return 1.0
        return max(0.0, (total - step) / max(1, total - rise))


def in_file_order(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Results of batches, joined and sorted by their ``index``."""
    merged = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = merged["index"].argsort()
    return {key: value[order] for key, value in merged.items()}


def share_of(batch: Mapping[str, torch.Tensor]) -> float | torch.Tensor:
    """What the loss of these rows counts in that of the whole batch, of which other processes have the rest."""
    return batch.get("share", 1.0)


class LitAdapted(L.LightningModule):
    """Trains the adapters and the head of an adapted model on a task.

    Its ``state_dict`` holds only what is trained; the ranks travel in the checkpoint and are restored before weights.

    Args:
        model: the adapted model; its adapters are enabled by a callback before the optimizer is made.
        task: loss, metrics, predictions.
        optimizer: optimizer settings.
        seed: of the adapters' initialisation and of dropout.
        identity: digests of what a checkpoint belongs to (backbone weights, data); one of anything else is refused.
        prefix: starts forwards above the frozen blocks; None: they run whole.
        processes: that train the same model, each on its share of every batch.
    """

    def __init__(
        self,
        model: AdaptedModel,
        task: Task,
        optimizer: Optimizer,
        seed: int,
        identity: Mapping[str, str],
        prefix: FrozenPrefix | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.settings = optimizer
        self.seed = seed
        self.identity = dict(identity)
        self.prefix = prefix
        self.processes = processes
        self.switch: Switch | None = None
        """Switches sites while training goes on; None where the allocation stands."""
        self.penalty: Callable[[], torch.Tensor] | None = None
        """What training adds to the task's loss."""
        self.most_held = 0
        """Adapter parameters that were in memory at once before the last change of an allocation."""
        self.search_seconds: float | None = None
        self._seconds_before = 0.0
        self._training_since: float | None = None
        self.outputs: dict[str, list[dict[str, torch.Tensor]]] = {}
        self.found: dict[str, dict[str, float]] = {}  # split -> metric -> value, of its last evaluation
        self.validated_step: int | None = None
        self._in_curves: int | None = None  # step of the last validation in the curves, perhaps of an earlier process
        self._epoch_loss = torch.zeros((), dtype=torch.float64)  # sum over the epoch's examples so far
        self._epoch_rows = 0

    def scalar_loss(self, model: AdaptedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The task's loss of a model on a batch."""
        return self.task.loss(self.task.logits(model, batch), batch)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss."""
        with self._entered(batch, "train"):
            loss = self.scalar_loss(self.model, batch)
        rows, share = len(batch["labels"]), share_of(batch)
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False, batch_size=rows)
        steps = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if steps and (self.trainer.global_step + 1) % LOG_EVERY == 0:
            whole = self.processes.summed(loss.detach() * share)
            self.note({"train/loss_step": whole.item()}, self.trainer.global_step)
        if share:
            self._epoch_loss = self._epoch_loss.to(loss.device) + loss.detach().double() * rows
        self._epoch_rows += rows if share else 0
        return (loss if self.penalty is None else loss + self.penalty()) * share

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient of the whole batch, before it is clipped."""
        self.processes.sum_gradients(p for group in optimizer.param_groups for p in group["params"])

    def _entered(self, batch: Mapping[str, torch.Tensor], split: str) -> AbstractContextManager[None]:
        """Forwards of this batch start above the frozen prefix, if that is wanted."""
        return nullcontext() if self.prefix is None else self.prefix.entered(self.model, batch, split)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout, from the run's seed and the position alone: the same for every allocation and after a resume.

        Processes beside the first draw other numbers than it does.

        Raises:
            RuntimeError: if the allocation never happened.
        """
        if not self.model.held_parameters:
            raise RuntimeError("no adapter is enabled: the allocation callback did not run before training")
        of = () if self.processes.leads else (self.processes.rank,)
        torch.manual_seed(derive(self.seed, "dropout", self.trainer.current_epoch, batch_idx, *of))

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss, which a resume within the epoch must not change; stop a run that has diverged.

        Raises:
            FloatingPointError: if it is not finite.
        """
        mine = torch.stack([self._epoch_loss.cpu(), torch.tensor(self._epoch_rows, dtype=torch.float64)])
        total, rows = self.processes.summed(mine)
        loss = (total / rows).float()
        self._epoch_loss, self._epoch_rows = torch.zeros((), dtype=torch.float64), 0
        self.log("train/loss_epoch", loss, logger=False)
        self.note({"train/loss_epoch": loss.item()}, self.trainer.global_step - 1)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} after epoch {self.trainer.current_epoch + 1}; lower optimizer.lr"
            )

    def note(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, at once: Lightning would write them only after the checkpoint of this step or epoch."""
        for logger in self.trainer.loggers:
            logger.log_metrics({**values, "epoch": self.trainer.current_epoch}, step)

    @property
    def held_parameters(self) -> int:
        """Adapter parameters in memory, at most: of the model, and those that are kept while their site is off."""
        now = self.model.held_parameters + (0 if self.switch is None else self.switch.kept_parameters)
        return max(now, self.most_held)

    def add_search(self, seconds: float) -> None:
        """Count them as search, and not as training if that has begun."""
        self.search_seconds = (self.search_seconds or 0.0) + seconds
        if self._training_since is not None:
            self._training_since += seconds

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Feed the metrics and keep the predictions."""
        self._evaluate("validation", batch)

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Feed the metrics and keep the predictions."""
        self._evaluate(self._test_splits[dataloader_idx], batch)

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's predictions."""
        self._begin("validation")

    def on_test_epoch_start(self) -> None:
        """Forget earlier predictions."""
        for split in self._test_splits:
            self._begin(split)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.validated_step = self.trainer.global_step
        self._end("validation", curves=self._in_curves != self.validated_step)
        self._in_curves = self.validated_step

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test split."""
        for split in self._test_splits:
            self._end(split)

    @property
    def _test_splits(self) -> list[str]:
        """Names of the test splits: the keys where loaders are named, as ``TextData`` does, else ``test``."""
        loaders = self.trainer.test_dataloaders
        return list(loaders) if isinstance(loaders, Mapping) else ["test"]

    def _begin(self, split: str) -> None:
        self.outputs[split] = []

    def _evaluate(self, split: str, batch: dict[str, torch.Tensor]) -> None:
        with self._entered(batch, split):
            logits = self.task.logits(self.model, batch)
        predictions = self.task.predict(logits)
        kept = {"index": batch["index"], "labels": batch["labels"], "prediction": predictions, "logits": logits.float()}
        kept["loss"] = self.task.loss(logits, batch) * len(batch["labels"])
        self.outputs[split].append({key: value.cpu() for key, value in kept.items()})

    def _end(self, split: str, curves: bool = True) -> None:
        self.outputs[split] = parts = self._all_batches(self.outputs[split])
        metrics, loss = self.task.make_metrics(), torch.zeros(())
        for part in parts:
            metrics.update(part["prediction"], part["labels"])
            loss = loss + part.pop("loss")
        computed = metrics.compute()
        found = {name: computed[name] for name in self.task.metrics}
        found["loss"] = loss / sum(len(part["index"]) for part in parts)
        for name, value in found.items():
            shown = split == "validation" and name != "loss"
            self.log(f"{split}/{name}", value, prog_bar=shown, logger=None if curves else False)
        self.found[split] = {name: value.item() for name, value in found.items()}

    def _all_batches(self, mine: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Those of all processes, in the order in which one alone would have met them."""
        if self.processes.alone:
            return mine
        rounds = zip(*self.processes.gathered(mine), strict=True)
        by_row = {int(part["index"][0]): part for parts in rounds for part in parts}  # one may come twice, to fill up
        return list(by_row.values())

    def predictions(self, split: str) -> dict[str, torch.Tensor]:
        """The last evaluation of a split, in file order: ``index``, ``labels``, ``prediction``, ``logits``."""
        return in_file_order(self.outputs[split])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over adapters and head; the rate changes every step."""
        adapters = trained_parameters(self.model)
        head = list(self.model.head_parameters.values())
        spared = self.model.undecayed
        decayed, rest = ([p for p in adapters if (p in spared) == kind] for kind in (False, True))
        groups: list[dict[str, Any]] = [{"params": decayed, "lr": self.settings.lr, "name": "adapters"}]
        if rest:
            groups.append({"params": rest, "lr": self.settings.lr, "name": "undecayed", "weight_decay": 0.0})
        if head:
            groups.append({"params": head, "lr": self.settings.head_lr, "name": "head"})
        # One kernel for all parameters, which are many and small; under autocast Lightning clips no gradients for it.
        fused = self.trainer.precision == "32-true" and self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.settings.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def check_replicas(self) -> None:
        """Compare what is trained, and what the optimizer knows of it, with the other processes'.

        Raises:
            RuntimeError: if a bit differs.
        """
        if self.processes.alone:
            return
        found = hashlib.sha256(repr(sorted(self.model.ranks.items())).encode())
        state: list[torch.Tensor] = list(self.model.trained_state_dict().values())
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state += [value for _, value in sorted(optimizer.state.get(parameter, {}).items())]
        if self.switch is not None:
            state += [value for _, kept in sorted(self.switch.state_dict()["kept"].items()) for value in kept.values()]
        for value in state:
            found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        digests = self.processes.gathered(found.hexdigest())
        if len(set(digests)) > 1:
            raise RuntimeError(f"processes hold different adapters at step {self.trainer.global_step}: {digests}")

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """What is trained, and nothing else."""
        return self.model.trained_state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill the enabled adapters and the head; every name must fit, whatever ``strict`` says.

        Raises:
            KeyError: if tensors are missing or unknown.
        """
        self.model.load_trained_state_dict(state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Ranks travel with the weights, and what identifies the run they belong to."""
        checkpoint["ranks"] = {name: rank for name, rank in self.model.ranks.items() if rank}
        checkpoint["in_curves"] = self._in_curves
        checkpoint["frozen"] = sorted(self.model.frozen)
        checkpoint["switch"] = None if self.switch is None else self.switch.state_dict()
        checkpoint["identity"] = self.identity
        checkpoint["most_held"] = self.most_held
        checkpoint["epoch_loss"] = self.processes.gathered({"sum": self._epoch_loss.cpu(), "rows": self._epoch_rows})
        checkpoint["seconds"] = {"search": self.search_seconds, "training": self.training_seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Enable the sites before their weights are loaded and before the optimizer is made.

        Raises:
            SettingError: if the checkpoint belongs to another backbone or to other data.
        """
        for what, expected in self.identity.items():
            if checkpoint["identity"].get(what) != expected:
                raise SettingError("resume", "this checkpoint", f"it was made with other {what} than there are now")
        self.model.enable(checkpoint["ranks"], self.seed)
        self.model.freeze(checkpoint["frozen"])
        self._in_curves = checkpoint["in_curves"]
        self.most_held = checkpoint["most_held"]
        if self.switch is not None:
            self.switch.load_state_dict(checkpoint["switch"])
        if len(checkpoint["epoch_loss"]) != self.processes.size:
            given = f"a checkpoint of {len(checkpoint['epoch_loss'])} processes"
            raise SettingError("resume", given, f"there are {self.processes.size} now")
        mine = checkpoint["epoch_loss"][self.processes.rank]
        self._epoch_loss, self._epoch_rows = mine["sum"], mine["rows"]
        self.search_seconds = checkpoint["seconds"]["search"]
        self._seconds_before = checkpoint["seconds"]["training"]

    def on_train_start(self) -> None:
        """The clock of training starts."""
        self._training_since = time.perf_counter()

    def on_train_end(self) -> None:
        """And stops; what every process ends with is the same."""
        self._seconds_before, self._training_since = self.training_seconds, None
        self.check_replicas()

    @property
    def training_seconds(self) -> float:
        """Time spent in training and its validations so far, in earlier processes too (up to their last checkpoint)."""
        since = self._training_since
        return self._seconds_before + (0.0 if since is None else time.perf_counter() - since)
