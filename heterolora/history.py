"""The decisions of a dynamic run: ``history.jsonl``, one JSON object a line.

    {"step": 120, "scores": {"0.q": 0.5, "0.v": [0.4, 0.1]}, "ranks": {"0.q": 8, "0.v": 0}, "reason": "every 120 steps"}

The first line is the allocation that training starts with (step 0). The file is only appended to. A run that is
resumed decides anew from its checkpoint on, so a line replaces all lines before it whose step is not smaller than its
own. Runs that allocate once have no such file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterolora.allocation import check_ranks
from heterolora.errors import SettingError
from heterolora.proxies.base import Score
from heterolora.results import RowFile

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Decision:
    """What was decided at one moment of a run.

    Attributes:
        step: optimizer steps made before it.
        scores: site -> one number, or one for each unit of rank, largest first; empty if nothing was scored.
        ranks: site -> rank from then on, for every site of the search space (0: off).
        reason: why there was a decision, for people.
    """

    step: int
    scores: Mapping[str, Score]
    ranks: Mapping[str, int]
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: a line of the file."""
        scores = {
            name: value if isinstance(value, int | float) else [float(unit) for unit in value]
            for name, value in self.scores.items()
        }
        return {"step": self.step, "scores": scores, "ranks": dict(self.ranks), "reason": self.reason}


def append_decision(path: Path, decision: Decision) -> None:
    """Add a decision to the file, which need not exist, and wait until it is on the disk."""
    RowFile(path).append(decision.as_dict())


def read_history(path: Path) -> list[Decision]:
    """The decisions that count, in the order of their steps; what a process that died left of a line is no line.

    Args:
        path: the file; without one there are no decisions.

    Raises:
        SettingError: if a line is no decision, or the decisions are not about the same sites.
    """
    decisions: list[Decision] = []
    for number, row in enumerate(RowFile(path).rows(), 1):
        try:
            decision = _decision(row)
        except (KeyError, TypeError, ValueError) as error:
            why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise SettingError("history", f"{path}, line {number}", why) from error
        if decisions and decision.ranks.keys() != decisions[0].ranks.keys():
            raise SettingError("history", f"{path}, line {number}", "its sites are not those of the first line")
        while decisions and decisions[-1].step >= decision.step:
            decisions.pop()
        decisions.append(decision)
    return decisions


def _decision(row: Mapping[str, Any]) -> Decision:
    step, reason = row["step"], row["reason"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step {step!r} is no whole number of at least 0")
    if not isinstance(reason, str):
        raise ValueError(f"reason {reason!r} is no text")
    if not isinstance(row["scores"], Mapping):
        raise ValueError("scores are no JSON object")
    ranks = check_ranks(row["ranks"])
    scores = {name: _score(name, value) for name, value in row["scores"].items()}
    if unknown := sorted(scores.keys() - ranks.keys()):
        raise ValueError(f"scores of sites without a rank: {unknown}")
    return Decision(step, scores, ranks, reason)


def _score(name: str, value: Any) -> Score:
    units = value if isinstance(value, list) else [value]
    if not all(isinstance(unit, int | float) and not isinstance(unit, bool) and math.isfinite(unit) for unit in units):
        raise ValueError(f"the score of {name}, {value!r}, is neither a finite number nor a list of them")
    return [float(unit) for unit in value] if isinstance(value, list) else float(value)
