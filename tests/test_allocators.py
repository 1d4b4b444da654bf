"""The allocator contract: a new allocator joins all of it by one line of ``ALLOCATORS``."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import hydra
import pytest
import yaml
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator, GainRule, tie_order
from heterolora.allocators.exact import spend_exactly
from heterolora.allocators.fixed import Fixed
from heterolora.allocators.greedy import Greedy
from heterolora.allocators.knapsack import Knapsack
from heterolora.allocators.limits import LimitRule
from heterolora.allocators.proportional import Proportional
from heterolora.allocators.redistribute import Redistribute
from heterolora.allocators.shares import Shares
from heterolora.allocators.top import Top
from heterolora.allocators.uniform import Uniform
from heterolora.budget import SiteCount
from heterolora.build import build
from heterolora.cost import AdditiveCost, Cost
from heterolora.errors import SettingError
from heterolora.sites import Port, Site
from tests.conftest import ROOT

# The same examples in every run, however slow the machine is.
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Entry:
    """An allocator from the seed of its ties and a file of ranks, which promises it makes, and what it needs for them.

    ``limits`` are those of the allocator, for the tests that need to know what may be added.
    """

    make: Callable[[int, Path], Allocator]
    fills: bool = False  # leaves less than the cheapest unit it could still add
    spends: bool = False  # spends the whole budget where some ranks can
    draws: bool = False  # breaks ties by its seed
    grows: bool = True  # a larger budget never spends less
    gains: bool = False  # a larger budget never gains less
    additive: bool = False  # needs a price for each site
    positive: bool = False  # needs some gain above 0
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


CAPPED = {"shortcut": {"max_share": 0.6, "max_rank": 3}}
RESERVED = {"lora": {"min_share": 0.3}, "shortcut": {"min_share": 0.25, "max_share": 0.6}}


def greedy(limits, min_rank=0, gain="harmonic", exact=False):
    return lambda seed, file: Greedy(min_rank, 5, gain, "none", limits, exact, seed)


def proportional(limits, exact=False):
    return lambda seed, file: Proportional(0, 5, "none", limits, exact, seed)


def knapsack(limits, exact=False):
    return lambda seed, file: Knapsack(0, 5, "flat", "none", limits, exact, seed)


FILLS = {"fills": True, "draws": True}
SHARES = {**FILLS, "grows": False, "additive": True, "positive": True}
PRICED = {**FILLS, "grows": False, "additive": True}
SPENDS = {"spends": True}

ALLOCATORS = {
    "top_combined": Entry(lambda seed, file: Top("combined", 2, "none", seed), draws=True),
    "top_separate": Entry(lambda seed, file: Top("separate", 2, "none", seed), draws=True),
    "uniform": Entry(lambda seed, file: Uniform(None)),
    "greedy": Entry(greedy(None), **FILLS),
    "greedy_min_rank": Entry(greedy(None, 1, "flat"), **FILLS),
    "greedy_capped": Entry(greedy(CAPPED), **FILLS, grows=False, additive=True, limits=CAPPED),
    "greedy_reserved": Entry(greedy(RESERVED), **FILLS, grows=False, additive=True, limits=RESERVED),
    "greedy_exact": Entry(greedy(None, exact=True), **FILLS, **SPENDS, grows=False),
    "greedy_capped_exact": Entry(greedy(CAPPED, exact=True), **PRICED, **SPENDS, limits=CAPPED),
    "greedy_reserved_exact": Entry(greedy(RESERVED, exact=True), **PRICED, **SPENDS, limits=RESERVED),
    "proportional": Entry(proportional(None), **SHARES),
    "proportional_capped": Entry(proportional(CAPPED), **SHARES, limits=CAPPED),
    "proportional_reserved": Entry(proportional(RESERVED), **SHARES, limits=RESERVED),
    "proportional_exact": Entry(proportional(None, exact=True), **SHARES, **SPENDS),
    "proportional_capped_exact": Entry(proportional(CAPPED, exact=True), **SHARES, **SPENDS, limits=CAPPED),
    "proportional_reserved_exact": Entry(proportional(RESERVED, exact=True), **SHARES, **SPENDS, limits=RESERVED),
    "knapsack": Entry(knapsack(None), **PRICED, gains=True),
    "knapsack_capped": Entry(knapsack(CAPPED), **PRICED, gains=True, limits=CAPPED),
    "knapsack_reserved": Entry(knapsack(RESERVED), **PRICED, limits=RESERVED),
    "knapsack_exact": Entry(knapsack(None, exact=True), **PRICED, **SPENDS),
    "knapsack_capped_exact": Entry(knapsack(CAPPED, exact=True), **PRICED, **SPENDS, limits=CAPPED),
    "knapsack_reserved_exact": Entry(knapsack(RESERVED, exact=True), **PRICED, **SPENDS, limits=RESERVED),
    "redistribute": Entry(lambda seed, file: Redistribute(2.0, seed), draws=True, grows=False, additive=True),
    "shares": Entry(lambda seed, file: Shares("root", "nearest", 0.5, 4.0), grows=False, additive=True, positive=True),
    "fixed": Entry(lambda seed, file: Fixed(str(file), None)),
}


def entries(chosen):
    """Those with limits, and those that spend exactly, are no part of the quick tests."""
    long = {name for name, entry in chosen.items() if entry.limits or entry.spends}
    shown = [pytest.param(e, id=n, marks=[pytest.mark.medium] if n in long else []) for n, e in chosen.items()]
    return pytest.mark.parametrize("entry", shown)


EVERY = entries(ALLOCATORS)


def those(promise: str):
    return entries({name: entry for name, entry in ALLOCATORS.items() if getattr(entry, promise)})


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

    def total(self, allocation: Allocation) -> float:
        """The sum of gains."""
        return math.fsum(gain for name, rank in allocation.ranks.items() for gain in self.gains[name][:rank])

    def spending(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """What each group spends."""
        return {
            label: sum(ranks[name] * self.cost.units[name] for name in ranks if self.groups[name] == label)
            for label in set(self.groups.values())
        }

    def caps(self, limits, max_rank: int) -> dict[str, int]:
        """The largest rank of each site."""
        return {
            name: min(len(values), limits.get(self.groups[name], {}).get("max_rank", max_rank))
            for name, values in self.gains.items()
        }


def assert_full(problem: Problem, ranks, limits, max_rank: int) -> None:
    """No unit can be added: each site is at its largest rank, its group has no room, or the budget has none."""
    caps, spent = problem.caps(limits, max_rank), problem.spending(ranks)
    for name, rank in ranks.items():
        share = limits.get(problem.groups[name], {}).get("max_share")
        if rank == caps[name]:
            continue
        if share is not None:
            after = spent[problem.groups[name]] + problem.cost.units[name]
            if after > Fraction(str(share)) * problem.budget:
                continue
        assert problem.cost({**ranks, name: rank + 1}) > problem.budget


def equal_problem(budget: int, sites: int = 8, rank: int = 2, value: float = 1.0) -> Problem:
    """Nothing distinguishes the sites but their names; half of them belong to each group."""
    names = [f"s{number}" for number in range(sites)]
    groups = {name: ("lora", "shortcut")[number % 2] for number, name in enumerate(names)}
    return Problem({name: [value] * rank for name in names}, AdditiveCost(dict.fromkeys(names, 1)), groups, budget)


VALUES = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 1e6)  # the first kind makes ties common


@st.composite
def problems(draw, tied: bool | None = None, least: int = 1, labels=(), values=VALUES, sites=6, units=5) -> Problem:
    """Problems whose budget pays for ``least`` units at every site, and for up to 60 parameters more.

    Each of the labels occurs.
    """
    names = [f"s{number}" for number in range(draw(st.integers(max(1, len(labels)), sites)))]
    gains = {name: sorted(draw(st.lists(values, min_size=2, max_size=units)), reverse=True) for name in names}
    units = {name: draw(st.integers(1, 9)) for name in names}
    groups = {name: draw(st.sampled_from(["lora", "shortcut"])) for name in names} | dict(
        zip(names, labels, strict=False)
    )
    tied = draw(st.booleans()) if tied is None else tied
    cost = TiedCost(draw(st.integers(1, 9)), units) if tied else AdditiveCost(units)
    budget = cost(dict.fromkeys(names, least)) + draw(st.integers(0, 60))
    return Problem(gains, cost, groups, budget)


def fitting(entry: Entry) -> st.SearchStrategy[Problem]:
    """Problems that the allocator can answer."""
    drawn = problems(tied=False if entry.additive else None, labels=tuple(entry.limits))
    return drawn.filter(lambda problem: not entry.positive or any(map(any, problem.gains.values())))


def active(allocation: Allocation) -> set[str]:
    return {name for name, rank in allocation.ranks.items() if rank}


# -- the contract ----------------------------------------------------------------------------------------------------


def test_every_allocator_with_a_config_file_is_in_the_table(file):
    files = list((ROOT / "conf" / "allocator").glob("*.yaml"))
    nodes = [yaml.safe_load(path.read_text()) for path in files]
    configured = {node["_target_"].rpartition(".")[2] for node in nodes if "_target_" in node}  # presets have none
    assert configured == {type(entry.make(0, file)).__name__ for entry in ALLOCATORS.values()}


@EVERY
@PROPERTY
@given(data=st.data())
def test_ranks_are_possible_and_the_price_is_true_and_within_the_budget(entry, file, data):
    problem = data.draw(fitting(entry))
    allocation = problem.solve(entry.make(0, file))
    assert allocation.ranks.keys() == problem.gains.keys()
    assert all(0 <= rank <= len(problem.gains[name]) for name, rank in allocation.ranks.items())
    units = problem.cost.units
    price = sum(rank * units[name] for name, rank in allocation.ranks.items())
    price += getattr(problem.cost, "shared", 0) * max(allocation.ranks.values())
    assert allocation.spent == price <= problem.budget == allocation.budget


@EVERY
@PROPERTY
@given(data=st.data())
def test_the_order_of_the_inputs_is_irrelevant(entry, file, data):
    problem = data.draw(fitting(entry))
    shuffled = problem.in_order(data.draw(st.permutations(list(problem.gains))))
    assert shuffled.solve(entry.make(0, file)) == problem.solve(entry.make(0, file))


@EVERY
@PROPERTY
@given(data=st.data())
def test_an_answer_is_repeated_and_leaves_the_question_as_it_was(entry, file, data):
    problem = data.draw(fitting(entry))
    allocator, before = entry.make(0, file), copy.deepcopy(problem)
    assert problem.solve(allocator) == problem.solve(allocator)
    assert problem == before


@those("grows")
@PROPERTY
@given(data=st.data(), more=st.integers(0, 20))
def test_a_larger_budget_never_spends_less(entry, file, data, more):
    allocator, problem = entry.make(0, file), data.draw(fitting(entry))
    richer = replace(problem, budget=problem.budget + more)
    assert problem.solve(allocator).spent <= richer.solve(allocator).spent


@those("gains")
@PROPERTY
@given(data=st.data(), more=st.integers(0, 20))
def test_a_larger_budget_never_gains_less(entry, file, data, more):
    allocator, problem = entry.make(0, file), data.draw(fitting(entry))
    richer = replace(problem, budget=problem.budget + more)
    assert problem.total(problem.solve(allocator)) <= richer.total(richer.solve(allocator)) * (1 + 1e-12)


@those("fills")
@PROPERTY
@given(data=st.data())
def test_less_is_left_than_the_cheapest_unit_that_could_be_added(entry, file, data):
    problem = data.draw(fitting(entry))
    assert_full(problem, problem.solve(entry.make(0, file)).ranks, entry.limits, 5)


@those("spends")
@PROPERTY
@given(data=st.data())
def test_the_whole_budget_is_spent_where_some_ranks_can(entry, file, data):
    # With at most 4 units at each of 4 sites, no trade has to take back more than 12.
    drawn = problems(tied=False, labels=tuple(entry.limits), sites=4, units=4)
    problem, allocator = data.draw(drawn), entry.make(0, file)
    assume(not entry.positive or any(map(any, problem.gains.values())))
    found, plain = problem.solve(allocator), problem.solve(replace(allocator, exact=False))
    if whole_choices(problem, entry.limits):
        assert found.spent == whole(problem)
    else:
        assert found == plain


@those("additive")
def test_an_adapter_whose_sites_share_factors_is_refused_where_it_cannot_be_right(entry, file):
    problem = equal_problem(20)
    tied = replace(problem, cost=TiedCost(3, problem.cost.units))
    with pytest.raises(SettingError, match=r"share.*; use (greedy|min_rank)"):
        tied.solve(entry.make(0, file))


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
        if entry.positive and one == 0:
            for problem in (plain, mixed):
                with pytest.raises(SettingError, match="all scores are 0"):
                    problem.solve(entry.make(seed, file))
        else:
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
    "make",
    [
        lambda seed: Greedy(0, 2, "flat", "none", None, exact=False, seed=seed),
        lambda seed: Knapsack(0, 2, "flat", "none", None, exact=False, seed=seed),
        lambda seed: Top("combined", 2, "none", seed),
    ],
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
    assert active(problem.solve(Greedy(0, 1, "flat", "none", None, exact=False, seed=0))) == {"a", "b"}


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
    assert problem.solve(Greedy(0, 5, "flat", "none", None, exact=False, seed=3)).ranks == ranks


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
    allocation = problem.solve(Greedy(0, 5, "flat", "none", None, exact=False, seed=0))
    assert total(allocation.ranks[name] for name in gains) == best


@PROPERTY
@given(problem=problems(least=2))
def test_greedy_gives_every_site_its_least_rank_first(problem):
    assert min(problem.solve(Greedy(2, 5, "flat", "none", None, exact=False, seed=0)).ranks.values()) >= 2


def test_greedy_names_a_least_rank_that_is_too_dear_or_too_large():
    problem = equal_problem(budget=15)
    with pytest.raises(SettingError, match=r"allocator.min_rank=2: costs 16, the budget is 15"):
        problem.solve(Greedy(2, 5, "flat", "none", None, exact=False, seed=0))
    with pytest.raises(SettingError, match=r"allocator.min_rank=3.*s0"):
        replace(problem, budget=100).solve(Greedy(3, 5, "flat", "none", None, exact=False, seed=0))


def test_greedy_gives_no_site_more_than_its_largest_rank():
    # Gains longer than max_rank come from callers who make them without the allocator's own rule.
    assert set(
        equal_problem(budget=100, rank=4).solve(Greedy(0, 3, "flat", "none", None, exact=False, seed=0)).ranks.values()
    ) == {3}


# -- knapsack --------------------------------------------------------------------------------------------------------


WHOLE = st.integers(0, 9)  # sums of whole numbers are exact


def every_choice(problem: Problem, limits=None, max_rank: int = 5, min_rank: int = 0):
    """All ranks that respect budget and limits (DESIGN.md 6), by trying every one."""
    limits = limits or {}
    caps = problem.caps(limits, max_rank)
    floors = {name: limits.get(group, {}).get("min_rank", min_rank) for name, group in problem.groups.items()}
    choices = itertools.product(*(range(floors[name], caps[name] + 1) for name in problem.gains))
    for ranks in (dict(zip(problem.gains, choice, strict=True)) for choice in choices):
        if problem.cost(ranks) <= problem.budget and respects_shares(problem, ranks, limits, caps):
            yield ranks


def respects_shares(problem: Problem, ranks, limits, caps) -> bool:
    """Each group within its largest share, and its reserve used as far as any of its units fits into it."""
    spent = problem.spending(ranks)
    most = problem.spending(caps)
    for label, limit in limits.items():
        if spent[label] > Fraction(str(limit.get("max_share", 1))) * problem.budget:
            return False
        reserve = min(math.floor(Fraction(str(limit.get("min_share", 0))) * problem.budget), most[label])
        open_ = [name for name in ranks if problem.groups[name] == label and ranks[name] < caps[name]]
        if any(spent[label] + problem.cost.units[name] <= reserve for name in open_):
            return False
    return True


def whole(problem: Problem) -> int:
    """The budget, less what no mix of units can spend because of their common divisor; least ranks are 0."""
    return problem.budget - problem.budget % math.gcd(*problem.cost.units.values())


def whole_choices(problem: Problem, limits=None, max_rank: int = 5) -> list[dict[str, int]]:
    """All ranks that respect limits and spend the whole budget."""
    choices = every_choice(problem, limits, max_rank)
    return [ranks for ranks in choices if problem.cost(ranks) == whole(problem)]


def best(problem: Problem, choices) -> float:
    return max(sum(sum(problem.gains[name][:rank]) for name, rank in ranks.items()) for ranks in choices)


@settings(PROPERTY, max_examples=100)
@given(problem=problems(tied=False, least=0, values=WHOLE, sites=4, units=4))
def test_knapsack_is_the_best_of_all_choices(problem):
    found = problem.solve(Knapsack(0, 5, "flat", "none", None, exact=False, seed=0))
    assert problem.total(found) == best(problem, every_choice(problem))


def test_knapsack_beats_greedy_where_the_best_ratio_leaves_a_gap():
    # Per parameter: a 10/6, b and c 8/5. Greedy takes a and has 4 left; b and c fill the budget of 10.
    gains = {"a": [10.0], "b": [8.0], "c": [8.0]}
    problem = Problem(gains, AdditiveCost({"a": 6, "b": 5, "c": 5}), dict.fromkeys(gains, "lora"), 10)
    assert active(problem.solve(Greedy(0, 1, "flat", "none", None, exact=False, seed=0))) == {"a"}
    assert active(problem.solve(Knapsack(0, 1, "flat", "none", None, exact=False, seed=0))) == {"b", "c"}


def test_knapsack_prefers_the_cheaper_of_equal_optima():
    gains = {"dear": [5.0], "cheap": [5.0]}
    problem = Problem(gains, AdditiveCost({"dear": 3, "cheap": 2}), dict.fromkeys(gains, "lora"), 3)
    for seed in range(8):
        assert active(problem.solve(Knapsack(0, 1, "flat", "none", None, exact=False, seed=seed))) == {"cheap"}


def test_knapsack_draws_between_equal_optima_of_different_prices():
    gains = {"one": [5.0], "pair": [2.5, 2.5]}
    problem = Problem(gains, AdditiveCost({"one": 4, "pair": 2}), dict.fromkeys(gains, "lora"), 4)
    chosen = {
        frozenset(active(problem.solve(Knapsack(0, 2, "flat", "none", None, exact=False, seed=seed))))
        for seed in range(20)
    }
    assert chosen == {frozenset({"one"}), frozenset({"pair"})}


def large() -> Problem:
    """200 sites of 32 units at five prices of common divisor 384, and a budget of 50,000 of these."""
    prices = [384 * multiple for multiple in (4, 10, 16, 27, 35)]
    gains = {f"s{n}": [(1 + n % 37) ** 2 / (k + n % 5) for k in range(1, 33)] for n in range(200)}
    cost = AdditiveCost({name: prices[number % 5] for number, name in enumerate(gains)})
    return Problem(gains, cost, {name: ("lora", "shortcut")[n % 3 == 0] for n, name in enumerate(gains)}, 384 * 50_000)


@pytest.mark.parametrize("limits", [None, CAPPED, RESERVED], ids=["free", "capped", "reserved"])
def test_knapsack_on_a_large_space_lies_between_greedy_and_what_fractions_of_units_could_gain(limits):
    problem = large()
    found = problem.solve(Knapsack(0, 32, "flat", "none", limits, exact=False, seed=0))
    assert_full(problem, found.ranks, limits or {}, 32)
    assert problem.total(found) >= problem.total(
        problem.solve(Greedy(0, 32, "flat", "none", limits, exact=False, seed=0))
    )
    units = [(gain, problem.cost.units[name]) for name, values in problem.gains.items() for gain in values]
    left, bound = problem.budget, 0.0
    for gain, price in sorted(units, key=lambda unit: -unit[0] / unit[1]):
        part = min(1.0, left / price)
        bound, left = bound + part * gain, left - part * price
    assert problem.total(found) <= bound * (1 + 1e-12)
    if limits is None:
        assert problem.total(found) >= bound * (1 - 1e-4)


@pytest.mark.parametrize("prices", [(999_983, 1_000_003), (7_919, 7_907)], ids=["memory", "time"])
def test_knapsack_refuses_tables_that_would_be_too_large(prices):
    gains = {f"s{n}": [1.0] * 400 for n in range(20)}
    cost = AdditiveCost({name: prices[n % 2] for n, name in enumerate(gains)})
    problem = Problem(gains, cost, dict.fromkeys(gains, "lora"), cost(dict.fromkeys(gains, 300)))
    with pytest.raises(SettingError, match=r"allocator=knapsack.*steps.*use greedy"):
        problem.solve(Knapsack(0, 400, "flat", "none", None, exact=False, seed=0))


def test_knapsack_refuses_gains_below_0():
    problem = Problem({"a": [1.0, -1.0], "b": [1.0]}, AdditiveCost({"a": 1, "b": 1}), dict.fromkeys("ab", "lora"), 3)
    with pytest.raises(SettingError, match=r"allocator=knapsack.*below 0.*\['a'\].*use greedy"):
        problem.solve(Knapsack(0, 2, "flat", "none", None, exact=False, seed=0))
    assert problem.solve(Knapsack(0, 1, "flat", "none", None, exact=False, seed=0)).ranks == {
        "a": 1,
        "b": 1,
    }  # it never gets there


@pytest.mark.parametrize("allocator", [Greedy, Knapsack])
def test_evas_example(allocator):
    # The six largest of .5 .4 .3 .2 .15 .1 | .08 .05 ... belong to the first, second and third layer 3, 1 and 2 times.
    gains = {"L1": [0.5, 0.3, 0.1, 0.05], "L2": [0.4, 0.05, 0.03, 0.01], "L3": [0.2, 0.15, 0.08, 0.02]}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, 64)), dict.fromkeys(gains, "lora"), 6 * 64)
    assert problem.solve(allocator(0, 4, "flat", "none", None, exact=False, seed=0)).ranks == {
        "L1": 3,
        "L2": 1,
        "L3": 2,
    }


# -- proportional ----------------------------------------------------------------------------------------------------


def goras_layers(budget: int = 32 * 128) -> Problem:
    """Four equal layers with shares (1, 1, 2, 4) / 8 of what rank 8 everywhere costs (SYSTEMS.md 8.2)."""
    gains = {"a": [0.1] * 64, "b": [0.1] * 64, "c": [0.2] * 64, "d": [0.4] * 64}
    return Problem(gains, AdditiveCost(dict.fromkeys(gains, 128)), dict.fromkeys(gains, "lora"), budget)


@pytest.mark.parametrize(
    ("min_rank", "max_rank", "expected"),
    [
        (0, 32, [4, 4, 8, 16]),
        (0, 12, [5, 5, 10, 12]),  # the 4 units that d cannot take go to the others as 1 : 1 : 2
        (0, 9, [7, 7, 9, 9]),  # 14 units between a and b, once c is full too
        (6, 32, [6, 6, 7, 13]),  # 20 units between c and d as 1 : 2 are 6.67 and 13.33
        (6, 12, [6, 6, 8, 12]),
        (8, 32, [8, 8, 8, 8]),
        (0, 6, [6, 6, 6, 6]),
    ],
)
def test_shares_of_gora_and_what_bounds_make_of_them(min_rank, max_rank, expected):
    ranks = goras_layers().solve(Proportional(min_rank, max_rank, "none", None, exact=False, seed=0)).ranks
    assert list(ranks.values()) == expected


@PROPERTY
@given(weights=st.lists(st.integers(1, 99), min_size=2, max_size=6), budget=st.integers(1, 60))
def test_proportional_is_the_rule_of_largest_remainders_where_prices_are_equal(weights, budget):
    gains = {f"s{n}": [float(weight)] * 60 for n, weight in enumerate(weights)}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, 7)), dict.fromkeys(gains, "lora"), 7 * budget + 3)
    # the 3 parameters that buy no unit belong to the ideal shares
    quotas = [Fraction(problem.budget * weight, 7 * sum(weights)) for weight in weights]
    ranks = list(problem.solve(Proportional(0, 60, "none", None, exact=False, seed=0)).ranks.values())
    assert sum(ranks) == budget
    extra = [rank - math.floor(quota) for rank, quota in zip(ranks, quotas, strict=True)]
    assert set(extra) <= {0, 1}
    remainders = [quota - math.floor(quota) for quota in quotas]
    winners = [remainder for remainder, more in zip(remainders, extra, strict=True) if more]
    losers = [remainder for remainder, more in zip(remainders, extra, strict=True) if not more]
    assert not winners or not losers or min(winners) >= max(losers)


def test_a_dearer_site_of_equal_score_gets_equal_parameters():
    gains = dict.fromkeys(("narrow", "wide"), [1.0] * 20)
    problem = Problem(gains, AdditiveCost({"narrow": 10, "wide": 30}), dict.fromkeys(gains, "lora"), 240)
    assert problem.solve(Proportional(0, 20, "none", None, exact=False, seed=0)).ranks == {"narrow": 12, "wide": 4}


def test_a_list_weighs_as_the_mean_of_the_units_that_the_site_may_get():
    gains = {"list": [5.0, 3.0, 1.0, 0.0], "number": [1.5] * 4}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, 1)), {"list": "a", "number": "b"}, 5)
    assert problem.solve(Proportional(0, 4, "none", None, exact=False, seed=0)).ranks == {
        "list": 3,
        "number": 2,
    }  # 2.25 : 1.5
    # limited to 2 units, its mean is 4: 3.6 units, of which it takes 2
    assert problem.solve(Proportional(0, 4, "none", {"a": {"max_rank": 2}}, exact=False, seed=0)).ranks == {
        "list": 2,
        "number": 3,
    }


def test_sites_without_score_get_what_nobody_else_can_take():
    gains = {"a": [1.0] * 2, "b": [0.0] * 2, "c": [0.0] * 2}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, 1)), dict.fromkeys(gains, "lora"), 4)
    assert problem.solve(Proportional(0, 2, "none", None, exact=False, seed=0)).ranks == {"a": 2, "b": 1, "c": 1}


def test_a_group_that_spends_its_share_leaves_the_rest_to_others_in_proportion():
    # d may spend half of what 16 units cost: 8 units, and 24 are shared by the others as 1 : 1 : 2.
    problem = goras_layers()
    problem = replace(problem, groups=problem.groups | {"d": "shortcut"})
    ranks = problem.solve(Proportional(0, 32, "none", {"shortcut": {"max_share": 0.25}}, exact=False, seed=0)).ranks
    assert list(ranks.values()) == [6, 6, 12, 8]
    ranks = problem.solve(Proportional(0, 32, "none", {"shortcut": {"min_share": 0.75}}, exact=False, seed=0)).ranks
    assert list(ranks.values()) == [2, 2, 4, 24]


@pytest.mark.parametrize(
    ("values", "reason"), [((1.0, -0.5), r"below 0, as at \['s1'\].*use greedy"), ((0.0, 0.0), "all scores are 0")]
)
def test_proportional_refuses_scores_that_are_no_shares(values, reason):
    gains = {f"s{n}": [value] * 2 for n, value in enumerate(values)}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, 1)), dict.fromkeys(gains, "lora"), 3)
    with pytest.raises(SettingError, match=f"allocator=proportional.*{reason}"):
        problem.solve(Proportional(0, 2, "none", None, exact=False, seed=0))


# -- limits ----------------------------------------------------------------------------------------------------------


def limited(exact: bool):
    return {
        "greedy": lambda limits, least: Greedy(least, 3, "flat", "none", limits, exact, seed=0),
        "proportional": lambda limits, least: Proportional(least, 3, "none", limits, exact, seed=0),
        "knapsack": lambda limits, least: Knapsack(least, 3, "flat", "none", limits, exact, seed=0),
    }


LIMITED = limited(False) | {f"{name}_exact": make for name, make in limited(True).items()}


FAMILIES = ("lora", "shortcut", "cross")


@st.composite
def limits(draw):
    """Limits of some groups that do not contradict each other; least shares sum to 1 at most."""
    drawn, left = {}, 10
    for label in draw(st.lists(st.sampled_from(FAMILIES), unique=True, min_size=1)):
        tenths = draw(st.integers(0, left))
        left -= tenths
        limit = {"min_share": tenths / 10, "max_share": draw(st.integers(tenths, 10)) / 10}
        limit |= {"min_rank": draw(st.integers(0, 1)), "max_rank": draw(st.integers(1, 4))}
        drawn[label] = {key: limit[key] for key in draw(st.sets(st.sampled_from(list(limit))))}
    return drawn


def too_dear(problem: Problem, limits, min_rank: int) -> bool:
    """Whether least ranks and reserves cannot all be paid for."""
    floors = {name: limits.get(group, {}).get("min_rank", min_rank) for name, group in problem.groups.items()}
    least, most = problem.spending(floors), problem.spending(problem.caps(limits, 3))
    together = 0
    for label, spent in least.items():
        limit = limits.get(label, {})
        if spent > Fraction(str(limit.get("max_share", 1))) * problem.budget:
            return True
        reserve = min(math.floor(Fraction(str(limit.get("min_share", 0))) * problem.budget), most[label])
        together += max(spent, reserve)
    return together > problem.budget


LIMITED_PROBLEMS = problems(tied=False, least=0, labels=FAMILIES, values=WHOLE, sites=5, units=3)


@pytest.mark.medium
@pytest.mark.parametrize("make", LIMITED.values(), ids=LIMITED.keys())
@settings(PROPERTY, max_examples=100)
@given(problem=LIMITED_PROBLEMS, limits=limits(), least=st.integers(0, 1))
def test_limits_are_respected_and_the_budget_is_used_up_to_them(make, problem, limits, least):
    assume(any(map(any, problem.gains.values())))
    if too_dear(problem, limits, least):
        with pytest.raises(SettingError, match=r"allocator\.(min_rank|limits)"):
            problem.solve(make(limits, least))
        return
    ranks = problem.solve(make(limits, least)).ranks
    assert ranks in list(every_choice(problem, limits, 3, least))
    assert_full(problem, ranks, limits, 3)


@pytest.mark.medium
@settings(PROPERTY, max_examples=100)
@given(problem=LIMITED_PROBLEMS, limits=limits(), least=st.integers(0, 1))
def test_knapsack_is_the_best_of_all_choices_within_limits(problem, limits, least):
    assume(not too_dear(problem, limits, least))
    found, near = (problem.solve(LIMITED[name](limits, least)) for name in ("knapsack", "greedy"))
    assert problem.total(found) == best(problem, every_choice(problem, limits, 3, least)) >= problem.total(near)


@PROPERTY
@given(problem=LIMITED_PROBLEMS, limits=limits())
def test_greedy_takes_the_best_gain_per_parameter_that_limits_allow_at_every_step(problem, limits):
    assume(not too_dear(problem, limits, 0))
    caps, most = problem.caps(limits, 3), problem.spending(problem.caps(limits, 3))
    ranks = {name: limits.get(group, {}).get("min_rank", 0) for name, group in problem.groups.items()}

    def fits(name: str, reserved: bool) -> bool:
        if ranks[name] == caps[name]:
            return False
        spent = problem.spending({**ranks, name: ranks[name] + 1})
        kept = dict(spent)
        for label, limit in limits.items():
            if spent[label] > Fraction(str(limit.get("max_share", 1))) * problem.budget:
                return False
            reserve = min(math.floor(Fraction(str(limit.get("min_share", 0))) * problem.budget), most[label])
            kept[label] = max(spent[label], reserve if reserved else 0)
        return sum(kept.values()) <= problem.budget

    for reserved in (True, False):
        while names := [name for name in ranks if fits(name, reserved)]:
            ranks[min(names, key=lambda n: (-problem.gains[n][ranks[n]] / problem.cost.units[n], tie_order(0, n)))] += 1
    assert problem.solve(LIMITED["greedy"](limits, 0)).ranks == ranks


@pytest.mark.parametrize(("kind", "make"), LIMITED.items(), ids=LIMITED.keys())
@PROPERTY
@given(problem=LIMITED_PROBLEMS)
def test_limits_that_say_nothing_change_nothing(kind, make, problem):
    assume(any(map(any, problem.gains.values())))
    nothing = {
        "lora": {},
        "cross": {"max_rank": 3},
        "shortcut": {"min_share": 0, "max_share": 1, "min_rank": 0, "max_rank": 3},
    }
    plain = problem.solve(make(None, 0))
    assert plain == problem.solve(make({}, 0))
    if kind.startswith("knapsack"):  # among equal optima, another one may be drawn
        assert problem.total(plain) == problem.total(problem.solve(make(nothing, 0)))
    else:
        assert plain == problem.solve(make(nothing, 0))


def test_a_reserve_is_spent_by_its_group_first_and_what_no_unit_of_it_fits_into_is_released():
    # 50 are reserved for the poor group: two units of 20; the last 10 buy two more of the rich one's, at 5.
    gains = {"rich": [9.0] * 20, "poor": [1.0] * 20}
    groups = {"rich": "lora", "poor": "shortcut"}
    problem = Problem(gains, AdditiveCost({"rich": 5, "poor": 20}), groups, 100)
    for make in LIMITED.values():
        allocator = replace(make({"shortcut": {"min_share": 0.5}}, 0), max_rank=20)
        assert problem.solve(allocator).ranks == {"rich": 12, "poor": 2}


def test_no_more_is_reserved_than_a_group_can_spend():
    gains = {"rich": [9.0] * 30, "poor": [1.0] * 30}
    problem = Problem(gains, AdditiveCost({"rich": 1, "poor": 1}), {"rich": "lora", "poor": "shortcut"}, 30)
    for make in LIMITED.values():
        allocator = replace(make({"shortcut": {"min_share": 0.9, "max_rank": 4}}, 0), max_rank=30)
        assert problem.solve(allocator).ranks == {"rich": 26, "poor": 4}


def test_a_share_is_the_number_that_was_written():
    # As floats, 0.29 * 100 is below 29.
    gains = {"a": [9.0] * 100, "b": [1.0] * 100}
    problem = Problem(gains, AdditiveCost({"a": 1, "b": 1}), {"a": "lora", "b": "shortcut"}, 100)
    for make in LIMITED.values():
        allocator = replace(make({"lora": {"max_share": 0.29}}, 0), max_rank=100)
        assert problem.solve(allocator).ranks == {"a": 29, "b": 71}


@pytest.mark.parametrize("make", LIMITED.values(), ids=LIMITED.keys())
def test_a_group_may_get_more_rank_than_the_others(make):
    problem = equal_problem(budget=100, rank=8)
    allocator = make({"shortcut": {"max_rank": 6, "min_rank": 2}}, 0)
    ranks = problem.solve(allocator).ranks
    assert ranks == {name: 3 if group == "lora" else 6 for name, group in problem.groups.items()}
    assert allocator.gain_rule.max_rank == 6  # gains are made for it


def test_ranks_are_limited_with_joint_costs_too():
    problem = equal_problem(budget=100, rank=8)
    problem = replace(problem, cost=TiedCost(3, problem.cost.units))
    ranks = problem.solve(
        Greedy(0, 3, "flat", "none", {"shortcut": {"max_rank": 2}, "lora": {"min_rank": 1}}, exact=False, seed=0)
    ).ranks
    assert ranks == {name: 3 if group == "lora" else 2 for name, group in problem.groups.items()}


WRONG_LIMITS = {  # limits and allocator.min_rank: setting, message
    "group": ({"lora": {}, "cut": {"max_rank": 1}}, 0, "allocator.limits.cut", r"\['lora', 'shortcut'\]"),
    "key": ({"lora": {"share": 0.5}}, 0, "allocator.limits.lora.share", "'min_share', 'max_share', 'min_rank'"),
    "share above 1": ({"lora": {"max_share": 25}}, 0, "allocator.limits.lora.max_share", "from 0 to 1"),
    "share below 0": ({"lora": {"min_share": -0.1}}, 0, "allocator.limits.lora.min_share", "from 0 to 1"),
    "no number": ({"lora": {"min_share": math.nan}}, 0, "allocator.limits.lora.min_share", "from 0 to 1"),
    "shares": ({"lora": {"min_share": 0.5, "max_share": 0.4}}, 0, "allocator.limits.lora.min_share", "max_share=0.4"),
    "sum": ({"lora": {"min_share": 0.6}, "shortcut": {"min_share": 0.5}}, 0, "allocator.limits", "more than 1"),
    "half a rank": ({"lora": {"max_rank": 1.5}}, 0, "allocator.limits.lora.max_rank", "whole number"),
    "negative": ({"lora": {"min_rank": -1}}, 0, "allocator.limits.lora.min_rank", "whole number"),
    "ranks": ({"lora": {"min_rank": 2, "max_rank": 1}}, 0, "allocator.limits.lora.min_rank", "above max_rank=1"),
    "min_rank": ({"lora": {"min_rank": 4}}, 0, "allocator.limits.lora.min_rank", "above max_rank=3"),
    "max_rank": ({"lora": {"max_rank": 0}}, 1, "allocator.limits.lora.max_rank", "below min_rank=1"),
    "too large": ({"lora": {"min_rank": 3}}, 0, "allocator.limits.lora.min_rank", r"\['s0'.*can hold"),
    "too large for all": ({"lora": {"min_rank": 1}}, 3, "allocator.min_rank", r"\['s1'.*can hold"),
    "too dear": ({"lora": {"min_rank": 2}}, 1, "allocator.limits.lora.min_rank", "costs 12, the budget is 10"),
    "too dear for all": ({"lora": {"min_rank": 1}}, 2, "allocator.min_rank", "costs 12, the budget is 10"),
    "ceiling": (
        {"lora": {"min_rank": 1, "max_share": 0.3}}, 0, "allocator.limits.lora.max_share",
        "allows 3 of 10 parameters, the group's least ranks cost 4",
    ),
    "reserve": (
        {"lora": {"min_rank": 1}, "shortcut": {"min_share": 0.7}}, 0, "allocator.limits.shortcut.min_share",
        "reserves 7 of 10 parameters, more than all least ranks leave",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", LIMITED.values(), ids=LIMITED.keys())
@pytest.mark.parametrize(("limits", "least", "setting", "reason"), WRONG_LIMITS.values(), ids=WRONG_LIMITS.keys())
def test_impossible_limits_are_refused_by_name(make, limits, least, setting, reason):
    with pytest.raises(SettingError, match=reason) as caught:  # four sites a group, two units each, at price 1
        equal_problem(budget=10).solve(make(limits, least))
    assert caught.value.setting == setting


@pytest.mark.parametrize("name", ["greedy", "proportional", "knapsack"])
def test_limits_are_given_on_the_command_line(name):
    limits = "allocator.limits={shortcut: {max_share: 0.25, max_rank: 8}, lora: {min_share: 0.5}}"
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("train", [f"allocator={name}", limits])
    allocator = build(OmegaConf.to_container(config.allocator, resolve=True), "allocator")
    assert allocator.limits == {"shortcut": {"max_share": 0.25, "max_rank": 8}, "lora": {"min_share": 0.5}}


# -- the whole budget ------------------------------------------------------------------------------------------------


def test_what_is_left_is_spent_by_a_trade():
    # Greedy takes 14 wide units, then 8 narrow ones, and has 32 left; 3 narrow units cost 32 more than 2 wide ones.
    gains = {"narrow": [1.0] * 20, "wide": [9.0] * 14}
    problem = Problem(gains, AdditiveCost({"narrow": 64, "wide": 80}), dict.fromkeys(gains, "lora"), 1664)
    plain = Greedy(0, 20, "flat", "none", None, exact=False, seed=0)
    assert problem.solve(plain).ranks == {"narrow": 8, "wide": 14}
    assert problem.solve(replace(plain, exact=True)).ranks == {"narrow": 11, "wide": 12}
    # All units cost multiples of 16: of 15 more, nothing can be spent.
    assert replace(problem, budget=1664 + 15).solve(replace(plain, exact=True)).ranks == {"narrow": 11, "wide": 12}


@pytest.mark.medium
@pytest.mark.parametrize("name", ["greedy_exact", "knapsack_exact"])
@settings(PROPERTY, max_examples=100)
@given(problem=LIMITED_PROBLEMS, limits=limits())
def test_no_other_choice_that_spends_the_whole_budget_gains_more(name, problem, limits):
    limits = {label: {key: limit[key] for key in limit if key != "min_rank"} for label, limit in limits.items()}
    assume(not too_dear(problem, limits, 0))
    choices = whole_choices(problem, limits, 3)
    assume(choices)
    allocator = LIMITED[name](limits, 0)
    found, plain = problem.solve(allocator), problem.solve(replace(allocator, exact=False))
    if name == "greedy_exact" and plain.spent == whole(problem):
        assert found == plain  # there is nothing to trade for
    else:
        assert problem.total(found) == best(problem, choices)


@PROPERTY
@given(
    weights=st.lists(st.integers(1, 99), min_size=2, max_size=3),
    prices=st.lists(st.integers(2, 9), min_size=3, max_size=3),
    budget=st.integers(1, 40),
)
def test_proportional_spends_the_whole_budget_as_near_to_the_shares_as_possible(weights, prices, budget):
    gains = {f"s{n}": [float(weight)] * 20 for n, weight in enumerate(weights)}
    units = dict(zip(gains, prices, strict=False))
    problem = Problem(gains, AdditiveCost(units), dict.fromkeys(gains, "lora"), budget)
    quotas = {name: Fraction(budget * round(gains[name][0]), sum(weights) * units[name]) for name in gains}

    def distance(ranks) -> float:
        return float(sum((rank - quotas[name]) ** 2 for name, rank in ranks.items()))

    choices = whole_choices(problem, max_rank=20)
    assume(choices)
    allocator = Proportional(0, 20, "none", None, exact=True, seed=0)
    found, plain = problem.solve(allocator), problem.solve(replace(allocator, exact=False))
    if plain.spent == whole(problem):
        assert found == plain  # there is nothing to trade for
    else:
        assert distance(found.ranks) == pytest.approx(min(map(distance, choices)))


@settings(PROPERTY, max_examples=100)
@given(data=st.data(), problem=problems(tied=False, least=0, values=WHOLE, sites=4, units=4))
def test_a_trade_loses_the_least_whatever_was_allocated(data, problem):
    units = problem.cost.units
    ranks = data.draw(st.sampled_from(list(every_choice(problem))))
    bounds = LimitRule(0, 5, None).resolve(problem.gains, problem.cost, problem.budget, problem.groups)
    traded = spend_exactly(ranks, problem.gains, units, bounds, seed=0)

    def is_trade(other) -> bool:
        """Whether no price has units both granted and taken back."""
        more = {units[name] for name in units if other[name] > ranks[name]}
        return more.isdisjoint(units[name] for name in units if other[name] < ranks[name])

    trades = list(filter(is_trade, whole_choices(problem)))
    if trades and problem.cost(ranks) < whole(problem):
        assert problem.cost(traded) == whole(problem)
        assert is_trade(traded)
        assert best(problem, [traded]) == best(problem, trades)
    else:
        assert traded == ranks


@pytest.mark.medium
@settings(PROPERTY, max_examples=100)
@given(data=st.data(), problem=LIMITED_PROBLEMS, limits=limits())
def test_a_trade_keeps_limits_whatever_was_allocated_within_them(data, problem, limits):
    assume(not too_dear(problem, limits, 0))
    choices = list(every_choice(problem, limits, 3))
    ranks = data.draw(st.sampled_from(choices))
    bounds = LimitRule(0, 3, limits).resolve(problem.gains, problem.cost, problem.budget, problem.groups)
    traded, units = spend_exactly(ranks, problem.gains, problem.cost.units, bounds, seed=0), problem.cost.units
    assert traded in choices
    divisor = math.gcd(*(units[name] for name in units if bounds.floors[name] < bounds.caps[name]))
    left = problem.budget - problem.cost(ranks)
    goal = problem.budget - left % (divisor or left + 1)  # where no rank can change, what is spent is all
    if any(problem.cost(choice) == goal for choice in choices):
        assert problem.cost(traded) == goal
    else:
        assert traded == ranks


@pytest.mark.parametrize(("units", "trades"), [(12, True), (13, False)])
def test_a_trade_takes_back_12_units_at_most(units, trades):
    # After all units of price 2, one parameter is left, and one unit costs as much as that and all of them.
    gains = {"cheap": [5.0] * units, "dear": [1.0]}
    problem = Problem(
        gains, AdditiveCost({"cheap": 2, "dear": 2 * units + 1}), dict.fromkeys(gains, "x"), 2 * units + 1
    )
    found = problem.solve(Greedy(0, 20, "flat", "none", None, exact=True, seed=0))
    assert found.ranks == ({"cheap": 0, "dear": 1} if trades else {"cheap": units, "dear": 0})
    # the table of all choices has no such bound
    assert problem.solve(Knapsack(0, 20, "flat", "none", None, exact=True, seed=0)).unspent == 0


def test_a_search_of_too_many_mixes_keeps_what_fewer_units_taken_back_gave(monkeypatch):
    # Two parameters are left. One unit of mid for one of near loses 8; two units of mid for one of far lose only 3.
    gains = {"mid": [9.0] * 3, "near": [1.0], "far": [15.0]}
    units = {"mid": 10, "near": 12, "far": 22}
    problem = Problem(gains, AdditiveCost(units), dict.fromkeys(gains, "lora"), 32)
    bounds = LimitRule(0, 5, None).resolve(gains, problem.cost, problem.budget, problem.groups)
    ranks, found = {"mid": 3, "near": 0, "far": 0}, []
    for tries in range(100):
        monkeypatch.setattr("heterolora.allocators.exact.MOST_TRIES", tries)
        found.append(spend_exactly(ranks, gains, units, bounds, seed=0))
    few, many = {"mid": 2, "near": 1, "far": 0}, {"mid": 1, "near": 0, "far": 1}
    assert [ranks for ranks, _ in itertools.groupby(found)] == [ranks, few, many]


def test_of_trades_that_lose_equally_little_the_one_that_takes_back_the_fewest_units_is_made():
    # Two parameters are left. One unit of mid for near, two for far, or three for wide: nothing is lost.
    gains = {"mid": [9.0] * 3, "near": [9.0], "far": [18.0], "wide": [27.0]}
    units = {"mid": 10, "near": 12, "far": 22, "wide": 32}
    problem = Problem(gains, AdditiveCost(units), dict.fromkeys(gains, "lora"), 32)
    bounds = LimitRule(0, 5, None).resolve(gains, problem.cost, problem.budget, problem.groups)
    for seed in range(8):
        traded = spend_exactly({"mid": 3, "near": 0, "far": 0, "wide": 0}, gains, units, bounds, seed)
        assert traded == {"mid": 2, "near": 1, "far": 0, "wide": 0}


def test_equal_units_are_traded_by_the_seed():
    # One parameter is left: one of the 8 cheap sites loses its unit, and one of the 3 dear ones gets one.
    gains = {f"cheap{n}": [2.0] for n in range(8)} | {f"dear{n}": [1.0] for n in range(3)}
    cost = AdditiveCost({name: 2 if name.startswith("cheap") else 3 for name in gains})
    problem, changed = Problem(gains, cost, dict.fromkeys(gains, "lora"), 17), set()
    for seed in range(40):
        allocator = Greedy(0, 1, "flat", "none", None, exact=True, seed=seed)
        ranks = problem.solve(allocator).ranks
        assert ranks == problem.in_order(reversed(problem.gains)).solve(allocator).ranks
        trade = {name for name in gains if ranks[name] != name.startswith("cheap")}
        cheap, dear = ([name for name in gains if cost.units[name] == price] for price in (2, 3))
        last, first = max(cheap, key=lambda name: tie_order(seed, name)), min(dear, key=lambda n: tie_order(seed, n))
        assert trade == {last, first}  # what was granted last is taken back first
        changed |= trade
    assert changed == gains.keys()  # no name is at a disadvantage


@PROPERTY
@given(problem=problems(tied=True))
def test_where_sites_share_factors_nothing_is_traded(problem):
    plain = Greedy(0, 5, "flat", "none", None, exact=False, seed=0)
    assert problem.solve(replace(plain, exact=True)) == problem.solve(plain)


@pytest.mark.parametrize("make", [Greedy, Knapsack])
@pytest.mark.parametrize("limits", [None, CAPPED, RESERVED], ids=["free", "capped", "reserved"])
def test_a_large_space_spends_its_whole_budget(make, limits):
    problem = large()
    found = problem.solve(make(0, 32, "flat", "none", limits, exact=True, seed=0))
    assert found.unspent == 0
    plain = problem.solve(make(0, 32, "flat", "none", limits, exact=False, seed=0))
    assert problem.total(found) == pytest.approx(problem.total(plain), rel=1e-3)


@pytest.mark.parametrize("name", ["greedy", "proportional", "knapsack"])
def test_configs_spend_the_whole_budget(name):
    node = yaml.safe_load((ROOT / "conf" / "allocator" / f"{name}.yaml").read_text())
    gains = {"narrow": [1.0] * 20, "wide": [9.0] * 14}
    problem = Problem(gains, AdditiveCost({"narrow": 64, "wide": 80}), dict.fromkeys(gains, "lora"), 1664)
    allocator = build(node | {"seed": 0}, "allocator")
    assert problem.solve(replace(allocator, exact=False)).unspent
    assert problem.solve(allocator).unspent == 0


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
    assert problem.solve(Uniform(None)).ranks == dict.fromkeys(problem.gains, best)


def test_uniform_says_what_rank_1_would_cost():
    assert equal_problem(budget=8).solve(Uniform(None)).spent == 8
    with pytest.raises(SettingError, match=r"budget=7: rank 1 at all 8 sites costs 8"):
        equal_problem(budget=7).solve(Uniform(None))


# -- fixed -----------------------------------------------------------------------------------------------------------


def from_file(tmp_path, content: str, problem: Problem) -> Allocation:
    path = tmp_path / "ranks.json"
    path.write_text(content)
    return problem.solve(Fixed(str(path), None))


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
    found = problem.solve(Greedy(0, 5, "flat", "none", None, exact=False, seed=0))
    assert from_file(tmp_path_factory.mktemp("run"), json.dumps(found.as_dict()), problem) == found


def test_fixed_needs_an_existing_file(tmp_path):
    with pytest.raises(SettingError, match="path=None"):
        Fixed(None, None)
    with pytest.raises(SettingError, match="no such file"):
        Fixed(str(tmp_path / "missing.json"), None)


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Top("combined", 0, "none", 0), "rank"),
        (lambda: Greedy(-1, 5, "flat", "none", None, exact=False, seed=0), "min_rank"),
        (lambda: Greedy(6, 5, "flat", "none", None, exact=False, seed=0), "min_rank"),
        (lambda: Greedy(0, 0, "flat", "none", None, exact=False, seed=0), "max_rank"),
        (lambda: Greedy(0, -1, "flat", "none", None, exact=False, seed=0), "max_rank"),
        (lambda: Proportional(6, 5, "none", None, exact=False, seed=0), "min_rank"),
        (lambda: Proportional(0, 0, "none", None, exact=False, seed=0), "max_rank"),
        (lambda: Knapsack(-1, 5, "flat", "none", None, exact=False, seed=0), "min_rank"),
        (lambda: Knapsack(0, 0, "flat", "none", None, exact=False, seed=0), "max_rank"),
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
    assert Greedy(0, 5, "harmonic", "per_group", None, exact=False, seed=0).gain_rule == GainRule(
        "harmonic", 5, "per_group"
    )
    assert Knapsack(0, 5, "harmonic", "order", None, exact=False, seed=0).gain_rule == GainRule("harmonic", 5, "order")
    assert Proportional(0, 5, "none", None, exact=False, seed=0).gain_rule == GainRule("flat", 5, "none")
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
    normalise=st.sampled_from(["none", "per_parameter", "per_group", "order"]),
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


def test_order_replaces_sizes_by_the_share_of_sites_that_score_at_most_as_much():
    scores = {"a": 1e9, "b": -3.0, "c": -3.0}
    expected = {"a": [1.0], "b": [2 / 3], "c": [2 / 3]}
    assert GainRule("flat", 1, "order").gains(scores, SITES, GROUPS) == expected
    assert GainRule("harmonic", 2, "order").gains(scores, SITES, GROUPS) == {
        "a": [1.0, 0.5],
        "b": [2 / 3, 1 / 3],
        "c": [2 / 3, 1 / 3],
    }


def test_order_keeps_the_proportions_of_a_sites_units():
    # Totals 8, 10 and 0: two thirds, one, and one third, which a list of zeros spreads evenly.
    gains = GainRule("flat", 4, "order").gains({"a": [5.0, 2.0, 1.0], "b": [10.0], "c": [0.0, 0.0]}, SITES, GROUPS)
    assert gains["a"] == pytest.approx([5 / 12, 2 / 12, 1 / 12])
    assert gains["b"] == [1.0]
    assert gains["c"] == pytest.approx([1 / 6, 1 / 6])
    # What is cut off by max_rank or by the site's width counts for the order, as it does for per_group.
    cut = GainRule("flat", 1, "order").gains({"a": [5.0, 2.0, 1.0], "b": [10.0], "c": [0.0, 0.0]}, SITES, GROUPS)
    assert cut == {name: values[:1] for name, values in gains.items()}


@PROPERTY
@given(scores=SCORES, up=st.floats(0.1, 1e3), shift=st.integers(-99, 99))
def test_order_knows_no_scale(scores, up, shift):
    scores = {name: round(score) for name, score in scores.items()}  # so that ties stay ties
    moved = {name: up * (score + shift) for name, score in scores.items()}
    assume(len(set(moved.values())) == len(set(scores.values())))
    rule = GainRule("harmonic", 3, "order")
    assert rule.gains(moved, SITES, GROUPS) == rule.gains(scores, SITES, GROUPS)


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


def test_groups_that_are_numbers_can_be_limited():
    """``search_space.group_by=layer``: YAML and the command line give 0, not '0'."""
    node = yaml.safe_load((ROOT / "conf" / "allocator" / "greedy.yaml").read_text())
    allocator = build(node | {"seed": 0, "limits": {0: {"max_rank": 1}}}, "allocator")
    gains = {"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0, 1.0]}
    found = allocator.allocate(gains, AdditiveCost({"a": 1, "b": 1}), 4, {"a": "0", "b": "1"})
    assert found.ranks == {"a": 1, "b": 3}


@pytest.mark.parametrize("name", ["greedy", "proportional", "knapsack"])
def test_a_budget_beyond_all_bounds_buys_everything(name):
    node = yaml.safe_load((ROOT / "conf" / "allocator" / f"{name}.yaml").read_text())
    allocator = build(node | {"seed": 0}, "allocator")
    gains = {"a": [3.0, 2.0], "b": [1.0, 1.0, 1.0]}
    found = allocator.allocate(gains, AdditiveCost({"a": 2, "b": 3}), 10**20, {"a": "x", "b": "x"})
    assert found.ranks == {"a": 2, "b": 3}
