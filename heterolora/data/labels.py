"""How labels are read: names or codes of classes, or numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from heterolora.errors import SettingError

_WHOLE = re.compile(r"([+-]?\d+)\.0+")


def label_name(value: Any) -> str:
    """A class name as text: 1, 1.0, ``"1"`` and ``"1.0"`` are all ``1``; flags are ``true`` and ``false``.

    Other text is kept as it is, spaces and case included.

    Raises:
        TypeError: for what is neither text, a number nor a flag.
    """
    if isinstance(value, str):
        whole = _WHOLE.fullmatch(value)  # what a whole number becomes in a column that once had gaps
        return value if whole is None else whole[1]
    if hasattr(value, "item"):  # numpy's own numbers and flags
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)):
        return str(value)
    raise TypeError(f"{value!r} is neither text nor a number")


def _names_of(values: Iterable[Any], place: str) -> list[str]:
    names = []
    for row, value in enumerate(values, 1):
        try:
            names.append(label_name(value))
        except TypeError as error:
            raise SettingError("task.source", place, f"label of row {row}: {error}") from None
    return names


def class_names(values: Iterable[Any], place: str) -> tuple[str, ...]:
    """The distinct labels, sorted as text.

    Args:
        values: labels as they were read.
        place: where they stand, for messages.

    Raises:
        SettingError: if there are not at least two.
    """
    names = tuple(sorted(set(_names_of(values, place))))
    if len(names) < 2:
        raise SettingError("task.labels", None, f"{place} has a single class, {names[0]!r}; at least two are needed")
    return names


def class_codes(values: Iterable[Any], names: Sequence[str], coded: bool, place: str) -> pd.Series:
    """The place of each label in ``names``.

    Args:
        values: labels as they were read.
        names: names of the classes, in order.
        coded: whether a label may be a code (from 0) in place of a name; never where a name is a number itself.
        place: where they stand, for messages.

    Raises:
        SettingError: for a label that is none of ``names``.
    """
    codes = {name: code for code, name in enumerate(names)}
    if coded and not any(name.isdigit() for name in names):
        codes |= {str(code): code for code in range(len(names))}
    found = _names_of(values, place)
    if unknown := sorted(set(found) - codes.keys()):
        row = next(row for row, name in enumerate(found, 1) if name not in codes)
        raise SettingError("task.labels", list(names), f"{place} has other labels: {unknown[:3]} (first in row {row})")
    return pd.Series([codes[name] for name in found], dtype=int)


def numbers(values: Iterable[Any], place: str) -> pd.Series:
    """Labels as finite numbers.

    Args:
        values: labels as they were read: numbers, or numbers written as text.
        place: where they stand, for messages.

    Raises:
        SettingError: for the first that is none.
    """
    found = []
    for row, value in enumerate(values, 1):
        try:
            number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)  # 1_000 is Python's
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SettingError("task.source", place, f"label {value!r} in row {row} is no finite number")
        found.append(number)
    return pd.Series(found, dtype=float)
