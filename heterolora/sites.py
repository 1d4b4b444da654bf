"""Sites: the places of a backbone that can carry a low-rank map from a source to a sink."""

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["lora", "shortcut"]


@dataclass(frozen=True, order=True)
class Tap:
    """A point of the residual stream.

    ``index`` 2l is the input of block l, 2l+1 the input of its feed-forward sub-layer, 2L the last block's output.
    """

    index: int

    def __str__(self) -> str:
        return f"t{self.index}"


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
    """

    name: str
    kind: Kind
    role: str
    layer: int
    source: Point
    sink: Point
    in_features: int
    out_features: int

    @property
    def span(self) -> int | None:
        """Number of sub-layers between two taps; None for a site that stays at one module."""
        if isinstance(self.source, Tap) and isinstance(self.sink, Tap):
            return self.sink.index - self.source.index
        return None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"source": str(self.source), "sink": str(self.sink), "span": self.span}
