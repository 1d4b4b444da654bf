"""Peak memory of a run, not of the process's whole life."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

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


def now_mib() -> float | None:
    """Resident memory of the process in MiB at this moment; None where the system does not say."""
    if _STATUS.exists() and (match := re.search(r"VmRSS:\s+(\d+) kB", _STATUS.read_text())):
        return int(match[1]) / 1024
    return None


def kept_mib(model: nn.Module, forward: Callable[[], object]) -> float:
    """MiB that autograd keeps of one forward call for its backward pass, beside the model's own tensors."""
    counter = Kept()
    with counter.counting([*model.parameters(), *model.buffers()]):
        graph = forward()
    del graph
    return counter.mib


class Kept:
    """Bytes that autograd keeps for a backward pass, each storage counted once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def mib(self) -> float:
        """In MiB."""
        return sum(self._sizes.values()) / 2**20

    @contextmanager
    def counting(self, without: Iterable[torch.Tensor]) -> Iterator[None]:
        """Count what is kept by forwards inside, as long as their graph lives.

        Args:
            without: tensors that are there anyway, such as weights.
        """
        there = {tensor.untyped_storage().data_ptr() for tensor in without}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # a node that kept its own output would keep itself alive for ever

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
