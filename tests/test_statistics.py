"""Means, intervals and tests against scipy, all sign patterns by hand, and what must hold whatever the numbers are."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from heterolora.errors import SettingError
from heterolora.statistics import (
    DRAWS,
    EXACT_PAIRS,
    Estimate,
    Mean,
    SignFlip,
    holm,
    mean,
    paired_difference,
    rank_correlation,
    sign_flip,
    top_overlap,
)

VALUES = st.floats(-100, 100, allow_subnormal=False)
BAD = [math.nan, math.inf, -math.inf]


def draw(n, seed=0):
    return np.random.default_rng(seed).normal(0.8, 0.05, n).tolist()


# -- means ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_mean_and_interval_are_those_of_scipy(n):
    values = draw(n)
    found = mean(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (found.low, found.high, found.n) == pytest.approx((low, high, n))


def test_an_interval_from_a_table():
    # t(0.975, 4) = 2.776 in any table; sd of 1..5 is sqrt(2.5)
    found = mean([1, 2, 3, 4, 5])
    assert found.value == 3
    assert found.high - 3 == pytest.approx(2.776 * math.sqrt(2.5 / 5), abs=1e-3)


def test_one_value_has_no_interval():
    found = mean([0.5])
    assert (found.value, found.n) == (0.5, 1)
    assert all(math.isnan(number) for number in (found.low, found.high, found.sd))


def test_no_value_has_no_mean():
    found = mean([])
    assert found.n == 0
    assert all(math.isnan(number) for number in (found.value, found.low, found.high, found.sd))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.8190234])
def test_equal_values_have_no_spread_not_even_rounding(value):
    assert mean([value] * 7) == Mean(value, value, value, 7, 0.0)


@given(st.lists(VALUES, min_size=2, max_size=8), st.randoms())
def test_the_order_of_values_does_not_matter(values, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    assert mean(shuffled) == mean(values)


@given(st.lists(VALUES, min_size=2, max_size=8), st.floats(0.01, 100), VALUES)
def test_scaled_and_shifted_values_have_scaled_and_shifted_intervals(values, factor, shift):
    found, other = mean(values), mean([factor * value + shift for value in values])
    for now, before in ((other.low, found.low), (other.value, found.value), (other.high, found.high)):
        assert now == pytest.approx(factor * before + shift, abs=1e-6, rel=1e-9)
    assert other.sd == pytest.approx(factor * found.sd, abs=1e-8, rel=1e-9)


@pytest.mark.parametrize("bad", BAD)
def test_a_value_that_is_no_number_is_refused(bad):
    for call in (lambda: mean([1.0, bad]), lambda: sign_flip([bad] * 6), lambda: paired_difference([bad], [1.0])):
        with pytest.raises(SettingError, match="finite"):
            call()


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 9])
def test_paired_differences_are_those_of_scipy(n):
    a, b = draw(n), draw(n, seed=1)
    found = paired_difference(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.low, found.high, found.n) == pytest.approx((low, high, n))
    assert found.sd == pytest.approx(np.std(np.subtract(a, b), ddof=1))


def test_pairs_need_two_of_each():
    with pytest.raises(SettingError, match="as many numbers as the other, 2"):
        paired_difference([1, 2], [1, 2, 3])


# -- sign flips -------------------------------------------------------------------------------------------------------


def by_hand(differences):
    """Share of all patterns whose sum is at least as large, in exact fractions."""
    exact = [Fraction(str(value)) for value in differences]
    patterns = list(itertools.product((1, -1), repeat=len(exact)))
    sizes = [abs(sum(sign * value for sign, value in zip(pattern, exact, strict=True))) for pattern in patterns]
    return sum(size >= abs(sum(exact)) for size in sizes) / len(patterns)


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # all one sign: 2 / 64
        [0.1, 0.2, -0.3, 0.4, 0.5, 0.6, -0.7],
        [0.1, 0.2, -0.3, 0.4, -0.4, 0.0],  # cancel to 5.6e-17: p is 1 all the same
        [0.1, 0.1, 0.1, 0.1, -0.1, -0.1, 0.1],  # many ties
        [0.3, 0.1, 0.1, 0.1, -0.3, 0.1, 0.0, 0.2],
    ],
)
def test_p_is_the_share_of_all_patterns(differences):
    assert sign_flip(differences) == SignFlip(by_hand(differences), exact=True)


def test_the_smallest_p_of_six_pairs():
    assert sign_flip([0.01, 0.02, 0.03, 0.01, 0.02, 0.05]) == SignFlip(2 / 64, exact=True)


@pytest.mark.parametrize("n", [6, 11])
def test_p_is_that_of_scipy(n):
    differences = np.subtract(draw(n, 3), 0.79)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip(differences.tolist()).p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_pairs_for_any_p_below_five_percent(n):
    assert sign_flip([0.1] * n) is None


@pytest.mark.parametrize("n", [6, EXACT_PAIRS, EXACT_PAIRS + 1])
def test_no_difference_at_all_has_p_1(n):
    assert sign_flip([0.0] * n) == SignFlip(1.0, exact=n <= EXACT_PAIRS)


@given(st.lists(VALUES.map(lambda value: round(value, 6)), min_size=6, max_size=9), st.randoms())
def test_p_depends_on_neither_order_nor_direction(differences, random):
    shuffled = differences.copy()
    random.shuffle(shuffled)
    p = sign_flip(differences).p
    assert sign_flip(shuffled).p == p
    assert sign_flip([-value for value in differences]).p == p
    assert 2 ** (1 - len(differences)) <= p <= 1


@settings(max_examples=40)
@given(st.lists(st.integers(-1000, 1000), min_size=6, max_size=8))
def test_p_of_whole_numbers_is_the_share_by_hand(differences):
    assert sign_flip(differences).p == by_hand(differences)
    assert sign_flip([value / 1000 for value in differences]).p == by_hand(differences)  # ties survive rounding


def test_twenty_pairs_are_looked_at_in_full_within_little_memory():
    differences = [0.01] * EXACT_PAIRS
    differences[:4] = [-0.01] * 4
    tracemalloc.start()
    found = sign_flip(differences)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 16 of 20 heads: a coin's two-sided tail
    assert found == SignFlip(pytest.approx(stats.binomtest(16, 20).pvalue), exact=True)
    assert peak < 100 * 2**20


def test_more_pairs_are_sampled_and_say_so():
    differences = [0.01] * 20 + [-0.01] * 10
    tracemalloc.start()
    found = sign_flip(differences)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = stats.binomtest(20, 30).pvalue
    assert not found.exact
    assert found.p == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / DRAWS))
    assert sign_flip(differences) == found
    assert peak < 100 * 2**20


def test_a_sampled_p_is_never_0():
    assert sign_flip([1.0] * 60) == SignFlip(1 / (DRAWS + 1), exact=False)


# -- Holm -------------------------------------------------------------------------------------------------------------


def test_holms_correction_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; the last must not fall below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_corrected_p_are_at_most_1():
    assert holm([0.6, 0.5, 0.9]) == [1.0, 1.0, 1.0]


def test_one_p_stays_and_none_is_none():
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8), st.randoms())
def test_corrected_p_keep_the_order_and_are_never_smaller(ps, random):
    found = holm(ps)
    assert all(raw <= corrected <= min(1, len(ps) * raw) for raw, corrected in zip(ps, found, strict=True))
    for (p, a), (q, b) in itertools.combinations(zip(ps, found, strict=True), 2):
        assert (p - q) * (a - b) >= 0
        assert p != q or a == b
    order = list(range(len(ps)))
    random.shuffle(order)
    assert holm([ps[i] for i in order]) == [found[i] for i in order]


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_a_p_outside_0_to_1_is_refused(bad):
    with pytest.raises(SettingError, match="from 0 to 1"):
        holm([0.5, bad])


# -- rankings ---------------------------------------------------------------------------------------------------------

SCIPY = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}
KINDS = sorted(SCIPY)


def ranked(n=25):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return x, (x + rng.normal(size=n)).round(1)  # with ties


@pytest.mark.parametrize("kind", KINDS)
def test_correlations_are_those_of_scipy(kind):
    x, y = ranked()
    found = rank_correlation(x, y, kind, resamples=50)
    assert found.value == pytest.approx(SCIPY[kind](x, y).statistic)
    assert found.n == 25


def test_kendall_is_tau_b_by_hand():
    # six pairs of items: 3 agree, 0 disagree, 2 tied in x only, 1 tied in y only: 3 / sqrt((6 - 2) (6 - 1))
    assert rank_correlation([1, 1, 1.5, 1.5], [1, 2, 2, 3], "kendall", 10).value == pytest.approx(3 / math.sqrt(20))


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_is_that_of_scipys_bootstrap(kind):
    x, y = ranked()
    found = rank_correlation(x, y, kind, resamples=1000)
    low, high = stats.bootstrap(
        (x, y),
        lambda a, b: SCIPY[kind](a, b).statistic,
        n_resamples=1000,
        paired=True,
        vectorized=False,
        method="percentile",
        random_state=1,
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)  # other draws
    assert found.low < found.value < found.high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 25])
def test_the_interval_is_that_of_scipy_draw_by_draw(kind, n):
    """Draws of three items are often constant; scipy would warn of those."""
    x, y = (values[:n].round() for values in ranked())
    draws = np.random.default_rng(7).integers(0, n, (200, n))
    usable = [draw for draw in draws if len(set(x[draw])) > 1 and len(set(y[draw])) > 1]
    expected = np.percentile([SCIPY[kind](x[draw], y[draw]).statistic for draw in usable], [2.5, 97.5])
    found = rank_correlation(x, y, kind, resamples=200, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_draws(kind):
    x, y = ranked()
    first = rank_correlation(x, y, kind, resamples=50)
    assert rank_correlation(x, y, kind, resamples=50) == first
    assert rank_correlation(x, y, kind, resamples=50, seed=1).low != first.low


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5]), ([1], [2]), ([], [])])
def test_constant_scores_rank_nothing(kind, x, y):
    found = rank_correlation(x, y, kind)
    assert found.n == len(x)
    assert all(math.isnan(number) for number in (found.value, found.low, found.high))


@pytest.mark.parametrize("kind", KINDS)
def test_constant_resamples_are_left_out(kind):
    # half of the draws of two items take one of them twice; the others all agree
    assert rank_correlation([1, 2], [3, 4], kind, resamples=40) == Estimate(
        pytest.approx(1), pytest.approx(1), pytest.approx(1), 2
    )


def test_without_a_usable_resample_there_is_no_interval():
    x, y = [0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5]
    lacking = next(
        seed for seed in range(50) if 5 not in np.random.default_rng(seed).integers(0, 6, (1, 6))
    )  # the one draw lacks the item that differs
    found = rank_correlation(x, y, "kendall", resamples=1, seed=lacking)
    assert found.value > 0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8), st.sampled_from(KINDS))
def test_a_correlation_is_symmetric_and_knows_only_ranks(pairs, kind):
    x, y = zip(*pairs, strict=True)
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    found = rank_correlation(x, y, kind, resamples=60)  # enough that not all are constant
    assert -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9
    assert rank_correlation(y, x, kind, 1).value == pytest.approx(found.value)
    assert rank_correlation([math.exp(value) for value in x], y, kind, 1).value == pytest.approx(found.value)
    assert rank_correlation([-value for value in x], y, kind, 1).value == pytest.approx(-found.value)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (([1, 2], [1], "kendall"), "y"),
        (([1, math.nan], [1, 2], "kendall"), "x"),
        (([[1, 2]], [1, 2], "kendall"), "x"),
        (([1, 2], [1, 2], "pearson"), "kind"),
        (([1, 2], [1, 2], "kendall", 0), "resamples"),
    ],
)
def test_rankings_that_cannot_be_compared_are_refused(arguments, setting):
    with pytest.raises(SettingError) as caught:
        rank_correlation(*arguments)
    assert caught.value.setting == setting


# -- the best items ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "share", "expected"),
    [
        ([8, 7, 6, 5, 4, 3, 2, 1], [8, 1, 7, 2, 3, 4, 5, 6], 0.25, 0.5),  # {0, 1} and {0, 2}
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.25, 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.25, 0.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 1.0, 1.0),
        ([5, 5, 5, 5], [1, 0, 0, 0], 0.25, 1.0),  # of equal ones the first
        ([5, 5, 5, 5], [0, 1, 0, 0], 0.25, 0.0),
        ([2, 1], [3, 4], 0.01, 0.0),  # never fewer than one
        (list(range(10)), [*range(8), 9, 8], 0.25, 1.0),  # 2.5 is rounded to 2
    ],
)
def test_overlap_of_the_best_by_hand(x, y, share, expected):
    assert top_overlap(x, y, share) == expected


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12), st.floats(0.01, 1))
def test_overlap_is_symmetric_and_complete_with_itself(pairs, share):
    x, y = zip(*pairs, strict=True)
    assert top_overlap(x, y, share) == top_overlap(y, x, share)
    assert 0 <= top_overlap(x, y, share) <= 1
    assert top_overlap(x, x, share) == 1


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [(([1], [1], 0.0), "share"), (([1], [1], 1.1), "share"), (([], []), "x"), (([1, 2], [1]), "y")],
)
def test_overlaps_that_mean_nothing_are_refused(arguments, setting):
    with pytest.raises(SettingError) as caught:
        top_overlap(*arguments)
    assert caught.value.setting == setting
