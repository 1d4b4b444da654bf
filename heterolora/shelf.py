"""What several runs of one process share: data, tokens and backbones are loaded once."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from heterolora.backbone import Backbone
from heterolora.data.module import TextData
from heterolora.data.splits import Splits
from heterolora.parts import Parts
from heterolora.tasks.base import Task

T = TypeVar("T")

_KEPT = 2  # of each kind: a comparison over two tasks goes back and forth between them


@dataclass(frozen=True)
class Material:
    """What a run reads and never changes."""

    splits: Splits
    origin: str
    task: Task


class Shelf:
    """Loads what a run needs, and keeps it for the next run that needs the same.

    Nothing that a run could change is handed out twice: a kept backbone is copied, with the head of the run's seed.

    Args:
        keep: keep what was loaded; false: every run loads its own.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._kept: dict[str, dict[str, Any]] = {"material": {}, "backbone": {}, "tokens": {}}

    def material(self, parts: Parts, config: Mapping[str, Any]) -> Material:
        """Splits, where they came from, and the completed task; see ``Data.splits``."""
        return self._get("material", _key(config, "data", "task"), lambda: Material(*parts.data.splits(parts.task)))

    def backbone(self, parts: Parts, config: Mapping[str, Any], outputs: int) -> Backbone:
        """The backbone with a head of so many outputs, drawn from the run's seed."""
        key = f"{_key(config, 'model')} {outputs}"
        loaded = self._get("backbone", key, lambda: parts.model.load(outputs, parts.seed))
        return loaded.copy(parts.seed) if self.keep else loaded

    def tokens(self, parts: Parts, config: Mapping[str, Any], material: Material, backbone: Backbone) -> TextData:
        """Loaders over the tokenised splits, in the order of the run's seed."""

        def make() -> TextData:
            return TextData(
                material.splits, material.task, backbone.tokenizer, backbone.positions, parts.data, parts.seed
            )

        return self._get("tokens", _key(config, "data", "task", "model"), make).reseeded(parts.seed)

    def _get(self, kind: str, key: str, load: Callable[[], T]) -> T:
        if not self.keep:
            return load()
        kept = self._kept[kind]
        if key not in kept:
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            kept[key] = load()
        found: T = kept[key]
        return found


def _key(config: Mapping[str, Any], *nodes: str) -> str:
    return json.dumps([config[node] for node in nodes], sort_keys=True, default=str)
