"""An adapted model as a folder that PEFT loads, checked by loading it."""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from heterolora import __version__
from heterolora.adapters.base import Adapter, AdapterFamily, plain_factors
from heterolora.adapters.dora import Decomposed
from heterolora.adapters.lora import LoRA
from heterolora.backbone import fingerprint
from heterolora.errors import SettingError
from heterolora.linear import sharing
from heterolora.model import AdaptedModel
from heterolora.peft_config import CONFIG, WEIGHTS, adapter_config, module_of
from heterolora.peft_files import Factors, peft_tensors
from heterolora.report.card import Exported, Origin, model_card
from heterolora.report.files import check_new_folder, whole_folder, write_json, write_text
from heterolora.shortcuts import write_rest
from heterolora.space import Space
from heterolora.tasks.base import Task

_log = logging.getLogger(__name__)

Logits = Callable[[nn.Module], torch.Tensor]
"""What a model, ours or PEFT's, answers to one fixed batch."""

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""How transformers names its classes, and what PEFT calls what they are for."""

_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}
"""Largest difference of two logits, as a share of the largest logit, that rounding explains.

Some architectures compute norms and attention in float32 whatever the model's dtype is: float64 is no better than that.
On a half-precision backbone PEFT rounds the head and adds deltas before it rounds, and folded weights are rounded; that
factors and head came back to the bit is what tells there.
"""


class ExportError(RuntimeError):
    """What was written does not come back as it was; the folder was not kept."""


def agreement(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, who: str) -> tuple[float, float]:
    """Largest difference of two sets of logits, and the largest logit.

    Args:
        got: what came back.
        expected: what it should be.
        dtype: the coarser of those in which they were computed.
        who: gave the former, for the message.

    Raises:
        ExportError: if they differ by more than rounding explains.
    """
    expected = expected.double()
    difference = (got.double() - expected).abs().max().item() if got.shape == expected.shape else math.inf
    largest = expected.abs().max().item()
    if not difference <= _ROUNDING[dtype] * largest:  # a NaN is no agreement
        raise ExportError(
            f"the logits of {who} differ by up to {difference:.3g} from ours, of which the largest is {largest:.3g}"
        )
    return difference, largest


@dataclass(frozen=True)
class Export:
    """What a run hands over at its end.

    Args:
        peft: write ``RUN/peft``, a folder that PEFT and transformers load.
        fold_scale: write ``scale * B`` as ``lora_B``, which readers of ``r`` and ``lora_alpha`` alone understand, too;
            false: leave B as it is and put the scale into ``alpha_pattern``, which PEFT alone reads, to the last bit.
    """

    peft: bool
    fold_scale: bool


NO_EXPORT = Export(peft=False, fold_scale=True)
"""For runs of which nothing is kept but a row."""


def export_peft(
    model: AdaptedModel, folder: Path, logits: Logits, *, fold_scale: bool, origin: Origin | None = None
) -> Exported:
    """Write the adapters that are on, and the head, for PEFT; then load them with PEFT and compare.

    PEFT gets LoRA: of other families the two factors whose product is the map, which hold more numbers than were
    trained where a family makes them from fewer.

    The folder holds ``adapter_config.json``, ``adapter_model.safetensors``, a model card, ``heterolora.json``
    (allocation, fingerprint of the backbone, what is missing), and where shortcuts have rank, which PEFT cannot hold,
    ``shortcuts.safetensors``. If no LoRA site has rank, there is nothing for PEFT, and the head is there, too.

    Args:
        model: it is left as it was.
        folder: must not exist, or be empty; the one above it must exist.
        logits: what a model answers to one real batch, on the model's device; called without gradients, in evaluation
            mode.
        fold_scale: see ``Export``.
        origin: the run, for the card and ``heterolora.json``.

    Raises:
        SettingError: if the folder cannot be made.
        ExportError: if ranks, factors, head or logits come back different; nothing is left then.
    """
    check_new_folder(folder, "folder")
    parts = _parts(model)
    with whole_folder(folder) as scratch, _evaluating(model), torch.no_grad():
        difference = largest = None
        if parts.modules:
            config = adapter_config(
                model.space.sites,
                {name: adapter.rank for name, adapter in parts.lora.items()},
                {name: adapter.scale for name, adapter in parts.lora.items()},
                fold_scale=fold_scale,
                task_type="SEQ_CLS" if parts.saved else None,
                modules_to_save=parts.saved,
                base_model=_base_model(model.backbone),
                fan_in_fan_out=_transposed(model.backbone, parts.modules),
                dropout=next(iter(parts.lora.values())).dropout,
                dora=any(factors.lengths is not None for factors in parts.modules.values()),
            )
            write_json(scratch / CONFIG, dict(sorted(config.items())))
            tensors = peft_tensors(parts.modules, _head(model, parts.saved), fold_scale)
            save_file(tensors, scratch / WEIGHTS, {"format": "pt"})
            difference, largest = _compare(model, scratch, parts, logits, fold_scale)
        found = _exported(model, parts, fold_scale, difference, largest)
        for module, others in found.shared.items():
            _log.warning("%s is the weight of %s, too: PEFT's merge_and_unload would change both", module, others)
        write_rest(
            scratch,
            model,
            list(parts.shortcuts),
            _notes(model, found, origin),
            fingerprint(model.backbone, sorted(model.head)),
            head=not parts.modules,
        )
        write_text(scratch / "README.md", model_card(model.space.sites, found, _settings(model.backbone), origin))
    return found


def config_to_train(
    backbone: nn.Module, head: Iterable[str], space: Space, ranks: Mapping[str, int], family: AdapterFamily
) -> dict[str, Any]:
    """The content of an ``adapter_config.json`` for PEFT to train an allocation with, and the head with it.

    PEFT scales by alpha over rank, and is told the alpha that gives the family's scale at each site.

    Args:
        backbone: the model, with weights or without.
        head: names of the parameters that are trained with the task.
        space: the candidates; shortcuts are left out, PEFT cannot hold them.
        ranks: site name -> rank.
        family: must be LoRA.

    Raises:
        SettingError: if no LoRA site has rank, or the adapters are not LoRA.
    """
    if not isinstance(family, LoRA):
        raise SettingError("adapter", type(family).__name__, "is for PEFT to train, which knows LoRA; use adapter=lora")
    modules = {site.name: module for site in space.sites if (module := module_of(site)) is not None}
    held = {name: rank for name, rank in ranks.items() if rank and name in modules}
    saved = head_modules(backbone, frozenset(head))
    config = adapter_config(
        space.sites,
        held,
        {name: family.scale_at(space[name], rank) for name, rank in held.items()},
        fold_scale=False,
        task_type=next((kind for end, kind in _TASK_TYPES.items() if type(backbone).__name__.endswith(end)), None),
        modules_to_save=saved,
        base_model=_base_model(backbone),
        fan_in_fan_out=_transposed(backbone, [modules[name] for name in held]),
        dropout=family.dropout,
    )
    return dict(sorted((config | {"inference_mode": False}).items()))


def _base_model(backbone: nn.Module) -> str | None:
    """Hub id or folder that transformers loaded it from."""
    return getattr(getattr(backbone, "config", None), "_name_or_path", None) or None


def _transposed(backbone: nn.Module, modules: Iterable[str]) -> bool:
    """Whether these layers hold their weights transposed (``Conv1D``)."""
    layers = [backbone.get_submodule(module) for module in modules]
    linear = [layer for layer in layers if not isinstance(layer, nn.Embedding)]
    return bool(linear) and all(hasattr(layer, "nx") for layer in linear)


@dataclass(frozen=True)
class _Parts:
    """The adapters that are on, by where they can go."""

    lora: Mapping[str, Adapter]
    shortcuts: Mapping[str, Adapter]
    modules: Mapping[str, Factors]
    saved: Sequence[str]


def _parts(model: AdaptedModel) -> _Parts:
    on: dict[str, Any] = {name: adapter for name in model.held if (adapter := model.active_adapter(name)) is not None}
    lora, shortcuts, modules = {}, {}, {}
    for name, adapter in on.items():
        module = module_of(model.space[name])
        if module is None:
            shortcuts[name] = adapter
        else:
            lora[name] = adapter
            modules[module] = _factors(adapter, model.space[name].lookup)
    return _Parts(lora, shortcuts, modules, head_modules(model.backbone, model.head))


def _factors(adapter: Adapter, lookup: bool) -> Factors:
    if isinstance(adapter, Decomposed):
        return Factors(adapter.A.detach(), adapter.B.detach(), adapter.scale, adapter.m.detach())
    return Factors(*plain_factors(adapter), adapter.scale, lookup=lookup)


def head_modules(backbone: nn.Module, head: frozenset[str]) -> list[str]:
    """The largest modules of which every parameter belongs to the head.

    PEFT wraps whole modules, and one inside another would be wrapped twice.

    Raises:
        SettingError: if a parameter of the head belongs to no module but the whole model.
    """
    found = set()
    for name in sorted(head):
        path = name.rpartition(".")[0]
        while (above := path.rpartition(".")[0]) and _names(backbone, above) <= head:
            path = above
        if not path:
            raise SettingError(
                "export.peft", True, f"the head's parameter {name} is in no module of its own; use false"
            )
        found.add(path)
    return sorted(found)


def _names(backbone: nn.Module, path: str) -> set[str]:
    return {f"{path}.{name}" for name, _ in backbone.get_submodule(path).named_parameters()}


def _head(model: AdaptedModel, saved: Sequence[str]) -> dict[str, torch.Tensor]:
    """Everything that PEFT will look for in the modules that are stored whole, in the dtype it was trained in."""
    return {
        f"{path}.{name}": value
        for path in saved
        for name, value in model.backbone.get_submodule(path).state_dict().items()
    }


def _settings(backbone: nn.Module) -> dict[str, Any]:
    config = getattr(backbone, "config", None)
    values = {key: getattr(config, key, None) for key in ("num_labels", "pad_token_id")}
    return {key: value for key, value in values.items() if value is not None}


def _exported(
    model: AdaptedModel, parts: _Parts, fold_scale: bool, difference: float | None, largest: float | None
) -> Exported:
    own = sum(factors.A.numel() + factors.B.numel() for factors in parts.modules.values())
    rest = sum(factor.numel() for adapter in parts.shortcuts.values() for factor in plain_factors(adapter))
    return Exported(
        modules={module: len(factors.A) for module, factors in sorted(parts.modules.items())},
        sites={name: adapter.rank for name, adapter in parts.lora.items()},
        missing={name: adapter.rank for name, adapter in parts.shortcuts.items()},
        saved=parts.saved,
        parameters=(own, own + rest),
        fold_scale=fold_scale,
        difference=difference,
        largest=largest,
        dtype=str(next(model.backbone.parameters()).dtype).removeprefix("torch."),
        shared={module: others for module in sorted(parts.modules) if (others := sharing(model.backbone, module))},
    )


def _notes(model: AdaptedModel, found: Exported, origin: Origin | None) -> dict[str, Any]:
    return {
        "heterolora": __version__,
        "base": _base_model(model.backbone),
        "model": dict(origin.model) if origin else None,
        "outputs": getattr(getattr(model.backbone, "config", None), "num_labels", None),
        "allocation": dict(origin.allocation) if origin else {"ranks": model.ranks},
        "in_peft": dict(found.sites),
        "not_in_peft": dict(found.missing),
        "fold_scale": found.fold_scale,
        "check": {"largest_difference": found.difference, "largest_logit": found.largest, "dtype": found.dtype},
    }


@contextmanager
def _evaluating(model: AdaptedModel) -> Iterator[None]:
    """Evaluation mode for a while; PEFT's changes of ``requires_grad`` are undone, too."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, grad in wanted.items():
            parameter.requires_grad_(grad)


# -- at the end of a run -----------------------------------------------------------------------------------------------


def hand_over(model: AdaptedModel, run: Path, logits: Logits, settings: Export, origin: Origin) -> dict[str, Any]:
    """Write ``RUN/peft``; an export that fails is said, and is no failure of the run, whose results are there.

    Returns:
        Plain values for ``summary.json``.
    """
    folder = run / "peft"
    try:
        found = export_peft(model, folder, logits, fold_scale=settings.fold_scale, origin=origin)
    except (ExportError, SettingError, OSError) as error:
        _log.error("nothing was exported: %s", error)
        return {"folder": None, "error": str(error)}
    if not found.modules:
        _log.info("nothing for PEFT to load, all rank is at shortcuts; they and the head are in %s", folder)
    elif found.missing:
        _log.info(
            "exported to %s without %d shortcuts, which PEFT cannot hold (search_space=lora_all has none)",
            folder,
            len(found.missing),
        )
    return {
        "folder": folder.name,
        "modules": len(found.modules),
        "parameters": found.parameters[0],
        "not_in_peft": len(found.missing),
        "largest_difference": found.difference,
        "largest_logit": found.largest,
    }


def origin_of(
    config: Mapping[str, Any], task: Task, summary: Mapping[str, Any], allocation: Mapping[str, Any]
) -> Origin:
    """What a card says of a run.

    Args:
        config: the run's resolved config.
        task: the run's task, completed.
        summary: the content of ``summary.json``.
        allocation: the content of ``allocation.json``.
    """
    return Origin(
        title=summary["title"],
        task=task.name,
        text=task.inputs,
        max_length=task.max_length,
        labels=task.labels if task.outputs > 1 else None,
        metrics=summary["metrics"],
        collapsed=[split for split, found in summary["collapsed"].items() if found],
        note=summary["data"]["note"],
        seed=summary["seed"],
        model=config["model"],
        allocation=allocation,
        versions=summary["versions"],
    )


# -- the check ---------------------------------------------------------------------------------------------------------


def _compare(model: AdaptedModel, folder: Path, parts: _Parts, logits: Logits, fold_scale: bool) -> tuple[float, float]:
    """Largest difference between the logits of what PEFT loads and ours without shortcuts, and the largest logit.

    Raises:
        ExportError: if they differ by more than rounding, or what PEFT holds is not what was trained.
    """
    theirs = _reloaded(model, folder)
    _compare_factors(theirs, parts, fold_scale)
    _compare_head(theirs, model, parts)
    off = set(model.held) - set(parts.lora) - set(parts.shortcuts)
    model.switch_off(off | set(parts.shortcuts))
    try:
        expected = logits(model)
    finally:
        model.switch_off(off)
    try:
        got = logits(theirs)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ExportError(f"PEFT's model gives no answer ({' '.join(str(error).split())})") from error
    return agreement(got, expected, next(model.backbone.parameters()).dtype, "PEFT")


def _reloaded(model: AdaptedModel, folder: Path) -> Any:
    """What stock PEFT makes of the folder and a backbone that shares its frozen weights with ours."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT's own use of transformers, which a user can do nothing about.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        try:
            loaded = PeftModel.from_pretrained(
                _bare_copy(model), str(folder), torch_device=str(next(model.backbone.parameters()).device)
            )
        except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ExportError(
                f"PEFT cannot load it ({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error
    return loaded.eval()


def _bare_copy(model: AdaptedModel) -> nn.Module:
    """The backbone as a user has it: frozen weights shared, no hooks, and a head of NaN that must be overwritten."""
    backbone = model.backbone
    frozen = [parameter for name, parameter in backbone.named_parameters() if name not in model.head]
    with model.disabled():
        copied: nn.Module = copy.deepcopy(backbone, {id(value): value for value in (*frozen, *backbone.buffers())})
    dtype = next(backbone.parameters()).dtype
    for path in head_modules(backbone, model.head):
        module = copied.get_submodule(path)
        for inner in module.modules():
            inner._forward_pre_hooks.clear()  # ours, for a head in float32 on a half-precision backbone
        module.to(dtype)
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    return copied


def _compare_factors(theirs: Any, parts: _Parts, fold_scale: bool) -> None:
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name: layer for name, layer in theirs.get_base_model().named_modules() if isinstance(layer, LoraLayer)
    }
    if layers.keys() != parts.modules.keys():
        raise ExportError(f"PEFT has adapters at other modules: {sorted(layers.keys() ^ parts.modules.keys())[:3]}")
    for name, layer in layers.items():
        ours, scale = parts.modules[name], layer.scaling["default"]
        if ours.lookup:
            A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]  # noqa: N806
        else:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # noqa: N806
        if layer.r["default"] != len(ours.A):
            raise ExportError(f"PEFT gives {name} rank {layer.r['default']}, not {len(ours.A)}")
        expected = ours.B * ours.scale if fold_scale else ours.B
        if not (torch.equal(A, ours.A) and torch.equal(B, expected)):
            raise ExportError(f"PEFT's factors of {name} are not those that were trained")
        wanted = 1.0 if fold_scale else ours.scale
        if not math.isclose(scale, wanted, rel_tol=1e-15):
            raise ExportError(f"PEFT scales {name} by {scale}, not by {wanted}")


def _compare_head(theirs: Any, model: AdaptedModel, parts: _Parts) -> None:
    for path in parts.saved:
        wrapper = theirs.get_base_model().get_submodule(path)
        held = getattr(wrapper, "modules_to_save", {})
        state = held["default"].state_dict() if "default" in held else {}
        for name, value in model.backbone.get_submodule(path).state_dict().items():
            if name not in state or not torch.equal(state[name], value.to(state[name].dtype)):
                raise ExportError(f"PEFT's {path}.{name} is not what was trained")
