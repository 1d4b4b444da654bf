"""Labels: how names, codes and numbers are read, and what is refused."""

import math

import numpy as np
import pandas as pd
import pytest

from heterolora.data.labels import class_codes, class_names, label_name, numbers
from heterolora.errors import SettingError

PLACE = "the train split of here"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (1, "1"),
        (1.0, "1"),
        ("1", "1"),
        ("1.0", "1"),
        ("-2.00", "-2"),
        (np.int8(1), "1"),
        (np.float32(1.0), "1"),
        ("01", "01"),  # a code of its own, e.g. a postcode
        ("1.5", "1.5"),
        (1.5, "1.5"),
        ("1.", "1."),
        (True, "true"),
        (np.bool_(False), "false"),
        ("True", "true"),
        ("FALSE", "false"),
        (" True", " True"),
        (np.float32(0.1), "0.1"),
        (np.float64(0.1), "0.1"),
        (np.float16(2.0), "2"),
        (" yes", " yes"),
        ("Yes", "Yes"),
    ],
)
def test_a_class_has_one_name_however_its_number_is_written(given, name):
    assert label_name(given) == name


@pytest.mark.parametrize("given", [None, [1], {"a": 1}, object(), np.array([1]), np.array([1, 2]), "x\ud800"])
def test_what_is_no_name_is_refused(given):
    with pytest.raises(TypeError):
        label_name(given)
    with pytest.raises(
        SettingError,
        match=r"task\.source=the train split of here: label of row 2: .* (neither text nor|half a character)",
    ):
        class_names(["a", given], PLACE)


def test_classes_are_learnt_sorted_as_text():
    assert class_names(["b", 10, "a", 2.0, "2", "b"], PLACE) == ("10", "2", "a", "b")


def test_classes_that_differ_in_spaces_or_case_are_told(caplog):
    assert class_names(["yes", " yes", "no", "Yes", "maybe"], PLACE) == (" yes", "Yes", "maybe", "no", "yes")
    assert caplog.messages == [
        "the train split of here has classes that differ in nothing but spaces or case: [' yes', 'Yes', 'yes']"
    ]


def test_names_are_read_as_labels_are():
    assert class_codes(["1", 0.0, "True"], ["0.0", "1", "TRUE"], False, PLACE).tolist() == [1, 0, 2]


def test_one_class_is_none():
    with pytest.raises(SettingError, match=r"task\.labels=None: the train split of here has a single class, '1'"):
        class_names(["1", 1, 1.0], PLACE)


def test_codes_are_places_in_the_names():
    codes = class_codes(pd.Series(["c", "a", "b"], index=[7, 8, 9]), ["a", "b", "c"], False, PLACE)
    assert codes.tolist() == [2, 0, 1]
    assert codes.dtype == int


@pytest.mark.parametrize("label", [1, "1", 1.0, True])
def test_a_number_is_a_code_only_where_that_is_said(label):
    if label is not True:
        assert class_codes([label], ["no", "yes"], True, PLACE).tolist() == [1]
    with pytest.raises(SettingError, match="has other labels"):
        class_codes([label], ["no", "yes"], False, PLACE)


def test_a_flag_is_a_name():
    assert class_codes([True, False], ["false", "true"], True, PLACE).tolist() == [1, 0]


def test_unknown_labels_are_named_with_the_first_row():
    message = r"task\.labels=\['a', 'b'\]: the train split of here has other labels: \['c', 'd'\] \(first in row 2\)"
    with pytest.raises(SettingError, match=message):
        class_codes(["a", "d", "c"], ["a", "b"], False, PLACE)


def test_numbers_may_be_written_as_text():
    found = numbers(["3.800", 2, np.float32(0.5), " 1e1 "], PLACE)
    assert found.tolist() == [3.8, 2.0, 0.5, 10.0]
    assert found.dtype == float


@pytest.mark.parametrize(
    "label", ["three", "", "3,5", "1_000", None, True, np.bool_(1), math.nan, "inf", [1], np.ones(1), {}]
)
def test_what_is_no_number_is_named_with_its_row(label):
    with pytest.raises(SettingError, match=r"task\.source=the train split of here: label .* in row 2 is no finite"):
        numbers([1.0, label], PLACE)
