"""The layout table and how it is read; that its hooks are right is ``test_model.py``'s matter."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from heterolora.backbone import Tiny
from heterolora.errors import SettingError
from heterolora.layouts import LAYOUTS, BoundLayout, HookPoint, Layout, check_layout, find_layout
from heterolora.sites import Tap
from tests.architectures import ARCHITECTURES, make_backbone


def short(value) -> str:
    """A test's id: the model type, what selects the entry, the key."""
    return value if isinstance(value, str) else str(dict(value.when))


ENTRIES = [(model_type, entry) for model_type, entries in LAYOUTS.items() for entry in entries]
EACH = pytest.mark.parametrize(("model_type", "entry"), ENTRIES, ids=short)

POINTS = ("middle", "middle_sum", "middle_add", "out_sum", "out_add")
SHORTCUT_ROLES = {"residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn"}


def config_of(model_type: str, entry: Layout, **changes) -> SimpleNamespace:
    """A config that the entry is right for, but for the changes."""
    return SimpleNamespace(model_type=model_type, **(dict(entry.when) | dict(entry.requires) | changes))


def texts(entry: Layout) -> list[str]:
    """Every hook point of an entry."""
    values = [getattr(entry, name) for name in POINTS]
    return [text for value in values if value is not None for text in ([value] if isinstance(value, str) else value)]


@cache
def backbone(architecture: str):
    return make_backbone(architecture)


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


def test_everything_that_an_entry_names_exists_in_a_backbone(architecture):
    model = backbone(architecture)
    entry = find_layout(model.config)
    blocks = model.base_model.get_submodule(entry.blocks)
    assert len(blocks) == model.config.num_hidden_layers
    norms = [norm for norm in (entry.middle_norm, entry.out_norm) if norm is not None]
    paths = [HookPoint.parse(text, "B").module.removeprefix("B").removeprefix(".") for text in texts(entry)]
    for path in [*entry.roles.values(), *norms, *paths]:
        blocks[0].get_submodule(path)  # raises if there is none


# -- look-up -----------------------------------------------------------------------------------------------------------


@EACH
def test_an_entry_is_found_by_its_config(model_type, entry):
    assert find_layout(config_of(model_type, entry)) is entry


def test_every_architecture_of_the_tests_has_its_own_entry():
    found = [find_layout(backbone(name).config) for name in ARCHITECTURES]
    assert all(found)
    assert len({id(entry) for entry in found}) == len(ARCHITECTURES)


@EACH
def test_at_most_one_entry_of_a_type_fits_a_config(model_type, entry):
    config = config_of(model_type, entry)
    others = [other for other in LAYOUTS[model_type] if other is not entry]
    for other in others:
        assert any(getattr(config, key, None) != value for key, value in other.when.items())


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(model_type=None)])
def test_no_model_type_no_entry(config):
    assert find_layout(config) is None


def test_an_unlisted_model_type_has_no_entry():
    assert find_layout(SimpleNamespace(model_type="distilbert")) is None


SELECTED = [(model_type, entry, key) for model_type, entry in ENTRIES for key in entry.when]


@pytest.mark.parametrize(("model_type", "entry", "key"), SELECTED, ids=short)
def test_a_listed_type_with_an_unknown_variant_is_refused_with_those_known(model_type, entry, key):
    with pytest.raises(SettingError, match=r"known for .* only; give model\.layout") as caught:
        find_layout(config_of(model_type, entry, **{key: "never seen"}))
    assert caught.value.given == model_type
    assert all(str(dict(other.when)) in caught.value.possible for other in LAYOUTS[model_type])


REQUIRED = [(model_type, entry, key) for model_type, entry in ENTRIES for key in entry.requires]


@pytest.mark.parametrize(("model_type", "entry", "key"), REQUIRED, ids=short)
def test_a_config_under_which_the_hooks_are_wrong_is_refused(model_type, entry, key):
    config = config_of(model_type, entry, **{key: "something else"})
    for refuse in (find_layout, lambda config: check_layout(entry, config)):
        with pytest.raises(
            SettingError, match=f"{model_type} with {key}=something else: .*{key}={entry.requires[key]}"
        ):
            refuse(config)


@pytest.mark.parametrize(("model_type", "entry", "key"), REQUIRED, ids=short)
def test_a_config_that_does_not_know_a_required_key_is_fine(model_type, entry, key):
    config = config_of(model_type, entry)
    delattr(config, key)
    assert find_layout(config) is entry


def test_conditions_are_met_by_some_entries():
    assert SELECTED  # otherwise the tests above run on nothing
    assert REQUIRED


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("opt_pre", "layerdrop", 0.1),
        ("opt_post", "layerdrop", 0.1),
        ("bert", "chunk_size_feed_forward", 4),
        ("bert", "add_cross_attention", True),
    ],
)
def test_real_configs_that_break_the_hooks_are_refused(architecture, key, value):
    config = type(backbone(architecture).config)(**backbone(architecture).config.to_dict() | {key: value})
    with pytest.raises(SettingError, match=f"{key}={value}"):
        find_layout(config)


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
BOUND = BoundLayout(LAYOUT, ("h.0", "h.1"))
PARALLEL = BoundLayout(replace(LAYOUT, middle=None, middle_sum=(), middle_add=()), ("h.0", "h.1"))


def test_taps_are_counted_from_the_first_input_to_the_last_output():
    assert BOUND.num_taps == PARALLEL.num_taps == 5
    assert [index for index in range(-2, 8) if BOUND.has_tap(index)] == [0, 1, 2, 3, 4]
    assert [index for index in range(-2, 8) if PARALLEL.has_tap(index)] == [0, 2, 4]


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
    bare = BoundLayout(replace(LAYOUT, middle_norm=None, out_norm=None), ("h.0", "h.1"))
    assert bare.write(Tap(3), 2).norm is bare.write(Tap(4), 2).norm is None


def test_a_tap_that_does_not_exist_is_not_read():
    with pytest.raises(KeyError, match="t1 does not exist"):
        PARALLEL.read(Tap(1))


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
    ],
)
def test_a_users_layout_that_is_none_is_refused(layout, named):
    with pytest.raises(SettingError, match=rf"^model\.layout.*{named}"):
        with_layout(layout)
