"""The budget contract: a new budget joins it by one line of ``BUDGETS`` and its file in ``conf/budget``."""

import math
from dataclasses import replace
from fractions import Fraction as Exact
from functools import cache

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from heterolora.budget import Fraction, Params, Share, SiteCount, UniformRank
from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.sites import Port, Site
from heterolora.space import SearchSpace, Space, Survey, survey
from tests.architectures import ARCHITECTURES, make_backbone
from tests.conftest import ROOT

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)

FILES = sorted((ROOT / "conf" / "budget").glob("*.yaml"))


def times(modules: int, **widths: int) -> dict[str, int]:
    """in + out of a role's linear layers, summed over so many modules."""
    return {role: modules * width for role, width in widths.items()}


# By hand from tests/architectures.py: hidden size 32, inner size 48, four heads, three layers.
SQUARE = {"q": 64, "k": 64, "v": 64, "o": 64, "up": 80, "down": 80}
# 4 heads of width 12, 2 for keys and values
GROUPED = times(3, q=32 + 48, k=32 + 24, v=32 + 24, o=48 + 32, gate=80, up=80, down=80)
HALVED = times(3, q=64, k=32 + 16, v=32 + 16, o=64, gate=80, up=80, down=80)  # 2 of 4 heads for keys and values
FUSED = times(3, qkv=32 + 96, o=64, up=80, down=80)
WIDE = times(3, o=64, up=32 + 128, down=128 + 32)  # an inner size of four times the hidden size
# three encoder blocks, two decoder blocks, 4 heads of width 12
T5 = times(5, q=80, k=80, v=80, o=80, up=80, down=80) | times(2, cross_q=80, cross_k=80, cross_v=80, cross_o=80)
WIDTHS = {
    **dict.fromkeys(
        ("bert", "roberta", "electra", "deberta_v2", "distilbert", "opt_pre", "opt_post", "phi", "gptj"),
        times(3, **SQUARE),
    ),
    "albert": times(1, **SQUARE),  # all layers share their modules
    "albert_groups": times(2 * 2, **SQUARE),
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text"), GROUPED),
    "qwen2": HALVED,
    "olmo2": HALVED,
    "phi3": times(3, qkv=32 + 32 + 16 + 16, o=64, gate_up=32 + 96, down=80),
    **dict.fromkeys(("gpt2", "gpt_neox", "gpt_neox_sequential"), FUSED),
    **dict.fromkeys(("bloom", "bloom_normed", "falcon_sequential"), times(3, qkv=32 + 96) | WIDE),
    "falcon": times(3, qkv=32 + 32 + 8 + 8) | WIDE,  # one head for keys and values
    "falcon_new": times(3, qkv=32 + 32 + 16 + 16) | WIDE,
    "t5": T5,
    "t5_gated": T5 | times(5, gate=80),
}
BUDGETS = {  # name: (budget, what it resolves to, given the widths of the roles; a fused qkv is both q and v)
    "uniform": (
        UniformRank(3, ["q", "v"], None),
        lambda widths: 3 * sum(widths.get(role, 0) for role in ("q", "v", "qkv")),
    ),
    "uniform everywhere": (UniformRank(2, None, None), lambda widths: 2 * sum(widths.values())),
    "uniform, a role twice": (UniformRank(1, ["o", "o"], None), lambda widths: widths["o"]),
    "params": (Params(1234, None), lambda widths: 1234),
}


@cache
def surveyed(architecture: str) -> Survey:
    return survey(make_backbone(architecture))


def space(architecture: str, *include) -> Space:
    rules = SearchSpace(include or ("lora", "shortcut"), [], None, [1, 2], False, "kind")
    return rules.resolve(surveyed(architecture))


def counted(lora: int, shortcut: int) -> Space:
    """A space of so many sites of each kind."""
    sites = [Site(f"l{n}", "lora", "q", 0, Port("m", "in"), Port("m", "out"), 4, 4) for n in range(lora)]
    sites += [Site(f"s{n}", "shortcut", "x", 0, Port("m", "in"), Port("m", "out"), 4, 4) for n in range(shortcut)]
    return Space(tuple(sites), {site.name: site.kind for site in sites}, backbone(0), False)


def backbone(parameters: int) -> Survey:
    """A backbone of so many parameters, of which nothing else is known."""
    return Survey("none", (), {}, {"": 4}, parameters, None)


# -- the contract ------------------------------------------------------------------------------------------------------


def test_the_table_of_widths_is_complete():
    assert WIDTHS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(("budget", "expected"), BUDGETS.values(), ids=BUDGETS.keys())
def test_a_budget_is_what_the_closed_form_says(architecture, budget, expected):
    assert budget.resolve(space(architecture)) == expected(WIDTHS[architecture])


@pytest.mark.parametrize("budget", [budget for budget, _ in BUDGETS.values()], ids=BUDGETS.keys())
def test_a_budget_depends_on_the_backbone_and_not_on_the_search_space(architecture, budget):
    spaces = [space(architecture, *include) for include in (["shortcut"], ["k"], ["lora", "shortcut"])]
    assert len({budget.resolve(space) for space in spaces}) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_resolves_to_something_on_every_architecture(architecture, path):
    resolved = build(yaml.safe_load(path.read_text()), "budget").resolve(space(architecture))
    assert (resolved.total if isinstance(resolved, SiteCount) else resolved) >= 1


def test_there_are_options():
    assert {"qv_r8", "qv_r2", "all_r2", "params", "share", "fraction"} <= {path.stem for path in FILES}


# -- uniform rank ------------------------------------------------------------------------------------------------------


@cache
def minilm() -> Space:
    """The shapes of MiniLM-L6, without memory."""
    config = transformers.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, vocab_size=8
    )
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return SearchSpace(["lora"], [], None, [1, 2], False, "kind").resolve(survey(model))


@pytest.mark.parametrize(
    ("option", "formula", "number"),
    [
        ("qv_r8", 8 * 6 * 2 * (384 + 384), 73_728),
        ("qv_r2", 2 * 6 * 2 * (384 + 384), 18_432),
        ("all_r2", 2 * 6 * (4 * (384 + 384) + 2 * (384 + 1536)), 82_944),
        ("params", 73_728, 73_728),  # its default is qv_r8 of the default model, as its comment says
    ],
)
def test_budgets_of_the_default_model(option, formula, number):
    node = yaml.safe_load((ROOT / "conf" / "budget" / f"{option}.yaml").read_text())
    assert build(node, "budget").resolve(minilm()) == formula == number


def test_an_unknown_role_is_refused_with_those_there_are():
    with pytest.raises(
        SettingError, match=r"\['qkv'\] not in this backbone, which has \['q', 'k', 'v', 'o', 'up'"
    ) as e:
        UniformRank(2, ["q", "qkv"], None).resolve(space("bert"))
    assert e.value.setting == "budget.roles"


def test_no_roles_at_all_are_refused_in_words():
    with pytest.raises(SettingError, match=r"budget\.roles=\[\].*'q'") as caught:
        UniformRank(2, [], None).resolve(space("bert"))
    assert "True" not in str(caught.value)


def test_roles_are_a_list():
    # "qv" is a sequence of two roles to Python, not to a user.
    with pytest.raises(SettingError, match=r"budget\.roles=qv"):
        build({"_target_": "heterolora.budget.UniformRank", "rank": 8, "roles": "qv", "step_time": None}, "budget")


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["q"], 3 * 96),  # phi3: qkv, once a layer
        (["q", "v"], 3 * 96),
        (["qkv", "k"], 3 * 96),
        (["gate"], 3 * 128),
        (["up", "o"], 3 * (128 + 64)),
    ],
)
def test_a_fused_layer_stands_for_its_roles_and_counts_once(roles, expected):
    assert UniformRank(1, roles, None).resolve(space("phi3")) == expected


def test_the_roles_that_a_fused_layer_stands_for_are_named_too():
    with pytest.raises(
        SettingError, match=r"\['query'\] not in .*\['qkv', 'q', 'k', 'v', 'o', 'gate_up', 'gate', 'up'"
    ):
        UniformRank(1, ["query"], None).resolve(space("phi3"))


# -- a share of the parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "parameters", "expected"),
    [
        (0.005, 22_713_216, 113_566),  # 113,566.08
        (0.29, 100, 29),  # as floats, 0.29 * 100 is 28.999999999999996
        (1e-7, 30_000_000, 3),  # written with an exponent
        (1.0, 7, 7),
        (0.5, 3, 1),
    ],
)
def test_a_share_of_the_parameters_is_rounded_down_exactly(value, parameters, expected):
    assert Share(value, None).resolve(replace(counted(1, 1), survey=backbone(parameters))) == expected


def test_a_share_counts_the_backbone_without_its_head():
    body = sum(parameter.numel() for parameter in make_backbone("bert").bert.parameters())
    assert Share(1.0, None).resolve(space("bert")) == body


def test_a_share_that_buys_nothing_is_refused():
    with pytest.raises(SettingError, match=r"budget\.value=0\.005.*less than 1 of the backbone's 199 parameters"):
        Share(0.005, None).resolve(replace(counted(1, 1), survey=backbone(199)))
    assert Share(0.005, None).resolve(replace(counted(1, 1), survey=backbone(200))) == 1


# -- a share of the sites ----------------------------------------------------------------------------------------------


def test_the_papers_rule_on_a_real_space():
    # 3 layers: 18 LoRA sites, 4 * 3 - 1 = 11 shortcuts; floor(4.5) and round(2.75).
    count = Fraction(0.25, 8, None).resolve(space("bert"))
    assert count == SiteCount({"lora": 4, "shortcut": 3}, 8)
    assert count.total == 7


@pytest.mark.parametrize(
    ("p", "sites", "expected"),
    [
        (0.25, (48, 95), (12, 24)),  # OPT-350M, q and v (REFERENCE.md 1.6)
        (0.33, (64, 127), (21, 42)),  # Llama, 32 layers
        (0.25, (7, 10), (1, 2)),  # round(2.5): half to even, down
        (0.25, (7, 14), (1, 4)),  # round(3.5): half to even, up
        (0.5, (3, 1), (1, 0)),
        (1.0, (5, 3), (5, 3)),
    ],
)
def test_lora_sites_are_rounded_down_and_shortcuts_to_the_nearest_even(p, sites, expected):
    assert Fraction(p, 4, None).resolve(counted(*sites)) == SiteCount(
        dict(zip(("lora", "shortcut"), expected, strict=True)), 4
    )


@PROPERTY
@given(sixteenths=st.integers(1, 16), lora=st.integers(1, 300), shortcut=st.integers(1, 300))
def test_counts_equal_exact_arithmetic(sixteenths, lora, shortcut):
    p = Exact(sixteenths, 16)  # a float holds it exactly
    expected = {"lora": math.floor(p * lora), "shortcut": round(p * shortcut)}
    if any(expected.values()):
        assert Fraction(float(p), 1, None).resolve(counted(lora, shortcut)).counts == expected
    else:
        with pytest.raises(SettingError, match="larger share"):
            Fraction(float(p), 1, None).resolve(counted(lora, shortcut))


def test_a_share_is_the_number_that_the_user_wrote():
    # As floats, 0.7 * 180 is 125.99999999999999.
    assert Fraction(0.7, 8, None).resolve(counted(180, 1)).counts["lora"] == 126


def test_kinds_decide_how_a_group_is_rounded_whatever_its_label():
    # Seven of each kind, in groups of five and two: floor(2.5) and floor(1), round(2.5) and round(1).
    found = counted(7, 7)
    labels = {site.name: f"{site.name[0]}{'a' if int(site.name[1:]) < 5 else 'b'}" for site in found.sites}
    counts = Fraction(0.5, 2, None).resolve(replace(found, groups=labels)).counts
    assert counts == {"la": 2, "lb": 1, "sa": 2, "sb": 1}
    labels = dict.fromkeys(labels, "lora")
    assert Fraction(0.5, 2, None).resolve(replace(counted(5, 7), groups=labels)).counts == {
        "lora": 2 + 4
    }  # floor(2.5) and round(3.5)


def test_a_space_of_one_kind_has_one_count():
    assert Fraction(0.5, 2, None).resolve(space("bert", "shortcut")).counts == {"shortcut": 6}  # round(5.5)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(SettingError, match=r"budget\.p=0\.1.*'lora': 4.*larger share"):
        Fraction(0.1, 8, None).resolve(counted(4, 4))


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: UniformRank(0, None, None), "rank"),
        (lambda: Params(0, None), "value"),
        (lambda: Params(-5, None), "value"),
        (lambda: Share(0.0, None), "value"),
        (lambda: Share(1.01, None), "value"),
        (lambda: Share(math.nan, None), "value"),
        (lambda: Fraction(0.25, 0, None), "rank"),
        (lambda: Fraction(0.0, 8, None), "p"),
        (lambda: Fraction(1.01, 8, None), "p"),
        (lambda: Fraction(math.nan, 8, None), "p"),
    ],
)
def test_impossible_arguments_are_refused_by_name(make, setting):
    with pytest.raises(SettingError) as caught:
        make()
    assert caught.value.setting == setting


# -- time as a second budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_on_the_step_is_a_share(share):
    for make in (lambda: UniformRank(1, None, share), lambda: Params(1, share), lambda: Share(0.1, share)):
        with pytest.raises(SettingError, match="a share above 0") as caught:
            make()
        assert caught.value.setting == "step_time"
    with pytest.raises(SettingError, match="counts sites: null here"):
        Fraction(0.5, 2, 0.7)


def test_the_reference_is_a_uniform_allocation_that_the_budget_pays_for(architecture):
    found = space(architecture)
    lora = {site.name: site for site in found.survey.lora_sites}
    for budget in (UniformRank(2, ["q", "v"], 0.5), UniformRank(2, None, 0.5), Params(3 * sum_of(lora), 0.5)):
        ranks = budget.reference(found.survey)
        assert len(set(ranks.values())) == 1
        assert sum(rank * (lora[name].in_features + lora[name].out_features) for name, rank in ranks.items()) == (
            budget.resolve(found)
        )
    assert Params(3 * sum_of(lora) - 1, None).reference(found.survey) == dict.fromkeys(lora, 2)
    assert Params(1, None).reference(found.survey) == dict.fromkeys(lora, 1)
    widest = min(min(site.in_features, site.out_features) for site in lora.values())
    assert set(Params(10**9, None).reference(found.survey).values()) == {widest}
    assert Share(0.2, None).reference(found.survey) == Params(Share(0.2, None).resolve(found), None).reference(
        found.survey
    )


def sum_of(sites) -> int:
    return sum(site.in_features + site.out_features for site in sites.values())
