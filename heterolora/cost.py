"""What an allocation costs in trainable parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Cost(Protocol):
    """Trainable parameters of an allocation; joint where factors are shared between sites."""

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """Parameters that one more unit of rank at ``name`` would add."""


@dataclass(frozen=True)
class AdditiveCost:
    """Every unit of rank at a site costs the same, whatever the others have.

    Attributes:
        units: site name -> parameters of one unit of rank.
    """

    units: Mapping[str, int]

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""
        return sum(rank * self.units[name] for name, rank in ranks.items())

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """Parameters of one unit of rank at the site."""
        return self.units[name]
