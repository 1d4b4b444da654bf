"""A user's own files as a source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from heterolora.data.sources import FileTable, Labelled
from heterolora.data.tables import READERS, check_columns, read_table
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Files:
    """Labelled texts in files: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (a list of records) or ``.parquet``.

    A ``.csv`` may quote its fields and needs a header; a ``.tsv`` has no quoting rules, as in GLUE. The splits are the
    user's own: a validation file stays the validation split, and a split without a file is a seeded share of the
    training file.

    Args:
        train: the training file, required for a run.
        validation: the validation file; null: a share of the training file.
        test: the test file; null: a share of the training file.
        label: the column that holds the labels.
    """

    train: str | None
    validation: str | None
    test: str | None
    label: str

    def read(self, root: Path | None, text: Sequence[str]) -> Labelled:
        """All files that are given; paths are relative to the working directory, whatever ``root`` is."""
        if self.train is None:
            raise SettingError("task.source.train", None, f"give a file of labelled texts; possible: {sorted(READERS)}")
        if self.label in text:
            raise SettingError("task.source.label", self.label, f"is one of the text columns {list(text)}")
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        paths = {split: Path(path).expanduser() for split, path in given.items() if path is not None}
        _refuse_twice(paths)
        splits = {}
        for split, path in paths.items():
            table = read_columns(path, text, self.label, f"task.source.{split}")
            splits[split] = table.rename(columns={self.label: "label"})
        return Labelled(splits, ", ".join(f"{split} {path}" for split, path in paths.items()), official=False)

    def read_file(self, path: Path, setting: str) -> FileTable:
        """Columns as they are called in the file; labels are names."""
        return FileTable(read_table(path, setting), self.label, official=False)


def _refuse_twice(paths: Mapping[str, Path]) -> None:
    seen: dict[Path, str] = {}
    for split, path in paths.items():
        first = seen.setdefault(path.resolve(), split)
        if first != split:
            raise SettingError(f"task.source.{split}", path, f"is the {first} file too; null takes a share of training")


def read_columns(path: Path, text: Sequence[str], label: str | None, setting: str) -> pd.DataFrame:
    """The named columns of a file: text columns, and the labels as they stand in the file.

    Args:
        path: the file.
        text: the text columns.
        label: the label column; None: there are no labels, or none are wanted.
        setting: what the user set to name the file, for messages.

    Raises:
        SettingError: if the file cannot be read, has no rows, lacks a column, or has a row without a text or a label.
    """
    table = read_table(path, setting)
    check_columns(table, text, label, setting, path, empty=False)
    return table[[*text] if label is None else [*text, label]]
