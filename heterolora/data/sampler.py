"""The order in which training examples are seen."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from heterolora.processes import ALONE, Processes
from heterolora.seeds import derive

_POOL = 32  # batches that are sorted together: enough to save padding, few enough to keep batches random
_POOLS = 7  # at least so many pools in an epoch, or the batches of a small set would be the same in every epoch


class Batches(Sampler[list[int]]):
    """Batches of an order, from any of them on; of each batch, the rows of one process.

    Args:
        sampler: rows in the order in which they are seen; Lightning tells it the epoch, under this name.
        batch_size: rows in a batch of all processes together; the last may have fewer.
        processes: that share each batch.
    """

    def __init__(self, sampler: "SimilarLength", batch_size: int, processes: Processes = ALONE) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.processes = processes
        self.first = 0

    def __len__(self) -> int:
        """Of a whole epoch, wherever it starts."""
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.sampler)
        first, self.first = self.first, 0
        for at in range(first * self.batch_size, len(rows), self.batch_size):
            batch = rows[at : at + self.batch_size]
            yield list(self.processes.mine(batch)) or batch[:1]  # all compute something, if only to throw it away

    def share(self, number: int) -> float:
        """This process's part of the rows of an epoch's batch (from 0): what its mean loss counts in the batch's."""
        rows = min(self.batch_size, len(self.sampler) - number * self.batch_size)
        return len(self.processes.mine(range(rows))) / rows


class SimilarLength(Sampler[int]):
    """A seeded shuffle in which every run of ``batch_size`` indices has examples of similar length.

    The order of an epoch depends on the seed and the epoch alone.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * min(_POOL, max(1, len(order) // self.batch_size // _POOLS))
        batches = []
        for start in range(0, len(order), pool):
            chunk = sorted(order[start : start + pool], key=lambda index: self.lengths[index])
            batches += [chunk[at : at + self.batch_size] for at in range(0, len(chunk), self.batch_size)]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at most one; it must come last
        for position in torch.randperm(len(full), generator=generator).tolist():
            yield from full[position]
        for batch in rest:
            yield from batch
