"""What PEFT and plain checkpoints cannot hold of an adapted model, in files of ours beside theirs.

``heterolora.json`` says which backbone the adapters belong to, what was allocated and what is missing beside it;
``shortcuts.safetensors`` holds that, under the names of a run's ``adapter.safetensors``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from heterolora.adapters.base import plain_factors
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.peft_config import NOTES
from heterolora.peft_files import Factors
from heterolora.report.files import write_json

SHORTCUTS = "shortcuts.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Rest:
    """What a folder of an export holds in files of ours.

    Attributes:
        fingerprint: of the backbone that the adapters belong to.
        spans: lengths of the shortcuts.
        renorm: whether the norm after a shortcut is applied again.
        sites: site name -> its map.
        head: name of a parameter -> its value, where the head is in no other file.
    """

    fingerprint: str
    spans: tuple[int, ...]
    renorm: bool
    sites: Mapping[str, Factors]
    head: Mapping[str, torch.Tensor]


def write_rest(
    folder: Path, model: AdaptedModel, names: list[str], notes: Mapping[str, Any], fingerprint: str, head: bool
) -> None:
    """Write ``heterolora.json``, and ``shortcuts.safetensors`` if any site is named.

    Args:
        folder: it must exist.
        model: holds the sites.
        names: the sites that no other file holds.
        notes: what else shall be said in ``heterolora.json``.
        fingerprint: of the backbone that the adapters are used with.
        head: store the head here, too.
    """
    adapters: dict[str, Any] = {name: model.adapter(name) for name in names}
    spans = {span for name in names if (span := model.space[name].span) is not None}
    content = {
        "format": FORMAT,
        "backbone": fingerprint,
        "spans": sorted(spans),
        "renorm": model.space.renorm,
        "scales": {name: adapter.scale for name, adapter in adapters.items()},
        **notes,
    }
    write_json(folder / NOTES, content)
    factors: dict[str, Any] = {name: plain_factors(adapter) for name, adapter in adapters.items()}
    tensors = {f"adapter.{name}.{key}": value for name in names for key, value in zip("AB", factors[name], strict=True)}
    if head:
        tensors |= {f"head.{name}": value for name, value in model.head_state_dict().items()}
    if tensors:
        plain = {name: value.detach().cpu().clone().contiguous() for name, value in sorted(tensors.items())}
        save_file(plain, folder / SHORTCUTS, {"format": "heterolora-1", "backbone": fingerprint})


def read_rest(folder: Path, setting: str) -> Rest | None:
    """Read them; None where there is no ``heterolora.json``, as in a folder that something else wrote.

    Args:
        folder: of an export.
        setting: what named it, for messages.

    Raises:
        SettingError: if they are damaged, or made by a later version.
    """
    path = folder / NOTES
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise SettingError(setting, path, f"has format {content['format']!r}, this version reads {FORMAT}")
        scales = {str(name): float(scale) for name, scale in content["scales"].items()}
        spans, renorm = tuple(map(int, content["spans"])), bool(content["renorm"])
        fingerprint = str(content["backbone"])
    except SettingError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(setting, path, f"is damaged ({type(error).__name__}: {error})") from error
    tensors = _read_tensors(folder / SHORTCUTS, fingerprint, setting) if (folder / SHORTCUTS).is_file() else {}
    sites, head = {}, {}
    try:
        for name in scales:
            sites[name] = Factors(tensors.pop(f"adapter.{name}.A"), tensors.pop(f"adapter.{name}.B"), scales[name])
    except KeyError as error:
        raise SettingError(setting, folder / SHORTCUTS, f"lacks {error}") from error
    for name in list(tensors):
        if name.startswith("head."):
            head[name.removeprefix("head.")] = tensors.pop(name)
    if tensors:
        raise SettingError(setting, folder / SHORTCUTS, f"holds what {NOTES} does not name: {sorted(tensors)[:3]}")
    return Rest(fingerprint, spans, renorm, sites, head)


def _read_tensors(path: Path, fingerprint: str, setting: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("backbone") != fingerprint:
                raise SettingError(setting, path, f"belongs to another backbone than {NOTES} says")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise SettingError(setting, path, f"cannot be read ({error})") from error
