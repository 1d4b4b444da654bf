"""An allocation: how much rank each site of a search space gets, what that costs, and where it came from."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Allocation:
    """Site name -> rank, for every site of the search space (0: no adapter).

    Attributes:
        ranks: rank of each site.
        spent: trainable adapter parameters that these ranks cost.
        budget: parameters that were allowed; None when the budget was a number of sites.
        provenance: what it was computed from (backbone, proxy, seed, versions, ...), plain values.

    Raises:
        ValueError: for a negative rank, or if more is spent than the budget allows.
    """

    ranks: Mapping[str, int]
    spent: int
    budget: int | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if negative := {name: rank for name, rank in self.ranks.items() if rank < 0}:
            raise ValueError(f"negative ranks: {negative}")
        if self.budget is not None and self.spent > self.budget:
            raise ValueError(f"the allocation spends {self.spent} parameters of a budget of {self.budget}")

    @property
    def unspent(self) -> int | None:
        """Parameters of the budget that were not used; None when the budget was a number of sites."""
        return None if self.budget is None else self.budget - self.spent

    @property
    def active(self) -> dict[str, int]:
        """The sites that got rank."""
        return {name: rank for name, rank in self.ranks.items() if rank > 0}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": FORMAT,
            "spent": self.spent,
            "budget": self.budget,
            "unspent": self.unspent,
            "ranks": dict(self.ranks),
            "provenance": dict(self.provenance),
        }


def read_ranks(path: Path) -> dict[str, int]:
    """Ranks from an ``allocation.json`` of ours, or from a plain JSON object of site name -> rank.

    Raises:
        ValueError: if the file is not JSON, or holds anything but whole ranks of at least 0.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a JSON file ({error})") from error
    if isinstance(content, dict) and "format" in content:
        if content["format"] != FORMAT:
            raise ValueError(f"allocation format {content['format']!r}, this version reads format {FORMAT}")
        content = content.get("ranks")
    return check_ranks(content)


def check_ranks(content: Any) -> dict[str, int]:
    """Ranks as plain values.

    Raises:
        ValueError: if it is no mapping of site name -> whole rank of at least 0.
    """
    if not isinstance(content, Mapping):
        raise ValueError("a JSON object of site name -> rank is needed")
    wrong = {k: v for k, v in content.items() if not isinstance(v, int) or isinstance(v, bool) or v < 0}
    if wrong:
        raise ValueError(f"ranks must be whole numbers of at least 0, got {wrong}")
    return dict(content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1):
        raise ValueError(f"named twice: {twice}")
    return dict(pairs)
