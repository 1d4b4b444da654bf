"""What a run would do and need, found out without training: ``run=dry``."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from heterolora.budget import Budget
from heterolora.data.module import TextData
from heterolora.lit import LitAdapted
from heterolora.proxies.base import Proxy
from heterolora.report.memory import kept_mib, now_mib
from heterolora.scoring import Probe, sees_head
from heterolora.trainer import TrainerSettings


def planned(
    module: LitAdapted, data: TextData, budget: Budget, probe: Probe, trainer: TrainerSettings, proxy: Proxy | None
) -> dict[str, Any]:
    """Sites, budget, steps, and the memory that a step would need, measured on the longest batch.

    Args:
        module: the model, nothing enabled.
        data: the examples.
        budget: what may be held.
        probe: how sites would be scored.
        trainer: how long would be trained.
        proxy: what would look at batches before training; None: nothing.

    Returns:
        Plain values; memory in MiB, and the peak at least: a step also needs room for what it computes and drops.
    """
    model = module.model
    resolved = budget.resolve(model.space)
    head = sum(parameter.numel() for parameter in model.head_parameters.values())
    trained = head + (resolved if isinstance(resolved, int) else 0)
    optimizer = trained * 4 * 4 / 2**20  # value, gradient and two moments, in float32
    warmed = proxy is not None and probe.trains_adapters([proxy])
    loaded, kept = now_mib(), kept_by_a_step(module, data.longest_batch())
    return {
        "sites": dict(Counter(f"{site.kind}: {site.label}" for site in model.space.sites)),
        "budget": resolved if isinstance(resolved, int) else asdict(resolved),
        "head_parameters": head,
        "backbone_parameters": model.space.survey.parameters,
        "steps": {
            "optimizer steps": trainer.steps(len(data.examples["train"]), data.settings.batch_size),
            "head warm-up steps": probe.head_warmup_steps if warmed or (proxy and sees_head(proxy)) else 0,
            "adapter warm-up steps": probe.adapter_warmup_steps if warmed else 0,
            "batches scored": probe.batches if proxy else 0,
        },
        "memory_mib": {
            "process, model loaded": loaded,
            "adapters, head, optimizer": optimizer,
            "kept for the backward pass": kept,
            "expected peak, at least": None if loaded is None else loaded + optimizer + kept,
        },
    }


def kept_by_a_step(module: LitAdapted, batch: Mapping[str, torch.Tensor]) -> float:
    """MiB that one training step keeps for its backward pass, with an adapter of rank 1 at every candidate site."""
    model = module.model
    model.enable(dict.fromkeys(model.ranks, 1), module.seed)
    module.train()
    try:
        return kept_mib(model, lambda: module.scalar_loss(model, batch))
    finally:
        model.enable({}, module.seed)
