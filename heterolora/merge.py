"""A finished run as a plain checkpoint: LoRA folded into the weights, what cannot be folded beside them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn

from heterolora import __version__
from heterolora.backbone import Dtype
from heterolora.data.module import encode
from heterolora.errors import SettingError
from heterolora.export import ExportError, agreement
from heterolora.linear import sharing
from heterolora.loading import LoadedRun
from heterolora.peft_config import module_of
from heterolora.peft_in import from_peft, merged_backbone
from heterolora.quiet import no_bars
from heterolora.report.files import check_new_folder, whole_folder
from heterolora.shortcuts import write_rest
from heterolora.tasks.base import text_columns

_TEXTS = (
    "a gorgeous , witty , seductive movie .",
    "It rained for three days, and the river rose above the lower bridge.",
    "No.",
    "He said the company would hire 1,200 people by March, twice as many as last year.",
)
"""What the check reads: a run's own data may not be where they were."""


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        folded: number of LoRA modules that are part of the weights now.
        missing: names of the shortcuts that are in ``shortcuts.safetensors``.
        dtype: of the weights.
        difference: largest difference between logits of the checkpoint, loaded again, and of the run without shortcuts.
        largest: largest logit, for comparison.
    """

    folded: int
    missing: tuple[str, ...]
    dtype: str
    difference: float
    largest: float


@torch.no_grad()
def merge(run: LoadedRun, out: Path, dtype: Dtype | None = None) -> Merged:
    """Write a run's model as transformers does, with tokenizer and names of the classes; then load it and compare.

    ``W + scale B A`` is computed in float32 at least, and refused if it is not finite. Shortcuts are paths of their own
    and cannot be folded: they are left in ``shortcuts.safetensors`` and ``heterolora.json``, for ``heterolora.load``.

    Args:
        run: a finished run; it is left as it was.
        out: must not exist, or be empty; the folder above it must exist.
        dtype: of the weights written; None: as the run held them.

    Raises:
        SettingError: if the folder cannot be made, or a weight cannot take what shall be folded into it.
        ExportError: if the checkpoint gives other logits; nothing is left then.
    """
    check_new_folder(out, "OUT")
    model = run.model
    on = {name: adapter for name in model.held if (adapter := model.active_adapter(name)) is not None}
    places = {name: module for name in on if (module := module_of(model.space[name])) is not None}
    missing = tuple(name for name in on if name not in places)
    target = next(model.backbone.parameters()).dtype if dtype is None else getattr(torch, dtype)
    with model.disabled():
        plain = _shared_copy(model.backbone)
    _forget_quantiser(plain)
    _fold(plain, {module: on[name] for name, module in places.items()})
    _settle(plain, target)
    _name_classes(plain, run)
    shown = str(target).removeprefix("torch.")
    coarser = max(target, next(model.backbone.parameters()).dtype, key=lambda kind: torch.finfo(kind).eps)
    with whole_folder(out) as scratch, no_bars():
        plain.save_pretrained(scratch)
        run.tokenizer.save_pretrained(scratch)
        difference, largest = _compare(run, scratch, missing, target, coarser)
        node = _config(run).get("model", {})
        again = merged_backbone(scratch, {**node, "dtype": shown}, run.task.outputs)
        notes = {
            "heterolora": __version__,
            "model": {**node, "dtype": shown},
            "outputs": run.task.outputs,
            "merged_from": {"backbone": run.summary["backbone"], "sites": {name: on[name].rank for name in places}},
            "not_merged": {name: on[name].rank for name in missing},
            "check": {"largest_difference": difference, "largest_logit": largest, "dtype": shown},
        }
        write_rest(scratch, model, list(missing), notes, again.fingerprint, head=False)
        if missing:
            whole = from_peft(again, scratch)
            agreement(_answers(run, whole), _answers(run, model), coarser, "the checkpoint and its shortcuts")
    return Merged(len(places), missing, shown, difference, largest)


def _config(run: LoadedRun) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    return found


def _shared_copy(backbone: nn.Module) -> Any:
    """A model of its own whose tensors are the backbone's."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    return copy.deepcopy(backbone, {id(value): value for value in tensors})


def _forget_quantiser(plain: Any) -> None:
    """Weights from a GGUF file are plain numbers once they are read, but transformers would not write them."""
    if (quantiser := getattr(plain, "hf_quantizer", None)) is None:
        return
    method = quantiser.quantization_config.quant_method
    if (name := str(getattr(method, "value", method))) != "gguf":
        raise SettingError(
            "RUN", name, "weights quantised like this cannot be folded into; PEFT loads the run's export"
        )
    plain.hf_quantizer, plain.is_quantized = None, False
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config


def _fold(plain: nn.Module, adapters: Mapping[str, Any]) -> None:
    """Give each layer a new weight; the old ones belong to the run."""
    for path, adapter in adapters.items():
        module = plain.get_submodule(path)
        weight = getattr(module, "weight", None)
        if not (isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2):
            raise SettingError("RUN", path, f"{type(module).__name__} holds no plain weight to fold into")
        if others := sharing(plain, path):
            raise SettingError("RUN", path, f"its weight is that of {others}, too")
        precise = torch.promote_types(weight.dtype, torch.float32)
        delta = adapter.delta_weight().to(precise)
        folded = weight.to(precise) + (delta.T if hasattr(module, "nx") or isinstance(module, nn.Embedding) else delta)
        if not torch.isfinite(folded).all():
            raise SettingError("RUN", path, "its weight is not finite after folding")
        module.weight = nn.Parameter(folded, requires_grad=False)


def _settle(plain: nn.Module, dtype: torch.dtype) -> None:
    """Every floating parameter in one dtype, the head's too, without touching those that are shared with the run."""
    settled: dict[int, nn.Parameter] = {}
    for name, parameter in list(plain.named_parameters(remove_duplicate=False)):
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            continue
        owner, _, leaf = name.rpartition(".")
        fresh = settled.setdefault(id(parameter), nn.Parameter(parameter.to(dtype), requires_grad=False))
        if not torch.isfinite(fresh).all():
            raise SettingError("--dtype", str(dtype).removeprefix("torch."), f"{name} is too large for it")
        setattr(plain.get_submodule(owner), leaf, fresh)
    for module in plain.modules():
        module._forward_pre_hooks.clear()  # ours, for a head in float32 on a half-precision backbone


def _name_classes(plain: Any, run: LoadedRun) -> None:
    if run.task.labels is not None and run.task.outputs == len(run.task.labels):
        plain.config.id2label = dict(enumerate(run.task.labels))
        plain.config.label2id = {name: code for code, name in enumerate(run.task.labels)}


# -- the check ---------------------------------------------------------------------------------------------------------


def _compare(
    run: LoadedRun, folder: Path, missing: tuple[str, ...], dtype: torch.dtype, coarser: torch.dtype
) -> tuple[float, float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in _TEXTS:
        if tokenizer(text)["input_ids"] != run.tokenizer(text)["input_ids"]:
            raise ExportError("the tokenizer does not come back as it was")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    device = next(run.model.parameters()).device
    got = _answers(run, loaded.to(device))
    before = [name for name in run.model.held if run.model.active_adapter(name) is None]
    run.model.switch_off([*before, *missing])
    try:
        expected = _answers(run, run.model)
    finally:
        run.model.switch_off(before)
    return agreement(got, expected, coarser, "the checkpoint")


def _answers(run: LoadedRun, model: nn.Module) -> torch.Tensor:
    columns = text_columns(run.task.inputs)
    table = pd.DataFrame({column: [*_TEXTS[at % 4 :], *_TEXTS[: at % 4]] for at, column in enumerate(columns)})
    device = next(model.parameters()).device
    (batch,) = encode(table, run.task, run.tokenizer, run.positions, len(table))
    with torch.no_grad():
        return run.task.logits(model, {key: value.to(device) for key, value in batch.items()})
