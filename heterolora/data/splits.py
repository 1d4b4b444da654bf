"""Train, validation and test, whatever the source has labels for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from heterolora.data.sources import Labelled
from heterolora.errors import SettingError
from heterolora.seeds import derive


@dataclass(frozen=True)
class Splits:
    """The three splits and how they came about.

    Attributes:
        tables: ``train``, ``validation``, ``test``.
        note: one sentence for the summary.
    """

    tables: Mapping[str, pd.DataFrame]
    note: str


def make_splits(data: Labelled, validation_share: float, seed: int, limit: int | None) -> Splits:
    """Complete what the source lacks.

    All three labelled: taken as they are. No labelled test set: the official validation set is the test set, and a
    seeded stratified share of the training set the validation set. Only one set: that share for each of the two.

    Args:
        data: what the source has.
        validation_share: share of the training set that is split off, where something must be.
        seed: of the split; not the run's seed, so that runs with other seeds see the same sentences.
        limit: keep at most so many sentences of each split (a seeded stratified choice); None: all.
    """
    if not 0 < validation_share < 0.5:
        raise SettingError("data.validation_share", validation_share, "a share above 0 and below 0.5")
    tables = dict(data.splits)
    if "train" not in tables:
        raise SettingError("task.source", data.origin, f"has no labelled training set, only {sorted(tables)}")
    note, held_out = "official splits", round(validation_share * len(tables["train"]))
    share = f"a stratified {validation_share:.0%} of the training set (split seed {seed})"
    if "test" not in tables:
        if "validation" in tables:
            tables["test"] = tables.pop("validation")
            note = f"test labels are hidden: test = official validation set, validation = {share}"
        else:
            tables["train"], tables["test"] = _split(tables["train"], held_out, seed, "test")
            note = f"one official set: validation and test = {share} each"
    elif "validation" not in tables:
        note = f"official test set; validation = {share}"
    if "validation" not in tables:
        tables["train"], tables["validation"] = _split(tables["train"], held_out, seed, "validation")
    if limit is not None:
        if limit < 1:
            raise SettingError("data.limit", limit, "a whole number of at least 1, or null")
        tables = {name: _limited(table, limit, seed) for name, table in tables.items()}
        note += f"; at most {limit} sentences of each"
    if empty := [name for name, table in tables.items() if table.empty]:
        raise SettingError("task.source", data.origin, f"the splits {empty} are empty")
    return Splits({name: tables[name].reset_index(drop=True) for name in ("train", "validation", "test")}, note)


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
    classes, sizes = np.unique(labels, return_counts=True)
    exact = count * sizes / len(labels)
    quota = np.floor(exact).astype(int)
    for index in np.argsort(quota - exact, kind="stable")[: count - quota.sum()]:
        quota[index] += 1
    generator = np.random.default_rng(derive(seed, "split", name))
    picks = [generator.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, quota, strict=True)]
    return np.concatenate(picks)
