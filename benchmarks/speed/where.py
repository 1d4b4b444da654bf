"""Where the time of the main job's training steps goes, by torch's profiler."""

from collections import defaultdict
from itertools import islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.bench import Bench
from benchmarks.speed.results import Found, WrongResultError, alone
from benchmarks.speed.subjects import FULL, QV_R8, Placement, ours
from heterolora.data.module import TextData
from heterolora.run import compose

_NARROW = 64
"""A product with a side of at most this is an adapter's, or the head's: layers are wider."""

_GROUPS = {
    "attention": ("scaled_dot_product", "flash_attention", "softmax", "bmm"),
    "norms": ("layer_norm", "rms_norm"),
    "activations": ("gelu", "silu", "relu", "tanh"),
    "optimizer": ("adamw", "clip_grad", "_foreach", "linalg_vector_norm"),
    "embeddings": ("embedding", "index_select"),
    "sums and scalings": ("aten::add", "aten::mul", "aten::sum", "aten::div"),
    "copies, views, memory": (
        "copy",
        "empty",
        "clone",
        "view",
        "transpose",
        "zero",
        "fill",
        "as_strided",
        "aten::t",
        "cat",
    ),
}
_WIDE, _THIN, _REST = (
    "products with frozen weights",
    "products of adapters and head",
    "everything else, Python included",
)


def where(bench: Bench) -> Found:
    """Seconds a step by kind of operation: the main job's sentences and budget, and LoRA on q and v for comparison."""
    rows = []
    for placement in (FULL, QV_R8):
        seconds, whole = _profiled(bench, placement)
        rows += [
            alone(f"{placement.name}: {kind}, {100 * value / whole:.1f} % of a step", [value])
            for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
        ]
    return Found(rows, (), {"model": bench.encoder, "task": "rotten_tomatoes"})


def _profiled(bench: Bench, placement: Placement) -> tuple[dict[str, float], float]:
    """Seconds of a step by kind, and of the whole step."""
    parts = compose(["task=rotten_tomatoes", f"model={bench.encoder}", "data.cache_dir=null", "data.limit=640"])
    splits, _, task = parts["data"].splits(parts["task"])
    backbone = bench.shelf.backbone(bench.encoder)
    data = TextData(splits, task, backbone.tokenizer, backbone.positions, parts["data"], bench.seed)
    learner = ours(backbone, placement, bench.encoder, bench.seed)
    learner.optimizer = torch.optim.AdamW(learner.trained, lr=1e-7, weight_decay=0.01, fused=True)
    count = 2 if bench.short else 20
    batches = [_inputs(batch) for batch in islice(data.train_dataloader(), count)]
    learner.model.train()
    learner.step(batches[0])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for batch in batches:
            learner.step(batch)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        seconds[_kind(event)] += event.self_cpu_time_total / 1e6 / count
    if min(seconds.get(_WIDE, 0), seconds.get(_THIN, 0)) <= 0 and not bench.short:
        raise WrongResultError("no products of frozen weights, or of adapters, were seen")
    return dict(seconds), sum(seconds.values())


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "index"}


def _kind(event: Any) -> str:
    name = event.key.lower()
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        sides = [side for shape in event.input_shapes for side in shape if len(shape) == 2]
        return _THIN if sides and min(sides) <= _NARROW else _WIDE
    return next((kind for kind, parts in _GROUPS.items() if any(part in name for part in parts)), _REST)
