"""The options of config groups by name, as plain values, for whoever does not come through Hydra."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from heterolora.errors import SettingError


def config_folder() -> Path:
    """Where the config files are: inside the installed package, or beside it in the repository."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    """Names of a group's options."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def option(group: str, name: str, setting: str | None = None, seed: int = 0) -> dict[str, Any]:
    """The node of one option, as it is with everything else at its default.

    Args:
        group: e.g. ``proxy``.
        name: e.g. ``snip``.
        setting: what the user set, for messages; None: the group.
        seed: of the run.

    Raises:
        SettingError: if there is no such option, or it is a preset that chooses options of other groups, too.
    """
    if name not in options(group):
        raise SettingError(setting or group, name, f"possible: {options(group)}")
    node = _read(config_folder() / group / f"{name}.yaml")
    if "_target_" not in node and node.get("defaults"):
        chosen = [
            entry if isinstance(entry, str) else " ".join(map("=".join, entry.items())) for entry in node["defaults"]
        ]
        raise SettingError(
            setting or group, name, f"is a preset for train.py; choose what it does: {', '.join(chosen)}"
        )
    tree = _read(config_folder() / "train.yaml") | {"seed": seed}
    return {key: _resolved(value, tree) for key, value in node.items()}


def default(node: str, seed: int = 0) -> dict[str, Any]:
    """A group's default option, or a node that has no group (``probe``), as ``train.yaml`` has it."""
    tree = _read(config_folder() / "train.yaml") | {"seed": seed}
    for entry in tree["defaults"]:
        if isinstance(entry, Mapping) and node in entry:
            return option(node, entry[node], seed=seed)
    return {key: _resolved(value, tree) for key, value in tree[node].items()}


def _resolved(value: Any, tree: Mapping[str, Any]) -> Any:
    """What ``${node.key}`` stands for."""
    if not isinstance(value, str) or not value.startswith("${"):
        return value
    found: Any = tree
    for key in value.removeprefix("${").removesuffix("}").split("."):
        found = found[key]
    return _resolved(found, tree)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
