"""Spectra and unevenness against closed forms, numpy, scipy and the definitions written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from heterolora.analysis import (
    effective_rank,
    evenness,
    gini,
    shares_by_label,
    singular_values,
    site_frequency,
    spectrum,
    stable_rank,
)
from heterolora.errors import SettingError

amounts = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12)


@pytest.mark.parametrize(("rank", "width", "out"), [(1, 5, 7), (4, 16, 9), (8, 8, 8), (6, 4, 10), (6, 10, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_singular_values_are_those_of_the_product(rank, width, out, dtype):
    a, b = torch.randn(rank, width).to(dtype), torch.randn(out, rank).to(dtype)
    values = singular_values(a, b, -0.5)
    product = -0.5 * b.double().numpy() @ a.double().numpy()
    expected = np.linalg.svd(product, compute_uv=False)[: min(rank, width, out)]
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_known_factors_have_known_singular_values():
    """B A = diag(3, 4) in two dimensions of five; the third unit of rank is not used."""
    a, b = torch.zeros(3, 5), torch.zeros(6, 3)
    a[0, 0], a[1, 1], b[0, 0], b[1, 1] = 1, 2, 3, 2
    found = spectrum(a, b, 1.0)
    assert found.values == pytest.approx((4, 3, 0))
    assert found.norm == pytest.approx(5)
    assert found.stable_rank == pytest.approx(25 / 16)
    assert found.effective_rank == pytest.approx((7 / 4) ** (4 / 7) * (7 / 3) ** (3 / 7))


def test_an_adapter_that_never_trained_has_no_rank():
    found = spectrum(torch.randn(4, 8), torch.zeros(8, 4), 2.0)
    assert (found.values, found.effective_rank, found.stable_rank, found.norm) == ((0, 0, 0, 0), 0, 0, 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3)),
        (torch.zeros(3), torch.zeros(3, 3)),
        (torch.full((2, 3), math.nan), torch.zeros(3, 2)),
    ],
)
def test_factors_that_fit_no_product_are_refused(a, b):
    with pytest.raises(SettingError, match="factors"):
        singular_values(a, b, 1.0)


@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), max_size=12))
def test_ranks_of_a_spectrum_are_scipys_entropy_and_the_norms_and_know_no_unit(values):
    effective, stable = effective_rank(values), stable_rank(values)
    if not any(values):
        assert (effective, stable) == (0, 0)
        return
    scaled = np.array(values) / max(values)
    assert effective == pytest.approx(math.exp(stats.entropy(scaled)), rel=1e-9)
    assert stable == pytest.approx(float(np.linalg.norm(scaled)) ** 2, rel=1e-9)
    assert effective_rank([8 * value for value in values]) == pytest.approx(effective)
    assert 1 - 1e-9 <= stable <= effective * (1 + 1e-9)
    assert effective <= len(values) * (1 + 1e-9)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_values_count_fully_and_one_value_counts_once(n):
    assert effective_rank([0.3] * n) == pytest.approx(n)
    assert stable_rank([0.3] * n) == pytest.approx(n)
    assert effective_rank([5.0, *[0.0] * n]) == pytest.approx(1)


@given(amounts)
def test_gini_is_the_mean_difference_of_all_pairs(values):
    found = gini(values)
    if not any(values):
        assert math.isnan(found)
        return
    array = np.array(values) / max(values)
    expected = abs(array[:, None] - array[None]).mean() / (2 * array.mean())
    assert found == pytest.approx(expected, abs=1e-9)
    assert -1e-9 <= found <= 1


@given(amounts)
def test_evenness_is_scipys_entropy_over_the_largest_possible(values):
    found = evenness(values)
    if not any(values) or len(values) == 1:
        assert math.isnan(found)
        return
    assert found == pytest.approx(stats.entropy(np.array(values) / max(values)) / math.log(len(values)), abs=1e-9)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_the_two_ends_of_unevenness(n):
    assert (gini([3] * n), evenness([3] * n)) == pytest.approx((0, 1))
    assert (gini([0] * (n - 1) + [9]), evenness([0] * (n - 1) + [9])) == pytest.approx(((n - 1) / n, 0))


@pytest.mark.parametrize("function", [gini, evenness, effective_rank, stable_rank])
@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_amounts_that_are_none_are_refused(function, wrong):
    with pytest.raises(SettingError, match="finite numbers of at least 0"):
        function([1.0, wrong])


DECISIONS = [{"a": 4, "b": 0, "c": 1}, {"a": 2, "b": 2, "c": 0}, {"a": 1, "b": 0, "c": 0}]


def test_frequency_counts_decisions_or_the_time_that_they_were_in_force():
    assert site_frequency(DECISIONS) == pytest.approx({"a": 1, "b": 1 / 3, "c": 1 / 3})
    assert site_frequency(DECISIONS, [10, 30, 60]) == pytest.approx({"a": 1, "b": 0.3, "c": 0.1})
    assert site_frequency([{"a": 1}, {"b": 1}]) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(("decisions", "durations"), [([], None), (DECISIONS, [1]), (DECISIONS, [0, 0, 0])], ids=str)
def test_frequency_without_time_is_refused(decisions, durations):
    with pytest.raises(SettingError):
        site_frequency(decisions, durations)


def test_shares_are_of_parameters_and_add_up():
    units, labels = {"a": 10, "b": 10, "c": 40}, {"a": "lora", "b": "shortcut", "c": "shortcut"}
    found = shares_by_label(DECISIONS, units, labels)
    assert found == {"lora": pytest.approx([0.5, 0.5, 1]), "shortcut": pytest.approx([0.5, 0.5, 0])}
    empty = shares_by_label([{"a": 0}], units, labels)
    assert all(math.isnan(share) for (share,) in empty.values())
    with pytest.raises(SettingError, match="'d'"):
        shares_by_label([{"d": 1}], units, labels)
