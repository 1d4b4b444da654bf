"""Tokens of the splits, cached on disk under what they depend on."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import tokenizers

from heterolora.errors import SettingError

_log = logging.getLogger(__name__)

Example = dict[str, Any]
"""Token ids and masks, each a list with one list of numbers for every alternative input; ``labels`` (absent where
there are none); and ``index``: the row in its split."""

Inputs = Sequence[Sequence[str]]
"""For every alternative input of an example, its text columns: one sentence or a pair."""


def tokenise(
    tables: Mapping[str, pd.DataFrame], tokenizer: Any, inputs: Inputs, max_length: int, cache: Path | None
) -> dict[str, list[Example]]:
    """Examples of each split.

    Args:
        tables: the splits' texts and labels.
        tokenizer: a transformers tokenizer.
        inputs: the text columns of each input that an example makes.
        max_length: longer inputs are cut, the longer sentence of a pair first.
        cache: folder for the tokens; None: keep none.
    """
    separator = _separator(tokenizer, inputs)
    folder = None if cache is None else cache / _key(tables, tokenizer, inputs, max_length, separator)
    examples = None if folder is None else _cached(folder, tables)
    if examples is not None:
        _log.info("tokens from %s", folder)
        return examples
    made = {split: _encode(table, tokenizer, inputs, max_length, separator) for split, table in tables.items()}
    data = datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split, columns in made.items()})
    if folder is not None:
        _save(data, folder)
    return {split: _examples(rows.to_dict()) for split, rows in data.items()}


def tokenise_table(table: pd.DataFrame, tokenizer: Any, inputs: Inputs, max_length: int) -> list[Example]:
    """Examples of one table, as ``tokenise`` makes them; it may have no column ``label``."""
    return _examples(_encode(table, tokenizer, inputs, max_length, _separator(tokenizer, inputs)))


def input_length(example: Example) -> int:
    """Tokens of its longest input."""
    return max(map(len, example["input_ids"]))


def _separator(tokenizer: Any, inputs: Inputs) -> list[int]:
    return pair_separator(tokenizer) if any(len(columns) == 2 for columns in inputs) else []


def _examples(columns: Mapping[str, Sequence[Any]]) -> list[Example]:
    """Rows; from columns, which datasets gives five times faster than a row after the other."""
    rows = enumerate(zip(*columns.values(), strict=True))
    return [{**dict(zip(columns, row, strict=True)), "index": index} for index, row in rows]


def _cached(folder: Path, tables: Mapping[str, pd.DataFrame]) -> dict[str, list[Example]] | None:
    """What the folder holds, if it is whole; a damaged one is removed, with a warning."""
    if not folder.exists():
        return None
    try:
        examples = {split: _examples(rows.to_dict()) for split, rows in datasets.load_from_disk(folder).items()}
        if {split: [row["labels"] for row in rows] for split, rows in examples.items()} == {
            split: table["label"].tolist() for split, table in tables.items()
        }:
            return examples
        reason = "other examples than its name says"
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of the first two
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    _log.warning("cached tokens in %s are damaged (%s); making them anew", folder, reason)
    away = folder.with_name(f"{folder.name}.damaged-{os.getpid()}")
    with suppress(FileNotFoundError):  # another process was there first
        os.rename(folder, away)
        shutil.rmtree(away)
    return None


def pair_separator(tokenizer: Any) -> list[int]:
    """Ids to put between two sentences, where the tokenizer itself puts nothing; empty: it does.

    Tokenizers of decoders often join a pair without a mark, which costs points on pair tasks.
    """
    encoded = tokenizer("a", "b")
    if tokenizer.is_fast:
        origins = encoded.sequence_ids(0)
        end = len(origins) - origins[::-1].index(0)
        between = origins.index(1) - end
    else:
        between = (
            len(encoded["input_ids"])
            - len(tokenizer("a")["input_ids"])
            - len(tokenizer("b", add_special_tokens=False)["input_ids"])
        )
    if between > 0:
        return []
    for token in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return list(tokenizer("\n", add_special_tokens=False)["input_ids"])


def _encode(
    table: pd.DataFrame, tokenizer: Any, inputs: Inputs, max_length: int, separator: Sequence[int]
) -> dict[str, list[Any]]:
    """Columns of examples: every alternative encoded on its own, then laid side by side."""
    encoded = [_encode_input(table, tokenizer, columns, max_length, separator) for columns in inputs]
    rows = {
        key: [list(alternatives) for alternatives in zip(*(each[key] for each in encoded), strict=True)]
        for key in encoded[0]
    }
    return rows | ({"labels": table["label"].tolist()} if "label" in table else {})


def _encode_input(
    table: pd.DataFrame, tokenizer: Any, text: Sequence[str], max_length: int, separator: Sequence[int]
) -> dict[str, list[Any]]:
    columns = [table[column].tolist() for column in text]
    # A text that holds "[SEP]" or "</s>" has these letters, not the model's mark.
    encoded = tokenizer(*columns, truncation=True, max_length=max_length - len(separator), split_special_tokens=True)
    rows = dict(encoded)
    _check_marks(rows["input_ids"], tokenizer, text)
    if separator:
        if not tokenizer.is_fast:
            raise SettingError("task.text", list(text), "this tokenizer marks no pairs and is not a fast one")
        start = tokenizer("a", "b").sequence_ids(0).index(0)  # either sentence may have no tokens of its own
        for index in range(len(table)):
            _insert(rows, index, start + encoded.sequence_ids(index).count(0), separator)
    if (empty := next((row for row, ids in enumerate(rows["input_ids"], 1) if not ids), None)) is not None:
        raise SettingError("task.text", list(text), f"row {empty} is empty, and this tokenizer adds no token to it")
    return rows


def _check_marks(rows: Sequence[Sequence[int]], tokenizer: Any, text: Sequence[str]) -> None:
    """Refuse a row that has more marks than the tokenizer gives any.

    Some tokenizers (T5's) have their marks among the pieces of text: no option keeps them apart from the letters, and
    a model would pool at the wrong place.
    """
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    own = Counter(token for token in tokenizer(*["a"] * len(text))["input_ids"] if token in marks)
    total = own.total()
    for row, ids in enumerate(rows, 1):
        if sum(token in marks for token in ids) > total:
            mark = next(iter(Counter(token for token in ids if token in marks) - own))
            token = tokenizer.convert_ids_to_tokens(mark)
            raise SettingError("task.text", list(text), f"row {row} holds {token!r}, which this model takes for a mark")


def _insert(rows: Mapping[str, list[Any]], index: int, place: int, separator: Sequence[int]) -> None:
    """Put the separator before the second sentence of one row; masks cover it, types are the first sentence's."""
    for key, values in rows.items():
        filler = separator if key == "input_ids" else [1 if key == "attention_mask" else 0] * len(separator)
        values[index] = [*values[index][:place], *filler, *values[index][place:]]


def _key(
    tables: Mapping[str, pd.DataFrame], tokenizer: Any, inputs: Inputs, max_length: int, separator: Sequence[int]
) -> str:
    digest = hashlib.sha256()
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}  # left by other uses
    sides = [tokenizer.truncation_side, list(tokenizer.model_input_names)]
    columns = [list(text) for text in inputs]
    kind = [type(tokenizer).__name__, "marks in a text are letters"]  # the second: how earlier tokens were made
    settings = [state, kind, sides, columns, max_length, list(separator), tokenizers.__version__]
    digest.update(json.dumps(settings).encode())
    used = dict.fromkeys(column for text in columns for column in text)
    for split, table in sorted(tables.items()):
        digest.update(split.encode())
        digest.update(table[[*used, "label"]].to_json(orient="values").encode())
    return digest.hexdigest()[:32]


def _save(data: datasets.DatasetDict, folder: Path) -> None:
    """Written beside its place, then moved there whole; a process that was faster wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data.save_to_disk(scratch / "tokens")
        try:
            os.rename(scratch / "tokens", folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        if shown:
            datasets.enable_progress_bars()
        shutil.rmtree(scratch, ignore_errors=True)
