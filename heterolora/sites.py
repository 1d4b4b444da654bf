"""Sites: the places of a backbone that can carry a low-rank map from a source to a sink."""

import re
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["lora", "shortcut"]

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Roles that one linear layer plays at once, in the backbones that compute them together."""

LOOKUPS = frozenset({"embed"})
"""Roles of sites that read ids, the rows of a table, and so stand for ``x`` = one-hot vectors, which nobody makes.

Ids are far more than features are, and so is what a unit of rank costs: such a site takes part in a search space only
where a rule names its role.
"""

SIDE_BY_SIDE = (("q", "k", "v"), ("gate", "up"), ("cross_k", "cross_v"))
"""Roles of layers that, in most blocks, are given the same input."""


@dataclass(frozen=True, order=True)
class Tap:
    """A point of a residual stream.

    ``index`` 2l is the input of block l, 2l+1 the input of its feed-forward sub-layer, 2L the last block's output.
    ``stream`` tells the stacks of an encoder-decoder apart; it is empty where there is one stack.
    """

    index: int
    stream: str = ""

    def __str__(self) -> str:
        return f"{self.stream}.t{self.index}" if self.stream else f"t{self.index}"


@dataclass(frozen=True, order=True)
class Port:
    """The input or the output of one module, named by its path in the backbone."""

    module: str
    side: Literal["in", "out"]

    def __str__(self) -> str:
        return f"{self.module}.{self.side}"


Point: TypeAlias = Tap | Port


@dataclass(frozen=True)
class Site:
    """A place that can carry a low-rank map ``delta(x) = scale * B A x``, added at ``sink``, with x read at ``source``.

    A LoRA site reads the input of one linear layer and joins its output; a shortcut reads one tap of the residual
    stream and joins a later one. Everything that scores, counts, allocates, trains or stores treats them alike.

    Where blocks share their weights (albert), a LoRA site exists once for each module, at the first layer that uses
    it, and acts in all of them; shortcuts differ by layer.
    """

    name: str
    kind: Kind
    role: str
    layer: int
    source: Point
    sink: Point
    in_features: int
    out_features: int
    stream: str = ""

    @property
    def span(self) -> int | None:
        """Number of sub-layers between two taps; None for a site that stays at one module."""
        if isinstance(self.source, Tap) and isinstance(self.sink, Tap):
            return self.sink.index - self.source.index
        return None

    @property
    def lookup(self) -> bool:
        """Whether the source holds ids ``[...]``, from 0 to ``in_features`` - 1, in place of vectors ``[..., in]``.

        Such a site comes before all blocks, whose count starts at its layer, 0.
        """
        return self.role in LOOKUPS

    @property
    def entry(self) -> int:
        """Blocks of its stream that run before the site reads anything: a step need not go back below."""
        return self.source.index // 2 if isinstance(self.source, Tap) else self.layer

    @property
    def reads(self) -> Hashable:
        """Equal for sites of one block that may read the same tensor: of one tap, or of layers side by side."""
        if isinstance(self.source, Tap):
            return (self.source, self.layer)
        together = next((roles for roles in SIDE_BY_SIDE if self.role in roles), None)
        return self.source if together is None else (self.stream, self.layer, together)

    @property
    def joins(self) -> int:
        """Blocks of its stream below the one where its delta joins: a backward pass for this site alone ends there.

        A delta that joins the last block's output needs no block's backward pass: then it is the number of blocks.
        """
        return self.sink.index // 2 if isinstance(self.sink, Tap) else self.layer

    @property
    def roles(self) -> tuple[str, ...]:
        """The role, and those that a fused layer stands for: a rule for q or v means a fused qkv too."""
        return (self.role, *FUSED.get(self.role, ()))

    @property
    def label(self) -> str:
        """The name without the layer: what sites of different layers have in common, e.g. ``q``, ``encoder.o``."""
        suffix = f"_s{self.span}" if (self.span or 0) > 2 else ""
        return (f"{self.stream}." if self.stream else "") + self.role + suffix

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"source": str(self.source), "sink": str(self.sink), "span": self.span}


def site_name(stream: str, layer: int, role: str, span: int | None = None) -> str:
    """``<layer>.<role>``; for spans above 2 with ``_s<span>``; where there are several streams, after ``<stream>.``."""
    return (f"{stream}." if stream else "") + f"{layer}.{role}" + (f"_s{span}" if (span or 0) > 2 else "")


def site_from(values: Mapping[str, Any]) -> Site:
    """The site that ``Site.as_dict`` wrote.

    Raises:
        ValueError: if a value is missing or cannot be one of a site.
    """
    texts, numbers = ("name", "kind", "role", "stream"), ("layer", "in_features", "out_features")
    wrong = [key for key in (*texts, "source", "sink") if not isinstance(values.get(key), str)]
    wrong += [key for key in numbers if not isinstance(values.get(key), int)]
    if wrong or values["kind"] not in get_args(Kind):
        raise ValueError(f"no site: {', '.join(wrong) or 'kind'} cannot be read in {dict(values)}")
    kept = {key: values[key] for key in (*texts, *numbers)}
    return Site(**kept, source=_point(values["source"]), sink=_point(values["sink"]))


def _point(text: str) -> Point:
    if tap := re.fullmatch(r"(?:(\w+)\.)?t(\d+)", text):
        return Tap(int(tap[2]), tap[1] or "")
    module, _, side = text.rpartition(".")
    if side not in ("in", "out"):
        raise ValueError(f"no point of a model: {text!r}")
    return Port(module, "in" if side == "in" else "out")


def split_name(name: str) -> tuple[int, str]:
    """Layer and label (``Site.label``) of a site's name, for whoever has the name alone.

    Raises:
        ValueError: if it is no name of a site.
    """
    parts = re.fullmatch(r"(?:([^\d.][^.]*)\.)?(\d+)\.(.+)", name)
    if parts is None:
        raise ValueError(f"no name of a site: {name!r}")
    return int(parts[2]), (f"{parts[1]}." if parts[1] else "") + parts[3]
