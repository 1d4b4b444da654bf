"""What an allocation was computed from, for the record."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from heterolora import __version__


def versions() -> dict[str, str]:
    """What results may depend on."""
    packages = {name: version(name) for name in ("torch", "transformers", "lightning")}
    return {"heterolora": __version__, "python": platform.python_version(), **packages}


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
