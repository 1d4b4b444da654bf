"""Ten thousand sites: everything from the survey to the hooks takes a time in proportion to them."""

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification

from heterolora.adapters.lora import LoRA
from heterolora.allocation import read_ranks
from heterolora.allocators.base import tie_order
from heterolora.allocators.greedy import Greedy
from heterolora.allocators.knapsack import Knapsack
from heterolora.allocators.proportional import Proportional
from heterolora.allocators.top import Top
from heterolora.allocators.uniform import Uniform
from heterolora.budget import SiteCount
from heterolora.errors import SettingError
from heterolora.layouts import LAYOUTS, Stack
from heterolora.model import AdaptedModel
from heterolora.seeds import derive
from heterolora.sites import Site, Tap
from heterolora.space import SearchSpace, survey
from tests.surroundings import ALONE
from tests.test_allocators import Problem, problems

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LORA = LoRA("constant", 2.0, 0.0)


def backbone(layers: int):
    """A model of no width to speak of, without weights."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "vocab_size": 9}
    config = AutoConfig.for_model("bert", num_hidden_layers=layers, max_position_embeddings=8, **sizes)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def parts(layers: int) -> dict[str, Callable[[], object]]:
    """Everything that is done to all sites, in its order, and ways to write rules about them."""
    model, held = backbone(layers), {}
    deep = list(range(layers))
    limits = {str(layer): {"max_share": 0.9} for layer in deep}

    def keep(name: str, value: object) -> None:
        held[name] = value

    def space(include, **options):
        settings = {"layers": None, "group_by": "layer"} | options
        return SearchSpace(include, [], settings["layers"], [1, 2], False, settings["group_by"]).resolve(held["found"])

    def prepare() -> None:
        keep("space", space(["lora", "shortcut"]))
        sites = held["space"].sites
        draw = Random(0)
        keep("scores", {site.name: draw.random() for site in sites})
        keep("cost", LORA.cost(sites))

    def allocate(allocator):
        groups = held["space"].groups
        gains = allocator.gain_rule.gains(held["scores"], held["space"].sites, groups) if allocator.gain_rule else {}
        gains = gains or {name: [0.0] * 4 for name in groups}
        budget = 2 * sum(held["cost"].units.values())
        return allocator.allocate(gains, held["cost"], budget, groups)

    return {
        "survey": lambda: keep("found", survey(model)),
        "rules": lambda: (space([{"layer": deep, "kind": "lora"}]), space(["q"], layers=deep)),
        "space": prepare,
        "attach": lambda: keep("model", AdaptedModel(model, held["space"], LORA, [])),
        "gains and greedy": lambda: keep("ranks", allocate(Greedy(0, 4, "harmonic", "none", None, False, 0)).ranks),
        "greedy, exact": lambda: allocate(Greedy(0, 4, "harmonic", "none", None, True, 0)),
        "limits of each layer": lambda: allocate(Greedy(0, 4, "harmonic", "none", limits, False, 0)),
        "uniform": lambda: allocate(Uniform(None)),
        "top": lambda: (allocate(Top("combined", 4, "none", 0)), allocate(Top("separate", 4, "none", 0))),
        "proportional": lambda: allocate(Proportional(0, 4, "none", None, True, 0)),
        "knapsack": lambda: allocate(Knapsack(0, 4, "harmonic", "none", None, False, 0)),
        "enable": lambda: held["model"].enable(held["ranks"], 0),
        "switch": lambda: held["model"].switch_off(held["model"].held[:3]),
        "bookkeeping": lambda: (held["model"].ranks, held["model"].held_parameters, held["model"].active_parameters),
        "state": lambda: held["model"].trained_state_dict(),
        "lookup": lambda: [held["space"][name] for name in held["ranks"]],
    }


def calls(act: Callable[[], object]) -> int:
    """Functions called, those written in C and each step of a generator among them: a time that no machine changes."""
    count = 0

    def tell(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tell)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.medium
def test_four_times_the_sites_call_four_times_the_functions():
    small = {name: calls(act) for name, act in parts(20).items()}
    large = {name: calls(act) for name, act in parts(80).items()}
    growth = {name: round(large[name] / small[name], 2) for name in small}
    assert {name: ratio for name, ratio in growth.items() if ratio > 4.8} == {}


@pytest.mark.medium
def test_what_c_does_to_10000_sites_takes_no_quadratic_time_either():
    """Generous: a scan for each site takes seconds."""
    seconds = {}
    for name, act in parts(770).items():
        start = time.process_time()
        act()
        seconds[name] = round(time.process_time() - start, 2)
    target = ("survey", "space", "attach", "gains and greedy", "enable")
    assert sum(seconds[name] for name in target) < 10, seconds  # 2 s on an idle machine
    assert max(seconds.values()) < 10, seconds


@pytest.mark.medium
def test_a_file_of_many_ranks_is_read_quickly(tmp_path):
    ranks = {f"{number}.q": 1 for number in range(30_000)}
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(ranks))
    start = time.process_time()
    assert read_ranks(path) == ranks
    assert time.process_time() - start < 2


# -- and nothing else has changed -----------------------------------------------------------------------------------


def one_by_one(problem: Problem, names, budget: int, rank: int) -> list[str]:
    """The best sites, priced anew after each."""
    taken: list[str] = []
    for name in sorted(names, key=lambda name: (-sum(problem.gains[name][:rank]), tie_order(7, name))):
        if problem.cost(dict.fromkeys([*taken, name], rank)) > budget:
            break
        taken.append(name)
    return taken


@PROPERTY
@given(problem=problems(least=0, sites=9))
def test_top_combined_is_what_taking_one_site_after_the_other_gives(problem):
    expected = one_by_one(problem, problem.gains, problem.budget, 2)
    assert set(problem.solve(Top("combined", 2, "none", 7)).active) == set(expected)


@PROPERTY
@given(problem=problems(least=0, sites=9))
def test_top_separate_is_what_taking_one_site_after_the_other_gives_in_each_family(problem):
    expected: set[str] = set()
    for label in set(problem.groups.values()):
        names = [name for name in problem.gains if problem.groups[name] == label]
        whole = problem.cost(dict.fromkeys(problem.gains, 2))
        share = math.floor(Fraction(problem.cost(dict.fromkeys(names, 2)), whole) * problem.budget)
        expected |= set(one_by_one(problem, names, share, 2))
    assert set(problem.solve(Top("separate", 2, "none", 7)).active) == expected


@PROPERTY
@given(problem=problems(sites=9), counts=st.fixed_dictionaries(dict.fromkeys(["lora", "shortcut"], st.integers(0, 4))))
def test_top_counts_the_best_of_each_family(problem, counts):
    count = SiteCount(counts, 2)
    chosen = Top("separate", 2, "none", 7).allocate(problem.gains, problem.cost, count, problem.groups).active
    for label, number in counts.items():
        names = [name for name in problem.gains if problem.groups[name] == label]
        assert set(one_by_one(problem, names, 10**9, 2)[:number]) == {n for n in chosen if problem.groups[n] == label}


@PROPERTY
@given(blocks=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=8))
def test_a_shared_block_is_told_apart_by_how_often_it_has_run(blocks):
    stack = Stack("root", tuple(blocks), LAYOUTS["bert"][0], "")
    for layer, block in enumerate(blocks):
        expected = blocks[:layer].count(block) if blocks.count(block) > 1 else None
        assert stack.read(Tap(2 * layer)).call == expected
        assert all(point.call == expected for point in stack.write(Tap(2 * layer + 2), 1).points)


VALUES = {"kind": ["lora", "shortcut"], "role": ["q", "o", "residual_attn", "shortcut_ffn"], "span": [1, 2, None]}
RULES = st.fixed_dictionaries(
    {},
    optional={key: st.sampled_from(some) | st.lists(st.sampled_from(some), max_size=3) for key, some in VALUES.items()}
    | {"layer": st.integers(-5, 4) | st.lists(st.integers(-5, 4), max_size=4)},
)


def fits(site: Site, rule, depth: int) -> bool:
    """A rule word for word."""
    for key, wanted in rule.items():
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if key == "layer" and not any(site.layer == value % depth for value in wanted if -depth <= value < depth):
            return False
        if key != "layer" and getattr(site, key) not in wanted:
            return False
    return True


@PROPERTY
@given(rule=RULES)
def test_a_rule_selects_the_sites_that_it_describes_and_each_value_of_its_lists_must_match_one(rule):
    depth = 4
    found = survey(backbone(depth))
    space = SearchSpace([rule], [], None, [1, 2], False, "kind")
    every = [*found.lora_sites, *found.shortcut_sites([1, 2])]
    lists = {key: values for key, values in rule.items() if isinstance(values, list)}
    narrowed = [{**rule, key: [value]} for key, values in lists.items() for value in values] or [rule]
    lost = [part for part in narrowed if not any(fits(site, part, depth) for site in every)]
    if lost:
        with pytest.raises(SettingError) as error:
            space.resolve(found)
        assert error.value.given == lost[0]
    else:
        chosen = {site.name for site in space.resolve(found).sites}
        assert chosen == {site.name for site in every if fits(site, rule, depth)}


def test_a_value_that_no_site_can_have_matches_none():
    with pytest.raises(SettingError, match="matches no site"):
        SearchSpace([{"role": [["q"]]}], [], None, [1], False, "kind").resolve(survey(backbone(1)))


@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 40])
def test_each_row_of_an_adapter_is_the_next_draw_of_its_site(width):
    site = Site("3.q", "lora", "q", 3, Tap(0), Tap(1), width, 5)
    generator = torch.Generator().manual_seed(derive(11, "adapter", "3.q"))
    bound = 1 / math.sqrt(width)
    rows = [torch.empty(width).uniform_(-bound, bound, generator=generator) for _ in range(5)]
    assert torch.equal(LORA.build(site, 5, 11, ALONE).A, torch.stack(rows))
    assert torch.equal(LORA.build(site, 2, 11, ALONE).A, torch.stack(rows[:2]))


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_afterwards_as_before_even_after_an_error(collecting):
    model = backbone(1)
    adapted = AdaptedModel(model, SearchSpace(["lora"], [], None, [1], False, "kind").resolve(survey(model)), LORA)
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        adapted.enable({"0.q": 1}, 0)
        assert gc.isenabled() == collecting
        with pytest.raises(KeyError):
            adapted.enable({"9.q": 1}, 0)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if was else gc.disable)()
