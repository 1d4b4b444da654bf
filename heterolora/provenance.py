"""What an allocation was computed from, for the record."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heterolora import __version__


def versions() -> dict[str, str]:
    """What results may depend on."""
    packages = {name: version(name) for name in ("torch", "transformers", "lightning")}
    return {"heterolora": __version__, "python": platform.python_version(), **packages}


def code_version() -> str | None:
    """The commit of this package's own repository, with ``+`` if files were changed since; None: installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(
    config: Mapping[str, Any], fingerprint: str | None, rows: Sequence[Sequence[int]] | None, **more: Any
) -> dict[str, Any]:
    """Plain values: the settings on which an allocation depends, and digests of what it looked at.

    Args:
        config: the resolved config.
        fingerprint: of the backbone's weights; None: they were not read.
        rows: training examples that were looked at, batch by batch; None: none were.
        more: replaces or adds entries.
    """
    return {
        "backbone": fingerprint,
        "seed": config["seed"],
        "proxy": config["proxy"],
        "probe": None if rows is None else config["probe"],
        "allocator": config["allocator"],
        "budget": config["budget"],
        "search_space": config["search_space"],
        "adapter": config["adapter"],
        "scored_rows_sha256": None if rows is None else hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "versions": versions(),
        **more,
    }
