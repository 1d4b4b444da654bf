"""What a case found: rows for a table, in a file that says how they came about."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from benchmarks.speed.pairs import paired_ratio
from heterolora.errors import SettingError
from heterolora.report.files import read_json, write_json
from heterolora.statistics import Estimate, paired_difference

FORMAT = 1

Unit: TypeAlias = Literal["s", "MiB", "share", "exponent"]


class WrongResultError(AssertionError):
    """Two things that are timed beside each other compute different values: their times would mean nothing."""


@dataclass(frozen=True)
class Target:
    """What shall hold.

    Attributes:
        of: the ratio, our own number, or the difference (whose interval shall hold 0).
        limit: the largest that is allowed; of a difference: not used.
    """

    of: Literal["ratio", "ours", "difference"]
    limit: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: what was measured.
        ours: median (shares: mean) of our numbers.
        peer: likewise; None: there is none.
        peer_name: whose.
        unit: of both; a share is shown in per cent.
        estimate: ratio or difference, as ``kind`` says; None: neither.
        low: lower end of its 95 % interval; None: there is none.
        high: upper end.
        kind: of the estimate.
        n: pairs, or numbers where there is no peer.
        target: what shall hold, if something shall.
        samples: name -> every number.
        note: what a reader must know.
    """

    what: str
    ours: float
    peer: float | None
    peer_name: str
    unit: Unit
    estimate: float | None
    low: float | None
    high: float | None
    kind: Literal["ratio", "difference", "none"]
    n: int
    target: Target | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None: there is none, or one seed alone, which has no interval."""
        if self.target is None or (self.target.of == "difference" and (self.low is None or self.high is None)):
            return None
        if self.target.of == "ours":
            return self.ours <= self.target.limit
        if self.target.of == "ratio":
            return self.estimate is not None and self.estimate <= self.target.limit
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


def compared(
    what: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    *,
    unit: Unit = "s",
    target: float | None = None,
    note: str = "",
) -> Row:
    """A row of paired numbers: their ratio, which shall be ``target`` at most."""
    found = paired_ratio(ours, peer)
    wanted = None if target is None else Target("ratio", target)
    medians = statistics.median(ours), statistics.median(peer)
    return _row(what, *medians, peer_name, unit, found, "ratio", wanted, {"ours": ours, "peer": peer}, note)


def differing(what: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, note: str = "") -> Row:
    """A row of paired shares: the mean difference with its t interval, which shall hold 0."""
    found = paired_difference(ours, peer)
    means = statistics.fmean(ours), statistics.fmean(peer)
    samples = {"ours": ours, "peer": peer}
    return _row(what, *means, peer_name, "share", found, "difference", Target("difference"), samples, note)


def alone(what: str, ours: Sequence[float], *, unit: Unit = "s", target: float | None = None, note: str = "") -> Row:
    """A row without a peer."""
    wanted = None if target is None else Target("ours", target)
    middle = statistics.median(ours)
    nothing = Estimate(math.nan, math.nan, math.nan, len(ours))
    return _row(what, middle, None, "", unit, nothing, "none", wanted, {"ours": ours}, note)


def _row(
    what: str,
    ours: float,
    peer: float | None,
    peer_name: str,
    unit: Unit,
    found: Estimate,
    kind: Literal["ratio", "difference", "none"],
    target: Target | None,
    samples: Mapping[str, Sequence[float]],
    note: str,
) -> Row:
    value, low, high = (None if math.isnan(number) else number for number in (found.value, found.low, found.high))
    lists = {name: list(values) for name, values in samples.items()}
    return Row(what, ours, peer, peer_name, unit, value, low, high, kind, found.n, target, lists, note)


@dataclass(frozen=True)
class Found:
    """What a case found.

    Attributes:
        rows: the table.
        checks: what was found equal before anything was timed.
        more: anything else for the record.
    """

    rows: Sequence[Row]
    checks: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A case's file.

    Attributes:
        case: its name.
        settings: what it was asked for.
        machine: where and with what.
        seconds: how long it took.
        found: the rest.
    """

    case: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    seconds: float
    found: Found

    def write(self, folder: Path) -> None:
        """``folder/<case>.json``, whole or not at all."""
        content = {"format": FORMAT, **asdict(self)}
        for row, made in zip(content["found"]["rows"], self.found.rows, strict=True):
            row["met"] = made.met
        write_json(folder / f"{self.case}.json", content)


def read_result(path: Path) -> Result:
    """A case's file.

    Raises:
        SettingError: if it is none.
    """
    content = read_json(path, "--out")
    try:
        if content["format"] != FORMAT:
            raise SettingError("--out", path, f"has format {content['format']}, this is {FORMAT}: measure it again")
        given = content["found"]
        rows = [_read_row(row) for row in given["rows"]]
        found = Found(rows, given["checks"], given["more"])
        return Result(content["case"], content["settings"], content["machine"], content["seconds"], found)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingError("--out", path, f"is no result of this benchmark ({error!r})") from error


def _read_row(row: Mapping[str, Any]) -> Row:
    values = {key: value for key, value in row.items() if key != "met"}
    if values["target"] is not None:
        values["target"] = Target(**values["target"])
    return Row(**values)


def read_results(folder: Path) -> dict[str, Result]:
    """Case -> its result, of all files of a folder."""
    found = [read_result(path) for path in sorted(folder.glob("*.json"))]
    return {result.case: result for result in found}
