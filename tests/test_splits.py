"""Splits: official ones, those that have to be made, and limits."""

import inspect
import math
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heterolora.data.module import Data
from heterolora.data.sources import Glue, Labelled, MovieReviews
from heterolora.data.splits import make_splits
from heterolora.errors import SettingError

PAIR = ["sentence1", "sentence2"]


def table_of(labels, start=0):
    """A table whose texts are all different."""
    return pd.DataFrame({"text": [f"text {start + row}" for row in range(len(labels))], "label": list(labels)})


def one_set(labels):
    return Labelled({"train": table_of(labels)}, "made up")


def three_sets(sizes=(20, 8, 12)):
    starts = dict(zip(("train", "validation", "test"), (0, 1000, 2000), strict=True))
    tables = {
        name: table_of([0, 1] * (size // 2), start)
        for (name, start), size in zip(starts.items(), sizes, strict=True)
    }  # fmt: skip
    return Labelled(tables, "made up")


def texts(splits):
    return {name: table["text"].tolist() for name, table in splits.tables.items()}


def sizes(splits):
    return {name: len(table) for name, table in splits.tables.items()}


@pytest.fixture(scope="module")
def reviews():
    return MovieReviews("rotten_tomatoes").read(None, ["text"])


# -- real data --------------------------------------------------------------------------------------------------------


def test_mrpc_keeps_its_official_splits(data_root):
    data = Glue("mrpc").read(data_root, PAIR)
    splits = make_splits(data, 0.1, 0, None)
    assert sizes(splits) == {"train": 3668, "validation": 408, "test": 1725}
    assert splits.note == "official splits"
    for name, table in data.splits.items():
        pd.testing.assert_frame_equal(splits.tables[name], table)


def test_rte_tests_on_the_official_validation_set(data_root):
    data = Glue("rte").read(data_root, PAIR)
    splits = make_splits(data, 0.1, 0, None)
    assert sizes(splits) == {"train": 2241, "validation": 249, "test": 277}
    pd.testing.assert_frame_equal(splits.tables["test"], data.splits["validation"])
    assert "test labels are hidden: test = official validation set" in splits.note
    assert "validation = a stratified 10% of the training set (split seed 0)" in splits.note


def test_rte_validation_is_cut_out_of_its_training_set(data_root):
    data = Glue("rte").read(data_root, PAIR)
    splits = make_splits(data, 0.1, 0, None)
    parts = pd.concat([splits.tables["train"], splits.tables["validation"]])
    assert Counter(parts.itertuples(index=False, name=None)) == Counter(
        data.splits["train"].itertuples(index=False, name=None)
    )
    shares = [(table["label"] == "entailment").mean() for table in (splits.tables["validation"], data.splits["train"])]
    assert shares[0] == pytest.approx(shares[1], abs=1 / 249)


def test_rotten_tomatoes_is_split_in_three(reviews):
    splits = make_splits(reviews, 0.1, 0, None)
    found = [text for table in splits.tables.values() for text in table["text"]]
    assert sizes(splits) == {"train": 6824, "validation": 853, "test": 853}
    assert sorted(found) == sorted(reviews.splits["train"]["text"])  # disjoint: no text is twice
    assert len(set(found)) == 8530
    assert (
        splits.note
        == "one official set: validation and test = a stratified 10% of the training set (split seed 0) each"
    )


def test_rotten_tomatoes_stays_balanced(reviews):
    for table in make_splits(reviews, 0.1, 0, None).tables.values():
        assert abs((table["label"] == 0).sum() - (table["label"] == 1).sum()) <= 1


# -- what must be made ------------------------------------------------------------------------------------------------


def test_the_same_split_seed_gives_the_same_sentences(reviews):
    first = texts(make_splits(reviews, 0.1, 5, None))
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(123)
    assert texts(make_splits(reviews, 0.1, 5, None)) == first


def test_another_split_seed_gives_other_sentences(reviews):
    first, second = (texts(make_splits(reviews, 0.1, seed, None)) for seed in (0, 1))
    for name in ("validation", "test"):
        overlap = set(first[name]) & set(second[name])
        assert len(overlap) < 0.25 * len(first[name])  # a tenth by chance


def test_the_runs_seed_cannot_reach_the_split():
    assert list(inspect.signature(Data.splits).parameters) == ["self", "task"]
    assert "seed" not in inspect.signature(Data).parameters


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    share=st.floats(0.05, 0.4),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_made_splits_are_stratified_disjoint_and_in_file_order(counts, share, seed):
    labels = [code for code, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(labels)
    data = Labelled({"train": table_of(labels), "validation": table_of([0, 1], 1000)}, "made up")
    wanted = round(share * len(labels))
    assume(wanted > 0)
    splits = make_splits(data, share, seed, None)
    train, validation = splits.tables["train"], splits.tables["validation"]
    assert len(validation) == wanted
    assert sorted([*train["text"], *validation["text"]]) == sorted(data.splits["train"]["text"])
    for code, count in enumerate(counts):
        exact = wanted * count / len(labels)
        assert (validation["label"] == code).sum() in (math.floor(exact), math.ceil(exact))
    for table in (train, validation):
        order = [int(text.split()[1]) for text in table["text"]]
        assert order == sorted(order)
        assert table["label"].tolist() == [labels[row] for row in order]
        assert list(table.index) == list(range(len(table)))


@pytest.mark.parametrize("count", [15, 20, 25, 30, 45, 100])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_validation_and_test_get_the_same_number_of_sentences(count, share):
    # the note says "each"; a rounded share of what is left after the first cut need not be the same number
    splits = make_splits(one_set([row % 2 for row in range(count)]), share, 0, None)
    assert sizes(splits)["validation"] == sizes(splits)["test"] == round(share * count)


def test_a_test_set_without_a_validation_set():
    data = Labelled({"train": table_of([0, 1] * 10), "test": table_of([0, 1] * 3, 1000)}, "made up")
    splits = make_splits(data, 0.1, 0, None)
    assert sizes(splits) == {"train": 18, "validation": 2, "test": 6}
    assert splits.tables["test"]["text"].tolist() == data.splits["test"]["text"].tolist()


def test_the_note_tells_of_a_validation_set_that_was_made():
    data = Labelled({"train": table_of([0, 1] * 10), "test": table_of([0, 1] * 3, 1000)}, "made up")
    assert "stratified 10% of the training set" in make_splits(data, 0.1, 0, None).note


def test_the_source_is_left_as_it_was():
    data = one_set([0, 1] * 20)
    before = data.splits["train"].copy()
    make_splits(data, 0.1, 0, 5)
    assert set(data.splits) == {"train"}
    pd.testing.assert_frame_equal(data.splits["train"], before)


# -- further test sets, a user's own splits, numbers ------------------------------------------------------------------


def two_validation_sets():
    tables = {"train": table_of([0, 1] * 20), "validation": table_of([0, 1], 1000)}
    return Labelled(tables | {"validation_mismatched": table_of([1, 0, 1], 2000)}, "made up")


def test_every_official_validation_set_is_a_test_set_where_test_labels_are_hidden():
    splits = make_splits(two_validation_sets(), 0.1, 0, None)
    assert sizes(splits) == {"train": 36, "validation": 4, "test": 2, "test_mismatched": 3}
    assert splits.tests == ("test", "test_mismatched")
    assert texts(splits)["test_mismatched"] == ["text 2000", "text 2001", "text 2002"]
    assert splits.note.startswith("test labels are hidden: test = official validation set, validation = ")
    assert splits.note.endswith("; test_mismatched = official validation_mismatched set")


def test_a_further_set_changes_no_other_split():
    plain = Labelled({k: v for k, v in two_validation_sets().splits.items() if "mis" not in k}, "made up")
    with_it, without = (texts(make_splits(data, 0.1, 0, None)) for data in (two_validation_sets(), plain))
    assert {name: rows for name, rows in with_it.items() if name != "test_mismatched"} == without


def test_a_limit_holds_for_further_test_sets():
    assert sizes(make_splits(two_validation_sets(), 0.1, 0, 2))["test_mismatched"] == 2


def test_further_test_sets_of_a_source_are_kept():
    data = three_sets()
    found = make_splits(Labelled({**data.splits, "test_hard": table_of([1], 9000)}, "made up"), 0.1, 0, None)
    assert found.tests == ("test", "test_hard")
    assert found.note == "official splits"


def test_splits_of_unknown_names_are_refused():
    data = three_sets()
    with pytest.raises(SettingError, match=r"has splits \['validation_x'\] beside a test set"):
        make_splits(Labelled({**data.splits, "validation_x": table_of([1])}, "made up"), 0.1, 0, None)


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (("train",), "one given set: validation and test = a stratified 10% of the training set (split seed 0) each"),
        (("train", "validation"), "given validation set; test = a stratified 10% of the training set (split seed 0)"),
        (("train", "test"), "given test set; validation = a stratified 10% of the training set (split seed 0)"),
        (("train", "validation", "test"), "given splits"),
    ],
)
def test_a_users_own_splits_are_what_they_are_called(given, note):
    data = Labelled({name: three_sets((40, 8, 12)).splits[name] for name in given}, "files", official=False)
    splits = make_splits(data, 0.1, 0, None)
    assert splits.note == note
    assert sizes(splits) == {
        "train": 40 - 4 * (3 - len(given)),
        "validation": 8 if "validation" in given else 4,
        "test": 12 if "test" in given else 4,
    }
    for name in set(given) - {"train"}:
        assert texts(splits)[name] == data.splits[name]["text"].tolist()


def test_numbers_are_split_without_strata():
    labels = [row / 7 for row in range(70)]
    chosen = [make_splits(one_set(labels), 0.1, seed, None) for seed in (0, 0, 1)]
    assert sizes(chosen[0]) == {"train": 56, "validation": 7, "test": 7}
    assert "a random 10% of the training set" in chosen[0].note
    assert texts(chosen[0]) == texts(chosen[1]) != texts(chosen[2])
    assert chosen[0].tables["validation"]["label"].nunique() == 7
    assert sizes(make_splits(one_set(labels), 0.1, 0, 5)) == {"train": 5, "validation": 5, "test": 5}


def test_a_class_with_one_example_is_in_one_split():
    splits = make_splits(one_set([0] * 20 + [1] * 20 + [2]), 0.1, 0, None)
    assert sizes(splits) == {"train": 33, "validation": 4, "test": 4}
    assert sum((table["label"] == 2).sum() for table in splits.tables.values()) == 1


def test_the_note_counts_texts_that_training_has_too(caplog):
    tables = {"train": table_of([0, 1] * 10), "validation": table_of([0, 1], 15), "test": table_of([0, 1] * 3, 18)}
    splits = make_splits(Labelled(tables | {"test_new": table_of([1], 99)}, "made up"), 0.1, 0, None)
    assert splits.note == "official splits; texts that training has, too: 2 in validation, 2 in test"
    assert "made up: texts that training has, too: 2 in validation, 2 in test" in caplog.text


def test_a_pair_is_the_same_when_both_of_its_texts_are():
    train = pd.DataFrame({"a": ["x", "y"], "b": ["1", "2"], "label": [0, 1]})
    tables = {"train": train, "validation": train.assign(b=["2", "1"]), "test": train.assign(label=[1, 0])}
    assert make_splits(Labelled(tables, ""), 0.1, 0, None).note.endswith("; texts that training has, too: 2 in test")


def test_reviews_that_are_there_twice_are_told():
    splits = make_splits(MovieReviews("imdb").read(None, ["text"]), 0.1, 0, None)
    assert splits.note.endswith("; texts that training has, too: 15 in validation, 15 in test")


# -- limit ------------------------------------------------------------------------------------------------------------


def test_a_limit_keeps_a_stratified_part_of_each_split():
    full, few = (make_splits(three_sets(), 0.1, 0, limit) for limit in (None, 6))
    assert sizes(few) == {"train": 6, "validation": 6, "test": 6}
    for name, table in few.tables.items():
        assert table["label"].sum() == 3
        rows = [texts(full)[name].index(text) for text in table["text"]]
        assert rows == sorted(set(rows))  # each once, in file order
        assert list(table.index) == list(range(6))
    assert "; at most 6 sentences of each" in few.note


def test_a_limit_is_seeded_by_the_split_seed():
    chosen = [texts(make_splits(three_sets((200, 200, 200)), 0.1, seed, 20)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_a_limit_above_the_size_changes_nothing():
    assert texts(make_splits(three_sets(), 0.1, 0, 20)) == texts(make_splits(three_sets(), 0.1, 0, None))


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(SettingError) as caught:
        make_splits(three_sets(), 0.1, 0, limit)
    assert caught.value.setting == "data.limit"


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.5, 1.0, -0.1, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(SettingError) as caught:
        make_splits(one_set([0, 1] * 20), share, 0, None)
    assert caught.value.setting == "data.validation_share"


def test_no_training_set_is_refused():
    data = Labelled({"validation": table_of([0, 1])}, "made up")
    with pytest.raises(SettingError, match=r"made up: has no labelled training set, only \['validation'\]"):
        make_splits(data, 0.1, 0, None)


def test_a_split_that_would_be_empty_is_refused():
    with pytest.raises(SettingError, match="are empty"):
        make_splits(one_set([0, 1, 0, 1]), 0.1, 0, None)  # 0.4 sentences
