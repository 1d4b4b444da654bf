"""Batches for training, evaluation and scoring."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from heterolora.data.sampler import Batches, SimilarLength
from heterolora.data.sources import Labelled
from heterolora.data.splits import Splits, make_splits, training_table
from heterolora.data.tables import check_columns, check_texts
from heterolora.data.tokens import Example, input_length, tokenise, tokenise_table
from heterolora.errors import SettingError
from heterolora.processes import ALONE, Processes
from heterolora.seeds import derive
from heterolora.tasks.base import Task, text_columns

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Data settings.

    Args:
        root: folder with local data sets (``ROOT/glue/MRPC/train.tsv``, ``ROOT/superglue/CB/train.jsonl``, ...); null:
            packages and the hub.
        batch_size: examples in a training or scoring batch.
        eval_batch_size: examples in an evaluation batch.
        validation_share: share of the training set that becomes the validation set where labels are missing.
        split_seed: seed of that split; runs with other ``seed`` see the same sentences.
        limit: at most so many examples of each split; null: all.
        pad_to_multiple_of: batches are padded to a multiple of so many tokens; at 8, what a CPU computes for an example
            does not depend on its batch.
        cache_dir: folder for tokenised data; null: keep none.
    """

    root: str | None
    batch_size: int
    eval_batch_size: int
    validation_share: float
    split_seed: int
    limit: int | None
    pad_to_multiple_of: int
    cache_dir: str | None

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "pad_to_multiple_of"):
            if getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "a whole number of at least 1")

    def splits(self, task: Task) -> tuple[Splits, str, Task]:
        """Read the task's data.

        Returns:
            The splits, with labels as batches hold them; where they came from; and the task, completed by what its
            config leaves to the data.
        """
        root = Path(self.root).expanduser() if self.root else None  # an empty HETEROLORA_DATA is none
        if root is not None and not root.is_dir():  # asked only now: a trained model is loaded without its data
            raise SettingError("data.root", self.root, "no such folder")
        found = task.source.read(root, text_columns(task.inputs))
        task = task.completed(training_table(found)["label"], f"the train split of {found.origin}")
        tables = {split: _encoded(table, task, split, found) for split, table in found.splits.items()}
        splits = make_splits(replace(found, splits=tables), self.validation_share, self.split_seed, self.limit)
        seen = set(splits.tables["train"]["label"])
        if unseen := [name for code, name in enumerate(task.labels or ()) if code not in seen]:
            _log.warning("the training split has no example of %s", unseen)
        return splits, found.origin, task


def _encoded(table: pd.DataFrame, task: Task, split: str, found: Labelled) -> pd.DataFrame:
    place = f"the {split} split of {found.origin}"
    check_texts(table, text_columns(task.inputs), "task.source", place)
    labels = task.encode_labels(table["label"], found.official, place)
    return table.reset_index(drop=True).assign(label=labels)


def read_texts(path: Path, task: Task, setting: str) -> pd.DataFrame:
    """A file of texts to predict, all columns: as the task's source publishes them, or with the task's columns.

    Args:
        path: the file.
        task: of a finished run.
        setting: what the user set to name the file, for messages.

    Raises:
        SettingError: if it cannot be read, has no rows, or lacks a text column or a text.
    """
    given = task.source.read_file(path, setting)
    check_columns(given.table, text_columns(task.inputs), None, setting, path, empty=given.official)
    return given.table


def read_labelled(path: Path, task: Task, label: str | None, setting: str) -> pd.DataFrame:
    """A file to evaluate: the task's text columns and ``label``, as ``task.encode_labels`` gives it.

    Args:
        path: the file.
        task: of a finished run.
        label: the label column; None: what the task's source calls it.
        setting: what the user set to name the file, for messages.

    Raises:
        SettingError: as for ``read_texts``, and for a row without a label or with one that the task does not have.
    """
    given, text = task.source.read_file(path, setting), text_columns(task.inputs)
    column = given.label if label is None else label
    if column in text:
        raise SettingError(setting, path, f"{column!r} is a text column, and no label")
    check_columns(given.table, text, column, setting, path, empty=given.official)
    labels = task.encode_labels(given.table[column], given.official, str(path))
    return given.table[text].reset_index(drop=True).assign(label=labels)


def encode(
    table: pd.DataFrame, task: Task, tokenizer: Any, positions: int | None, batch_size: int, multiple: int = 1
) -> DataLoader[Example]:
    """Batches of one table, for predictions or an evaluation outside a run.

    They go by length; ``index`` restores the order of the table.

    Args:
        table: the task's text columns, and for an evaluation ``label``, as ``task.encode_labels`` gives it.
        task: names the text columns and the length limit.
        tokenizer: the backbone's.
        positions: tokens that the backbone can take; None: no limit.
        batch_size: examples in a batch.
        multiple: tokens that the length of a batch is a multiple of.

    Raises:
        SettingError: if a text column or a text is missing, or there are no rows.
    """
    if table.empty:
        raise SettingError("task.text", text_columns(task.inputs), "the table has no rows")
    _check_length(task, tokenizer, positions, multiple)
    check_texts(table, text_columns(task.inputs), "task.text", text_columns(task.inputs))
    examples = tokenise_table(table, tokenizer, task.inputs, task.max_length)
    return _by_length(examples, batch_size, _Collator(tokenizer, multiple))


def _check_length(task: Task, tokenizer: Any, positions: int | None, multiple: int) -> None:
    longest = min(tokenizer.model_max_length, positions or task.max_length)
    if positions is not None and -(-task.max_length // multiple) * multiple > positions >= task.max_length:
        raise SettingError(
            "data.pad_to_multiple_of",
            multiple,
            f"{task.max_length} tokens would be padded beyond this model's {positions}",
        )
    if longest < task.max_length:
        raise SettingError("task.max_length", task.max_length, f"this model's limit is {longest} tokens")


def _by_length(
    examples: Any, batch_size: int, collate: "_Collator", processes: Processes = ALONE
) -> DataLoader[Example]:
    order = sorted(range(len(examples)), key=lambda row: input_length(examples[row]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    mine = list(processes.mine(batches))
    if len(mine) < -(-len(batches) // processes.size):  # all do as many; LitAdapted drops what comes twice
        mine.append(batches[0])
    generator = torch.Generator()  # of its own: a loader draws a number that it has no use for
    return DataLoader(examples, batch_sampler=mine, collate_fn=collate, generator=generator)


class Resumable(DataLoader[Example]):
    """Knows how many batches of the epoch it gave, and can start after them."""

    batch_sampler: Batches

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._given = self.batch_sampler.first
        for batch in super().__iter__():
            if not self.batch_sampler.processes.alone:
                batch["share"] = torch.tensor(self.batch_sampler.share(self._given))
            self._given += 1  # before it is given: a checkpoint is written while it is in use
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches of this epoch that were given."""
        return {"batches": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start after them; after a whole epoch, with the next one's first."""
        self.batch_sampler.first = state["batches"] % len(self.batch_sampler)


class _Collator:
    """Examples to a batch: all alternatives of the first, of the second, ..., padded to the longest of the batch."""

    def __init__(self, tokenizer: Any, multiple: int) -> None:
        self._pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        given = [key for key in ("labels", "index") if key in examples[0]]
        keys = [key for key in examples[0] if key not in given]
        inputs = [
            {key: example[key][at] for key in keys} for example in examples for at in range(len(example["input_ids"]))
        ]
        return dict(self._pad(inputs)) | {key: _tensor([example[key] for example in examples]) for key in given}


def _tensor(values: Sequence[int | float]) -> torch.Tensor:
    """Numbers with all their digits: torch would make float32 of them."""
    return torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else None)


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
        _check_length(task, tokenizer, positions, settings.pad_to_multiple_of)
        cache = None if settings.cache_dir is None else Path(settings.cache_dir).expanduser()
        try:
            self.examples = tokenise(splits.tables, tokenizer, task.inputs, task.max_length, cache)
        except OSError as error:
            raise SettingError("data.cache_dir", cache, f"tokens cannot be kept there ({error})") from error
        self.settings = settings
        self.seed = seed
        self._tests = splits.tests
        self._training: Resumable | None = None
        self._position = {"batches": 0}
        self._collate = _Collator(tokenizer, settings.pad_to_multiple_of)
        self._processes = ALONE

    def among(self, processes: Processes) -> "TextData":
        """The same tokens, of whose batches these processes each take a share in training and in evaluation."""
        other = copy.copy(self)
        other._processes = processes
        return other

    def reseeded(self, seed: int) -> "TextData":
        """The same tokens in the order of another seed; this one must not have been given to a trainer."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def lengths(self, split: str) -> list[int]:
        """Tokens of each input of a split, the alternatives of an example one after the other."""
        return [len(ids) for example in self.examples[split] for ids in example["input_ids"]]

    def train_dataloader(self) -> DataLoader[Example]:
        """Seeded order, batches of similar length."""
        examples: Any = self.examples["train"]
        batches = Batches(self._sampler("training"), self.settings.batch_size, self._processes)
        self._training = Resumable(
            examples, batch_sampler=batches, collate_fn=self._collate, generator=torch.Generator()
        )
        self._training.load_state_dict(self._position)
        return self._training

    def state_dict(self) -> dict[str, int]:
        """Where in the epoch training is."""
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Training goes on there; Lightning may ask for its loader before it has read what that loader kept."""
        self._position = state_dict

    def val_dataloader(self) -> DataLoader[Example]:
        """By length."""
        return self._evaluation("validation")

    def test_dataloader(self) -> dict[str, DataLoader[Example]]:
        """A loader for each test split, by length; ``index`` restores the order of the split."""
        return {split: self._evaluation(split) for split in self._tests}

    def scoring_batches(self, count: int, draw: int = 0) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
        """Batches of the training split for the proxies, and the rows they hold; their order is not training's.

        Args:
            count: how many.
            draw: which draw of them; a search in the middle of training looks at others than the one before.

        Raises:
            SettingError: if the training split has fewer batches.
        """
        size = self.settings.batch_size
        sampler = self._sampler("scoring")
        sampler.set_epoch(draw)
        order = list(sampler)
        rows = [order[at : at + size] for at in range(0, len(order), size)]
        if len(rows) < count:
            raise SettingError("probe.batches", count, f"the training split has {len(rows)} batches of {size}")
        return [self._collate([self.examples["train"][row] for row in batch]) for batch in rows[:count]], rows[:count]

    def a_few(self) -> dict[str, torch.Tensor]:
        """Some examples of the validation split: as many as a training batch has."""
        return self._collate(self.examples["validation"][: self.settings.batch_size])

    def longest_batch(self) -> dict[str, torch.Tensor]:
        """The training batch that needs most memory: the longest examples together."""
        examples = sorted(self.examples["train"], key=input_length)[-self.settings.batch_size :]
        return self._collate(examples)

    def typical_batch(self) -> dict[str, torch.Tensor]:
        """A training batch of median length, whatever the seed: what times of steps are measured on."""
        examples, size = sorted(self.examples["train"], key=input_length), self.settings.batch_size
        start = max(0, (len(examples) - size) // 2)
        return self._collate(examples[start : start + size])

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
        lengths = [input_length(example) for example in self.examples["train"]]
        return SimilarLength(lengths, self.settings.batch_size, derive(self.seed, purpose))

    def _evaluation(self, split: str) -> DataLoader[Example]:
        return _by_length(self.examples[split], self.settings.eval_batch_size, self._collate, self._processes)
