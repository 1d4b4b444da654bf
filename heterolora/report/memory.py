"""Peak memory of a run, not of the process's whole life."""

import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Start measuring anew, where the system allows it (Linux); elsewhere the peak is that of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _RESET.exists():
        try:
            _RESET.write_text("5")
        except OSError:  # some containers forbid it; the peak then counts from the start of the process
            return


def peak_mib() -> float:
    """Peak resident memory in MiB, plus the peak allocated on the GPU if there is one."""
    if _STATUS.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        host = int(match[1]) / 1024
    else:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return host + (torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0)
