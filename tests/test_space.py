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
from heterolora.layouts import LAYOUTS, HookPoint, Layout
from heterolora.sites import FUSED, Port, Site, Tap, site_name
from heterolora.space import SearchSpace, Space, Survey, survey
from tests.architectures import ARCHITECTURES, make_backbone, make_config
from tests.conftest import ROOT

FILES = sorted((ROOT / "conf" / "search_space").glob("*.yaml"))
LAYERS = 3
DEPTHS = {"albert_groups": {"": 8}} | {key: {"encoder": 3, "decoder": 2} for key in ("t5", "t5_gated")}
PARALLEL = {"falcon", "falcon_new", "gptj", "gpt_neox", "phi"}
"""No feed-forward taps of their own."""

SELECTS = {  # option: what its name says
    "full": lambda site: True,
    "lora_qv": lambda site: site.role in ("q", "v", "qkv"),
    "lora_attention": lambda site: site.role in ("q", "k", "v", "o", "qkv"),
    "lora_all": lambda site: site.kind == "lora",
    "shortcuts": lambda site: site.kind == "shortcut",
    "lora_qv_shortcuts": lambda site: site.kind == "shortcut" or site.role in ("q", "v", "qkv"),
    "lora_embeddings": lambda site: site.role == "embed",
    "lora_feed_forward": lambda site: site.kind == "lora" and site.role not in ("q", "k", "v", "o", "qkv", "embed"),
    "lora_everything": lambda site: site.kind == "lora",
    "lor2c": lambda site: (site.role == "shortcut_attn" and site.span in (2, 4)) or site.role in ("q", "v", "qkv"),
}


@cache
def backbone(architecture: str):
    return make_backbone(architecture)


@cache
def surveyed(architecture: str) -> Survey:
    return survey(backbone(architecture))


@cache
def depths(architecture: str) -> dict[str, int]:
    """Layers of each stream."""
    return DEPTHS.get(architecture, {"": LAYERS})


def select(found: Survey, include=("lora", "shortcut"), exclude=(), layers=None, spans=(1, 2), **options) -> Space:
    options = {"renorm": False, "group_by": "kind"} | options
    return SearchSpace(list(include), list(exclude), layers, list(spans), **options).resolve(found)


def names(space: Space) -> list[str]:
    return [site.name for site in space.sites]


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> widths of each linear layer of the repeated blocks, found without the package."""
    prefix, found = model.base_model_prefix, {}
    for path, module in model.base_model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and any(part.isdigit() for part in path.split(".")):
            shape = tuple(module.weight.shape)  # [in, out] in Conv1D, [out, in] in Linear
            found[f"{prefix}.{path}"] = shape if isinstance(module, Conv1D) else shape[::-1]
    return found


def tiny(model_type: str, auto=transformers.AutoModelForSequenceClassification, **options):
    """A model without memory, of a type that the layout table does not list."""
    config = transformers.AutoConfig.for_model(
        model_type, **options, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.device("meta"):
        return auto.from_config(config)


def mpnet():
    return tiny("mpnet", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def openai_gpt():
    """Linear layers that are Conv1D."""
    return tiny("openai-gpt", n_embd=32, n_layer=2, n_head=4)


def changed(architecture: str, **options):
    """A listed type under other config values, without memory."""
    config = make_config(architecture)
    for key, value in options.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(config)


# -- options of the config ---------------------------------------------------------------------------------------------


def test_every_option_has_a_line_in_the_table():
    assert {path.stem for path in FILES} == SELECTS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_selects_what_its_name_says(architecture, path):
    node = yaml.safe_load(path.read_text())
    spans = sorted({1, 2, *node["spans"]})
    found = surveyed(architecture)
    words = found.embeddings if path.stem in ("lora_embeddings", "lora_everything") else ()
    everything = [*words, *found.lora_sites, *found.shortcut_sites(spans)]
    space = build(node, "search_space")
    if path.stem in ("lora_embeddings", "lora_everything") and not words:  # gemma scales what it looks up
        with pytest.raises(SettingError, match="embed"):
            space.resolve(found)
        return
    space = space.resolve(found)
    assert set(names(space)) == {site.name for site in everything if SELECTS[path.stem](site)}
    assert not space.renorm


# -- sites -------------------------------------------------------------------------------------------------------------


def test_lora_sites_are_the_linear_layers_of_the_blocks(architecture):
    expected = linears(backbone(architecture))
    sites = surveyed(architecture).lora_sites
    assert {site.source.module: (site.in_features, site.out_features) for site in sites} == expected
    assert len(sites) == len(expected)
    for site in sites:
        assert (site.source, site.sink) == (Port(site.source.module, "in"), Port(site.source.module, "out"))
        assert (site.name, site.span) == (site_name(site.stream, site.layer, site.role), None)
        assert site.entry == site.layer
        if not architecture.startswith("albert"):  # there the path has the group, not the layer
            assert str(site.layer) in site.source.module.split(".")


def test_shortcuts_are_those_of_the_paper(architecture):
    expected = {}
    for stream, depth in depths(architecture).items():
        for layer in range(depth):  # DESIGN.md section 3
            start = f"{stream}.{layer}" if stream else str(layer)
            expected[f"{start}.shortcut_attn"] = (2 * layer, 2 * layer + 2)
            if architecture in PARALLEL:
                continue
            expected[f"{start}.residual_attn"] = (2 * layer, 2 * layer + 1)
            expected[f"{start}.residual_ffn"] = (2 * layer + 1, 2 * layer + 2)
            if layer:
                expected[f"{start}.shortcut_ffn"] = (2 * layer - 1, 2 * layer + 1)
    sites = select(surveyed(architecture), ["shortcut"]).sites
    assert {site.name: (site.source.index, site.sink.index) for site in sites} == expected
    for site in sites:
        assert (site.in_features, site.out_features) == (32, 32)
        assert site.name == site_name(site.stream, site.layer, site.role)
        assert site.stream == site.source.stream == site.sink.stream


def test_depths_and_widths_are_those_of_the_streams(architecture):
    found = surveyed(architecture)
    assert {stream: found.depth(stream) for stream in found.stacks} == depths(architecture)
    assert found.deepest == max(depths(architecture).values())
    assert found.widths == dict.fromkeys(depths(architecture), 32)
    assert found.no_shortcuts is None


@pytest.mark.parametrize("span", range(1, 2 * LAYERS + 1))
def test_shortcuts_of_one_span_start_at_every_tap_that_leaves_room(span):
    sites = select(surveyed("llama"), ["shortcut"], spans=[span]).sites
    assert {site.source.index for site in sites} == set(range(2 * LAYERS + 1 - span))
    for site in sites:
        start, end = site.source.index, site.sink.index
        assert site.span == end - start == span
        assert site.entry == start // 2
        assert site.layer == (end - 1) // 2
        stem, side = "residual" if span == 1 else "shortcut", "ffn" if start % 2 else "attn"
        assert site.role == f"{stem}_{side}"
        assert site.name == f"{site.layer}.{site.role}" + (f"_s{span}" if span > 2 else "")


def test_names_are_unique(architecture):
    longest = 2 * max(depths(architecture).values())
    found = names(select(surveyed(architecture), spans=range(1, longest + 1)))
    assert len(found) == len(set(found))
    taps = [range(0, 2 * depth + 1, 2 if architecture in PARALLEL else 1) for depth in depths(architecture).values()]
    pairs = sum(len(stream) * (len(stream) - 1) // 2 for stream in taps)
    assert len(found) == len(linears(backbone(architecture))) + pairs


def test_sites_come_layer_by_layer_in_each_stream(architecture):
    sites = select(surveyed(architecture), ["shortcut", "lora"], spans=[2, 1]).sites
    streams = list(depths(architecture))
    places = [(streams.index(site.stream), site.layer) for site in sites]
    assert places == sorted(places)


def test_the_order_of_rules_and_spans_does_not_matter():
    space = select(surveyed("opt_pre"), ["shortcut", "v", "q"], spans=[2, 1])
    assert names(space) == names(select(surveyed("opt_pre"), ["q", "lora", "shortcut"], ["k", "o", "up", "down"]))


def test_a_site_is_found_by_its_name():
    space = select(surveyed("bert"))
    assert all(space[site.name] is site for site in space.sites)
    with pytest.raises(KeyError, match=r"9\.q"):
        space["9.q"]


@pytest.mark.parametrize(
    ("group_by", "labels"),
    [
        ("kind", {"lora", "shortcut"}),
        ("role", {"q", "residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn"}),
        ("layer", {"0", "1", "2"}),
    ],
)
def test_groups_are_what_the_setting_says(group_by, labels):
    space = select(surveyed("bert"), ["q", "shortcut"], group_by=group_by)
    assert space.groups == {site.name: str(getattr(site, group_by)) for site in space.sites}
    assert set(space.groups.values()) == labels


def test_groups_of_two_streams_are_apart():
    """The decoder's q is not the encoder's; but LoRA is LoRA in both."""
    found = {by: set(select(surveyed("t5"), ["q"], group_by=by).groups.values()) for by in ("kind", "role", "layer")}
    assert found["kind"] == {"lora"}
    assert found["role"] == {"encoder.q", "decoder.q"}
    assert found["layer"] == {"encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"}


@pytest.mark.parametrize("group_by", ["span", "", None])
def test_other_groups_are_refused(group_by):
    node = yaml.safe_load(FILES[0].read_text()) | {"group_by": group_by}
    with pytest.raises(SettingError, match=r"search_space\.group_by.*'kind', 'role', 'layer' or 'label'"):
        build(node, "search_space")


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
        "stream": "",
    }
    module = "bert.encoder.layer.0.attention.self.query"
    values = space["0.q"].as_dict()
    assert (values["source"], values["sink"], values["span"]) == (f"{module}.in", f"{module}.out", None)


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["t5", "t5_gated"])
def test_no_site_is_between_two_streams(architecture):
    found = surveyed(architecture)
    sites = select(found, spans=range(1, 7)).sites
    assert {site.stream for site in sites} == {"encoder", "decoder"}
    for site in sites:
        ends = (site.source, site.sink)
        if site.kind == "lora":
            assert all(end.module.startswith(f"transformer.{site.stream}.block.") for end in ends)
        else:
            assert {end.stream for end in ends} == {site.stream}
            assert all(0 <= end.index <= 2 * found.depth(site.stream) for end in ends)
        assert site.name.startswith(f"{site.stream}.{site.layer}.")
        assert site.label == site.name.replace(f".{site.layer}.", ".", 1)


def test_roles_of_the_cross_attention_are_their_own():
    found = surveyed("t5")
    cross = {site.role for site in found.lora_sites if site.role.startswith("cross_")}
    assert cross == {"cross_q", "cross_k", "cross_v", "cross_o"}
    assert names(select(found, ["cross_k"])) == ["decoder.0.cross_k", "decoder.1.cross_k"]
    assert not any("cross" in name for name in names(select(found, ["q", "k", "v", "o"])))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"stream": "decoder", "role": "q"}, ["decoder.0.q", "decoder.1.q"]),
        ({"stream": ["encoder", "decoder"], "role": "q", "layer": -1}, ["encoder.2.q", "decoder.1.q"]),
        ({"role": "v", "layer": [2]}, ["encoder.2.v"]),  # the decoder has two layers
        ({"stream": "encoder", "span": 1, "layer": 0}, ["encoder.0.residual_attn", "encoder.0.residual_ffn"]),
    ],
)
def test_a_rule_may_name_the_stream(rule, expected):
    everything = names(select(surveyed("t5")))
    assert names(select(surveyed("t5"), [rule])) == expected
    assert names(select(surveyed("t5"), exclude=[rule])) == [name for name in everything if name not in expected]


def test_layers_count_from_the_end_of_each_stream():
    assert names(select(surveyed("t5"), ["q"], layers=[-1])) == ["encoder.2.q", "decoder.1.q"]
    assert names(select(surveyed("t5"), ["q"], layers=[-3])) == ["encoder.0.q"]
    assert names(select(surveyed("t5"), ["q"], layers=[2, 0])) == ["encoder.0.q", "encoder.2.q", "decoder.0.q"]


def test_spans_up_to_the_deepest_stream_exist():
    sites = select(surveyed("t5"), ["shortcut"], spans=[5, 6]).sites
    assert {site.stream for site in sites} == {"encoder"}  # a decoder of two layers has spans up to 4
    with pytest.raises(SettingError, match=r"search_space\.spans.*spans from 1 to 6 exist"):
        select(surveyed("t5"), spans=[7])


@pytest.mark.parametrize("rule", [{"stream": "middle"}, {"stream": ["encoder", "x"]}, {"stream": "", "role": "q"}])
def test_a_stream_that_does_not_exist_is_refused_with_those_there_are(rule):
    with pytest.raises(SettingError, match=r"matches no site; .*streams \['encoder', 'decoder'\]"):
        select(surveyed("t5"), [rule])
    with pytest.raises(SettingError, match="matches no site") as caught:
        select(surveyed("bert"), [{"stream": "encoder"}])
    assert "streams" not in caught.value.possible


@pytest.mark.parametrize("gated", [False, True])
def test_an_encoder_alone_has_one_stream(gated):
    config = make_config("t5_gated" if gated else "t5")
    with torch.device("meta"):
        alone = survey(transformers.T5EncoderModel(config))
    whole = surveyed("t5_gated" if gated else "t5")
    assert list(alone.stacks) == ["encoder"]
    assert [(site.name, site.in_features, site.out_features) for site in alone.lora_sites] == [
        (site.name, site.in_features, site.out_features) for site in whole.lora_sites if site.stream == "encoder"
    ]
    assert names(select(alone, ["shortcut"])) == names(select(whole, [{"kind": "shortcut", "stream": "encoder"}]))


# -- shared blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layers"), [("albert", {0: "0.0"}), ("albert_groups", {0: "0.0", 1: "0.1", 4: "1.0", 5: "1.1"})]
)
def test_a_lora_site_exists_once_for_each_shared_module(architecture, layers):
    sites = surveyed(architecture).lora_sites
    start = "albert.encoder.albert_layer_groups."
    expected = {f"{layer}.q": start + path.replace(".", ".albert_layers.") for layer, path in layers.items()}
    found = {site.name: site.source.module.removesuffix(".attention.query") for site in sites if site.role == "q"}
    assert found == expected
    assert len(sites) == len({site.source for site in sites}) == 6 * len(layers)


def test_shortcuts_of_shared_blocks_differ_by_depth():
    found = surveyed("albert_groups")
    sites = select(found, ["shortcut"]).sites
    assert {site.layer for site in sites} == set(range(8))
    points = [(found.read(site.source), found.write(site.sink, site.span)) for site in sites]
    assert len(set(points)) == len(points)
    block = "albert.encoder.albert_layer_groups.0.albert_layers.1"  # runs at depths 1 and 3
    assert [found.read(Tap(index)) for index in (2, 6)] == [HookPoint(block, "pre", 0, call) for call in (0, 1)]
    assert [found.write(Tap(index), 2).points for index in (3, 7)] == [
        (HookPoint(f"{block}.attention.LayerNorm", "post", None, call),) for call in (0, 1)
    ]


def test_shared_modules_count_once_in_the_size():
    assert surveyed("albert").parameters < surveyed("bert").parameters / 2


# -- fused layers ------------------------------------------------------------------------------------------------------

QKV = ["gpt2", "gpt_neox", "gpt_neox_sequential", "bloom", "bloom_normed", "falcon", "falcon_new", "falcon_sequential"]


@pytest.mark.parametrize("architecture", [*QKV, "phi3"])
@pytest.mark.parametrize("role", FUSED["qkv"])
def test_a_rule_for_a_role_means_the_fused_layer_that_plays_it(architecture, role):
    expected = [f"{layer}.qkv" for layer in range(LAYERS)]
    for rule in (role, "qkv", {"role": role}, {"kind": "lora", "role": [role, "qkv"]}):
        assert names(select(surveyed(architecture), [rule])) == expected
    left = select(surveyed(architecture), ["lora"], [role]).sites
    assert {site.role for site in left} & {"qkv", *FUSED["qkv"]} == set()


@pytest.mark.parametrize("role", FUSED["gate_up"])
def test_gate_and_up_mean_the_fused_layer_too(role):
    assert names(select(surveyed("phi3"), [role])) == ["0.gate_up", "1.gate_up", "2.gate_up"]


def test_a_fused_name_is_none_of_layers_that_stand_apart():
    with pytest.raises(SettingError, match="matches no site"):
        select(surveyed("llama"), ["qkv"])
    with pytest.raises(SettingError, match="matches no site"):
        select(surveyed("gpt2"), ["gate"])


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
    assert "lora: ['q', 'k', 'v', 'o', 'up', 'down', 'embed']" in caught.value.possible
    assert "'residual_attn', 'residual_ffn', 'shortcut_attn', 'shortcut_ffn'" in caught.value.possible
    assert "layers [0, 1, 2], spans [1, 2]" in caught.value.possible


@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_an_unknown_key_of_a_rule_is_refused_where_it_stands(setting):
    rules = {"include": ["lora"], "exclude": []} | {setting: [{"roles": "q"}]}
    with pytest.raises(
        SettingError, match=r"\['roles'\], possible: \['kind', 'role', 'layer', 'span', 'stream'\]"
    ) as caught:
        select(surveyed("bert"), **rules)
    assert caught.value.setting == f"search_space.{setting}"


@pytest.mark.parametrize("rules", [{"include": []}, {"include": ["lora"], "exclude": ["lora"]}])
def test_an_empty_space_is_refused(rules):
    with pytest.raises(SettingError, match=r"search_space\.include.*no site"):
        select(surveyed("bert"), **rules)


# -- renorm ------------------------------------------------------------------------------------------------------------


def names_all_norms(found: Survey) -> bool:
    return all(
        stack.layout.middle_norm is not None and stack.layout.out_norm is not None for stack in found.stacks.values()
    )


def test_renorm_needs_a_norm_for_every_longer_shortcut(architecture):
    found = surveyed(architecture)
    if names_all_norms(found):
        assert select(found, renorm=True).renorm
    else:
        with pytest.raises(SettingError, match=r"search_space\.renorm.*use false"):
            select(found, renorm=True)
    if architecture not in PARALLEL:
        assert select(found, renorm=True, spans=[1]).renorm  # only longer adds are followed by a norm
    assert select(found, ["lora"], renorm=True).renorm


def test_renorm_is_met_with_both_answers():
    assert {names_all_norms(surveyed(name)) for name in ARCHITECTURES} == {True, False}


# -- configs under which hooks are wrong -------------------------------------------------------------------------------


def test_a_backbone_that_passes_by_its_linear_layers_is_refused_altogether():
    with pytest.raises(SettingError, match=r"^model=.*bloom with slow_but_exact=True.*'slow_but_exact': False"):
        survey(changed("bloom", slow_but_exact=True))


NO_SHORTCUTS = [
    ("deberta_v2", "conv_kernel_size", 3),
    ("bert", "chunk_size_feed_forward", 4),
    ("roberta", "chunk_size_feed_forward", 4),
    ("electra", "add_cross_attention", True),
    ("gpt2", "add_cross_attention", True),
    ("opt_pre", "layerdrop", 0.1),
    ("opt_post", "layerdrop", 0.1),
]


@pytest.mark.parametrize(("architecture", "key", "value"), NO_SHORTCUTS)
def test_a_backbone_without_its_taps_can_have_lora_alone(architecture, key, value):
    options = {key: value}
    if key == "add_cross_attention":
        options["is_decoder"] = True
    found = survey(changed(architecture, **options))
    assert f"with {key}={value} this backbone can have no shortcuts" in found.no_shortcuts
    assert found.shortcut_sites([1, 2, 3]) == ()
    assert names(select(found, ["lora"])) == names(select(surveyed(architecture), ["lora"]))
    for include in (["shortcut"], ["lora", "shortcut"], ["residual_attn"], [{"span": 2}]):
        with pytest.raises(SettingError, match=rf"search_space\.include=.*matches no site.*{key}={value}"):
            select(found, include)


def test_the_reason_is_told_only_where_there_is_one():
    with pytest.raises(SettingError) as caught:
        select(surveyed("deberta_v2"), ["gate"])
    assert "no shortcuts" not in caught.value.possible


# -- backbones of other types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mpnet, openai_gpt])
def test_an_unlisted_type_gets_lora_sites_on_all_linear_layers_of_its_blocks(make):
    model = make()
    sites = select(survey(model), ["lora"]).sites
    assert {site.source.module: (site.in_features, site.out_features) for site in sites} == linears(model)
    assert len(sites) == len(linears(model))
    assert {site.layer for site in sites} == {0, 1}
    assert {site.kind for site in sites} == {"lora"}
    assert {site.stream for site in sites} == {""}


@pytest.mark.parametrize("include", [["shortcut"], ["lora", "shortcut"], ["residual_attn"], [{"span": 2}]])
def test_an_unlisted_type_refuses_shortcuts_and_says_what_would_help(include):
    with pytest.raises(SettingError, match=r"'mpnet' has no layout entry.*give model\.layout") as caught:
        select(survey(mpnet()), include)
    assert "'attention.attn.q'" in caught.value.possible


MPNET = Layout(
    blocks="encoder.layer",
    roles={"q": "attention.attn.q", "v": "attention.attn.v"},
    middle="attention.LayerNorm.post",
    middle_sum=("attention.LayerNorm.pre[0]",),
    middle_add=("attention.LayerNorm.post",),
    out_sum=("output.LayerNorm.pre[0]",),
)


def test_a_layout_given_by_the_user_opens_an_unlisted_type():
    space = select(survey(mpnet(), MPNET))
    assert {site.role for site in space.sites if site.kind == "lora"} == {"q", "v"}
    assert len(space.sites) == 2 * 2 + 4 * 2 - 1


def test_a_stream_without_middle_taps_has_even_spans_only():
    found = survey(mpnet(), replace(MPNET, middle=None))  # as in parallel blocks
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
        select(survey(mpnet(), MPNET), [rule])


def test_a_survey_leaves_the_backbone_as_it_was():
    model = make_backbone("bert")
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    survey(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    assert all(after[name].requires_grad == flag for name, (_, flag) in before.items())


HEADS = {"classifier", "pre_classifier", "pooler", "score", "classification_head"}
"""Modules beside the base model in transformers' task classes."""


def test_the_size_is_that_of_the_backbone_without_its_head(architecture):
    parameters = dict(backbone(architecture).named_parameters())
    sizes = [value.numel() for name, value in parameters.items() if name.split(".")[0] not in HEADS]
    assert len(sizes) < len(parameters)
    assert surveyed(architecture).parameters == sum(sizes)


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


# -- sites alone -------------------------------------------------------------------------------------------------------


def test_a_site_between_taps_knows_its_span():
    def between(source, sink) -> Site:
        return Site("x", "shortcut", "x", 1, source, sink, 4, 4)

    assert between(Tap(1), Tap(4)).span == 3
    assert between(Tap(1), Port("m", "out")).span is None


@pytest.mark.parametrize(
    ("stream", "role", "span", "label"),
    [
        ("", "q", None, "q"),
        ("encoder", "o", None, "encoder.o"),
        ("", "shortcut_attn", 2, "shortcut_attn"),
        ("decoder", "shortcut_ffn", 3, "decoder.shortcut_ffn_s3"),
    ],
)
def test_a_label_is_the_name_without_the_layer(stream, role, span, label):
    ends = (Port("m", "in"), Port("m", "out")) if span is None else (Tap(4, stream), Tap(4 + span, stream))
    site = Site(site_name(stream, 7, role, span), "lora", role, 7, *ends, 4, 4, stream)
    assert site.label == label
    start, _, rest = label.rpartition(".")
    assert site.name == ".".join(part for part in (start, "7", rest) if part)
