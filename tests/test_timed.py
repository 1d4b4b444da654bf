"""Two budgets: every allocator keeps to both, whatever a step takes; small problems are compared with brute force."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heterolora.allocators.greedy import Greedy
from heterolora.allocators.knapsack import Knapsack
from heterolora.allocators.timed import allocate_in_time
from heterolora.allocators.uniform import Uniform
from heterolora.cost import AdditiveCost
from heterolora.errors import SettingError
from heterolora.sites import Port, Site
from heterolora.step_time import StepLimit, StepTimes, kind_of
from tests.test_allocators import ALLOCATORS, EVERY, PROPERTY, Problem, file, fitting, problems  # noqa: F401

KNAPSACK = Knapsack(0, 5, "flat", "none", None, exact=False, seed=0)
GREEDY = Greedy(0, 5, "flat", "none", None, exact=False, seed=0)
SECONDS = st.floats(0, 10, allow_subnormal=False)
ANY = problems()
SHARES = st.sampled_from([0.0, 0.5]) | st.floats(0, 0.99)


@dataclass(frozen=True)
class Timed:
    """A problem, and the steps of a made-up backbone."""

    problem: Problem
    sites: tuple[Site, ...]
    limit: StepLimit

    def solve(self, allocator):
        asked = self.problem
        return allocate_in_time(allocator, asked.gains, asked.cost, asked.budget, asked.groups, self.sites, self.limit)

    def keeps(self, ranks) -> bool:
        return self.seconds(ranks) <= self.limit.share * self.limit.reference * (1 + 1e-6)

    def seconds(self, ranks) -> float:
        """By hand: the definition, without the code under test."""
        times = self.limit.times
        active = [site for site in self.sites if ranks[site.name]]
        depth = len(times.backward[""])
        through = [0.0] * depth
        for site in active:
            for block in range(site.layer, depth):
                part = 1 - times.shares[kind_of(site)] if block == site.layer else 1.0
                through[block] = max(through[block], part)
        own = [times.adapters[kind_of(site)] for site in active]
        adapters = sum(fixed + each * ranks[site.name] for (fixed, each), site in zip(own, active, strict=True))
        passed = sum(part * seconds for part, seconds in zip(through, times.backward[""], strict=True))
        return times.constant + sum(times.forward[""]) + passed + adapters

    def choices(self):
        """All ranks within both budgets, but for those without any rank."""
        gains = self.problem.gains
        for choice in itertools.product(*(range(min(len(values), 5) + 1) for values in gains.values())):
            ranks = dict(zip(gains, choice, strict=True))
            if any(choice) and self.problem.cost(ranks) <= self.problem.budget and self.keeps(ranks):
                yield ranks

    def gain(self, ranks) -> float:
        return sum(sum(self.problem.gains[name][:rank]) for name, rank in ranks.items())


@st.composite
def timed(draw, asked=ANY, adapters=SECONDS, units=SECONDS) -> Timed:
    """A problem whose sites lie in up to four blocks."""
    problem = draw(asked)
    depth = draw(st.integers(1, 4))
    sites = [
        Site(name, "lora", f"r{n}", draw(st.integers(0, depth - 1)), Port(name, "in"), Port(name, "out"), 4, 4)
        for n, name in enumerate(problem.gains)
    ]
    blocks = [[draw(SECONDS) for _ in range(depth)] for _ in range(2)]
    kinds = [kind_of(site) for site in sites]
    times = StepTimes(
        draw(st.floats(0.1, 10)),
        {"": blocks[0]},
        {"": blocks[1]},
        {kind: (draw(adapters), draw(units)) for kind in kinds},
        {kind: draw(SHARES) for kind in kinds},
    )
    reference = times.predict(sites, {site.name: 2 for site in sites})
    return Timed(problem, tuple(sites), StepLimit(times, draw(st.floats(0.05, 1.2)), reference))


@EVERY
@PROPERTY
@given(data=st.data())
def test_every_allocator_keeps_to_both_budgets_or_names_the_least_share_that_it_can(entry, file, data):  # noqa: F811
    asked, allocator = data.draw(timed(fitting(entry))), entry.make(0, file)
    assume(asked.problem.solve(allocator).active)
    if isinstance(answer := outcome(asked, allocator), str):
        named = re.match(r"budget.step_time=.* predicted to take (\d+\.\d+) of", answer)
        assert named is not None
        assert float(named[1]) > asked.limit.share
        asked = replace(asked, limit=replace(asked.limit, share=float(named[1])))
        answer = asked.solve(allocator)
    found = answer
    assert found.active
    assert found.ranks.keys() == asked.problem.gains.keys()
    assert all(rank <= len(asked.problem.gains[name]) for name, rank in found.ranks.items())
    assert asked.problem.cost(found.ranks) == found.spent <= asked.problem.budget == found.budget
    assert asked.keeps(found.ranks)


@EVERY
@PROPERTY
@given(data=st.data())
def test_a_limit_that_binds_nothing_changes_nothing(entry, file, data):  # noqa: F811
    asked, allocator = data.draw(timed(fitting(entry))), entry.make(0, file)
    asked = replace(asked, limit=replace(asked.limit, share=1e9))
    assert asked.solve(allocator) == asked.problem.solve(allocator)


@EVERY
@PROPERTY
@given(data=st.data())
def test_the_order_of_the_sites_is_irrelevant(entry, file, data):  # noqa: F811
    asked, allocator = data.draw(timed(fitting(entry))), entry.make(0, file)
    names = data.draw(st.permutations(list(asked.problem.gains)))
    by_name = {site.name: site for site in asked.sites}
    other = replace(asked, problem=asked.problem.in_order(names), sites=tuple(by_name[name] for name in names))
    assert outcome(asked, allocator) == outcome(other, allocator)


def outcome(asked: Timed, allocator):
    try:
        return asked.solve(allocator)
    except SettingError as error:
        return str(error)


WHOLE = st.integers(0, 9)
SMALL = problems(tied=False, least=0, values=WHOLE, sites=4, units=3)


@PROPERTY
@given(asked=timed(SMALL, adapters=st.just(0.0), units=st.just(0.0)))
def test_with_adapters_that_take_no_time_knapsack_is_the_best_of_all_choices(asked):
    assume(asked.problem.solve(KNAPSACK).active)
    best = max((asked.gain(ranks) for ranks in asked.choices()), default=None)
    if best is None:
        with pytest.raises(SettingError):
            asked.solve(KNAPSACK)
    else:
        assert asked.gain(asked.solve(KNAPSACK).ranks) == pytest.approx(best)


def test_with_adapters_that_take_time_little_is_missing_to_the_best_of_all_choices():
    shares = []

    @settings(PROPERTY, max_examples=150)
    @given(asked=timed(SMALL, units=st.floats(0, 0.5)))  # a unit of rank takes little beside the adapter itself
    def compare(asked):
        assume(asked.problem.solve(KNAPSACK).active)
        best = max((asked.gain(ranks) for ranks in asked.choices()), default=None)
        if best is None:
            with pytest.raises(SettingError):
                asked.solve(KNAPSACK)
        elif best:
            shares.append(asked.gain(asked.solve(KNAPSACK).ranks) / best)

    compare()
    assert max(shares) <= 1 + 1e-9
    assert sum(shares) / len(shares) > 0.9
    assert sorted(shares)[len(shares) // 4] > 0.9


def ladder(seconds: float, share: float) -> Timed:
    """Four blocks of one site each, alike but for where they are; a uniform step takes 4 + 4 + 4 * seconds."""
    sites = tuple(Site(f"{n}.q", "lora", "q", n, Port(f"{n}", "in"), Port(f"{n}", "out"), 4, 4) for n in range(4))
    gains = {site.name: [9.0 - site.layer, 1.0] for site in sites}
    problem = Problem(gains, AdditiveCost(dict.fromkeys(gains, 1)), dict.fromkeys(gains, "lora"), 4)
    kind = kind_of(sites[0])
    times = StepTimes(0.0, {"": [1.0] * 4}, {"": [1.0] * 4}, {kind: (seconds, 0.0)}, {kind: 0.0})
    return Timed(problem, sites, StepLimit(times, share, times.predict(sites, dict.fromkeys(gains, 1))))


def test_greedy_leaves_the_lower_blocks_although_they_gain_more():
    # Of 8 seconds, 0.75 are 6: blocks 2 and 3, at all the rank that they can hold.
    assert ladder(0.0, 1.0).solve(GREEDY).ranks == {"0.q": 1, "1.q": 1, "2.q": 1, "3.q": 1}
    assert ladder(0.0, 0.75).solve(GREEDY).ranks == {"0.q": 0, "1.q": 0, "2.q": 2, "3.q": 2}
    assert ladder(0.0, 0.75).solve(Uniform(None)).ranks == {"0.q": 0, "1.q": 0, "2.q": 2, "3.q": 2}
    assert ladder(0.0, 0.625).solve(GREEDY).ranks == {"0.q": 0, "1.q": 0, "2.q": 0, "3.q": 2}
    with pytest.raises(SettingError, match=r"budget\.step_time=0\.6: the fastest.* 0\.625 of"):
        ladder(0.0, 0.6).solve(GREEDY)


def test_where_adapters_take_the_time_the_sites_of_least_gain_go():
    # Of 4 + 4 + 4 * 10 seconds, 0.6 are 28.8: two adapters anywhere; the lowest two gain most.
    assert ladder(10.0, 0.6).solve(GREEDY).ranks == {"0.q": 2, "1.q": 2, "2.q": 0, "3.q": 0}


def test_with_kept_outputs_a_step_is_shorter_by_what_lies_below_its_sources():
    asked = ladder(0.0, 0.5)
    with pytest.raises(SettingError):
        asked.solve(GREEDY)
    kept = replace(asked, limit=replace(asked.limit, cached=True))
    assert kept.solve(GREEDY).ranks == {"0.q": 0, "1.q": 0, "2.q": 2, "3.q": 2}  # 2 forward and 2 back


def test_what_is_refused_without_a_limit_is_refused_with_one():
    asked = ladder(0.0, 0.75)
    with pytest.raises(SettingError, match=r"budget=3: rank 1 at all 4 sites costs 4"):
        replace(asked, problem=replace(asked.problem, budget=3)).solve(Uniform(None))


def test_a_least_rank_everywhere_leaves_no_site_out():
    asked = ladder(0.0, 0.75)
    with pytest.raises(SettingError, match=r"budget\.step_time=0\.75: the fastest.* 1\.000 of"):
        asked.solve(Greedy(1, 5, "flat", "none", None, exact=False, seed=0))


def test_all_allocators_with_a_config_are_among_those_above():
    assert {"top_combined", "uniform", "greedy", "knapsack", "proportional", "fixed"} <= ALLOCATORS.keys()
