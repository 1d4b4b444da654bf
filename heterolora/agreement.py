"""Whether proxies agree on which sites are best, and whether a proxy agrees with itself on other batches."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from heterolora.statistics import CONFIDENCE, Estimate, correlation, top_overlap

Vector: TypeAlias = npt.NDArray[np.float64]

MEASURES: Mapping[str, Callable[[Vector, Vector], float]] = {
    "spearman": lambda x, y: correlation(x, y, "spearman"),
    "kendall": lambda x, y: correlation(x, y, "kendall"),
    "top_quarter": lambda x, y: top_overlap(x.tolist(), y.tolist(), 0.25),
}
"""Of two rankings of the same sites: rank correlations from -1 to 1, and the share of the best quarter in common."""


@dataclass(frozen=True)
class Pair:
    """Two proxies.

    Attributes:
        a: name of the one.
        b: name of the other.
        measures: of ``MEASURES``, with a percentile interval over resampled batches; NaN ends where there is none.
    """

    a: str
    b: str
    measures: Mapping[str, Estimate]


@dataclass(frozen=True)
class Agreement:
    """How alike rankings of the same sites are.

    Attributes:
        pairs: every two proxies.
        stability: proxy -> the measures between its ranking by all batches and those by resampled batches: their
            median, and 95 % of them. Only of proxies that were resampled.
    """

    pairs: tuple[Pair, ...]
    stability: Mapping[str, Mapping[str, Estimate]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: null where a number is not defined."""
        return {
            "pairs": [{"a": pair.a, "b": pair.b, **_plain(pair.measures)} for pair in self.pairs],
            "stability": {name: _plain(measures) for name, measures in self.stability.items()},
        }


def _plain(measures: Mapping[str, Estimate]) -> dict[str, Any]:
    return {
        name: {key: None if math.isnan(value) else value for key, value in asdict(found).items()}
        for name, found in measures.items()
    }


def agree(scores: Mapping[str, Vector], resampled: Mapping[str, npt.NDArray[np.float64]]) -> Agreement:
    """Compare rankings.

    Args:
        scores: proxy -> one number for each site, ``[sites]``.
        resampled: proxy -> ``[1 + resamples, sites]``, by all batches and by the same resamples for every proxy; of
            those that there are.
    """
    pairs = []
    for a, b in combinations(scores, 2):
        drawn = (resampled[a][1:], resampled[b][1:]) if a in resampled and b in resampled else None
        pairs.append(Pair(a, b, {name: _estimate(of, scores[a], scores[b], drawn) for name, of in MEASURES.items()}))
    stability = {name: {m: _stability(of, rows) for m, of in MEASURES.items()} for name, rows in resampled.items()}
    return Agreement(tuple(pairs), stability)


def _estimate(
    measure: Callable[[Vector, Vector], float], x: Vector, y: Vector, drawn: tuple[Vector, Vector] | None
) -> Estimate:
    found = [] if drawn is None else [measure(first, second) for first, second in zip(*drawn, strict=True)]
    low, high = _interval(found)
    return Estimate(measure(x, y), low, high, x.size)


def _stability(measure: Callable[[Vector, Vector], float], rows: Vector) -> Estimate:
    found = [measure(rows[0], row) for row in rows[1:]]
    low, high = _interval(found)
    defined = [value for value in found if not math.isnan(value)]
    return Estimate(float(np.median(defined)) if defined else math.nan, low, high, rows.shape[1])


def _interval(values: list[float]) -> tuple[float, float]:
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return math.nan, math.nan
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(defined, [tail, 100 - tail]).tolist()
    return low, high
