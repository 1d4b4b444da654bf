"""PEFT's ``adapter_config.json`` as plain values: written from an allocation and read back, without torch or PEFT.

What PEFT makes of each key was tried out with 0.21: patterns are regular expressions that must match up to the end of a
module's path, the first match in the file's order wins, and the file's order is alphabetical. So patterns written here
are anchored and escaped full paths, of which no two match the same module.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from heterolora.errors import SettingError
from heterolora.sites import Port, Site

T = TypeVar("T")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NOTES = "heterolora.json"
"""Ours, beside PEFT's files: see ``heterolora.shortcuts``."""

_ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")

_UNDERSTOOD = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision", "peft_version"}
    | {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    | {"init_lora_weights", "eva_config", "corda_config", "megatron_core", "qalora_group_size", "runtime_config"}
    | set(_ADALORA)
)
"""Keys whose every value is either honoured here or changes nothing that an adapter computes. Others must be off."""

_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the frozen weights as they are."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says about ranks and scales.

    Attributes:
        kind: ``LORA`` or ``ADALORA``.
        rank: of modules that no pattern matches (AdaLoRA: the rank that training began with).
        alpha: likewise.
        ranks: pattern -> rank, in the file's order; AdaLoRA: path of a module -> rank.
        alphas: pattern -> alpha, in the file's order.
        rslora: whether a scale is alpha / sqrt(rank) in place of alpha / rank.
        dropout: probability with which an input feature is dropped in training.
        targets: full paths or ends of paths of the modules that have an adapter, or one regular expression.
        excluded: likewise, of those that have none after all.
        base_model: hub id or folder of the backbone, if it is known.
    """

    kind: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dropout: float
    targets: Sequence[str] | str
    excluded: Sequence[str] | str
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """Rank of a module's adapter."""
        if self.kind == "ADALORA":
            return self.ranks.get(module, self.rank)
        return _first_match(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of ``B A``."""
        if self.kind == "ADALORA":  # alpha over the rank of the beginning, and PEFT's guard against a division by 0
            return (self.alpha if self.alpha > 0 else float(self.rank)) / (self.rank + 1e-5)
        rank, alpha = self.rank_of(module), _first_match(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def among(self, modules: Iterable[str]) -> list[str]:
        """Those of these modules that have an adapter."""
        return [m for m in modules if _targets(self.targets, m) and not _targets(self.excluded, m)]


def _first_match(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _targets(wanted: Sequence[str] | str, module: str) -> bool:
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def module_of(site: Site) -> str | None:
    """Path of the linear layer at which a site's map sits; None for a shortcut, which sits at none."""
    return site.sink.module if isinstance(site.sink, Port) else None


def adapter_config(
    sites: Iterable[Site],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    fold_scale: bool,
    task_type: str | None,
    modules_to_save: Sequence[str],
    base_model: str | None,
    fan_in_fan_out: bool,
    dropout: float,
    dora: bool = False,
) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for an allocation; shortcuts and sites without rank are not in it.

    Args:
        sites: the candidates.
        ranks: site name -> rank; sites that are not named have none.
        scales: site name -> factor of ``B A``, of every site with rank.
        fold_scale: the weights beside it hold ``scale * B``, so that alpha is the rank everywhere and a reader that
            knows ``r`` and ``lora_alpha`` alone is right; otherwise alpha says the scale.
        task_type: PEFT's name of the kind of task, e.g. ``SEQ_CLS``.
        modules_to_save: paths of the modules that are stored whole: the head.
        base_model: hub id or folder of the backbone, if PEFT shall find it by itself.
        fan_in_fan_out: whether the layers hold their weights transposed (``Conv1D``).
        dropout: probability with which an adapter's input feature is dropped in training.
        dora: the weights beside it hold the lengths of rows, too.

    Returns:
        Plain values; patterns and modules are sorted, so that equal allocations give equal files.

    Raises:
        SettingError: if no LoRA site has rank.
    """
    held = {m: site.name for site in sites if (m := module_of(site)) is not None and ranks.get(site.name, 0) > 0}
    if not held:
        raise SettingError("export.peft", True, "PEFT holds LoRA modules, and no LoRA site has rank; use false")
    modules = sorted(held)
    rank = {module: ranks[held[module]] for module in modules}
    alpha = {m: rank[m] if fold_scale else _alpha(scales[held[m]], rank[m]) for m in modules}
    largest = max(modules, key=lambda module: rank[module])  # the first of the largest
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank[largest],
        "lora_alpha": alpha[largest],
        "lora_dropout": dropout,
        "rank_pattern": {_pattern(m): rank[m] for m in modules if rank[m] != rank[largest]},
        "alpha_pattern": {_pattern(m): alpha[m] for m in modules if alpha[m] != alpha[largest]},
        "target_modules": modules,
        "modules_to_save": sorted(modules_to_save) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": dora,
        "bias": "none",
        "init_lora_weights": True,
    }


def _pattern(module: str) -> str:
    return "^" + re.escape(module)


def _alpha(scale: float, rank: int) -> float:
    """The number whose quotient by the rank is the scale to the last bit, where there is one; it is at most one off."""
    product = scale * rank
    near = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    found = next((alpha for alpha in near if alpha / rank == scale), product)
    return int(found) if found == int(found) else found


def read_config(path: Path, setting: str) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Args:
        path: the file.
        setting: what named it, for messages.

    Raises:
        SettingError: if it cannot be read, is damaged, or asks for what a LoRA of ours cannot do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(setting, path, f"cannot be read ({error})") from error
    if not isinstance(content, dict) or "peft_type" not in content:
        raise SettingError(setting, path, "is no adapter_config.json of PEFT: it names no peft_type")
    _refuse(content, path, setting)
    try:
        return _parsed(content)
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise SettingError(setting, path, f"is damaged ({type(error).__name__}: {error})") from error


def _refuse(content: Mapping[str, Any], path: Path, setting: str) -> None:
    kind = content["peft_type"]
    if kind not in ("LORA", "ADALORA"):
        raise SettingError(setting, path, f"is an adapter of type {kind}; only LORA and ADALORA can be loaded")
    if content.get("bias", "none") != "none":
        raise SettingError(setting, path, f"trains biases (bias={content['bias']}), which stay frozen here")
    start = content.get("init_lora_weights", True)
    if start not in _KEEPS_THE_BASE:
        raise SettingError(setting, path, f"init_lora_weights={start} changes the frozen weights; convert it with PEFT")
    if others := sorted(key for key, value in content.items() if value and key not in _UNDERSTOOD):
        shown = ", ".join(f"{key}={content[key]}" for key in others)
        raise SettingError(setting, path, f"asks for what a plain LoRA is not: {shown}")


def _parsed(content: Mapping[str, Any]) -> AdapterConfig:
    adaptive = content["peft_type"] == "ADALORA"
    patterns = content.get("rank_pattern") or {}
    if adaptive:  # of each module, which of its first units are left
        ranks = {_without_factor(name): sum(kept) for name, kept in patterns.items()}
    else:
        ranks = {name: int(rank) for name, rank in patterns.items()}
    for pattern in (*(() if adaptive else ranks), *(content.get("alpha_pattern") or {})):
        re.compile(pattern)
    targets = content.get("target_modules")
    return AdapterConfig(
        kind=content["peft_type"],
        rank=int(content["init_r"] if adaptive else content["r"]),
        alpha=float(content["lora_alpha"]),
        ranks=ranks,
        alphas={name: float(alpha) for name, alpha in (content.get("alpha_pattern") or {}).items()},
        rslora=bool(content.get("use_rslora", False)),
        dropout=float(content.get("lora_dropout", 0.0)),
        targets=targets if isinstance(targets, str) else list(targets or ()),
        excluded=content.get("exclude_modules") or (),
        base_model=content.get("base_model_name_or_path") or None,
    )


def _without_factor(name: str) -> str:
    """``model.layers.0.q_proj.lora_E`` (or with the adapter's name after it) -> ``model.layers.0.q_proj``."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]
