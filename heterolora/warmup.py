"""Training before scoring: of the head alone, and of adapters at every candidate site together with it."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import nn

from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.proxies.evidence import Batch, Loss, Track

_log = logging.getLogger(__name__)


def warm_up_head(
    model: AdaptedModel, loss: Loss, batches: Iterator[Batch], steps: int, lr: float, track: Track
) -> None:
    """Train the head by AdamW, with no adapter in the forward; in evaluation mode.

    Raises:
        SettingError: if there are too few batches.
    """
    head = list(model.head_parameters.values())
    if not head or not steps:
        return
    with model.disabled():
        _train(model, loss, batches, [{"params": head, "lr": lr}], steps, track, "head")


def warm_up_adapters(
    model: AdaptedModel,
    loss: Loss,
    batches: Iterator[Batch],
    adapters: Mapping[str, nn.Module],
    steps: int,
    lr: float,
    head_lr: float,
    track: Track,
) -> None:
    """Train adapters and the head together by AdamW; in evaluation mode, so that nothing is drawn.

    The model holds afterwards what it held before; the head stays as it was trained.

    Args:
        model: the adapted model.
        loss: scalar loss of the model on a batch.
        batches: one for each step.
        adapters: site -> fresh adapter; trained in place.
        steps: how many.
        lr: of the adapters.
        head_lr: of the head.
        track: shows progress.

    Raises:
        SettingError: if there are too few batches.
        FloatingPointError: if the loss is not finite.
    """
    head = list(model.head_parameters.values())
    with model.swapped(adapters):
        groups = [{"params": list(model.adapters.parameters()), "lr": lr}]
        if head:
            groups.append({"params": head, "lr": head_lr})
        losses = _train(model, loss, batches, groups, steps, track, "adapter")
        for parameter in model.adapters.parameters():
            parameter.grad = None
    share = -(-steps // 4)
    _log.info(
        "adapters at %d sites warmed up in %d steps: mean loss %.4f in the first %d, %.4f in the last %d",
        *(len(adapters), steps, fmean(losses[:share]), share, fmean(losses[-share:]), share),
    )


def _train(
    model: AdaptedModel,
    loss: Loss,
    batches: Iterator[Batch],
    groups: Iterable[Mapping[str, Any]],
    steps: int,
    track: Track,
    what: str,
) -> list[float]:
    """The loss of each step."""
    model.eval()
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    losses: list[float] = []
    for batch in track(islice(batches, steps), f"warming up the {what}s".replace("heads", "head"), steps):
        optimizer.zero_grad()
        value = loss(model, batch)
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss of {what} warm-up step {len(losses)} is {losses[-1]}; lower probe.{what}_warmup_lr"
            )
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if len(losses) < steps:
        raise SettingError(f"probe.{what}_warmup_steps", steps, "there are no batches to warm up on; use 0")
    return losses
