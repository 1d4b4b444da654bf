"""Tables in files of any kind, and the checks that all of them pass."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from heterolora.errors import SettingError


def check_columns(
    table: pd.DataFrame, text: Sequence[str], label: str | None, setting: str, given: object, empty: bool
) -> None:
    """Refuse a table that lacks rows or columns or, in a row, a text or a label.

    Args:
        table: what was read.
        text: the text columns.
        label: the label column; None: there are no labels, or none are wanted.
        setting: what the user set to name the table, for messages.
        given: what it was set to.
        empty: whether a text may be empty, as in some published sets.

    Raises:
        SettingError: naming ``setting``, with the first row that cannot be used.
    """
    if table.empty:
        raise SettingError(setting, given, "has no rows")
    columns, names = [*text] if label is None else [*text, label], list(table.columns)
    if missing := [column for column in columns if column not in names]:
        raise SettingError(setting, given, f"columns {missing} are missing, the file has {names}")
    if double := [column for column in columns if names.count(column) > 1]:
        raise SettingError(setting, given, f"has several columns named {double[0]!r}")
    for column in columns if not empty else columns[len(text) :]:
        if (row := _first(table[column].isna() | table[column].map(_is_empty))) is not None:
            raise SettingError(setting, given, f"row {row} has no {column!r}")
    check_texts(table, text, setting, given)


def check_texts(table: pd.DataFrame, text: Sequence[str], setting: str, given: object) -> None:
    """Refuse a table that lacks text columns or, in a row, a text; an empty text is one.

    Raises:
        SettingError: naming ``setting``, with the first row that cannot be used.
    """
    if missing := [column for column in text if column not in table]:
        raise SettingError(setting, given, f"columns {missing} are missing, there are {list(table)}")
    for column in text:
        if (row := _first(table[column].isna())) is not None:
            raise SettingError(setting, given, f"row {row} has no {column!r}")
        for row, value in enumerate(table[column], 1):
            if not isinstance(value, str):
                raise SettingError(
                    setting, given, f"column {column!r} is no text: row {row} has {value!r} ({type(value).__name__})"
                )
            if has_surrogate(value):
                raise SettingError(
                    setting, given, f"column {column!r} of row {row} has half a character (a lone surrogate): {value!r}"
                )


def has_surrogate(text: str) -> bool:
    """Whether it holds half a character, as ``"\\ud800"`` in JSON; no tokenizer and no file can take that."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not value


def _first(wrong: pd.Series) -> int | None:
    """The first row, from 1, for which it is true."""
    found = wrong.tolist()
    return found.index(True) + 1 if True in found else None


def file_text(path: Path) -> str:
    """The text of a file with its line ends as they are; where the only ones are CR (old Macs), with LF for them."""
    text = path.read_bytes().decode("utf-8-sig")
    return text if "\n" in text else text.replace("\r", "\n")


def read_table(path: Path, setting: str) -> pd.DataFrame:
    """All columns of a file, read by its suffix; the values of .csv and .tsv are text.

    Args:
        path: the file.
        setting: what the user set to name it, for messages.

    Raises:
        SettingError: if there is no such file, or it cannot be read.
    """
    if path.suffix.lower() not in READERS:
        raise SettingError(setting, path, f"unknown kind of file; possible: {sorted(READERS)}")
    if not path.is_file():
        raise SettingError(setting, path, "no such file")
    try:
        return READERS[path.suffix.lower()](path)
    except (OSError, ValueError, RecursionError) as error:  # pandas', pyarrow's, json's and decoding errors are these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingError(setting, path, f"cannot be read ({reason})") from error


def _read_csv(path: Path, separator: str = ",", quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> pd.DataFrame:
    # An empty line is a row that lacks everything, or rows would move up; at the end of the file it is none.
    text = file_text(path).rstrip("\r\n")
    # pandas ends a row at a lone CR too; another letter stands in for it.
    stand_in = next(letter for letter in map(chr, range(0xE000, 0xF8FF)) if letter not in text)
    text, lone = re.subn(r"\r(?!\n)", stand_in, text)
    # The header is read as a row: pandas renames columns that are there twice, and makes an index of one too many.
    rows = pd.read_csv(
        io.StringIO(text),
        sep=separator,
        quoting=quoting,
        header=None,
        dtype=str,
        keep_default_na=False,  # "NA" and "null" are words
        na_values=[""],
        skip_blank_lines=False,
    )
    rows = rows.replace(stand_in, "\r", regex=True) if lone else rows
    table: pd.DataFrame = rows.iloc[1:].reset_index(drop=True)
    table.columns = pd.Index(rows.iloc[0].fillna("").tolist())
    return table


def _read_tsv(path: Path) -> pd.DataFrame:
    return _read_csv(path, "\t", csv.QUOTE_NONE)


def _read_jsonl(path: Path) -> pd.DataFrame:
    records = []
    lines = file_text(path).rstrip("\r\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return _from_records(records)


def _read_json(path: Path) -> pd.DataFrame:
    return _from_records(json.loads(file_text(path)))


def _from_records(records: Any) -> pd.DataFrame:
    """A column for each key; values keep their types, and a key that a record lacks is missing there."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("needs records with named values")
    return pd.DataFrame(records, dtype=object)


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path: pd.read_parquet(path),
}
