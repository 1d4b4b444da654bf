"""The layout table and how it is read; that its hooks are right is ``test_model.py``'s matter."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from heterolora.backbone import Tiny
from heterolora.errors import SettingError
from heterolora.layouts import LAYOUTS, HookPoint, Layout, Stack, find_layouts, mismatch
from heterolora.sites import FUSED, Tap
from tests.architectures import ARCHITECTURES, make_backbone


def short(value) -> str:
    """A test's id: the model type, what selects the entry, the key."""
    return value if isinstance(value, str) else f"{value.stream}{dict(value.when)}"


ENTRIES = [(model_type, entry) for model_type, entries in LAYOUTS.items() for entry in entries]
EACH = pytest.mark.parametrize(("model_type", "entry"), ENTRIES, ids=short)

POINTS = ("middle", "middle_sum", "middle_add", "out_sum", "out_add")
SHORTCUT_ROLES = {"residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn"}


def config_of(model_type: str, entry: Layout, **changes) -> SimpleNamespace:
    """A config that the entry is right for, but for the changes."""
    fits = dict(entry.when) | dict(entry.requires) | dict(entry.shortcuts_require)
    return SimpleNamespace(model_type=model_type, **(fits | changes))


def texts(entry: Layout) -> list[str]:
    """Every hook point of an entry."""
    values = [getattr(entry, name) for name in POINTS]
    return [text for value in values if value is not None for text in ([value] if isinstance(value, str) else value)]


@cache
def backbone(architecture: str):
    return make_backbone(architecture)


def blocks_of(entry: Layout, base, config) -> list:
    """The blocks of an entry in the order in which they run."""
    blocks = base.get_submodule(entry.blocks)
    return list(blocks) if entry.order is None else [blocks.get_submodule(path) for path in entry.order(config)]


# -- hook points -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B.post", HookPoint("h.3", "post", None)),
        ("B.pre[0]", HookPoint("h.3", "pre", 0)),
        ("norm.post", HookPoint("h.3.norm", "post", None)),
        ("attention.0.dense.post[1]", HookPoint("h.3.attention.0.dense", "post", 1)),
        ("a.pre[12]", HookPoint("h.3.a", "pre", 12)),
        ("pre.post.pre[0]", HookPoint("h.3.pre.post", "pre", 0)),  # only the last part is the side
        ("B.B.post", HookPoint("h.3.B.B", "post", None)),  # the block is B alone
    ],
)
def test_a_hook_point_is_read(text, expected):
    assert HookPoint.parse(text, "h.3") == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "B", "norm", "norm.out", "norm.post ", "a b.post"),
        *("norm.pre", "norm.post[]", "norm.post[-1]", "norm.post[x]", "norm.post[0][1]", "norm.post[1"),
        *(".post", ".a.post", "a..post", "a..b.post"),
    ],
)
def test_anything_else_is_no_hook_point(text):
    with pytest.raises(SettingError, match=r"'module\.pre\[0\]', 'module\.post' or 'module\.post\[0\]'") as caught:
        HookPoint.parse(text, "h.3")
    assert (caught.value.setting, caught.value.given) == ("model.layout", text)


# -- the table ---------------------------------------------------------------------------------------------------------


@EACH
def test_every_hook_point_of_the_table_is_one(model_type, entry):
    points = [HookPoint.parse(text, "h.0") for text in texts(entry)]
    assert len(points) >= (5 if entry.middle else 1)


@EACH
def test_roles_do_not_share_a_linear_layer_or_a_shortcuts_name(model_type, entry):
    assert len(set(entry.roles.values())) == len(entry.roles)
    assert not SHORTCUT_ROLES & entry.roles.keys()
    assert {"q", "qkv"} & entry.roles.keys()


@EACH
def test_a_layer_has_its_roles_in_one_form(model_type, entry):
    """A rule for q must not meet q and qkv side by side."""
    for fused, parts in FUSED.items():
        assert not (fused in entry.roles and set(parts) & entry.roles.keys())


def test_everything_that_an_entry_names_exists_in_every_block(architecture):
    model = backbone(architecture)
    for entry in find_layouts(model.config):
        norms = [norm for norm in (entry.middle_norm, entry.out_norm) if norm is not None]
        paths = [HookPoint.parse(text, "B").module.removeprefix("B").removeprefix(".") for text in texts(entry)]
        for block in blocks_of(entry, model.base_model, model.config):
            for path in [*entry.roles.values(), *norms, *paths]:
                block.get_submodule(path)  # raises if there is none


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ((12, 1, 1), ["0.0"] * 12),
        ((4, 2, 1), ["0.0", "0.0", "1.0", "1.0"]),
        ((2, 2, 2), ["0.0", "0.1", "1.0", "1.1"]),
        ((3, 2, 1), ["0.0", "0.0", "1.0"]),  # int(depth / 1.5)
    ],
)
def test_shared_blocks_run_in_the_order_of_the_config(options, order):
    layers, groups, inner = options
    config = SimpleNamespace(num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner)
    (entry,) = LAYOUTS["albert"]
    assert entry.order(config) == [path.replace(".", ".albert_layers.") for path in order]


# -- look-up -----------------------------------------------------------------------------------------------------------


@EACH
def test_an_entry_is_found_by_its_config(model_type, entry):
    found = find_layouts(config_of(model_type, entry))
    assert any(other is entry for other in found)
    assert len({other.stream for other in found}) == len(found)


def test_every_entry_is_that_of_an_architecture_of_the_tests():
    found = {
        (config.model_type, id(entry))
        for config in (backbone(name).config for name in ARCHITECTURES)
        for entry in find_layouts(config)
    }
    assert found == {(model_type, id(entry)) for model_type, entry in ENTRIES}


def test_streams_are_those_of_the_architecture(architecture):
    streams = [entry.stream for entry in find_layouts(backbone(architecture).config)]
    assert streams == (["encoder", "decoder"] if architecture.startswith("t5") else [""])


@EACH
def test_at_most_one_entry_of_a_type_and_stream_fits_a_config(model_type, entry):
    config = config_of(model_type, entry)
    for other in LAYOUTS[model_type]:
        if other is not entry and other.stream == entry.stream:
            assert mismatch(other.when, config)


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(model_type=None)])
def test_no_model_type_no_entry(config):
    assert find_layouts(config) == ()


def test_an_unlisted_model_type_has_no_entry():
    assert find_layouts(SimpleNamespace(model_type="squeezebert")) == ()


SELECTED = [(model_type, entry, key) for model_type, entry in ENTRIES for key in entry.when]


@pytest.mark.parametrize(("model_type", "entry", "key"), SELECTED, ids=short)
def test_a_listed_type_with_an_unknown_variant_is_refused_with_those_known(model_type, entry, key):
    known = {str(dict(other.when)) for other in LAYOUTS[model_type]}
    config = config_of(model_type, entry, **{key: "never seen"})
    with pytest.raises(SettingError, match=r"known for .* only; give model\.layout") as caught:
        find_layouts(config)
    assert caught.value.given == model_type
    assert all(when in caught.value.possible for when in known)


REQUIRED = [
    (model_type, entry, kind, key)
    for model_type, entry in ENTRIES
    for kind in ("requires", "shortcuts_require")
    for key in getattr(entry, kind)
]


@pytest.mark.parametrize(("model_type", "entry", "kind", "key"), REQUIRED, ids=short)
def test_a_config_that_breaks_a_condition_is_named(model_type, entry, kind, key):
    wanted = getattr(entry, kind)
    assert mismatch(wanted, config_of(model_type, entry)) is None
    assert mismatch(wanted, config_of(model_type, entry, **{key: "something else"})) == f"{key}=something else"


@pytest.mark.parametrize(("model_type", "entry", "kind", "key"), REQUIRED, ids=short)
def test_a_config_that_does_not_know_a_condition_is_fine(model_type, entry, kind, key):
    config = config_of(model_type, entry)
    delattr(config, key)
    assert mismatch(getattr(entry, kind), config) is None
    assert any(other is entry for other in find_layouts(config))


def test_conditions_are_met_by_some_entries():
    assert SELECTED  # otherwise the tests above run on nothing
    assert {kind for *_, kind, _ in REQUIRED} == {"requires", "shortcuts_require"}


def test_the_conditions_of_real_configs_are_attributes_that_they_have():
    """A misspelt key would never be a mismatch."""
    for name in ARCHITECTURES:
        config = backbone(name).config
        for entry in find_layouts(config):
            known = {*entry.when, *entry.requires, *entry.shortcuts_require}
            missing = {key for key in known if not hasattr(config, key)}
            assert missing <= {"conv_kernel_size"}, (name, missing)  # deberta-v3 says nothing of a convolution


# -- taps --------------------------------------------------------------------------------------------------------------

LAYOUT = Layout(
    blocks="h",
    roles={"q": "attn.q"},
    middle="norm2.pre[0]",
    middle_sum=("norm1.pre[0]",),
    middle_add=("norm2.pre[0]", "B.post"),
    out_sum=("norm3.pre[0]",),
    out_add=("B.post[0]",),
    middle_norm="norm1",
    out_norm="norm3",
)
BOUND = Stack("", ("h.0", "h.1"), LAYOUT, "")
PARALLEL = replace(BOUND, layout=replace(LAYOUT, middle=None, middle_sum=(), middle_add=()))
SHARED = replace(BOUND, blocks=("h.0", "h.0", "h.1", "h.0"))
UNKNOWN = replace(BOUND, layout=None)


def test_taps_are_counted_from_the_first_input_to_the_last_output():
    assert BOUND.num_taps == PARALLEL.num_taps == 5
    assert [index for index in range(-2, 8) if BOUND.has_tap(index)] == [0, 1, 2, 3, 4]
    assert [index for index in range(-2, 8) if PARALLEL.has_tap(index)] == [0, 2, 4]
    assert SHARED.num_taps == 9


def test_a_stack_without_an_entry_knows_no_taps():
    assert UNKNOWN.num_taps == 5
    assert not any(UNKNOWN.has_tap(index) for index in range(5))
    for ask in (lambda: UNKNOWN.read(Tap(1)), lambda: UNKNOWN.write(Tap(2), 2), lambda: UNKNOWN.write(Tap(1), 1)):
        with pytest.raises(KeyError, match="not known"):
            ask()


@pytest.mark.parametrize(
    ("tap", "point"),
    [
        (0, HookPoint("h.0", "pre", 0)),
        (1, HookPoint("h.0.norm2", "pre", 0)),
        (2, HookPoint("h.1", "pre", 0)),
        (3, HookPoint("h.1.norm2", "pre", 0)),
        (4, HookPoint("h.1", "post", 0)),  # there is no next block whose input it would be
    ],
)
def test_a_tap_is_read_where_it_is_complete(tap, point):
    assert BOUND.read(Tap(tap)) == point


@pytest.mark.parametrize(
    ("tap", "span", "points", "norm"),
    [
        (1, 1, [("h.0.norm1", "pre", 0)], "h.0.norm1"),
        (2, 1, [("h.0.norm3", "pre", 0)], "h.0.norm3"),
        (2, 2, [("h.0", "post", 0)], "h.0.norm3"),
        (3, 1, [("h.1.norm1", "pre", 0)], "h.1.norm1"),
        (3, 2, [("h.1.norm2", "pre", 0), ("h.1", "post", None)], "h.1.norm1"),
        (3, 3, [("h.1.norm2", "pre", 0), ("h.1", "post", None)], "h.1.norm1"),
        (4, 4, [("h.1", "post", 0)], "h.1.norm3"),
    ],
)
def test_a_delta_joins_in_the_layer_that_makes_its_sink(tap, span, points, norm):
    junction = BOUND.write(Tap(tap), span)
    assert junction.points == tuple(HookPoint(*point) for point in points)
    assert junction.norm == norm


def test_a_layout_without_norms_names_none():
    bare = replace(BOUND, layout=replace(LAYOUT, middle_norm=None, out_norm=None))
    assert bare.write(Tap(3), 2).norm is bare.write(Tap(4), 2).norm is None


def test_a_tap_that_does_not_exist_is_not_read():
    with pytest.raises(KeyError, match="t1 does not exist"):
        PARALLEL.read(Tap(1))


@pytest.mark.parametrize(
    ("tap", "point"),
    [
        (0, HookPoint("h.0", "pre", 0, 0)),
        (2, HookPoint("h.0", "pre", 0, 1)),
        (3, HookPoint("h.0.norm2", "pre", 0, 1)),
        (4, HookPoint("h.1", "pre", 0)),  # not shared: every call is meant
        (7, HookPoint("h.0.norm2", "pre", 0, 2)),
        (8, HookPoint("h.0", "post", 0, 2)),
    ],
)
def test_a_tap_of_a_shared_block_is_one_of_its_calls(tap, point):
    assert SHARED.read(Tap(tap)) == point


def test_a_delta_joins_in_one_call_of_a_shared_block():
    assert SHARED.write(Tap(3), 2).points == (HookPoint("h.0.norm2", "pre", 0, 1), HookPoint("h.0", "post", None, 1))
    assert SHARED.write(Tap(6), 2).points == (HookPoint("h.1", "post", 0),)
    assert SHARED.write(Tap(7), 1).points == (HookPoint("h.0.norm1", "pre", 0, 2),)


def test_points_are_written_as_in_the_table():
    assert [str(point) for point in (SHARED.read(Tap(8)), BOUND.read(Tap(3)), *BOUND.write(Tap(3), 2).points[1:])] == [
        *("h.0.post[0] (call 2)", "h.1.norm2.pre[0]", "h.1.post")
    ]
    for point in (HookPoint("h.3.norm", "post", None), HookPoint("h.3.attn", "pre", 1)):
        assert HookPoint.parse(str(point).removeprefix("h.3."), "h.3") == point


def test_taps_are_named_with_their_stream():
    assert [str(Tap(3)), str(Tap(0, "decoder"))] == ["t3", "decoder.t0"]


# -- a layout of the user's own ----------------------------------------------------------------------------------------


def with_layout(layout):
    """A tiny BERT whose layout the user gives."""
    options = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Tiny("bert", options, "float32", None, layout, False).load(num_labels=2, seed=0)


def test_a_users_layout_is_taken_over():
    loaded = with_layout({"blocks": "encoder.layer", "roles": {"q": "attention.self.query"}})
    assert loaded.layout == Layout("encoder.layer", {"q": "attention.self.query"})


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"blocks": "encoder.layer", "roles": {"q": "x"}, "block": "y"}, "block"),
        ({"blocks": "encoder.layer"}, "roles"),
        ({"roles": {"q": "x"}}, "blocks"),
        ({"blocks": 3, "roles": {"q": "x"}}, "blocks"),
        ({"blocks": "encoder.layer", "roles": "q"}, "roles"),
        ({"blocks": "encoder.layer", "roles": {"q": "x"}, "out_add": "B.post"}, "out_add"),  # a list is needed
        ({"blocks": "encoder.layer", "roles": {"q": "x"}, "out_add": []}, "out_add"),  # shortcuts would join nothing
        ({"blocks": "encoder.layer", "roles": {"q": "x"}, "middle": "norm.post"}, "middle_sum.*middle_add.*out_sum"),
    ],
)
def test_a_users_layout_that_is_none_is_refused(layout, named):
    with pytest.raises(SettingError, match=rf"^model\.layout.*{named}"):
        with_layout(layout)
