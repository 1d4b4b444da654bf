"""Adapters that PEFT trained, or that were exported from here, as an adapted model: to score, compare or continue."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heterolora.adapters.lora import LoRA
from heterolora.backbone import Backbone, Pretrained
from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.peft_config import CONFIG, NOTES, module_of
from heterolora.peft_files import Factors, PeftAdapter, read_adapter
from heterolora.shortcuts import Rest, read_rest
from heterolora.sites import Site
from heterolora.space import SearchSpace, Space, Survey, survey

_log = logging.getLogger(__name__)


def from_peft(
    backbone: Backbone, folder: str | Path, space: Space | None = None, setting: str = "folder"
) -> AdaptedModel:
    """An adapted model that computes what PEFT would, in evaluation mode.

    Where all modules have one scale, that is the scale of the adapters; where they differ, the commonest is, and the
    ratio to it goes into B. Shortcuts that an export of ours left beside PEFT's files are loaded, too.

    Args:
        backbone: what the adapter belongs to; it is frozen and used as it is.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``, and perhaps files of ours.
        space: the candidate sites; None: every LoRA site, and where the folder has shortcuts, those of their spans.
        setting: what named the folder, for messages.

    Raises:
        SettingError: if the adapter is for another backbone (told by the fingerprint that our exports hold, by modules
            and by shapes), has modules that are no sites of the space, or is none that a LoRA can hold.
    """
    place = Path(folder).expanduser()
    adapter, rest = _read(place, backbone, setting)
    if space is None:
        space = _space_for(survey(backbone.model, backbone.layout), adapter, rest, setting, place)
    maps = _by_site(adapter, rest, space, place, setting)
    if not maps and adapter is not None:
        raise SettingError(setting, place, "holds no adapter of any rank")
    family = LoRA("constant", _scales(maps, space), adapter.config.dropout if adapter is not None else 0.0)
    model = AdaptedModel(backbone.model, space, family, backbone.head)
    model.enable({name: len(factors.A) for name, factors in maps.items()}, seed=0)
    _fill(model, backbone, maps, _saved(adapter, rest), place, setting)
    return model.eval()


def start_from(model: AdaptedModel, backbone: Backbone, folder: str | Path, setting: str = "start_from") -> None:
    """Fill the adapters that a model holds, and its head, from a PEFT adapter of the same ranks, to train on.

    The scales stay those of the model's own family; where the adapter's differ, the ratio goes into B.

    Args:
        model: with adapters enabled.
        backbone: the model's.
        folder: see ``from_peft``.
        setting: what named the folder, for messages.

    Raises:
        SettingError: as ``from_peft``, and if the ranks differ.
    """
    place = Path(folder).expanduser()
    if not isinstance(model.family, LoRA):
        raise SettingError(
            setting, place, f"holds LoRA, which {type(model.family).__name__} cannot take; use adapter=lora"
        )
    adapter, rest = _read(place, backbone, setting)
    maps = _by_site(adapter, rest, model.space, place, setting)
    given = {name: len(factors.A) for name, factors in maps.items()}
    held = {name: rank for name, rank in model.ranks.items() if rank}
    if given != held:
        differ = sorted(name for name in given.keys() | held.keys() if given.get(name, 0) != held.get(name, 0))
        raise SettingError(
            setting,
            place,
            f"has other ranks than were allocated at {differ[:3]}; add allocator=fixed allocator.path={place}",
        )
    _fill(model, backbone, maps, _saved(adapter, rest), place, setting)


def _read(place: Path, backbone: Backbone, setting: str) -> tuple[PeftAdapter | None, Rest | None]:
    rest = read_rest(place, setting)
    if rest is not None and rest.fingerprint != backbone.fingerprint:
        raise SettingError(setting, place, f"{NOTES} says that it belongs to other backbone weights")
    if rest is not None and not (place / CONFIG).exists():
        return None, rest
    return _without_tables(read_adapter(place, setting), backbone, place, setting), rest


def _without_tables(adapter: PeftAdapter, backbone: Backbone, place: Path, setting: str) -> PeftAdapter:
    """PEFT stores the frozen table of an embedding that it adapts, too; it must be ours.

    Raises:
        SettingError: if it is another.
    """
    saved = dict(adapter.saved)
    for module in (module for module, factors in adapter.modules.items() if factors.lookup):
        for name in (f"{module}.base_layer.weight", f"{module}.weight"):
            if (table := saved.pop(name, None)) is not None:
                own = dict(backbone.model.named_parameters()).get(f"{module}.weight")
                if own is None or table.shape != own.shape or not _equal(table, own):
                    raise SettingError(setting, place, f"stores another table at {module} than this backbone has")
    return replace(adapter, saved=saved)


def _equal(stored: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether these are the same numbers, as far as the coarser type tells: PEFT stores what it trained in."""
    coarser = min(stored.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(stored.to(coarser), own.to(coarser).to(stored.device))


def _saved(adapter: PeftAdapter | None, rest: Rest | None) -> dict[str, torch.Tensor]:
    return {**(adapter.saved if adapter is not None else {}), **(rest.head if rest is not None else {})}


def load_export(folder: str | Path, device: str = "cpu") -> AdaptedModel:
    """The whole model of a folder that was exported or merged here, backbone included, in evaluation mode.

    Args:
        folder: with a ``heterolora.json``.
        device: where the model shall be.

    Raises:
        SettingError: if it is no such folder, its backbone cannot be found, or is another one now.
    """
    return from_peft(export_backbone(folder), Path(folder).expanduser()).to(device)


def export_backbone(folder: str | Path) -> Backbone:
    """The backbone that a folder which was exported or merged here names, or holds.

    Args:
        folder: with a ``heterolora.json``.

    Raises:
        SettingError: if it is no such folder, or the backbone cannot be found.
    """
    place = Path(folder).expanduser()
    try:
        notes = json.loads((place / NOTES).read_text(encoding="utf-8"))
        node, outputs = notes["model"], int(notes["outputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError("folder", place, f"{NOTES} cannot be read ({type(error).__name__}: {error})") from error
    if node is None:
        raise SettingError("folder", place, f"{NOTES} names no backbone; use heterolora.from_peft with yours")
    if (place / "config.json").is_file():
        return merged_backbone(place, node, outputs)
    backbone: Backbone = build(node, "model").load(outputs, 0)
    return backbone


def saved_head(backbone: Backbone, folder: str | Path, setting: str = "folder") -> dict[str, torch.Tensor]:
    """The parameters of the head that an adapter's folder holds, by name; see ``from_peft``."""
    return _saved(*_read(Path(folder).expanduser(), backbone, setting))


def merged_backbone(folder: Path, node: Mapping[str, Any], outputs: int) -> Backbone:
    """The backbone that a merged folder holds.

    Args:
        folder: with a whole checkpoint of transformers.
        node: the config's node of the backbone that it was made from.
        outputs: of the head.
    """
    settings = Pretrained(str(folder), None, node["dtype"], None, node.get("layout"), gradient_checkpointing=False)
    return settings.load(outputs, 0)


def _space_for(found: Survey, adapter: PeftAdapter | None, rest: Rest | None, setting: str, place: Path) -> Space:
    words = adapter is not None and any(factors.lookup for factors in adapter.modules.values())
    include = ["lora"] + (["embed"] if words else []) + (["shortcut"] if rest is not None and rest.sites else [])
    spans = list(rest.spans) if rest is not None else []
    try:
        return SearchSpace(include, [], None, spans, rest is not None and rest.renorm, "kind").resolve(found)
    except SettingError as error:
        raise SettingError(setting, place, f"does not fit this backbone ({error})") from error


def _by_site(
    adapter: PeftAdapter | None, rest: Rest | None, space: Space, place: Path, setting: str
) -> dict[str, Factors]:
    """Site name -> its map, checked against the site's widths."""
    names = {module: site.name for site in space.sites if (module := module_of(site)) is not None}
    modules = adapter.modules if adapter is not None else {}
    if unknown := sorted(modules.keys() - names.keys()):
        raise SettingError(
            setting,
            place,
            f"{len(unknown)} of its {len(modules)} modules are no sites of this backbone and search space: "
            f"{unknown[:2]}; sites are such as {sorted(names)[:2]}",
        )
    maps = {names[module]: factors for module, factors in modules.items()}
    shortcuts = rest.sites if rest is not None else {}
    if unknown := sorted(shortcuts.keys() - {site.name for site in space.sites}):
        raise SettingError(setting, place, f"its shortcuts {unknown[:3]} are not in this search space")
    maps |= shortcuts
    for name, factors in maps.items():
        _check_shape(space[name], factors, place, setting)
    return maps


def _check_shape(site: Site, factors: Factors, place: Path, setting: str) -> None:
    if factors.lookup != site.lookup:  # PEFT itself would leave such factors out, and say nothing
        given, kind = ("an embedding's", "a linear layer") if factors.lookup else ("a linear layer's", "an embedding")
        raise SettingError(setting, place, f"holds {given} factors for {site.name}, which is {kind}")
    shapes = (factors.A.shape[1], factors.B.shape[0])
    if shapes != (site.in_features, site.out_features):
        raise SettingError(
            setting,
            place,
            f"is for another backbone: at {site.name} it maps {shapes[0]} features to {shapes[1]}, "
            f"the site has {site.in_features} and {site.out_features}",
        )


def _scales(maps: Mapping[str, Factors], space: Space) -> float | dict[str, float]:
    """The commonest scale of each kind; one number if they agree."""
    counts: dict[str, Counter[float]] = {}
    for name, factors in maps.items():
        counts.setdefault(space[name].kind, Counter())[factors.scale] += 1
    common = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    return common if len(set(common.values())) > 1 else next(iter(common.values()), 1.0)


def _fill(
    model: AdaptedModel,
    backbone: Backbone,
    maps: Mapping[str, Factors],
    saved: Mapping[str, torch.Tensor],
    place: Path,
    setting: str,
) -> None:
    model.load_adapter_state_dict(_tensors(model, maps))
    _load_head(model, backbone, saved, place, setting)


def _tensors(model: AdaptedModel, maps: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, factors in maps.items():
        scale = model.family.scale_at(model.space[name], len(factors.A))
        same = factors.scale == scale
        tensors[f"{name}.A"] = factors.A
        tensors[f"{name}.B"] = factors.B if same else factors.B * (factors.scale / scale)
    return tensors


def _load_head(
    model: AdaptedModel, backbone: Backbone, saved: Mapping[str, torch.Tensor], place: Path, setting: str
) -> None:
    head = model.head_parameters
    if outside := sorted(saved.keys() - head.keys()):
        raise SettingError(
            setting, place, f"stores {outside[:2]}, which are no part of this backbone's head {sorted(head)[:2]}..."
        )
    for name, value in saved.items():
        if value.shape != head[name].shape:
            raise SettingError(
                setting,
                place,
                f"its head {name} is {tuple(value.shape)}, this backbone's {tuple(head[name].shape)}: another number "
                "of classes",
            )
    if lacking := sorted(set(backbone.drawn) - saved.keys()):
        _log.warning("%s holds no %s: what was drawn from the seed stays", place, ", ".join(lacking))
    with torch.no_grad():
        for name, value in saved.items():
            head[name].copy_(value)
