"""Sites: the places of a backbone that can carry a low-rank map from a source to a sink."""

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["lora", "shortcut"]

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Roles that one linear layer plays at once, in the backbones that compute them together."""


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
