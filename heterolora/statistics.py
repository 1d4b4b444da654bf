"""Means over seeds, differences of pairs, corrected p-values, agreement of rankings: pure functions of numbers."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]

from heterolora.errors import SettingError

CONFIDENCE = 0.95
"""Of every interval here."""

FEWEST_PAIRS = 6
"""Fewer cannot give p < 0.05: the smallest two-sided p of n pairs is 2 / 2^n."""

EXACT_PAIRS = 20
"""Up to here all sign patterns are looked at; half of 2^20 sums of 8 bytes are 4 MiB."""

DRAWS = 100_000
"""Sign patterns drawn where there are too many to look at all."""

_CHUNK = 10_000
# Sums of the same numbers in another order differ by rounding, at most about n * 1e-16 of the sum of their sizes.
_ROUNDING = 1e-12

RankCorrelation: TypeAlias = Literal["spearman", "kendall"]
Vector: TypeAlias = npt.NDArray[np.float64]
_RANK_CORRELATIONS = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: the estimate, in the unit of the data; NaN where it is not defined.
        low: lower end of its 95 % interval; NaN where n < 2.
        high: upper end.
        n: numbers (or pairs, or items) that it was made from.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Mean(Estimate):
    """A mean with its Student-t interval.

    Attributes:
        sd: standard deviation of the numbers (divided by n - 1); NaN where n < 2.
    """

    sd: float


@dataclass(frozen=True)
class SignFlip:
    """What a sign-flip test found.

    Attributes:
        p: two-sided p-value, above 0.
        exact: whether all sign patterns were looked at, or ``DRAWS`` random ones.
    """

    p: float
    exact: bool


def mean(values: Sequence[float]) -> Mean:
    """Mean, standard deviation and 95 % Student-t interval: mean +- t(0.975, n - 1) sd / sqrt(n).

    Args:
        values: finite numbers; without any, everything but n is NaN.

    Raises:
        SettingError: if a value is not finite.
    """
    numbers = _finite("values", values).tolist()
    n = len(numbers)
    if n < 2:
        return Mean(numbers[0] if numbers else math.nan, math.nan, math.nan, n, math.nan)
    centre, sd = statistics.mean(numbers), statistics.stdev(numbers)  # of fractions: equal numbers have an sd of 0
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Mean(centre, centre - half, centre + half, n, sd)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Mean:
    """Mean of a - b with the 95 % Student-t interval of these differences.

    Args:
        a: finite numbers.
        b: as many; the i-th of both are a pair.

    Raises:
        SettingError: if a value is not finite or the lengths differ.
    """
    return mean((_finite("a", a) - _as_long("b", b, len(a))).tolist())


def sign_flip(differences: Sequence[float]) -> SignFlip | None:
    """Two-sided sign-flip (permutation) test of a mean difference of 0 (Fisher 1935).

    p is the share of the 2^n ways to choose the signs whose mean is at least as far from 0 as the one seen; equal up to
    rounding counts as equal, also where the differences cancel, which is why this is not left to
    ``scipy.stats.permutation_test`` (that would also take seconds for 20 pairs). For more than ``EXACT_PAIRS``
    differences it is (hits + 1) / (draws + 1) of ``DRAWS`` random patterns (Phipson and Smyth 2010), the same in each
    call.

    Args:
        differences: finite numbers, one of each pair.

    Returns:
        None for fewer than ``FEWEST_PAIRS`` differences, for which no p below 0.05 is possible.

    Raises:
        SettingError: if a difference is not finite.
    """
    d = _finite("differences", differences)
    if d.size < FEWEST_PAIRS:
        return None
    threshold = abs(d.sum()) - _ROUNDING * abs(d).sum()
    if d.size <= EXACT_PAIRS:
        sums = d[:1]  # the first sign stays: turning all signs changes no size
        for value in d[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return SignFlip(float(np.mean(abs(sums) >= threshold)), exact=True)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(DRAWS // _CHUNK):
        signs = 2.0 * rng.integers(0, 2, (_CHUNK, d.size), dtype=np.int8) - 1
        hits += int(np.count_nonzero(abs(signs @ d) >= threshold))
    return SignFlip((hits + 1) / (DRAWS + 1), exact=False)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, is never below the adjusted one before it, and at most 1.

    Args:
        ps: p-values of one family of tests.

    Raises:
        SettingError: if one is not between 0 and 1.
    """
    if not all(0 <= p <= 1 for p in ps):
        raise SettingError("ps", list(ps), "numbers from 0 to 1")
    adjusted, floor = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        floor = max(floor, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = floor
    return adjusted


def rank_correlation(
    x: Sequence[float], y: Sequence[float], kind: RankCorrelation, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """How alike two rankings of the same items are, from -1 to 1, with a percentile bootstrap 95 % interval over items.

    Args:
        x: finite numbers, one of each item.
        y: as many.
        kind: ``spearman`` (rho; ties share their mean rank) or ``kendall`` (tau-b).
        resamples: how often the items are drawn again, with replacement. Resamples in which x or y is constant have no
            correlation and are left out; without any other the interval is NaN.
        seed: of the draws.

    Returns:
        All NaN (but for n) where x or y is constant, so for fewer than two items too.

    Raises:
        SettingError: if a value is not finite, the lengths differ, or ``kind`` or ``resamples`` cannot be used.
    """
    if kind not in _RANK_CORRELATIONS:
        raise SettingError("kind", kind, f"possible: {sorted(_RANK_CORRELATIONS)}")
    if resamples < 1:
        raise SettingError("resamples", resamples, "a whole number of at least 1")
    first = _finite("x", x)
    second = _as_long("y", y, first.size)
    value = correlation(first, second, kind)
    if math.isnan(value):
        return Estimate(math.nan, math.nan, math.nan, first.size)
    draws = np.random.default_rng(seed).integers(0, first.size, (resamples, first.size))
    drawn = (_spearman if kind == "spearman" else _kendall)(first, second, draws)
    drawn = drawn[~np.isnan(drawn)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail]).tolist() if drawn.size else (math.nan, math.nan)
    return Estimate(value, low, high, first.size)


def correlation(x: Vector, y: Vector, kind: RankCorrelation) -> float:
    """Spearman's rho or Kendall's tau-b of two rankings of the same items; NaN where one is constant."""
    if x.size == 0 or np.all(x == x[0]) or np.all(y == y[0]):
        return math.nan
    return float(_RANK_CORRELATIONS[kind](x, y).statistic)


def _spearman(x: Vector, y: Vector, draws: npt.NDArray[np.int64]) -> Vector:
    """Rho of each draw of items ``[draws, items]``; NaN where one is constant. As scipy's, but all draws at once."""
    first, second = (stats.rankdata(values[draws], axis=1) for values in (x, y))
    first, second = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (first, second))
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return _divided((first * second).sum(axis=1), size)


def _kendall(x: Vector, y: Vector, draws: npt.NDArray[np.int64]) -> Vector:
    """Tau-b of each draw: how often each item was drawn weighs the pairs of items."""
    counts = np.apply_along_axis(np.bincount, 1, draws, minlength=x.size).astype(np.float64)
    first, second = (np.sign(values[:, None] - values[None]) for values in (x, y))

    def pairs(signs: Vector) -> Vector:
        return np.asarray(((counts @ signs) * counts).sum(axis=1))

    return _divided(pairs(first * second), np.sqrt(pairs(abs(first)) * pairs(abs(second))))


def _divided(numerator: Vector, size: Vector) -> Vector:
    return np.divide(numerator, size, out=np.full_like(numerator, math.nan), where=size > 0)


def top_overlap(x: Sequence[float], y: Sequence[float], share: float = 0.25) -> float:
    """Share of the best items by x that are also among the best by y, from 0 to 1.

    Best are the max(1, round(share * n)) items with the largest values (a half is rounded to the even number); of equal
    ones those that come first in the sequence.

    Args:
        x: finite numbers, one of each item.
        y: as many.
        share: of the items that count as best, above 0 and at most 1.

    Raises:
        SettingError: if a value is not finite, the lengths differ, there is no item, or the share cannot be used.
    """
    if not 0 < share <= 1:
        raise SettingError("share", share, "above 0 and at most 1")
    first = _finite("x", x)
    second = _as_long("y", y, first.size)
    if first.size == 0:
        raise SettingError("x", [], "at least one item")
    size = max(1, round(share * first.size))
    best = [set(np.argsort(-values, kind="stable")[:size].tolist()) for values in (first, second)]
    return len(best[0] & best[1]) / size


def _finite(name: str, values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise SettingError(name, array.tolist(), "finite numbers in one row")
    return array


def _as_long(name: str, values: Sequence[float], length: int) -> npt.NDArray[np.float64]:
    array = _finite(name, values)
    if array.size != length:
        raise SettingError(name, array.tolist(), f"as many numbers as the other, {length}")
    return array
