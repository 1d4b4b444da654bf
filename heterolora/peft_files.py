"""The tensors of a PEFT adapter: read as factors by module, and written from adapters of ours."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from heterolora.errors import SettingError
from heterolora.peft_config import CONFIG, WEIGHTS, AdapterConfig, read_config

PREFIX = "base_model.model."
"""What PEFT puts before every path of the backbone."""


@dataclass(frozen=True)
class Factors:
    """One low-rank map ``scale * B A``.

    Attributes:
        A: ``[rank, in]``.
        B: ``[out, rank]``.
        scale: factor of the product.
        lengths: ``[out]``, those of the new weight's rows; None: the map is the product (DoRA's is not).
        lookup: whether it acts on ids, at an embedding.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    lengths: torch.Tensor | None = None
    lookup: bool = False


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder of PEFT's holds.

    Attributes:
        config: ranks and scales as the config has them.
        modules: path of a linear layer -> its map; modules whose rank fell to 0 are left out.
        saved: name of a parameter -> its trained value: the head, and whatever else was stored whole.
    """

    config: AdapterConfig
    modules: Mapping[str, Factors]
    saved: Mapping[str, torch.Tensor]


def peft_tensors(
    modules: Mapping[str, Factors], saved: Mapping[str, torch.Tensor], fold_scale: bool
) -> dict[str, torch.Tensor]:
    """The content of ``adapter_model.safetensors``.

    Args:
        modules: path of a linear layer -> its map.
        saved: name of a parameter of the head -> its value.
        fold_scale: write ``scale * B``.
    """
    tensors = {}
    for module, factors in modules.items():
        for factor, value in (("A", factors.A), ("B", factors.B * factors.scale if fold_scale else factors.B)):
            end = f"lora_embedding_{factor}" if factors.lookup else f"lora_{factor}.weight"
            tensors[f"{PREFIX}{module}.{end}"] = value
        if factors.lengths is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = factors.lengths
    tensors |= {f"{PREFIX}{name}": value for name, value in saved.items()}
    # A copy each: safetensors refuses tensors that share memory.
    return {name: value.detach().cpu().clone().contiguous() for name, value in sorted(tensors.items())}


def read_adapter(folder: Path, setting: str) -> PeftAdapter:
    """Read a folder that PEFT wrote.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        setting: what named it, for messages.

    Raises:
        SettingError: if a file is missing or damaged, config and tensors disagree, or the adapter is none that a LoRA
            of ours can hold.
    """
    config = read_config(folder / CONFIG, setting)
    path = folder / WEIGHTS
    if not path.is_file():
        raise SettingError(setting, folder, f"holds no {WEIGHTS}; pickles are not read, save with safe_serialization")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise SettingError(setting, path, f"cannot be read ({error})") from error
    factors: dict[str, dict[str, torch.Tensor]] = {}
    saved, lookups = {}, set()
    for name, value in tensors.items():
        if not name.startswith(PREFIX):
            raise SettingError(setting, path, f"holds {name}, but names of PEFT begin with {PREFIX}")
        module, factor, end = name.removeprefix(PREFIX).partition(".lora_")
        if not factor:
            saved[module] = value
        elif end.removesuffix(".weight") in ("A", "B", "E"):
            factors.setdefault(module, {})[end[0]] = value
        elif end in ("embedding_A", "embedding_B"):
            factors.setdefault(module, {})[end[-1]] = value
            lookups.add(module)
        else:
            raise SettingError(
                setting, path, f"holds {name}, which is no factor of a linear layer's LoRA, or of an embedding's"
            )
    if both := sorted(module for module in lookups if f"{PREFIX}{module}.lora_A.weight" in tensors):
        raise SettingError(setting, path, f"holds factors of a linear layer and of an embedding for {both[0]}")
    modules = {module: _factors(found, config, module, path, setting) for module, found in factors.items()}
    modules |= {module: replace(modules[module], lookup=True) for module in lookups}
    return PeftAdapter(config, {module: found for module, found in modules.items() if len(found.A)}, saved)


def _factors(
    found: Mapping[str, torch.Tensor], config: AdapterConfig, module: str, path: Path, setting: str
) -> Factors:
    needed = {"A", "B", "E"} if config.kind == "ADALORA" else {"A", "B"}
    if found.keys() != needed:
        raise SettingError(setting, path, f"{module} has factors {sorted(found)}, needed: {sorted(needed)}")
    A, B, rank = found["A"], found["B"], config.rank_of(module)  # noqa: N806
    if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == rank:
        raise SettingError(
            setting, path, f"{module} has rank {rank} in {CONFIG}, but factors {tuple(A.shape)} and {tuple(B.shape)}"
        )
    if "E" in found:  # AdaLoRA's singular values, one a row of A
        A = A * found["E"]  # noqa: N806
    return Factors(A, B, config.scale_of(module))
