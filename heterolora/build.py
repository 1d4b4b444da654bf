"""From a config node to the object it names, with every value checked against the class's own types."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from heterolora.errors import SettingError


def build(node: Any, name: str) -> Any:
    """The object of the class that ``node["_target_"]`` names, made from the node's other values.

    Nested nodes with a ``_target_`` are built first.

    Args:
        node: plain values, e.g. a resolved config node.
        name: where the node stands in the config, for messages.

    Raises:
        SettingError: if the target cannot be imported, an argument is missing or unknown, or a value has a wrong type.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise SettingError(name, node, "needs a _target_, the import path of a class")
    target = find_target(node["_target_"], f"{name}._target_")
    values = {key: value for key, value in node.items() if key != "_target_"}
    if not callable(target):
        raise SettingError(f"{name}._target_", node["_target_"], "names no class")
    _check_names(target, values, name)
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    checked = {key: _argument(value, hints.get(key, Any), f"{name}.{key}") for key, value in values.items()}
    try:
        return target(**checked)
    except SettingError as error:
        raise error if "." in error.setting else error.under(name) from None


def find_target(path: str, name: str) -> Any:
    """What an import path names.

    Raises:
        SettingError: if it cannot be imported.
    """
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingError(name, path, f"cannot be imported ({error})") from error


def _check_names(target: Any, values: Mapping[str, Any], name: str) -> None:
    signature = inspect.signature(target).parameters
    parameters = {k: p for k, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    if not open_ended and (unknown := sorted(values.keys() - parameters.keys())):
        raise SettingError(f"{name}.{unknown[0]}", values[unknown[0]], f"unknown; possible: {sorted(parameters)}")
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(required - values.keys()):
        raise SettingError(f"{name}.{missing[0]}", "(missing)", f"{target.__name__} needs it")


def _argument(value: Any, hint: Any, name: str) -> Any:
    """A nested object, or a plain value of the hinted type; numbers written as text become numbers."""
    given, value = value, _build_nested(value, name)
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (SchemaError, PydanticUserError):  # a protocol or a dataclass: only a built object can be right
        if _only_nodes(given, hint):
            return value
        raise SettingError(name, value, "needs a _target_, the import path of a class") from None
    try:  # strictly where there is a flag, for True is not meant as 1
        return adapter.validate_python(value, strict=_holds_flag(value) or None)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(item["msg"] for item in error.errors()))
        raise SettingError(name, given, reasons) from None


def _build_nested(value: Any, name: str) -> Any:
    if _is_node(value):
        return build(value, name)
    if isinstance(value, list):
        return [_build_nested(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return value


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _only_nodes(value: Any, hint: Any) -> bool:
    """Whether nothing but objects was given where objects are wanted: one, or a list of them."""
    if get_origin(hint) in (Sequence, list, tuple):
        return isinstance(value, list) and all(map(_is_node, value))
    return _is_node(value)


def _holds_flag(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_flag, value.values()))
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_holds_flag, value)))
