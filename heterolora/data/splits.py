"""Train, validation and test, whatever the source has labels for."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from heterolora.data.sources import Labelled
from heterolora.errors import SettingError
from heterolora.seeds import derive

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The splits and how they came about.

    Attributes:
        tables: ``train``, ``validation``, ``test``, and further test sets ``test_*``.
        note: one sentence for the summary.
    """

    tables: Mapping[str, pd.DataFrame]
    note: str

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the test sets, ``test`` first."""
        return tuple(name for name in self.tables if name not in ("train", "validation"))


def training_table(data: Labelled) -> pd.DataFrame:
    """The training set.

    Raises:
        SettingError: if there is none.
    """
    if "train" not in data.splits:
        raise SettingError("task.source", data.origin, f"has no labelled training set, only {sorted(data.splits)}")
    return data.splits["train"]


def make_splits(data: Labelled, validation_share: float, seed: int, limit: int | None) -> Splits:
    """Complete what the source lacks.

    All three labelled: taken as they are. No labelled test set: the official validation sets are the test sets, and a
    seeded stratified share of the training set the validation set; of a user's own files, that share is the test set.
    Only one set: that share for each of the two. Where labels are numbers, the share is drawn without strata.
    Texts of the training split that another split has, too, are counted in a warning and in the note.

    Args:
        data: what the source has.
        validation_share: share of the training set that is split off, where something must be.
        seed: of the split; not the run's seed, so that runs with other seeds see the same sentences.
        limit: keep at most so many sentences of each split (a seeded stratified choice); None: all.
    """
    if not 0 < validation_share < 0.5:
        raise SettingError("data.validation_share", validation_share, "a share above 0 and below 0.5")
    train = training_table(data)
    drawn = "random" if train["label"].dtype.kind == "f" else "stratified"
    tables, note = _complete(
        data, round(validation_share * len(train)), seed, f"a {drawn} {validation_share:.0%} of the training set"
    )
    if limit is not None:
        if limit < 1:
            raise SettingError("data.limit", limit, "a whole number of at least 1, or null")
        tables = {name: _limited(table, limit, seed) for name, table in tables.items()}
        note += f"; at most {limit} sentences of each"
    further = sorted(name for name in tables if name.startswith("test_"))
    order = ("train", "validation", "test", *further)
    if unknown := sorted(tables.keys() - set(order)):
        raise SettingError("task.source", data.origin, f"has splits {unknown} beside a test set; call them test_*")
    if empty := [name for name in order if tables[name].empty]:
        raise SettingError("task.source", data.origin, f"the splits {empty} are empty")
    if seen := _seen(tables, order[1:]):
        counts = ", ".join(f"{count} in {name}" for name, count in seen.items())
        _log.warning("%s: texts that training has, too: %s", data.origin, counts)
        note += f"; texts that training has, too: {counts}"
    return Splits({name: tables[name].reset_index(drop=True) for name in order}, note)


def _seen(tables: Mapping[str, pd.DataFrame], others: Sequence[str]) -> dict[str, int]:
    """How many rows of each other split have the texts of a training row, where there are any."""

    def texts(name: str) -> Iterator[tuple[str, ...]]:
        return tables[name].drop(columns="label").itertuples(index=False, name=None)

    known = set(texts("train"))
    counts = {name: sum(row in known for row in texts(name)) for name in others}
    return {name: count for name, count in counts.items() if count}


def _complete(data: Labelled, held_out: int, seed: int, share: str) -> tuple[dict[str, pd.DataFrame], str]:
    """Tables of at least train, validation and test, and what was done; ``share`` says what ``held_out`` rows are."""
    tables, kind, share = dict(data.splits), "official" if data.official else "given", f"{share} (split seed {seed})"
    has_validation, has_test = "validation" in tables, "test" in tables
    if has_validation and has_test:
        return tables, f"{kind} splits"
    if has_test:
        note = f"{kind} test set; validation = {share}"
    elif has_validation and data.official:
        further = [name for name in tables if name.startswith("validation_")]
        for name in ("validation", *further):
            tables[name.replace("validation", "test", 1)] = tables.pop(name)
        note = f"test labels are hidden: test = official validation set, validation = {share}"
        note += "".join(f"; {name.replace('validation', 'test', 1)} = official {name} set" for name in further)
    else:
        tables["train"], tables["test"] = _split(tables["train"], held_out, seed, "test")
        note = f"one {kind} set: validation and test = {share} each"
        if has_validation:
            note = f"{kind} validation set; test = {share}"
    if "validation" not in tables:
        tables["train"], tables["validation"] = _split(tables["train"], held_out, seed, "validation")
    return tables, note


def _split(table: pd.DataFrame, count: int, seed: int, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rest, chosen): ``count`` rows, the classes in proportion (largest remainders first), both in file order."""
    chosen = _stratified(table["label"].to_numpy(), count, seed, name)
    mask = np.zeros(len(table), dtype=bool)
    mask[chosen] = True
    return table[~mask], table[mask]


def _limited(table: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    if len(table) <= limit:
        return table
    return table.iloc[np.sort(_stratified(table["label"].to_numpy(), limit, seed, "limit"))]


def _stratified(labels: np.ndarray, count: int, seed: int, name: str) -> np.ndarray:
    if labels.dtype.kind == "f":
        labels = np.zeros(len(labels), dtype=int)  # numbers make no strata
    classes, sizes = np.unique(labels, return_counts=True)
    exact = count * sizes / len(labels)
    quota = np.floor(exact).astype(int)
    for index in np.argsort(quota - exact, kind="stable")[: count - quota.sum()]:
        quota[index] += 1
    generator = np.random.default_rng(derive(seed, "split", name))
    picks = [generator.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, quota, strict=True)]
    return np.concatenate(picks)
