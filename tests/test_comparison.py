"""Groups of runs side by side: which runs are counted, paired, corrected together, and which may not be compared."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from heterolora.comparison import Section, compare
from heterolora.errors import SettingError
from heterolora.results import Result
from heterolora.statistics import SignFlip

DEFAULTS = {"split": None, "metric": None, "baseline": None, "primary": None}


def run(group, seed, value=0.5, section="mrpc, minilm", held=1000, steps=100, place=None, **splits):
    metrics = splits or {"validation": {"accuracy": value, "loss": 1.0}}
    return Result(section, group, seed, metrics, held, steps, place or f"{section}/{group}/{seed}")


def sweep(group, values, **options):
    """One run for each value, seeds counted from 0; a seed without a value did not finish."""
    return [run(group, seed, value, **options) for seed, value in enumerate(values) if value is not ...]


def draw(n, seed):
    return np.random.default_rng(seed).normal(0.8, 0.02, n).tolist()


def one(results, **options) -> Section:
    (section,) = compare(results, **(DEFAULTS | options))
    return section


def rows(section):
    return {row.group: row for row in section.rows}


def refused(results, **options) -> SettingError:
    with pytest.raises(SettingError) as caught:
        compare(results, **(DEFAULTS | options))
    assert "\n" not in str(caught.value)
    return caught.value


# -- sections, rows, means --------------------------------------------------------------------------------------------


def test_sections_and_groups_come_in_order_of_first_appearance():
    results = [
        run("b", 0, section="rte, x"),
        run("a", 0, section="mrpc, x"),
        run("c", 0, section="rte, x"),
        run("b", 0, section="mrpc, x"),
        run("b", 1, section="rte, x"),
    ]
    found = compare(results, **DEFAULTS)
    assert [(s.name, [(row.group, row.mean.n) for row in s.rows]) for s in found] == [
        ("rte, x", [("b", 2), ("c", 1)]),
        ("mrpc, x", [("a", 1), ("b", 1)]),
    ]


def test_means_and_intervals_are_those_of_scipy():
    values = draw(4, 0)
    (row,) = one(sweep("a", values)).rows
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (row.mean.value, row.mean.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (row.mean.low, row.mean.high) == pytest.approx((low, high))
    assert (row.held, row.steps, row.undefined, row.unequal) == ((1000, 1000), (100, 100), 0, False)
    assert row.difference is None


def test_without_a_baseline_there_are_no_differences():
    section = one(sweep("a", draw(6, 0)) + sweep("b", draw(6, 1)))
    assert section.baseline is section.primary is None
    assert [row.difference for row in section.rows] == [None, None]
    assert section.notes == ()


@settings(max_examples=20, deadline=None)
@given(st.randoms())
def test_the_order_of_runs_changes_only_the_order_of_rows(random):
    results = sweep("a", draw(7, 0)) + sweep("b", [..., *draw(6, 1)]) + sweep("c", [*draw(3, 2), math.nan])
    shuffled = results.copy()
    random.shuffle(shuffled)
    found, expected = (one(given, baseline="b") for given in (shuffled, results))
    assert rows(found) == rows(expected)


def test_no_run_is_refused():
    assert refused([]).setting == "table"


# -- split and metric -------------------------------------------------------------------------------------------------

BOTH = {"validation": {"accuracy": 0.1, "f1": 0.2, "loss": 1.0}, "test": {"accuracy": 0.3, "f1": 0.4, "loss": 2.0}}


@pytest.mark.parametrize(
    ("split", "metric", "value"),
    [
        (None, None, 0.3),
        ("validation", None, 0.1),
        (None, "f1", 0.4),
        ("validation", "loss", 1.0),
    ],
)
def test_split_and_metric_are_as_asked_for(split, metric, value):
    section = one([run("a", 0, **BOTH)], split=split, metric=metric)
    assert section.rows[0].mean.value == value
    assert (section.split, section.metric) == (split or "test", metric or "accuracy")


def test_test_is_used_only_if_every_run_has_it():
    only = {"validation": BOTH["validation"]}
    assert one([run("a", 0, **BOTH), run("b", 0, **only)]).split == "validation"


def test_each_section_has_a_first_metric_of_its_own():
    results = [
        run("a", 0, section="mrpc", validation={"accuracy": 0.5, "loss": 1.0}),
        run("a", 0, section="stsb", validation={"pearson": 0.6, "loss": 1.0}),
    ]
    assert [section.metric for section in compare(results, **DEFAULTS)] == ["accuracy", "pearson"]
    error = refused(results, metric="accuracy")
    assert (error.setting, error.given) == ("--metric", "accuracy")
    assert "possible: ['loss']" in error.possible


@pytest.mark.parametrize(
    ("options", "setting", "possible"),
    [
        ({"split": "dev"}, "--split", "['validation', 'test']"),
        ({"metric": "pearson"}, "--metric", "['accuracy', 'f1', 'loss']"),
    ],
)
def test_names_that_no_run_has_are_refused(options, setting, possible):
    error = refused([run("a", 0, **BOTH)], **options)
    assert (error.setting, error.given) == (setting, next(iter(options.values())))
    assert possible in error.possible


def test_a_split_that_only_some_runs_have_is_refused():
    error = refused([run("a", 0, **BOTH), run("a", 1)], split="test")
    assert error.setting == "--split"
    assert "['validation']" in error.possible


def test_a_first_metric_that_another_run_of_the_section_lacks_is_refused():
    error = refused([run("a", 0, validation={"f1": 0.5, "loss": 1.0}), run("a", 1, validation={"loss": 1.0})])
    assert (error.setting, error.given) == ("--metric", "f1")
    assert "['loss']" in error.possible


def test_a_split_without_any_metric_is_refused():
    error = refused([run("a", 0, validation={}, place="here")])
    assert error.setting == "--split"
    assert "here" in error.possible


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_runs_without_a_value_are_left_out_and_counted(value):
    a, b = draw(7, 0), draw(7, 1)
    a[2] = b[4] = value
    section = one(sweep("a", a) + sweep("b", b), baseline="b")
    row = rows(section)["a"]
    kept = [0, 1, 3, 5, 6]
    assert (row.mean.n, row.undefined, rows(section)["b"].undefined) == (6, 1, 1)
    assert row.mean.value == pytest.approx(np.mean([a[i] for i in (0, 1, 3, 4, 5, 6)]))
    assert (row.difference.mean.n, row.difference.unpaired) == (5, 2)
    assert row.difference.mean.value == pytest.approx(np.mean([a[i] - b[i] for i in kept]))


def test_a_group_without_any_value_stays_in_the_table():
    section = one(sweep("a", [None, None]) + sweep("b", [0.5, 0.6]), baseline="b")
    row = rows(section)["a"]
    assert (row.mean.n, row.undefined, row.difference.mean.n, row.difference.unpaired) == (0, 2, 0, 2)
    assert math.isnan(row.mean.value)
    assert math.isnan(row.difference.mean.value)
    assert row.difference.test is None


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed_whatever_the_order():
    a, b = draw(8, 0), draw(8, 1)
    section = one(sweep("a", a)[::-1] + sweep("b", b), baseline="b")
    found = rows(section)["a"].difference
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    expected = stats.permutation_test(
        (np.subtract(a, b),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx((np.mean(a) - np.mean(b), low, high))
    assert (found.mean.n, found.unpaired) == (8, 0)
    assert found.test == SignFlip(pytest.approx(expected.pvalue), exact=True)
    assert found.p_holm == found.test.p  # the only one of its family
    assert rows(section)["b"].difference is None
    assert section.baseline == "b"


def test_seeds_of_a_half_finished_sweep_are_left_out_of_pairs_and_counted():
    base, late, early = draw(8, 0), draw(8, 1), draw(8, 2)
    late[:2] = [..., ...]
    results = sweep("base", [*base[:7], ...]) + sweep("late", late) + sweep("early", [*early[:4], *[...] * 4])
    found = rows(one(results, baseline="base"))
    difference = found["late"].difference
    assert (found["late"].mean.n, difference.mean.n, difference.unpaired) == (6, 5, 3)  # seed 7 against seeds 0 and 1
    assert difference.mean.value == pytest.approx(np.mean(np.subtract(late[2:7], base[2:7])))
    assert (difference.test, difference.p_holm) == (None, None)
    assert (found["early"].difference.mean.n, found["early"].difference.unpaired) == (4, 3)


def test_one_seed_has_a_difference_and_no_interval():
    found = rows(one([run("a", 0, 0.75), run("b", 0, 0.5)], baseline="b"))["a"]
    assert (found.mean.value, found.difference.mean.value, found.difference.mean.n) == (0.75, 0.25, 1)
    assert math.isnan(found.mean.low)
    assert math.isnan(found.difference.mean.low)
    assert found.difference.test is None


def test_groups_without_a_common_seed_have_no_difference():
    found = rows(one([run("a", 0), run("b", 1)], baseline="b"))["a"].difference
    assert (found.mean.n, found.unpaired) == (0, 2)
    assert math.isnan(found.mean.value)


# -- the family of comparisons ----------------------------------------------------------------------------------------


def ladder(positive, n=7):
    """Differences of 1..n hundredths from 0.5, of which the given ones are above it."""
    return [0.5 + (0.01 if i in positive else -0.01) * (i + 1) for i in range(n)]


def family():
    everything = set(range(7))
    return (
        sweep("base", [0.5] * 7)
        + sweep("all", ladder(everything))  # 2 / 128
        + sweep("but one", ladder(everything - {0}))  # 1 alone is turned: 4 / 128
        + sweep("but two", ladder(everything - {1}))  # 2 alone, 1 alone, or none: 6 / 128
        + sweep("few", ladder(everything)[:5])
    )


def test_all_p_of_a_section_are_corrected_together():
    found = rows(one(family(), baseline="base"))
    raw = {"all": 2 / 128, "but one": 4 / 128, "but two": 6 / 128}
    assert {name: found[name].difference.test for name in raw} == {name: SignFlip(p, True) for name, p in raw.items()}
    corrected = [found[name].difference.p_holm for name in raw]
    assert corrected == pytest.approx([6 / 128, 8 / 128, 8 / 128])  # times 3, 2, 1, never falling
    assert (found["few"].difference.test, found["few"].difference.p_holm) == (None, None)


def test_the_primary_comparison_is_outside_the_family():
    section = one(family(), baseline="base", primary="all")
    found = rows(section)
    assert section.primary == "all"
    assert found["all"].difference.test == SignFlip(2 / 128, True)
    assert found["all"].difference.p_holm is None
    assert found["but one"].difference.p_holm == pytest.approx(8 / 128)
    assert found["but two"].difference.p_holm == pytest.approx(8 / 128)


def test_sections_are_corrected_apart():
    other = [dataclasses.replace(result, section="rte, minilm") for result in family()]
    first, second = compare(family() + other, **(DEFAULTS | {"baseline": "base"}))
    assert first.rows == second.rows == one(family(), baseline="base").rows


@pytest.mark.parametrize(
    ("options", "setting", "possible"),
    [
        ({"baseline": "none"}, "--baseline", "['a', 'b']"),
        ({"primary": "a"}, "--primary", "--baseline"),
        ({"baseline": "a", "primary": "a"}, "--primary", "['b']"),
        ({"baseline": "a", "primary": "none"}, "--primary", "['b']"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(options, setting, possible):
    error = refused([run("a", 0), run("b", 0)], **options)
    assert error.setting == setting
    assert possible in error.possible


def test_a_primary_group_that_never_meets_the_baseline_is_refused():
    results = [run("a", 0), run("b", 0), run("c", 0, section="rte")]
    assert "['b']" in refused(results, baseline="a", primary="c").possible


def test_sections_that_lack_the_baseline_or_the_primary_group_say_so():
    groups = {"whole": ["base", "a", "b"], "no base": ["a", "b"], "no a": ["base", "b"]}
    results = [r for name, found in groups.items() for g in found for r in sweep(g, draw(6, len(g)), section=name)]
    whole, no_base, no_a = compare(results, **(DEFAULTS | {"baseline": "base", "primary": "a"}))
    assert (whole.baseline, whole.primary, whole.notes) == ("base", "a", ())
    assert rows(whole)["a"].difference.p_holm is None
    assert (no_base.baseline, no_base.primary) == (None, None)
    assert [row.difference for row in no_base.rows] == [None, None]
    assert no_base.notes == ("no run of the baseline base here, so no differences",)
    assert (no_a.baseline, no_a.primary) == ("base", None)
    assert rows(no_a)["b"].difference.p_holm is not None
    assert no_a.notes == ("no run of the primary group a here, so every p is corrected",)


# -- repetitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"validation": {"accuracy": 0.5, "loss": 1.1}}},
        {"metrics": {"validation": {"accuracy": None, "loss": 1.0}}},
        {"metrics": {"validation": {"accuracy": 0.5, "loss": 1.0}, "test": {"accuracy": 0.5}}},
        {"held": 1001},
        {"steps": 101},
    ],
    ids=str,
)
def test_two_different_runs_of_one_group_and_seed_are_refused(change):
    first = run("a", 3, place="one/here")
    second = dataclasses.replace(first, place="two/there", **change)
    error = refused([first, run("a", 4), second])
    assert (error.setting, error.given) == ("table", ["one/here", "two/there"])
    assert error.possible.startswith("two runs of one group and seed (a, 3)")


@pytest.mark.parametrize(("value", "same"), [(0.5, 0.5), (None, None), (math.nan, float("nan")), (None, math.nan)])
def test_a_run_that_repeats_another_counts_once_and_is_noted(value, same):
    first = run("a", 0, value, place="one/here")
    again = run("a", 0, same, place="two/there")
    other = run("a", 1, 0.75)
    section = one([first, other, again])
    assert section.rows == one([first, other]).rows
    (note,) = section.notes
    assert note == "counted once, for they repeat another run with the same results: two/there"


def test_the_same_run_read_twice_is_noted_too():
    first = run("a", 0, place="one/here")
    assert "one/here" in one([first, first]).notes[0]


def test_one_seed_in_two_sections_or_groups_is_no_repetition():
    results = [run("a", 0), run("b", 0), run("a", 0, section="rte")]
    assert all(section.notes == () for section in compare(results, **DEFAULTS))


# -- equal budgets ----------------------------------------------------------------------------------------------------


def budgets(**held):
    return [run(group, seed, held=number) for group, number in held.items() for seed in range(2)]


def test_unequal_parameters_are_refused():
    error = refused(budgets(a=1000, b=1011), baseline="a")
    assert (error.setting, error.given) == ("held", {"a": 1000, "b": 1011})
    assert "--unequal" in error.possible
    assert "1 %" in error.possible
    assert "mrpc, minilm" in error.possible


def test_parameters_are_compared_with_the_baseline_or_the_largest():
    results = budgets(a=1000, b=1009, c=991)  # 1.8 % between b and c
    assert one(results, baseline="a").notes == ("held parameters are equal within 1 % (they differ by up to 0.9 %)",)
    assert refused(results, baseline="c").given == {"a": 1000, "b": 1009, "c": 991}
    assert refused(results).setting == "held"
    assert one(results, tolerance=0.02).notes == ("held parameters are equal within 2 % (they differ by up to 1.78 %)",)


def test_equal_parameters_need_no_note_and_no_tolerance():
    assert one(budgets(a=1000, b=1000), tolerance=0.0).notes == ()
    assert refused(budgets(a=1000, b=1001), tolerance=0.0).setting == "held"


@pytest.mark.parametrize(("baseline", "marked"), [("a", ["c", "d"]), ("c", ["a", "b", "d"]), (None, ["a", "b", "d"])])
def test_unequal_groups_are_marked_and_named_where_they_are_allowed(baseline, marked):
    section = one(budgets(a=1000, b=1005, c=2000, d=500), baseline=baseline, allow_unequal=True)
    assert [row.group for row in section.rows if row.unequal] == marked
    assert section.notes[0].startswith("unequal: held parameters differ by more than 1 % from ")
    assert section.notes[0].endswith(f"in {', '.join(marked)}")
    assert ("equal within 1 %" in "".join(section.notes[1:])) is (baseline == "a")  # b, which is near enough


def test_one_run_that_differs_from_its_own_group_is_seen():
    results = [*budgets(a=1000, b=1000), run("b", 7, held=1100, value=None)]
    assert refused(results, baseline="a").given == {"a": 1000, "b": "1000 to 1100"}
    section = one(results, baseline="a", allow_unequal=True)
    assert (rows(section)["b"].held, rows(section)["b"].unequal) == ((1000, 1100), True)


def test_a_baseline_that_varies_is_marked_itself():
    results = [run("a", 0, held=1000), run("a", 1, held=1100), run("b", 0, held=1100)]
    assert refused(results, baseline="a").setting == "held"
    section = one(results, baseline="a", allow_unequal=True)
    assert [row.group for row in section.rows if row.unequal] == ["a"]


def test_a_baseline_without_parameters_equals_only_its_like():
    assert refused(budgets(head=0, b=1), baseline="head").setting == "held"
    section = one(budgets(head=0, b=1, c=0), baseline="head", allow_unequal=True)
    assert [row.group for row in section.rows if row.unequal] == ["b"]


def test_sections_may_have_budgets_of_their_own():
    results = [run("a", 0, section="x", held=10), run("b", 0, section="x", held=10), run("a", 0, section="y", held=99)]
    assert len(compare(results, **DEFAULTS)) == 2


def test_unequal_steps_are_refused_whatever_the_tolerance():
    results = [run("a", 0, steps=1000), run("b", 0, steps=1001)]
    error = refused(results, baseline="a", tolerance=0.5)
    assert (error.setting, error.given) == ("steps", {"a": 1000, "b": 1001})
    assert "--unequal" in error.possible
    section = one(results, baseline="a", allow_unequal=True)
    assert [row.unequal for row in section.rows] == [False, True]
    assert section.notes == ("unequal: optimizer steps differ from those of a (1,000) in b",)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_that_is_no_share_is_refused(tolerance):
    assert refused([run("a", 0)], tolerance=tolerance).setting == "tolerance"


def test_sections_are_values():
    section = one(family(), baseline="base")
    assert hash(section) == hash(one(family(), baseline="base"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        section.name = "other"
