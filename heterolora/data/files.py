"""A user's own files as a source."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from heterolora.data.sources import Labelled
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
            raise SettingError(
                "task.source.train", None, f"give a file of labelled texts; possible: {sorted(_READERS)}"
            )
        if self.label in text:
            raise SettingError("task.source.label", self.label, f"is one of the text columns {list(text)}")
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        paths = {split: Path(path).expanduser() for split, path in given.items() if path is not None}
        splits = {}
        for split, path in paths.items():
            table = read_columns(path, text, self.label, f"task.source.{split}")
            splits[split] = table.rename(columns={self.label: "label"})
        return Labelled(splits, ", ".join(f"{split} {path}" for split, path in paths.items()), official=False)


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
    columns = [*text] if label is None else [*text, label]
    if table.empty:
        raise SettingError(setting, path, "has no rows")
    names = list(table.columns)
    if missing := [column for column in columns if column not in names]:
        raise SettingError(setting, path, f"columns {missing} are missing, the file has {names}")
    if double := [column for column in columns if names.count(column) > 1]:
        raise SettingError(setting, path, f"has several columns named {double[0]!r}")
    if label is not None and (row := _first_missing(table[label])) is not None:
        raise SettingError(setting, path, f"row {row} has no {label!r}")
    check_texts(table, text, setting, path)
    return table[columns]


def check_texts(table: pd.DataFrame, text: Sequence[str], setting: str, given: object) -> None:
    """Refuse a table that lacks text columns or, in a row, a text.

    Raises:
        SettingError: naming ``setting``, with the first row that cannot be used.
    """
    if missing := [column for column in text if column not in table]:
        raise SettingError(setting, given, f"columns {missing} are missing, there are {list(table)}")
    for column in text:
        if (row := _first_missing(table[column])) is not None:
            raise SettingError(setting, given, f"row {row} has no {column!r}")
        for row, value in enumerate(table[column], 1):
            if not isinstance(value, str):
                raise SettingError(
                    setting, given, f"column {column!r} is no text: row {row} has {value!r} ({type(value).__name__})"
                )


def _first_missing(column: pd.Series) -> int | None:
    """The first row (from 1) that is empty; in a .csv an empty text and none at all look the same."""
    missing = (column.isna() | (column.astype(object) == "")).tolist()
    return missing.index(True) + 1 if True in missing else None


def read_table(path: Path, setting: str) -> pd.DataFrame:
    """All columns of a file, read by its suffix; the values of .csv and .tsv are text.

    Args:
        path: the file.
        setting: what the user set to name it, for messages.

    Raises:
        SettingError: if there is no such file, or it cannot be read.
    """
    if path.suffix.lower() not in _READERS:
        raise SettingError(setting, path, f"unknown kind of file; possible: {sorted(_READERS)}")
    if not path.is_file():
        raise SettingError(setting, path, "no such file")
    try:
        return _READERS[path.suffix.lower()](path)
    except (OSError, ValueError) as error:  # pandas', pyarrow's, json's and decoding errors are of these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingError(setting, path, f"cannot be read ({reason})") from error


def _read_csv(path: Path, separator: str = ",", quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> pd.DataFrame:
    # The header is read as a row: pandas renames columns that are there twice, and makes an index of one too many.
    rows = pd.read_csv(
        path,
        sep=separator,
        quoting=quoting,
        header=None,
        dtype=str,
        keep_default_na=False,  # "NA" and "null" are words
        na_values=[""],
        encoding="utf-8-sig",
    )
    table: pd.DataFrame = rows.iloc[1:].reset_index(drop=True)
    table.columns = pd.Index(rows.iloc[0].fillna("").tolist())
    return table


def _read_tsv(path: Path) -> pd.DataFrame:
    return _read_csv(path, "\t", csv.QUOTE_NONE)


def _read_jsonl(path: Path) -> pd.DataFrame:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return _from_records(records)


def _read_json(path: Path) -> pd.DataFrame:
    return _from_records(json.loads(path.read_text(encoding="utf-8-sig")))


def _from_records(records: Any) -> pd.DataFrame:
    """A column for each key; values keep their types, and a key that a record lacks is missing there."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("needs records with named values")
    return pd.DataFrame(records, dtype=object)


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path: pd.read_parquet(path),
}
