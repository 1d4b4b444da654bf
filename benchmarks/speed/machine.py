"""Where and with what something was measured."""

import hashlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from heterolora.calibration import cpu_model
from heterolora.provenance import code_version

ROOT = Path(__file__).parents[2]

PACKAGES = ("torch", "transformers", "peft", "lightning", "accelerate", "tokenizers", "numpy")

_MEASURED = ("heterolora", "conf", "benchmarks/speed")
"""Folders whose files decide what is measured."""


def facts() -> dict[str, Any]:
    """Processor, cores, threads, versions, commit and date."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": code_version(),
        "code": code_digest(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def memory_gib() -> float | None:
    """Memory of the machine; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """What seconds depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_digest() -> str:
    """Of everything that is measured or measures: a change of it, committed or not, makes old results another's."""
    found = hashlib.sha256()
    paths = [ROOT / "train.py"]
    for folder in _MEASURED:
        paths += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")]
    for path in sorted(paths):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
