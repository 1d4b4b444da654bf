"""Agreement of rankings, against scipy on the same numbers."""

import numpy as np
import pytest
from scipy import stats

from heterolora.agreement import agree


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=12), "b": rng.normal(size=12), "c": rng.normal(size=12)}


def test_measures_are_scipys(scores):
    pairs = {(pair.a, pair.b): pair.measures for pair in agree(scores, {}).pairs}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), measures in pairs.items():
        assert measures["spearman"].value == pytest.approx(stats.spearmanr(scores[a], scores[b]).statistic)
        assert measures["kendall"].value == pytest.approx(stats.kendalltau(scores[a], scores[b]).statistic)
        best = [set(np.argsort(-scores[name])[:3]) for name in (a, b)]
        assert measures["top_quarter"].value == len(best[0] & best[1]) / 3
        assert np.isnan(measures["spearman"].low)


def test_intervals_are_percentiles_over_the_same_resamples(scores):
    rng = np.random.default_rng(1)
    rows = {name: value + rng.normal(size=(41, 12)) * 0.3 for name, value in scores.items() if name != "c"}
    found = agree(scores, rows)
    drawn = [stats.spearmanr(x, y).statistic for x, y in zip(rows["a"][1:], rows["b"][1:], strict=True)]
    measure = found.pairs[0].measures["spearman"]
    assert (measure.low, measure.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert np.isnan(found.pairs[1].measures["spearman"].low)  # c was not resampled
    assert found.stability.keys() == {"a", "b"}
    own = [stats.kendalltau(rows["a"][0], row).statistic for row in rows["a"][1:]]
    stability = found.stability["a"]["kendall"]
    assert (stability.value, stability.low) == pytest.approx((np.median(own), np.percentile(own, 2.5)))


def test_a_proxy_that_never_changes_is_perfectly_stable_and_a_constant_one_is_not_defined():
    values = np.arange(8.0)
    found = agree({"a": values, "k": np.ones(8)}, {"a": np.tile(values, (5, 1)), "k": np.ones((5, 8))})
    assert found.stability["a"]["spearman"].value == 1
    assert np.isnan(found.pairs[0].measures["spearman"].value)
    plain = found.as_dict()
    assert plain["pairs"][0]["spearman"]["value"] is None
    assert plain["stability"]["a"]["spearman"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 8}
