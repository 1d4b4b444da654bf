"""Tokens of the splits, cached on disk under what they depend on."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import tokenizers

_log = logging.getLogger(__name__)

Example = dict[str, Any]
"""Token ids and masks as lists, ``labels``, and ``index``: the row in its split."""


def tokenise(
    tables: Mapping[str, pd.DataFrame], tokenizer: Any, text: Sequence[str], max_length: int, cache: Path | None
) -> dict[str, list[Example]]:
    """Examples of each split.

    Args:
        tables: the splits' texts and labels.
        tokenizer: a transformers tokenizer.
        text: the text columns: one sentence or a pair.
        max_length: longer inputs are cut, the longer sentence of a pair first.
        cache: folder for the tokens; None: keep none.
    """
    separator = pair_separator(tokenizer) if len(text) == 2 else None
    found: datasets.DatasetDict | None = None
    folder = None if cache is None else cache / _key(tables, tokenizer, text, max_length, separator)
    if folder is not None and folder.is_dir():
        found = datasets.load_from_disk(folder)
        _log.info("tokens from %s", folder)
    if found is None:
        found = datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(_encode(table, tokenizer, text, max_length, separator))
                for split, table in tables.items()
            }
        )
        if folder is not None:
            _save(found, folder)
    return {split: [{**row, "index": index} for index, row in enumerate(data)] for split, data in found.items()}


def pair_separator(tokenizer: Any) -> str | None:
    """Text to put between two sentences, where the tokenizer itself puts nothing; None: it does.

    Byte-level tokenizers of decoders often join a pair without a mark, which costs points on pair tasks.
    """
    ids = tokenizer("a", "b")["input_ids"]
    special = [index for index, token in enumerate(ids) if token in tokenizer.all_special_ids]
    inner = [index for index in special if 0 < index < len(ids) - 1]
    if inner:
        return None
    return tokenizer.sep_token or tokenizer.eos_token or "\n"


def _encode(
    table: pd.DataFrame, tokenizer: Any, text: Sequence[str], max_length: int, separator: str | None
) -> dict[str, list[Any]]:
    columns = [table[column].tolist() for column in text]
    if separator is not None:
        columns = [[f"{first}{separator}{second}" for first, second in zip(*columns, strict=True)]]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return {**encoded, "labels": table["label"].tolist()}


def _key(
    tables: Mapping[str, pd.DataFrame], tokenizer: Any, text: Sequence[str], max_length: int, separator: str | None
) -> str:
    digest = hashlib.sha256()
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    settings = [state, type(tokenizer).__name__, list(text), max_length, separator, tokenizers.__version__]
    digest.update(json.dumps(settings).encode())
    for split, table in sorted(tables.items()):
        digest.update(split.encode())
        digest.update(table[[*text, "label"]].to_json(orient="values").encode())
    return digest.hexdigest()[:32]


def _save(data: datasets.DatasetDict, folder: Path) -> None:
    """Written beside its place, then moved there whole; a process that was faster wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        data.save_to_disk(scratch / "tokens")
        if not bars:
            datasets.enable_progress_bars()
        try:
            os.rename(scratch / "tokens", folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
