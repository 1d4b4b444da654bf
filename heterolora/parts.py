"""The objects of a run, made from a config before anything is loaded."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from heterolora.adapters.base import AdapterFamily
from heterolora.allocators.base import Allocator
from heterolora.backbone import Pretrained, Tiny
from heterolora.baselines.base import Baseline, NoBaseline
from heterolora.budget import Budget
from heterolora.build import build
from heterolora.callbacks.allocate import AllocationTime
from heterolora.data.module import Data
from heterolora.errors import SettingError
from heterolora.export import Export
from heterolora.inits.base import Initialisation
from heterolora.lit import Optimizer
from heterolora.prefix_cache import PrefixSettings
from heterolora.proxies.base import Proxy
from heterolora.report.loggers import RunLogger
from heterolora.results import OFF
from heterolora.scoring import Probe
from heterolora.space import SearchSpace
from heterolora.tasks.base import Task
from heterolora.trainer import TrainerSettings

NODES = (
    "model",
    "task",
    "data",
    "search_space",
    "adapter",
    "optimizer",
    "prefix",
    "probe",
    "proxy",
    "allocator",
    "budget",
    "allocation",
    "trainer",
    "logger",
    "export",
)
"""Config nodes that name a class."""

_NO_RESULT = ("resume", "sweep", "outputs", "logger", "callbacks", "tournament", "table", "export")
"""Config nodes on which no result depends."""


@dataclass(frozen=True)
class Parts:
    """The objects of a run, one for each node of the config."""

    model: Pretrained | Tiny
    task: Task
    data: Data
    search_space: SearchSpace
    adapter: AdapterFamily
    probe: Probe
    proxy: Proxy
    allocator: Allocator
    budget: Budget
    allocation: AllocationTime
    init: Initialisation | None
    optimizer: Optimizer
    prefix: PrefixSettings
    trainer: TrainerSettings
    logger: RunLogger
    export: Export
    callbacks: Sequence[L.Callback]
    seed: int
    dry: bool
    start_from: str | None
    baseline: Baseline
    choices: Mapping[str, Any]


def make_parts(config: Mapping[str, Any], choices: Mapping[str, Any]) -> Parts:
    """The objects that a config names, before anything is loaded.

    Args:
        config: the resolved config.
        choices: group -> name of the chosen option, for titles.

    Raises:
        SettingError: for the first value that cannot be used.
    """
    seed = config["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise SettingError("seed", seed, "a whole number from 0 to 2^32 - 1")
    if config["run"] not in ("full", "dry"):
        raise SettingError("run", config["run"], "full, or dry: everything but training")
    objects = {node: build(config[node], node) for node in NODES}
    callbacks = [build(node, f"callbacks.{name}") for name, node in (config["callbacks"] or {}).items() if node]
    return Parts(
        **objects,
        init=build(config["init"], "init") if config.get("init") else None,
        callbacks=callbacks,
        seed=seed,
        dry=config["run"] == "dry",
        start_from=_folder(config["start_from"]),
        baseline=NoBaseline() if config.get("baseline") is None else build(config["baseline"], "baseline"),
        choices=choices,
    )


def _folder(path: Any) -> str | None:
    if path is not None and not (isinstance(path, str) and Path(path).expanduser().is_dir()):
        raise SettingError("start_from", path, "null, or the folder of a PEFT adapter")
    return path


def result_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config on which results depend; what is off is as if it were not there."""
    relevant = {key: value for key, value in _on(config).items() if key not in _NO_RESULT}
    if "trainer" in relevant:
        relevant["trainer"] = {key: value for key, value in relevant["trainer"].items() if key != "checkpoint_every"}
    return relevant | {"data": {key: value for key, value in config["data"].items() if key != "cache_dir"}}


def _on(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without what is off."""
    return {
        key: _on(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in node.items()
        if value or f"{prefix}{key}" not in OFF
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """Identifies runs that would give the same result."""
    text = json.dumps(result_settings(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
