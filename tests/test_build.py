"""From config nodes to objects: the errors a user meets, and that config files and classes agree."""

import inspect
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pytest
from omegaconf import OmegaConf

from heterolora.build import build, find_target
from heterolora.errors import SettingError
from tests.conftest import ROOT
from tests.jobs import compose_job

HERE = "tests.test_build"


class Shape(Protocol):
    """As the package's own protocols: not checkable at run time."""

    def area(self) -> float:
        """The area."""


@dataclass(frozen=True)
class Square:
    side: float
    count: int

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise SettingError("side", self.side, "a number above 0")

    def area(self) -> float:
        return self.side**2 * self.count


@dataclass(frozen=True)
class Picture:
    main: Shape
    frame: Square | None


@dataclass(frozen=True)
class Frame:
    inner: Square


@dataclass(frozen=True)
class Gallery:
    squares: Sequence[Square]


@dataclass(frozen=True)
class Hanging:
    picture: Picture
    high: bool


@dataclass(frozen=True)
class Typed:
    """One argument of each sort that config nodes have."""

    whole: int
    number: float
    text: str
    flag: bool
    choice: Literal["one", "two"]
    maybe: int | None
    several: Sequence[int]
    scale: float | Mapping[str, float]
    rules: Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Elsewhere:
    """Refuses a setting of another node."""

    value: int

    def __post_init__(self) -> None:
        raise SettingError("other.setting", self.value, "not with this")


class Open:
    def __init__(self, needed: int, **options: Any) -> None:
        self.needed, self.options = needed, options


class Variadic:
    def __init__(self, *parts: int, size: int) -> None:
        self.parts, self.size = parts, size


class Bare:
    """No constructor of its own."""


def make_square(side: float) -> Square:
    return Square(side, 1)


CONSTANT = 3

TYPED = {
    "_target_": f"{HERE}.Typed",
    "whole": 1,
    "number": 0.5,
    "text": "a",
    "flag": True,
    "choice": "one",
    "maybe": None,
    "several": [1, 2],
    "scale": 2.0,
    "rules": ["q", {"kind": "lora"}],
}
SQUARE = {"_target_": f"{HERE}.Square", "side": 2.0, "count": 1}
PICTURE = {"_target_": f"{HERE}.Picture", "main": SQUARE, "frame": None}


def refused(node: Any, name: str = "node") -> SettingError:
    with pytest.raises(SettingError) as caught:
        build(node, name)
    return caught.value


# -- objects -----------------------------------------------------------------------------------------------------------


def test_a_node_becomes_its_object():
    values = {key: value for key, value in TYPED.items() if key != "_target_"}
    assert build(TYPED, "node") == Typed(**values)


def test_functions_and_classes_without_a_constructor_are_targets_too():
    assert build({"_target_": f"{HERE}.make_square", "side": 3}, "node") == Square(3.0, 1)
    assert isinstance(build({"_target_": f"{HERE}.Bare"}, "node"), Bare)


def test_a_node_is_left_as_it_was():
    node = {**PICTURE, "main": dict(SQUARE)}
    build(node, "node")
    assert node == PICTURE


def test_nested_nodes_are_built_first():
    node = {"_target_": f"{HERE}.Hanging", "picture": {**PICTURE, "frame": SQUARE}, "high": True}
    assert build(node, "node") == Hanging(Picture(Square(2.0, 1), Square(2.0, 1)), True)


def test_nested_nodes_are_built_in_lists_too():
    node = {"_target_": f"{HERE}.Gallery", "squares": [SQUARE, SQUARE]}
    assert build(node, "node") == Gallery([Square(2.0, 1)] * 2)


def test_errors_in_lists_say_where():
    node = {"_target_": f"{HERE}.Gallery", "squares": [SQUARE, {**SQUARE, "side": -1}]}
    assert re.fullmatch(r"node\.squares\W+1\W+side", refused(node).setting)  # squares.1.side or squares[1].side


def test_open_ended_arguments_are_handed_through():
    made = build({"_target_": f"{HERE}.Open", "needed": 1, "extra": "x"}, "node")
    assert (made.needed, made.options) == (1, {"extra": "x"})


def test_open_ended_positions_need_nothing():
    assert build({"_target_": f"{HERE}.Variadic", "size": 2}, "node").size == 2


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("whole", "7", 7),
        ("whole", 7.0, 7),
        ("whole", "-1", -1),
        ("number", "1e-3", 0.001),  # YAML 1.1 reads 1e-3 as text
        ("number", 3, 3.0),
        ("maybe", "4", 4),
        ("several", ["1", 2], [1, 2]),
        ("scale", "2", 2.0),
        ("scale", {"lora": "2"}, {"lora": 2.0}),
        ("flag", "false", False),
    ],
)
def test_numbers_and_flags_may_be_written_as_text(key, given, expected):
    value = getattr(build({**TYPED, key: given}, "node"), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("whole", "many"),
        ("whole", 1.5),
        ("whole", "1.5"),
        ("whole", None),
        ("whole", [1]),
        ("number", "much"),
        ("number", None),
        ("text", 3),
        ("text", None),
        ("text", ["a"]),
        ("flag", "perhaps"),
        ("flag", 2),
        ("flag", None),
        ("choice", "three"),
        ("choice", None),
        ("maybe", "x"),
        ("several", 1),
        ("several", "12"),  # a list of digits to Python, not to a user
        ("several", ["a"]),
        ("several", None),
        ("scale", {"lora": "big"}),
        ("rules", "q"),
        ("rules", [3]),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_name(key, given):
    error = refused({**TYPED, key: given}, "group.node")
    assert (error.setting, error.given) == (f"group.node.{key}", given)
    assert str(error).startswith(f"group.node.{key}={given}: ")


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("whole", True),
        ("number", False),
        ("maybe", True),
        ("several", [1, True]),
        ("scale", True),
        ("scale", {"lora": True}),
    ],
)
def test_a_flag_is_no_number(key, given):
    assert refused({**TYPED, key: given}).setting == f"node.{key}"


def test_choices_are_listed():
    assert "'one' or 'two'" in refused({**TYPED, "choice": "three"}).possible


@pytest.mark.parametrize(
    ("node", "key", "given"),
    [
        (PICTURE, "main", None),
        (PICTURE, "main", "square"),
        (PICTURE, "main", ["square"]),
        (PICTURE, "main", {"side": 2.0, "count": 1}),
        (PICTURE, "frame", "square"),
        ({"_target_": f"{HERE}.Frame"}, "inner", None),
        ({"_target_": f"{HERE}.Frame"}, "inner", "square"),
        ({"_target_": f"{HERE}.Frame"}, "inner", [1]),
        ({"_target_": f"{HERE}.Gallery"}, "squares", SQUARE),
        ({"_target_": f"{HERE}.Gallery"}, "squares", [SQUARE, 3]),
    ],
)
def test_a_plain_value_in_the_place_of_an_object_is_refused_by_name(node, key, given):
    assert refused({**node, key: given}).setting.startswith(f"node.{key}")


def test_an_object_of_another_class_is_refused_by_name():
    assert refused({**PICTURE, "frame": TYPED}).setting.startswith("node.frame")


# -- names -------------------------------------------------------------------------------------------------------------


def test_an_unknown_argument_is_refused_with_those_possible():
    error = refused({**SQUARE, "colour": "red"}, "group.node")
    assert (error.setting, error.given) == ("group.node.colour", "red")
    assert error.possible == "unknown; possible: ['count', 'side']"


@pytest.mark.parametrize("key", ["side", "count"])
def test_a_missing_argument_is_refused_with_the_class_that_needs_it(key):
    error = refused({name: value for name, value in SQUARE.items() if name != key}, "group.node")
    assert error.setting == f"group.node.{key}"
    assert "Square needs it" in str(error)


def test_a_missing_argument_is_refused_beside_open_ended_ones():
    assert refused({"_target_": f"{HERE}.Open", "extra": 1}).setting == "node.needed"


def test_positions_cannot_be_named():
    assert refused({"_target_": f"{HERE}.Variadic", "size": 2, "parts": 1}).setting == "node.parts"


def test_inner_errors_carry_the_whole_dotted_name():
    hanging = {"_target_": f"{HERE}.Hanging", "high": True}
    wrong = {**PICTURE, "main": {**SQUARE, "side": -1}}
    assert refused({**hanging, "picture": wrong}, "wall").setting == "wall.picture.main.side"
    wrong = {**PICTURE, "main": {**SQUARE, "count": "x"}}
    assert refused({**hanging, "picture": wrong}, "wall").setting == "wall.picture.main.count"
    wrong = {**PICTURE, "main": {"_target_": f"{HERE}.Nothing"}}
    assert refused({**hanging, "picture": wrong}, "wall").setting == "wall.picture.main._target_"


def test_an_error_about_another_node_keeps_its_name():
    assert refused({"_target_": f"{HERE}.Elsewhere", "value": 1}, "group.node").setting == "other.setting"


@pytest.mark.parametrize("node", [None, 3, "name", [], {}, {"side": 1.0}, {"_target_": 3}, {"_target_": None}])
def test_a_node_without_a_target_is_refused(node):
    error = refused(node, "group.node")
    assert error.setting == "group.node"
    assert "_target_" in error.possible


@pytest.mark.parametrize(
    "target",
    [
        "",
        "Square",
        ".Square",
        "..tests.Square",
        "tests.",
        "no_such_package.Square",
        f"{HERE}.NoSuchClass",
        f"{HERE}.Square.side",
    ],
)
def test_a_target_that_cannot_be_imported_is_refused(target):
    error = refused({"_target_": target})
    assert (error.setting, error.given) == ("node._target_", target)
    with pytest.raises(SettingError, match="cannot be imported"):
        find_target(target, "here")


@pytest.mark.parametrize("target", ["heterolora.build", f"{HERE}.CONSTANT", f"{HERE}.TYPED"])
def test_a_target_that_makes_nothing_is_refused(target):
    assert refused({"_target_": target}).setting == "node._target_"


def test_find_target_gives_what_the_path_names():
    assert find_target(f"{HERE}.CONSTANT", "node") == 3


# -- the error itself --------------------------------------------------------------------------------------------------


def test_an_error_says_setting_value_and_what_is_possible():
    error = SettingError("rank", 0, "at least 1")
    assert str(error) == "rank=0: at least 1"
    assert str(error.under("allocator")) == "allocator.rank=0: at least 1"
    assert str(error.under("")) == "rank=0: at least 1"


def test_an_error_survives_the_way_between_processes():
    copy = pickle.loads(pickle.dumps(SettingError("allocator.rank", 0, "at least 1")))
    assert (copy.setting, copy.given, copy.possible) == ("allocator.rank", 0, "at least 1")
    assert str(copy) == "allocator.rank=0: at least 1"


# -- config files and classes ------------------------------------------------------------------------------------------

GROUPS = {"proxy", "allocator", "budget", "search_space", "adapter", "task", "model", "logger", "trainer", "allocation"}
GROUPS |= {"init"}


def targets(node: Any, name: str):
    """Every node below with a ``_target_``, by its dotted name."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield name, node
        for key, value in node.items():
            yield from targets(value, f"{name}.{key}")


FILES = {f"{path.parent.name}/{path.stem}": OmegaConf.load(path) for path in sorted((ROOT / "conf").glob("*/*.yaml"))}
FILES["train"] = OmegaConf.load(ROOT / "conf" / "train.yaml")
NODES = [node for file, config in FILES.items() for node in targets(OmegaConf.to_container(config), file)]
EACH_NODE = pytest.mark.parametrize(("name", "node"), NODES, ids=[name for name, _ in NODES])


PRESETS = ("adalora", "alora", "eva", "gora", "lor2c", "para", "plop")
"""Allocators that choose options of other groups, and name no class themselves."""


def test_a_preset_chooses_its_options_and_an_override_wins():
    for name in PRESETS:
        choices = compose_job(f"allocator={name}").hydra.runtime.choices
        chosen = {key: choices[key] for key in ("adapter", "proxy", "init", "allocation", "search_space")}
        default = {key: compose_job().hydra.runtime.choices[key] for key in chosen}
        assert chosen != default, name
    kept = compose_job("allocator=eva", "proxy=random", "init=none").hydra.runtime.choices
    assert (kept.proxy, kept.init) == ("random", "none")


def test_every_option_of_a_group_names_a_class():
    named = {name for name, _ in NODES}
    options = {file for file in FILES if file.partition("/")[0] in GROUPS}
    assert options - {"init/none", *(f"allocator/{name}" for name in PRESETS)} <= named
    assert {option.partition("/")[0] for option in options} == GROUPS
    assert {"train.data", "train.probe", "train.optimizer", "task/mrpc.source"} <= named


@EACH_NODE
def test_a_config_file_lists_every_argument_and_the_class_gives_no_default(name, node):
    parameters = inspect.signature(find_target(node["_target_"], name)).parameters
    assert node.keys() - {"_target_"} == parameters.keys()
    assert not [key for key, parameter in parameters.items() if parameter.default is not parameter.empty]


@EACH_NODE
def test_every_class_documents_its_arguments(name, node):
    target = find_target(node["_target_"], name)
    classes = inspect.getmro(target) if inspect.isclass(target) else [target]  # an argument is documented where it is
    documented = "\n".join(inspect.getdoc(part) or "" for part in classes)
    undocumented = [key for key in node if key != "_target_" and f"{key}:" not in documented]
    assert not undocumented


REST = {"seed": 0, "optimizer": {"head_lr": 1e-3, "lr": 1e-3}}  # what options refer to


@pytest.mark.parametrize("option", [file for file in FILES if "/" in file and "_target_" in FILES[file]])
def test_every_option_is_accepted_as_it_stands(option):
    group = option.partition("/")[0]
    config = OmegaConf.create({**REST, group: FILES[option]})
    node = OmegaConf.to_container(config, resolve=True)[group]
    if option == "allocator/fixed":  # the one that cannot do without a value from the user
        assert refused(node, group).setting == "allocator.path"
    else:
        assert type(build(node, group)).__name__ == node["_target_"].rpartition(".")[2]
