"""How labels are read: names or codes of classes, or numbers."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from heterolora.data.tables import has_surrogate
from heterolora.errors import SettingError

_log = logging.getLogger(__name__)

_WHOLE = re.compile(r"([+-]?\d+)\.0+")


def label_name(value: Any) -> str:
    """A class name as text: 1, 1.0, ``"1"`` and ``"1.0"`` are all ``1``; flags, in any case, ``true`` and ``false``.

    Other text is kept as it is, spaces and case included.

    Raises:
        TypeError: for what is neither text, a number nor a flag.
    """
    if isinstance(value, str):
        if has_surrogate(value):
            raise TypeError(f"{value!r} has half a character (a lone surrogate)")
        whole = _WHOLE.fullmatch(value)  # what a whole number becomes in a column that once had gaps
        flag = value.lower() in ("true", "false")  # pandas writes True, JSON true, spreadsheets TRUE
        return whole[1] if whole is not None else value.lower() if flag else value
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    if isinstance(value, (float, np.floating)):
        return str(int(value)) if value.is_integer() else str(value)  # of its own precision: 0.1 in float32, too
    if isinstance(value, (int, np.integer)):
        return str(value)
    raise TypeError(f"{value!r} is neither text nor a number")


def _names_of(values: Iterable[Any], place: str) -> list[str]:
    if isinstance(values, pd.Series):
        values = values.to_numpy()  # a series gives 0.1 of single precision with digits that it does not have
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
    alike = defaultdict(list)
    for name in names:
        alike["".join(name.split()).casefold()].append(name)
    for group in alike.values():
        if len(group) > 1:
            _log.warning("%s has classes that differ in nothing but spaces or case: %s", place, group)
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
    codes = {label_name(name): code for code, name in enumerate(names)}
    if coded and not any(name.isdigit() for name in codes):
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
            strange = isinstance(value, (bool, np.bool_)) or np.ndim(value) or "_" in str(value)  # 1_000 is Python's
            number = math.nan if strange else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SettingError("task.source", place, f"label {value!r} in row {row} is no finite number")
        found.append(number)
    return pd.Series(found, dtype=float)
