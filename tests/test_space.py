"""Which sites a search space selects; an option of ``conf/search_space`` joins the tests by one line of ``SELECTS``."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.layouts import LAYOUTS, Layout
from heterolora.sites import Port, Site, Tap
from heterolora.space import SearchSpace, Space, Survey, features, survey
from tests.architectures import ARCHITECTURES, make_backbone
from tests.conftest import ROOT

FILES = sorted((ROOT / "conf" / "search_space").glob("*.yaml"))
LAYERS = 3

SELECTS = {  # option: what its name says
    "full": lambda site: True,
    "lora_qv": lambda site: site.role in ("q", "v"),
    "lora_attention": lambda site: site.role in ("q", "k", "v", "o"),
    "lora_all": lambda site: site.kind == "lora",
    "shortcuts": lambda site: site.kind == "shortcut",
    "lora_qv_shortcuts": lambda site: site.kind == "shortcut" or site.role in ("q", "v"),
}


@cache
def backbone(architecture: str):
    return make_backbone(architecture)


@cache
def surveyed(architecture: str) -> Survey:
    return survey(backbone(architecture))


def select(found: Survey, include=("lora", "shortcut"), exclude=(), layers=None, spans=(1, 2), renorm=False) -> Space:
    return SearchSpace(list(include), list(exclude), layers, list(spans), renorm).resolve(found)


def names(space: Space) -> list[str]:
    return [site.name for site in space.sites]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear layer of the repeated blocks, found without the package."""
    kinds = (nn.Linear, Conv1D)
    found = {path: module for path, module in model.base_model.named_modules() if isinstance(module, kinds)}
    prefix = model.base_model_prefix
    numbered = {path: module for path, module in found.items() if any(part.isdigit() for part in path.split("."))}
    return {f"{prefix}.{path}": module for path, module in numbered.items()}


def tiny(model_type: str, **options):
    """A model of a type that the layout table does not list, without memory."""
    config = transformers.AutoConfig.for_model(
        model_type, **options, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(config)


def distilbert():
    return tiny("distilbert", dim=32, hidden_dim=48, n_layers=2, n_heads=4)


def gpt2():
    return tiny("gpt2", n_embd=32, n_layer=2, n_head=4)


# -- options of the config ---------------------------------------------------------------------------------------------


def test_every_option_has_a_line_in_the_table():
    assert {path.stem for path in FILES} == SELECTS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_selects_what_its_name_says(architecture, path):
    everything = [*surveyed(architecture).lora_sites, *surveyed(architecture).shortcut_sites([1, 2])]
    space = build(yaml.safe_load(path.read_text()), "search_space").resolve(surveyed(architecture))
    assert set(names(space)) == {site.name for site in everything if SELECTS[path.stem](site)}
    assert not space.renorm


# -- sites -------------------------------------------------------------------------------------------------------------


def test_lora_sites_are_the_linear_layers_of_the_blocks(architecture):
    expected = {
        path: (module.in_features, module.out_features) for path, module in linears(backbone(architecture)).items()
    }
    sites = surveyed(architecture).lora_sites
    assert {site.source.module: (site.in_features, site.out_features) for site in sites} == expected
    assert len(sites) == len(expected)
    for site in sites:
        assert (site.source, site.sink) == (Port(site.source.module, "in"), Port(site.source.module, "out"))
        assert (site.name, site.span) == (f"{site.layer}.{site.role}", None)
        assert str(site.layer) in site.source.module.split(".")


def test_shortcuts_are_those_of_the_paper(architecture):
    expected = {}
    for layer in range(LAYERS):  # DESIGN.md section 3
        expected[f"{layer}.residual_attn"] = (2 * layer, 2 * layer + 1)
        expected[f"{layer}.residual_ffn"] = (2 * layer + 1, 2 * layer + 2)
        expected[f"{layer}.shortcut_attn"] = (2 * layer, 2 * layer + 2)
        if layer:
            expected[f"{layer}.shortcut_ffn"] = (2 * layer - 1, 2 * layer + 1)
    sites = select(surveyed(architecture), ["shortcut"]).sites
    assert {site.name: (site.source.index, site.sink.index) for site in sites} == expected
    assert len(sites) == 4 * LAYERS - 1
    for site in sites:
        assert (site.in_features, site.out_features) == (32, 32)
        assert site.name == f"{site.layer}.{site.role}"


@pytest.mark.parametrize("span", range(1, 2 * LAYERS + 1))
def test_shortcuts_of_one_span_start_at_every_tap_that_leaves_room(span):
    sites = select(surveyed("llama"), ["shortcut"], spans=[span]).sites
    assert {site.source.index for site in sites} == set(range(2 * LAYERS + 1 - span))
    for site in sites:
        start, end = site.source.index, site.sink.index
        assert site.span == end - start == span
        assert site.layer == (end - 1) // 2
        stem, side = "residual" if span == 1 else "shortcut", "ffn" if start % 2 else "attn"
        assert site.role == f"{stem}_{side}"
        assert site.name == f"{site.layer}.{site.role}" + (f"_s{span}" if span > 2 else "")


def test_names_are_unique(architecture):
    found = names(select(surveyed(architecture), spans=range(1, 2 * LAYERS + 1)))
    assert len(found) == len(set(found))
    assert len(found) > 18 + 11


def test_sites_come_layer_by_layer_whatever_the_rules_order():
    space = select(surveyed("opt_pre"), ["shortcut", "v", "q"], spans=[2, 1])
    layers = [site.layer for site in space.sites]
    assert layers == sorted(layers)
    assert names(space) == names(select(surveyed("opt_pre"), ["q", "lora", "shortcut"], ["k", "o", "up", "down"]))


def test_a_site_is_found_by_its_name():
    space = select(surveyed("bert"))
    assert all(space[site.name] is site for site in space.sites)
    with pytest.raises(KeyError, match=r"9\.q"):
        space["9.q"]


def test_groups_are_the_kinds():
    space = select(surveyed("bert"), ["q", "shortcut"])
    assert space.groups == {site.name: site.kind for site in space.sites}
    assert set(space.groups.values()) == {"lora", "shortcut"}


def test_sites_as_plain_values():
    space = select(surveyed("bert"))
    assert json.loads(json.dumps(space["1.shortcut_ffn"].as_dict())) == {
        "name": "1.shortcut_ffn",
        "kind": "shortcut",
        "role": "shortcut_ffn",
        "layer": 1,
        "source": "t1",
        "sink": "t3",
        "span": 2,
        "in_features": 32,
        "out_features": 32,
    }
    module = "bert.encoder.layer.0.attention.self.query"
    values = space["0.q"].as_dict()
    assert (values["source"], values["sink"], values["span"]) == (f"{module}.in", f"{module}.out", None)


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("q", ["0.q", "1.q", "2.q"]),
        ("shortcut_ffn", ["1.shortcut_ffn", "2.shortcut_ffn"]),
        ({"role": "q"}, ["0.q", "1.q", "2.q"]),
        ({"role": ["q", "v"], "layer": 1}, ["1.q", "1.v"]),
        ({"role": ("q", "v"), "layer": -1}, ["2.q", "2.v"]),
        ({"role": "q", "layer": [0, -1]}, ["0.q", "2.q"]),
        ({"kind": "shortcut", "layer": 0}, ["0.residual_attn", "0.residual_ffn", "0.shortcut_attn"]),
        ({"span": 1, "layer": -3}, ["0.residual_attn", "0.residual_ffn"]),
        ({"span": [2], "role": "shortcut_attn", "layer": [1]}, ["1.shortcut_attn"]),
    ],
)
def test_a_rule_selects_and_excludes_the_same_sites(rule, expected):
    everything = names(select(surveyed("bert")))
    assert sorted(names(select(surveyed("bert"), [rule]))) == expected
    assert names(select(surveyed("bert"), exclude=[rule])) == [name for name in everything if name not in expected]


def test_a_role_covers_all_longer_spans():
    found = names(select(surveyed("bert"), ["shortcut_attn"], layers=[2], spans=[1, 2, 4, 6]))
    assert sorted(found) == ["2.shortcut_attn", "2.shortcut_attn_s4", "2.shortcut_attn_s6"]


def test_layers_restrict_everything_and_may_count_from_the_end():
    expected = [site.name for site in select(surveyed("llama")).sites if site.layer in (0, 2)]
    assert names(select(surveyed("llama"), layers=[0, -1])) == expected
    assert names(select(surveyed("llama"), layers=[2, 0, -3])) == expected


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1, 99])
def test_a_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(SettingError, match=r"search_space\.layers.*layers 0 to 2 exist"):
        select(surveyed("bert"), layers=[0, layer])


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1, -99])
@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_a_layer_that_does_not_exist_is_refused_in_a_rule(setting, layer):
    rules = {"include": ["lora"], "exclude": []} | {setting: [{"role": "q", "layer": layer}]}
    with pytest.raises(SettingError) as caught:
        select(surveyed("bert"), **rules)
    assert caught.value.setting == f"search_space.{setting}"


def test_no_layers_at_all_are_refused_as_such():
    with pytest.raises(SettingError, match=r"search_space\.layers"):
        select(surveyed("bert"), layers=[])


@pytest.mark.parametrize("spans", [[0], [-1], [1, 2 * LAYERS + 1]])
def test_a_span_that_does_not_exist_is_refused(spans):
    with pytest.raises(SettingError, match=r"search_space\.spans.*spans from 1 to 6 exist"):
        select(surveyed("bert"), ["lora"], spans=spans)


@pytest.mark.parametrize(
    "rule", ["query", "", {"role": "gate"}, {"kind": "q"}, {"kind": "lora", "span": 1}, {"span": 4}]
)
@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_a_rule_that_matches_nothing_is_refused_with_what_there_is(setting, rule):
    rules = {"include": ["lora"], "exclude": []} | {setting: [rule]}
    with pytest.raises(SettingError) as caught:
        select(surveyed("bert"), **rules)
    assert (caught.value.setting, caught.value.given) == (f"search_space.{setting}", rule)
    assert "lora: ['q', 'k', 'v', 'o', 'up', 'down']" in caught.value.possible
    assert "'residual_attn', 'residual_ffn', 'shortcut_attn', 'shortcut_ffn'" in caught.value.possible
    assert "layers [0, 1, 2], spans [1, 2]" in caught.value.possible


@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_an_unknown_key_of_a_rule_is_refused_where_it_stands(setting):
    rules = {"include": ["lora"], "exclude": []} | {setting: [{"roles": "q"}]}
    with pytest.raises(SettingError, match=r"\['roles'\], possible: \['kind', 'role', 'layer', 'span'\]") as caught:
        select(surveyed("bert"), **rules)
    assert caught.value.setting == f"search_space.{setting}"


@pytest.mark.parametrize("rules", [{"include": []}, {"include": ["lora"], "exclude": ["lora"]}])
def test_an_empty_space_is_refused(rules):
    with pytest.raises(SettingError, match=r"search_space\.include.*no site"):
        select(surveyed("bert"), **rules)


# -- renorm ------------------------------------------------------------------------------------------------------------


def names_all_norms(layout: Layout) -> bool:
    return layout.middle_norm is not None and layout.out_norm is not None


def test_renorm_needs_a_norm_for_every_longer_shortcut(architecture):
    found = surveyed(architecture)
    if names_all_norms(found.layout.layout):
        assert select(found, renorm=True).renorm
    else:
        with pytest.raises(SettingError, match=r"search_space\.renorm.*use false"):
            select(found, renorm=True)
    assert select(found, renorm=True, spans=[1]).renorm  # only longer adds are followed by a norm
    assert select(found, ["lora"], renorm=True).renorm


def test_renorm_is_met_with_both_answers():
    assert {names_all_norms(surveyed(name).layout.layout) for name in ARCHITECTURES} == {True, False}


# -- backbones of other types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [distilbert, gpt2])
def test_an_unlisted_type_gets_lora_sites_on_all_linear_layers_of_its_blocks(make):
    model = make()
    sites = select(survey(model), ["lora"]).sites
    # A weight of Conv1D is [in, out], one of Linear [out, in].
    shapes = {
        path: tuple(module.weight.shape) if isinstance(module, Conv1D) else tuple(reversed(module.weight.shape))
        for path, module in linears(model).items()
    }
    assert {site.source.module: (site.in_features, site.out_features) for site in sites} == shapes
    assert len(sites) == len(shapes)
    assert {site.layer for site in sites} == {0, 1}
    assert {site.kind for site in sites} == {"lora"}


@pytest.mark.parametrize("include", [["shortcut"], ["lora", "shortcut"], ["residual_attn"], [{"span": 2}]])
def test_an_unlisted_type_refuses_shortcuts_and_says_what_would_help(include):
    with pytest.raises(SettingError, match=r"'distilbert' has no layout entry.*give model\.layout") as caught:
        select(survey(distilbert()), include)
    assert "'attention.q_lin'" in caught.value.possible


DISTILBERT = Layout(
    blocks="transformer.layer",
    roles={"q": "attention.q_lin", "v": "attention.v_lin"},
    middle="sa_layer_norm.post",
    middle_sum=("sa_layer_norm.pre[0]",),
    middle_add=("sa_layer_norm.post",),
    out_sum=("output_layer_norm.pre[0]",),
)


def test_a_layout_given_by_the_user_opens_an_unlisted_type():
    space = select(survey(distilbert(), DISTILBERT))
    assert {site.role for site in space.sites if site.kind == "lora"} == {"q", "v"}
    assert len(space.sites) == 2 * 2 + 4 * 2 - 1


def test_a_stream_without_middle_taps_has_even_spans_only():
    found = survey(distilbert(), replace(DISTILBERT, middle=None))  # as in parallel blocks
    assert names(select(found, ["shortcut"], spans=[1, 2, 3, 4])) == [
        "0.shortcut_attn",
        "1.shortcut_attn",
        "1.shortcut_attn_s4",
    ]
    with pytest.raises(SettingError, match=r"matches no site; .*of kind shortcut: \['shortcut_attn'\]"):
        select(found, ["residual_attn"])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)


class Plain(nn.Module):
    """No transformers model: neither config nor base_model, and a list before the one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(500), nn.LayerNorm(500)])  # more parameters, but no linear layer
        self.blocks = nn.ModuleList([Block(4), Block(4)])


def test_any_module_with_repeated_blocks_is_surveyed():
    found = survey(Plain())
    assert found.model_type == "Plain"
    assert [site.source.module for site in found.lora_sites] == [
        f"blocks.{n}.inner.{i}" for n in (0, 1) for i in (0, 2)
    ]
    assert [(site.in_features, site.out_features) for site in found.lora_sites] == [(4, 8), (8, 4)] * 2
    assert found.parameters == 2000 + 2 * (4 * 8 + 8 + 8 * 4 + 4 + 8)


def test_a_model_without_repeated_blocks_is_refused():
    with pytest.raises(
        SettingError, match=r"model=Linear: one list of repeated blocks.*there is none; give model\.layout"
    ):
        survey(nn.Linear(3, 3))


def test_two_stacks_of_blocks_are_refused_not_halved():
    """An encoder-decoder whose encoder got no sites would be adapted by half, without a word."""
    model = Plain()
    model.decoder = nn.ModuleList([Block(4)])
    with pytest.raises(SettingError, match=r"these have: \['blocks', 'decoder'\]"):
        survey(model)


@pytest.mark.parametrize("rule", [{"role": ["q", "vv"]}, {"layer": [0, 99]}, {"kind": "lora", "role": ["vv", "q"]}])
def test_every_value_of_a_list_must_match_something(rule):
    with pytest.raises(SettingError, match="matches no site"):
        select(survey(distilbert(), DISTILBERT), [rule])


def test_a_survey_leaves_the_backbone_as_it_was():
    model = make_backbone("bert")
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    survey(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    assert all(after[name].requires_grad == flag for name, (_, flag) in before.items())


def test_the_size_of_the_backbone_is_counted(architecture):
    assert surveyed(architecture).parameters == sum(
        value.numel() for value in backbone(architecture).state_dict().values()
    )


# -- layouts that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks": "encoder.layers"}, "encoder.layers"),
        ({"blocks": "encoder"}, "encoder"),  # a module, but no list
        ({"roles": {"q": "attention.query"}}, "attention.query"),
        ({"roles": {"q": "attention.output.LayerNorm"}}, "attention.output.LayerNorm"),
        ({"roles": {"k": "attention.self.key"}}, "q or qkv"),  # the width of the stream is read there
        ({"middle": "attention.norm.post"}, "attention.norm"),
        ({"middle": "attention.output.LayerNorm"}, "attention.output.LayerNorm"),  # no hook point
        ({"middle_sum": ("norm1.pre[0]",)}, "norm1"),
        ({"middle_add": ("norm2.post",)}, "norm2"),
        ({"out_sum": ("norm3.pre[0]",)}, "norm3"),
        ({"out_add": ("norm4.post",)}, "norm4"),
        ({"middle_norm": "norm5"}, "norm5"),
        ({"out_norm": "norm6"}, "norm6"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_layout_that_names_what_is_not_there_is_refused(change, named):
    layout = replace(LAYOUTS["bert"][0], **change)
    with pytest.raises(SettingError, match=named) as caught:
        survey(backbone("bert"), layout)
    assert caught.value.setting.startswith("model.layout")


# -- widths ------------------------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """A linear layer in all but class."""

    in_features, out_features = 6, 3


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(5, 7), (5, 7)),
        (Conv1D(7, 5), (5, 7)),
        (Quantised(), (6, 3)),
        (nn.LayerNorm(5), None),
        (nn.Embedding(5, 7), None),
        (nn.Dropout(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_widths_are_read_from_linear_layers_of_any_make(module, expected):
    assert features(module) == expected


def test_a_site_between_taps_knows_its_span():
    def between(source, sink) -> Site:
        return Site("x", "shortcut", "x", 1, source, sink, 4, 4)

    assert between(Tap(1), Tap(4)).span == 3
    assert between(Tap(1), Port("m", "out")).span is None
