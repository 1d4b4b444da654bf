"""The allocator contract: a new allocator joins all of it by one line of ``ALLOCATORS``."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, GainRule, tie_order
from heterolora.allocators.fixed import Fixed
from heterolora.allocators.greedy import Greedy
from heterolora.allocators.top import Top
from heterolora.allocators.uniform import Uniform
from heterolora.budget import SiteCount
from heterolora.cost import AdditiveCost, Cost
from heterolora.errors import SettingError
from heterolora.sites import Port, Site
from tests.conftest import ROOT

# The same examples in every run, however slow the machine is.
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Entry:
    """An allocator from the seed of its ties and a file of ranks, and which optional promises it makes."""

    make: Callable[[int, Path], Allocator]
    fills: bool = False  # leaves less than the cheapest unit it could still add
    draws: bool = False  # breaks ties by its seed
    grows: bool = True  # a larger budget never spends less


ALLOCATORS = {
    "top_combined": Entry(lambda seed, file: Top("combined", 2, "none", seed), draws=True),
    "top_separate": Entry(lambda seed, file: Top("separate", 2, "none", seed), draws=True),
    "uniform": Entry(lambda seed, file: Uniform()),
    "greedy": Entry(lambda seed, file: Greedy(0, 5, "harmonic", "none", seed), fills=True, draws=True),
    "greedy_min_rank": Entry(lambda seed, file: Greedy(1, 5, "flat", "none", seed), fills=True, draws=True),
    "fixed": Entry(lambda seed, file: Fixed(str(file))),
}
EVERY = pytest.mark.parametrize("entry", ALLOCATORS.values(), ids=ALLOCATORS.keys())


def those(promise: str):
    chosen = {name: entry for name, entry in ALLOCATORS.items() if getattr(entry, promise)}
    return pytest.mark.parametrize("entry", chosen.values(), ids=chosen.keys())


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """What ``fixed`` reads: fits every problem below."""
    path = tmp_path_factory.mktemp("ranks") / "ranks.json"
    path.write_text('{"s0": 1}')
    return path


@dataclass(frozen=True)
class TiedCost:
    """A joint cost: all sites share factors of the largest rank, and pay for their own ones."""

    shared: int
    units: Mapping[str, int]

    def __call__(self, ranks: Mapping[str, int]) -> int:
        own = sum(rank * self.units[name] for name, rank in ranks.items())
        return own + self.shared * max(ranks.values(), default=0)

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        return self({**ranks, name: ranks.get(name, 0) + 1}) - self(ranks)


@dataclass(frozen=True)
class Problem:
    """What an allocator is asked."""

    gains: Mapping[str, list[float]]
    cost: Cost
    groups: Mapping[str, str]
    budget: int

    def solve(self, allocator: Allocator) -> Allocation:
        return allocator.allocate(self.gains, self.cost, self.budget, self.groups)

    def in_order(self, names) -> "Problem":
        """The same question with every dict in this order."""
        names = list(names)
        gains, groups = ({name: table[name] for name in names} for table in (self.gains, self.groups))
        cost = replace(self.cost, units={name: self.cost.units[name] for name in names})
        return Problem(gains, cost, groups, self.budget)


def equal_problem(budget: int, sites: int = 8, rank: int = 2, value: float = 1.0) -> Problem:
    """Nothing distinguishes the sites but their names; half of them belong to each group."""
    names = [f"s{number}" for number in range(sites)]
    groups = {name: ("lora", "shortcut")[number % 2] for number, name in enumerate(names)}
    return Problem({name: [value] * rank for name in names}, AdditiveCost(dict.fromkeys(names, 1)), groups, budget)


VALUES = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 1e6)  # the first kind makes ties common


@st.composite
def problems(draw, tied: bool | None = None, least: int = 1) -> Problem:
    """Problems whose budget pays for ``least`` units at every site, and for up to 60 parameters more."""
    names = [f"s{number}" for number in range(draw(st.integers(1, 6)))]
    gains = {name: sorted(draw(st.lists(VALUES, min_size=2, max_size=5)), reverse=True) for name in names}
    units = {name: draw(st.integers(1, 9)) for name in names}
    groups = {name: draw(st.sampled_from(["lora", "shortcut"])) for name in names}
    tied = draw(st.booleans()) if tied is None else tied
    cost = TiedCost(draw(st.integers(1, 9)), units) if tied else AdditiveCost(units)
    budget = cost(dict.fromkeys(names, least)) + draw(st.integers(0, 60))
    return Problem(gains, cost, groups, budget)


def active(allocation: Allocation) -> set[str]:
    return {name for name, rank in allocation.ranks.items() if rank}


# -- the contract ----------------------------------------------------------------------------------------------------


def test_every_allocator_with_a_config_file_is_in_the_table(file):
    files = list((ROOT / "conf" / "allocator").glob("*.yaml"))
    configured = {yaml.safe_load(path.read_text())["_target_"].rpartition(".")[2] for path in files}
    assert configured == {type(entry.make(0, file)).__name__ for entry in ALLOCATORS.values()}


@EVERY
@PROPERTY
@given(problem=problems())
def test_ranks_are_possible_and_the_price_is_true_and_within_the_budget(entry, file, problem):
    allocation = problem.solve(entry.make(0, file))
    assert allocation.ranks.keys() == problem.gains.keys()
    assert all(0 <= rank <= len(problem.gains[name]) for name, rank in allocation.ranks.items())
    units = problem.cost.units
    price = sum(rank * units[name] for name, rank in allocation.ranks.items())
    price += getattr(problem.cost, "shared", 0) * max(allocation.ranks.values())
    assert allocation.spent == price <= problem.budget == allocation.budget


@EVERY
@PROPERTY
@given(problem=problems(), data=st.data())
def test_the_order_of_the_inputs_is_irrelevant(entry, file, problem, data):
    shuffled = problem.in_order(data.draw(st.permutations(list(problem.gains))))
    assert shuffled.solve(entry.make(0, file)) == problem.solve(entry.make(0, file))


@EVERY
@PROPERTY
@given(problem=problems())
def test_an_answer_is_repeated_and_leaves_the_question_as_it_was(entry, file, problem):
    allocator, before = entry.make(0, file), copy.deepcopy(problem)
    assert problem.solve(allocator) == problem.solve(allocator)
    assert problem == before


@those("grows")
@PROPERTY
@given(problem=problems(), more=st.integers(0, 20))
def test_a_larger_budget_never_spends_less(entry, file, problem, more):
    allocator = entry.make(0, file)
    richer = replace(problem, budget=problem.budget + more)
    assert problem.solve(allocator).spent <= richer.solve(allocator).spent


@those("fills")
@PROPERTY
@given(problem=problems())
def test_less_is_left_than_the_cheapest_unit_that_could_be_added(entry, file, problem):
    ranks = problem.solve(entry.make(0, file)).ranks
    for name, values in problem.gains.items():
        if ranks[name] < len(values):
            assert problem.cost({**ranks, name: ranks[name] + 1}) > problem.budget


@those("draws")
def test_ties_are_broken_by_the_seed_and_not_by_the_order_of_the_sites(entry, file):
    problem = equal_problem(budget=12)
    choices = set()
    for seed in range(20):
        ranks = problem.solve(entry.make(seed, file)).ranks
        assert ranks == problem.in_order(reversed(problem.gains)).solve(entry.make(seed, file)).ranks
        choices.add(frozenset(name for name, rank in ranks.items() if rank == 2))
    assert len(choices) > 1
    assert frozenset.union(*choices) == problem.gains.keys()  # no name is at a disadvantage
    assert not frozenset.intersection(*choices)


@those("draws")
@pytest.mark.parametrize(("one", "other"), [(1.0, 1), (0.0, -0.0)])
def test_equal_gains_tie_however_they_are_written(entry, file, one, other):
    for seed in range(8):
        plain, mixed = equal_problem(12, value=one), equal_problem(12, value=one)
        mixed.gains.update({name: [other] * 2 for name in list(mixed.gains)[:4]})
        assert mixed.solve(entry.make(seed, file)).ranks == plain.solve(entry.make(seed, file)).ranks


@EVERY
def test_a_number_of_sites_is_understood_or_refused(entry, file):
    allocator, problem = entry.make(0, file), equal_problem(0)
    counts = SiteCount({"lora": 2, "shortcut": 1}, rank=2)
    if isinstance(allocator, Fixed):  # its ranks are the file's: refused unless they are such a choice
        with pytest.raises(SettingError, match="the budget is 3 sites of rank 2"):
            allocator.allocate(problem.gains, problem.cost, counts, problem.groups)
    elif allocator.counts_sites:
        allocation = allocator.allocate(problem.gains, problem.cost, counts, problem.groups)
        assert sorted(allocation.ranks.values()) == [0] * 5 + [2] * 3
        assert (allocation.spent, allocation.budget) == (6, None)
    else:
        with pytest.raises(SettingError, match="allocator=top"):
            allocator.allocate(problem.gains, problem.cost, counts, problem.groups)


@pytest.mark.parametrize(
    "make", [lambda seed: Greedy(0, 2, "flat", "none", seed), lambda s: Top("combined", 2, "none", s)]
)
def test_a_draw_among_equals_does_not_depend_on_which_others_there_are(make):
    for seed in range(8):
        problem = equal_problem(budget=8)
        winners = active(problem.solve(make(seed)))
        loser = min(problem.gains.keys() - winners)
        assert active(problem.in_order(problem.gains.keys() - {loser}).solve(make(seed))) == winners


# -- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_prices_a_unit_by_what_is_held_already():
    # Sharing costs 6 once: first a (14/7), then b (8/2, at first 8/8) before c (10/3, at first 10/9).
    gains = {"a": [14.0], "b": [8.0], "c": [10.0]}
    problem = Problem(gains, TiedCost(6, {"a": 1, "b": 2, "c": 3}), dict.fromkeys(gains, "lora"), 10)
    assert active(problem.solve(Greedy(0, 1, "flat", "none", 0))) == {"a", "b"}


@pytest.mark.parametrize("tied", [False, True], ids=["additive", "joint cost"])
@settings(PROPERTY, phases=[Phase.generate])
@given(data=st.data())
def test_greedy_takes_the_best_gain_per_parameter_at_every_step(tied, data):
    problem = data.draw(problems(tied=tied, least=0))
    ranks = dict.fromkeys(problem.gains, 0)

    def price(name: str) -> int:
        return problem.cost({**ranks, name: ranks[name] + 1}) - problem.cost(ranks)

    while True:
        open_ = [name for name, values in problem.gains.items() if ranks[name] < len(values)]
        fitting = [name for name in open_ if problem.cost(ranks) + price(name) <= problem.budget]
        if not fitting:
            break
        ranks[min(fitting, key=lambda name: (-problem.gains[name][ranks[name]] / price(name), tie_order(3, name)))] += 1
    assert problem.solve(Greedy(0, 5, "flat", "none", 3)).ranks == ranks


@PROPERTY
@given(
    values=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    price=st.integers(1, 4),
    budget=st.integers(0, 40),
)
def test_greedy_is_optimal_where_all_units_cost_the_same(values, price, budget):
    gains = {f"s{number}": sorted(units, reverse=True) for number, units in enumerate(values)}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, price)), dict.fromkeys(gains, "lora"), budget)

    def total(ranks) -> int:
        return sum(sum(units[:rank]) for units, rank in zip(gains.values(), ranks, strict=True))

    possible = itertools.product(*(range(len(units) + 1) for units in gains.values()))
    best = max(total(ranks) for ranks in possible if price * sum(ranks) <= budget)
    allocation = problem.solve(Greedy(0, 5, "flat", "none", 0))
    assert total(allocation.ranks[name] for name in gains) == best


@PROPERTY
@given(problem=problems(least=2))
def test_greedy_gives_every_site_its_least_rank_first(problem):
    assert min(problem.solve(Greedy(2, 5, "flat", "none", 0)).ranks.values()) >= 2


def test_greedy_names_a_least_rank_that_is_too_dear_or_too_large():
    problem = equal_problem(budget=15)
    with pytest.raises(SettingError, match=r"allocator.min_rank=2: costs 16, the budget is 15"):
        problem.solve(Greedy(2, 5, "flat", "none", 0))
    with pytest.raises(SettingError, match=r"allocator.min_rank=3.*s0"):
        replace(problem, budget=100).solve(Greedy(3, 5, "flat", "none", 0))


def test_greedy_gives_no_site_more_than_its_largest_rank():
    # Gains longer than max_rank come from callers who make them without the allocator's own rule.
    assert set(equal_problem(budget=100, rank=4).solve(Greedy(0, 3, "flat", "none", 0)).ranks.values()) == {3}


# -- top -------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(problem=problems())
def test_top_takes_the_best_sites_until_the_next_one_does_not_fit(problem):
    ranks = problem.solve(Top("combined", 2, "none", 0)).ranks
    assert set(ranks.values()) <= {0, 2}
    values = {name: sum(units[:2]) for name, units in problem.gains.items()}
    chosen, others = [name for name in ranks if ranks[name]], [name for name in ranks if not ranks[name]]
    if others:
        best = max(values[name] for name in others)
        assert all(values[name] >= best for name in chosen)
        nexts = [name for name in others if values[name] == best]
        assert any(problem.cost(dict.fromkeys([*chosen, name], 2)) > problem.budget for name in nexts)


def test_top_stops_at_the_first_site_that_does_not_fit():
    gains = {"best": [9.0], "dear": [5.0], "cheap": [1.0]}
    problem = Problem(gains, AdditiveCost({"best": 4, "dear": 7, "cheap": 1}), dict.fromkeys(gains, "lora"), 10)
    allocation = problem.solve(Top("combined", 1, "none", 0))
    assert active(allocation) == {"best"}
    assert allocation.unspent == 6


def test_top_judges_a_site_by_the_units_it_would_get():
    gains = {"wide": [3.0, 3.0, 3.0], "steep": [4.0, 0.0, 0.0]}
    problem = Problem(gains, AdditiveCost({"wide": 1, "steep": 1}), dict.fromkeys(gains, "lora"), 1)
    assert active(problem.solve(Top("combined", 1, "none", 0))) == {"steep"}


def families() -> Problem:
    """Six LoRA sites at 2 a unit, all better than the four shortcuts at 3: each family costs 12."""
    gains = {f"lora{n}": [10.0 + n] for n in range(6)} | {f"cut{n}": [1.0 + n] for n in range(4)}
    groups = {name: "lora" if name.startswith("lora") else "shortcut" for name in gains}
    cost = AdditiveCost({name: 2 if group == "lora" else 3 for name, group in groups.items()})
    return Problem(gains, cost, groups, 13)


def test_top_combined_lets_one_family_win_everything():
    assert active(families().solve(Top("combined", 1, "none", 0))) == {f"lora{n}" for n in range(6)}


def test_top_separate_gives_each_family_its_share():
    # 13 // 2 = 6 for each: three LoRA sites and two shortcuts, the best ones of their family.
    allocation = families().solve(Top("separate", 1, "none", 0))
    assert active(allocation) == {"lora5", "lora4", "lora3", "cut3", "cut2"}
    assert allocation.unspent == 1


@PROPERTY
@given(problem=problems(tied=False))
def test_top_separate_keeps_every_family_within_its_share(problem):
    ranks = problem.solve(Top("separate", 2, "none", 0)).ranks
    everything = sum(problem.cost.units.values())
    for group in set(problem.groups.values()):
        units = {name: problem.cost.units[name] for name, label in problem.groups.items() if label == group}
        spent = sum(ranks[name] * unit for name, unit in units.items())
        assert spent * everything <= problem.budget * sum(units.values())


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("combined", {"lora5", "lora4", "lora3"}), ("separate", {"lora5", "cut3", "cut2"})],
)
def test_top_counts_sites_over_all_or_in_each_family(mode, expected):
    problem = families()
    count = SiteCount({"lora": 1, "shortcut": 2}, rank=1)
    allocation = Top(mode, 1, "none", 0).allocate(problem.gains, problem.cost, count, problem.groups)
    assert active(allocation) == expected


def test_top_refuses_another_rank_than_the_budgets():
    problem = equal_problem(0)
    with pytest.raises(SettingError, match=r"allocator.rank=2.*budget.rank=1"):
        Top("combined", 2, "none", 0).allocate(problem.gains, problem.cost, SiteCount({"lora": 1}, 1), problem.groups)


def test_top_refuses_a_rank_that_a_site_cannot_hold():
    with pytest.raises(SettingError, match=r"allocator.rank=3.*s0"):
        equal_problem(budget=100).solve(Top("combined", 3, "none", 0))


# -- uniform ---------------------------------------------------------------------------------------------------------


@PROPERTY
@given(problem=problems())
def test_uniform_is_the_largest_rank_that_all_can_have(problem):
    ranks = range(1, min(map(len, problem.gains.values())) + 1)
    best = max(rank for rank in ranks if problem.cost(dict.fromkeys(problem.gains, rank)) <= problem.budget)
    assert problem.solve(Uniform()).ranks == dict.fromkeys(problem.gains, best)


def test_uniform_says_what_rank_1_would_cost():
    assert equal_problem(budget=8).solve(Uniform()).spent == 8
    with pytest.raises(SettingError, match=r"budget=7: rank 1 at all 8 sites costs 8"):
        equal_problem(budget=7).solve(Uniform())


# -- fixed -----------------------------------------------------------------------------------------------------------


def from_file(tmp_path, content: str, problem: Problem) -> Allocation:
    path = tmp_path / "ranks.json"
    path.write_text(content)
    return problem.solve(Fixed(str(path)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a JSON file"),
        ("[1, 2]", "site name -> rank"),
        ('{"format": 1}', "site name -> rank"),
        ('{"format": 99, "ranks": {"s0": 1}}', "format 99"),
        ('{"s0": 1.5}', "whole numbers"),
        ('{"s0": true}', "whole numbers"),
        ('{"s0": -1}', "at least 0"),
        ('{"s0": 1, "nowhere": 1}', "'nowhere'.*not in this search space"),
        ('{"s0": 3}', r"min\(in, out\) at \['s0'\]"),
        ('{"s0": 2, "s1": 2, "s2": 1}', "costs 5 parameters, the budget is 4"),
        ('{"s0": 0}', "no site any rank"),
        ("{}", "no site any rank"),
    ],
)
def test_fixed_says_what_is_wrong_with_its_file(tmp_path, content, reason):
    with pytest.raises(SettingError, match=reason) as caught:
        from_file(tmp_path, content, equal_problem(budget=4))
    assert caught.value.setting == "allocator.path"


def test_fixed_gives_what_the_file_names_and_nothing_to_others(tmp_path):
    # A site of rank 0 need not exist: the file may come from a larger search space.
    allocation = from_file(tmp_path, '{"s1": 2, "s3": 1, "elsewhere": 0}', equal_problem(budget=4))
    assert allocation.active == {"s1": 2, "s3": 1}
    assert (allocation.spent, allocation.unspent) == (3, 1)


@PROPERTY
@given(problem=problems())
def test_fixed_repeats_what_another_allocator_wrote(tmp_path_factory, problem):
    found = problem.solve(Greedy(0, 5, "flat", "none", 0))
    assert from_file(tmp_path_factory.mktemp("run"), json.dumps(found.as_dict()), problem) == found


def test_fixed_needs_an_existing_file(tmp_path):
    with pytest.raises(SettingError, match="path=None"):
        Fixed(None)
    with pytest.raises(SettingError, match="no such file"):
        Fixed(str(tmp_path / "missing.json"))


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Top("combined", 0, "none", 0), "rank"),
        (lambda: Greedy(-1, 5, "flat", "none", 0), "min_rank"),
        (lambda: Greedy(6, 5, "flat", "none", 0), "min_rank"),
        (lambda: Greedy(0, 0, "flat", "none", 0), "max_rank"),
        (lambda: Greedy(0, -1, "flat", "none", 0), "max_rank"),
    ],
)
def test_impossible_arguments_are_refused_by_name(make, setting):
    with pytest.raises(SettingError) as caught:
        make()
    assert caught.value.setting == setting


@EVERY
@PROPERTY
@given(problem=problems())
def test_an_allocator_without_a_rule_for_gains_looks_at_none(entry, file, problem):
    # Without a rule, no scores are computed, and zeros are handed over.
    allocator = entry.make(0, file)
    unscored = replace(problem, gains={name: [0.0] * len(values) for name, values in problem.gains.items()})
    assert allocator.gain_rule is not None or unscored.solve(allocator) == problem.solve(allocator)


def test_the_rule_for_gains_is_what_the_arguments_say():
    assert Greedy(0, 5, "harmonic", "per_group", 0).gain_rule == GainRule("harmonic", 5, "per_group")
    assert Top("combined", 3, "per_parameter", 0).gain_rule == GainRule("flat", 3, "per_parameter")


# -- gains -----------------------------------------------------------------------------------------------------------


def site(name: str, inputs: int, outputs: int) -> Site:
    return Site(name, "lora", "q", 0, Port(name, "in"), Port(name, "out"), inputs, outputs)


SITES = [site("a", 4, 8), site("b", 6, 2), site("c", 5, 5)]
GROUPS = {"a": "lora", "b": "lora", "c": "shortcut"}
SCORE = st.floats(-1e6, 1e6, allow_subnormal=False)
SCORES = st.fixed_dictionaries({name: SCORE for name in GROUPS})
RULES = st.builds(
    GainRule,
    gain=st.sampled_from(["harmonic", "flat"]),
    max_rank=st.integers(1, 6),
    normalise=st.sampled_from(["none", "per_parameter", "per_group"]),
)


def test_harmonic_and_flat_gains():
    scores = {"a": 12.0, "b": 6.0, "c": 0.0}
    assert GainRule("harmonic", 4, "none").gains(scores, SITES, GROUPS) == {
        "a": [12.0, 6.0, 4.0, 3.0],
        "b": [6.0, 3.0],  # b holds no more than rank 2
        "c": [0.0, 0.0, 0.0, 0.0],
    }
    assert GainRule("flat", 3, "none").gains(scores, SITES, GROUPS) == {"a": [12.0] * 3, "b": [6.0] * 2, "c": [0.0] * 3}


@pytest.mark.parametrize("gain", ["harmonic", "flat"])
def test_scores_for_each_unit_are_only_cut(gain):
    scores = {"a": [9.0, 4.0, 1.0, 0.5], "b": (7.0, 1.0), "c": [3.0]}
    expected = {"a": [9.0, 4.0, 1.0], "b": [7.0, 1.0], "c": [3.0]}
    assert GainRule(gain, 3, "none").gains(scores, SITES, GROUPS) == expected


def test_per_parameter_divides_by_what_a_unit_costs():
    gains = GainRule("flat", 1, "per_parameter").gains({"a": 12.0, "b": 6.0, "c": [5.0, 1.0]}, SITES, GROUPS)
    assert gains == {"a": [pytest.approx(1.0)], "b": [pytest.approx(0.75)], "c": [pytest.approx(0.5)]}


def test_per_group_divides_by_the_mean_of_the_group():
    gains = GainRule("flat", 1, "per_group").gains({"a": 12.0, "b": 6.0, "c": [5.0, 1.0]}, SITES, GROUPS)
    assert gains == {"a": [pytest.approx(12 / 9)], "b": [pytest.approx(6 / 9)], "c": [pytest.approx(5 / 6)]}


def test_a_group_that_scores_nothing_cannot_be_normalised():
    with pytest.raises(SettingError, match=r"normalise=per_group.*shortcut"):
        GainRule("flat", 1, "per_group").gains({"a": 1.0, "b": 2.0, "c": 0.0}, SITES, GROUPS)


@PROPERTY
@given(scores=SCORES, rule=RULES)
def test_gains_never_increase_with_the_rank(scores, rule):
    # Allocators rely on it; scores below 0 come from proxies such as grasp. To refuse them would be right, too.
    try:
        gains = rule.gains(scores, SITES, GROUPS)
    except SettingError:
        return
    for place in SITES:
        values = gains[place.name]
        assert len(values) == min(rule.max_rank, place.in_features, place.out_features)
        assert values == sorted(values, reverse=True)


@PROPERTY
@given(scores=SCORES, rule=RULES)
def test_a_normalisation_keeps_the_order_within_a_group_of_equal_sizes(scores, rule):
    try:
        gains = rule.gains(scores, [site(name, 5, 5) for name in GROUPS], GROUPS)
    except SettingError:  # as above
        return
    worse, better = sorted(["a", "b"], key=scores.get)
    assert gains[worse][0] <= gains[better][0]


def test_a_rule_needs_some_rank():
    with pytest.raises(SettingError, match="max_rank=0"):
        GainRule("flat", 0, "none")
