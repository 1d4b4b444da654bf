"""Batches for training, evaluation and scoring."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from heterolora.data.sampler import SimilarLength
from heterolora.data.splits import Splits, make_splits
from heterolora.data.tokens import Example, tokenise
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.tasks.base import Task


@dataclass(frozen=True)
class Data:
    """Data settings.

    Args:
        root: folder with local data sets (``ROOT/glue/MRPC/train.tsv``, ...); null: packages and the hub.
        batch_size: examples in a training or scoring batch.
        eval_batch_size: examples in an evaluation batch.
        validation_share: share of the training set that becomes the validation set where labels are missing.
        split_seed: seed of that split; runs with other ``seed`` see the same sentences.
        limit: at most so many examples of each split; null: all.
        cache_dir: folder for tokenised data; null: keep none.
    """

    root: str | None
    batch_size: int
    eval_batch_size: int
    validation_share: float
    split_seed: int
    limit: int | None
    cache_dir: str | None

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "a whole number of at least 1")
        if self.root and not Path(self.root).expanduser().is_dir():
            raise SettingError("root", self.root, "no such folder")

    def splits(self, task: Task) -> tuple[Splits, str]:
        """Read the task's data; the splits and where they came from."""
        root = Path(self.root).expanduser() if self.root else None  # an empty HETEROLORA_DATA is none
        labelled = task.source.read(root, task.text, task.labels)
        return make_splits(labelled, self.validation_share, self.split_seed, self.limit), labelled.origin


class TextData(L.LightningDataModule):
    """Loaders over tokenised splits.

    Args:
        splits: the texts.
        task: names the text columns and the length limit.
        tokenizer: the backbone's.
        positions: tokens that the backbone can take; None: no limit.
        settings: batch sizes and the cache.
        seed: of the training order and of the batches that are scored.
    """

    def __init__(
        self, splits: Splits, task: Task, tokenizer: Any, positions: int | None, settings: Data, seed: int
    ) -> None:
        super().__init__()
        longest = min(tokenizer.model_max_length, positions or task.max_length)
        if longest < task.max_length:
            raise SettingError("task.max_length", task.max_length, f"this model's limit is {longest} tokens")
        cache = None if settings.cache_dir is None else Path(settings.cache_dir).expanduser()
        try:
            self.examples = tokenise(splits.tables, tokenizer, task.text, task.max_length, cache)
        except OSError as error:
            raise SettingError("data.cache_dir", cache, f"tokens cannot be kept there ({error})") from error
        self.settings = settings
        self.seed = seed
        self._pad = DataCollatorWithPadding(tokenizer)

    def train_dataloader(self) -> DataLoader[Example]:
        """Seeded order, batches of similar length."""
        return self._loader("train", self._sampler("training"), self.settings.batch_size)

    def val_dataloader(self) -> DataLoader[Example]:
        """By length."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[Example]:
        """By length; ``index`` restores the order of the split."""
        return self._evaluation("test")

    def scoring_batches(self, count: int) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
        """Batches of the training split for the proxies, and the rows they hold; their order is not training's.

        Raises:
            SettingError: if the training split has fewer batches.
        """
        size = self.settings.batch_size
        order = list(self._sampler("scoring"))
        rows = [order[at : at + size] for at in range(0, len(order), size)]
        if len(rows) < count:
            raise SettingError("probe.batches", count, f"the training split has {len(rows)} batches of {size}")
        return [self._collate([self.examples["train"][row] for row in batch]) for batch in rows[:count]], rows[:count]

    def warmup_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches for the head's warm-up, in an order of their own."""
        sampler, epoch = self._sampler("warmup"), 0
        while True:
            sampler.set_epoch(epoch)
            order = iter(sampler)
            while batch := list(islice(order, self.settings.batch_size)):
                yield self._collate([self.examples["train"][row] for row in batch])
            epoch += 1

    def _sampler(self, purpose: str) -> SimilarLength:
        lengths = [len(example["input_ids"]) for example in self.examples["train"]]
        return SimilarLength(lengths, self.settings.batch_size, derive(self.seed, purpose))

    def _evaluation(self, split: str) -> DataLoader[Example]:
        examples = self.examples[split]
        order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
        return self._loader(split, order, self.settings.eval_batch_size)

    def _loader(self, split: str, order: Any, batch_size: int) -> DataLoader[Example]:
        examples: Any = self.examples[split]
        return DataLoader(examples, batch_size=batch_size, sampler=order, collate_fn=self._collate)

    def _collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Padded to the longest of the batch."""
        return dict(self._pad(list(examples)))
