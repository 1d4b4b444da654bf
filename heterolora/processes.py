"""What the processes of one run tell each other; a run in one process is the same with nobody to tell.

All of a run's processes hold the same adapters. They compute on different rows of the same batches, sum what they
found, and take the first one's word where one decision must hold for all.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from heterolora.errors import ProcessLostError, SettingError
from heterolora.launch import OURS, Place

T = TypeVar("T")

_MEETING = timedelta(minutes=5)
"""For all to be there."""

_PATIENCE = timedelta(minutes=30)
"""For a process that is alive, and late."""


@dataclass(frozen=True)
class Processes:
    """One process's view of all that work on its run.

    Every method but ``mine`` must be called by all of them, in the same order.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
        local_rank: number of this one on its machine.
        local_size: how many its machine has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one decides, and writes the files."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: every item is one process's."""
        return items if self.alone else items[self.rank :: self.size]

    def summed(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' values, to the bit the same in all of them."""
        return value if self.alone else self.summed_each([value])[0]

    def summed_each(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As ``summed``, for several in one exchange."""
        if self.alone or not values:
            return list(values)
        flat = torch.cat([value.detach().reshape(-1) for value in values])
        with _others():
            dist.all_reduce(flat)
            if flat.is_cuda:
                torch.cuda.synchronize()  # a wait for what never comes must be seen to be one
        parts = torch.split(flat, [value.numel() for value in values])
        return [part.reshape(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums; a parameter that no process has one for is left without."""
        if self.alone:
            return
        given = list(parameters)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in given]
        there = torch.tensor([float(p.grad is not None) for p in given], device=own[0].device if own else None)
        *sums, anywhere = self.summed_each([*own, there])
        for parameter, total, known in zip(given, sums, anywhere.tolist(), strict=True):
            parameter.grad = total if known else None

    def gathered(self, value: T) -> list[T]:
        """All processes' values, by rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with _others():
            dist.all_gather_object(found, value)
        return found

    def told(self, value: T) -> T:
        """The first process's value."""
        if self.alone:
            return value
        box = [value]
        with _others():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def agreed(self, find: Callable[[], T], refusals: type[Exception]) -> T:
        """What the first process finds, or its refusal; all of them look, for that may take all of them.

        Args:
            find: looks.
            refusals: errors that are an answer, too.
        """
        if self.alone:
            return find()
        found: T | Exception
        try:
            found = find()
        except refusals as error:
            found = error
        found = self.told(found)
        if isinstance(found, Exception):
            raise found
        return found

    def once(self, find: Callable[[], T]) -> T:
        """What the first process finds, while the others wait."""
        found: Any = find() if self.leads else None
        return cast(T, self.told(found))

    def check_equal(self, what: str, value: str) -> None:
        """Refuse to go on where processes differ.

        Raises:
            SettingError: naming what they differ in.
        """
        if len(set(found := self.gathered(value))) > 1:
            raise SettingError("processes", found, f"{what} must be the same in all of them")

    def wait(self) -> None:
        """Until all are here."""
        self.gathered(None)


ALONE = Processes()
"""The one process of a run."""


_since: list[float] = []
"""When this process began to wait for others, if it does."""


def waiting() -> float:
    """For how many seconds this process has been waiting for others."""
    return time.monotonic() - _since[-1] if _since else 0.0


@contextmanager
def _others() -> Iterator[None]:
    _since.append(time.monotonic())
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(f"another process of this run is gone ({str(error).splitlines()[0]})") from error
    finally:
        _since.pop()


def listening() -> TCPStore:
    """A place to meet at, on a free port of this machine."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_MEETING)


@contextmanager
def joined(
    place: Place, cuda: bool, store: Store | None = None, lost: Callable[[], str | None] = lambda: None
) -> Iterator[Processes]:
    """Meet the other processes.

    Those that this command started divide the threads of the machine, or they would fight for its cores; torchrun and
    srun do that themselves.

    Args:
        place: of this one.
        cuda: whether tensors on GPUs are exchanged.
        store: where they meet, if this process made that.
        lost: says which process will not come.

    Raises:
        ProcessLostError: if they cannot be found.
    """
    threads = torch.get_num_threads()
    if place.starter == OURS:
        torch.set_num_threads(max(1, threads // place.local_size))
    with _others():
        if store is None and place.address is not None:
            store = TCPStore(
                place.address, place.port, is_master=place.rank == 0, wait_for_workers=False, timeout=_MEETING
            )
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if store is not None:
            _meet(place, store, lost)
        if store is None:  # torchrun's agent has one
            dist.init_process_group(backend, timeout=_PATIENCE)
        else:
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=_PATIENCE)
    try:
        yield Processes(place.rank, place.size, place.local_rank, place.local_size)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def _meet(place: Place, store: Store, lost: Callable[[], str | None]) -> None:
    """Wait until all have come, before anything is done that only all of them together can end."""
    names = [f"here/{rank}" for rank in range(place.size)]
    store.set(names[place.rank], "yes")
    until = time.monotonic() + _MEETING.total_seconds()
    while missing := [name for name in names if not store.check([name])]:
        if (reason := lost()) is not None:
            raise ProcessLostError(reason)
        if time.monotonic() > until:
            raise ProcessLostError(f"{len(missing)} of {place.size} processes did not come within {_MEETING}")
        time.sleep(0.05)
