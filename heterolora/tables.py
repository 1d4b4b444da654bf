"""The table of a folder of runs: read, compared, shown and kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from heterolora.comparison import Section, compare
from heterolora.errors import SettingError
from heterolora.report.files import write_text, write_whole
from heterolora.report.table import as_frame, as_latex, as_markdown, print_table
from heterolora.results import Found, find_results

FORMATS: Mapping[str, Callable[[Sequence[Section]], str]] = {
    "csv": lambda sections: as_frame(sections).to_csv(index=False),
    "markdown": as_markdown,
    "latex": as_latex,
}
"""What a table can be written as, beside the terminal."""


MOST_TOLERANCE = 0.01
"""Held parameters that differ by more are not equal (docs/protocol.md)."""


@dataclass(frozen=True)
class TableSettings:
    """What is shown of a folder of runs.

    Args:
        split: null: ``test`` where all runs have it, else ``validation``.
        metric: null: the task's first.
        baseline: the group that the others are compared with; null: no differences.
        primary: the group whose comparison was chosen beforehand; null: none.
        tolerance: by how much held parameters may differ, as a share; at most 0.01.
        unequal: compare runs that hold unequal parameters, or made unequal steps, all the same, and mark them.
    """

    split: str | None
    metric: str | None
    baseline: str | None
    primary: str | None
    tolerance: float
    unequal: bool

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= MOST_TOLERANCE:
            raise SettingError(
                "tolerance",
                self.tolerance,
                f"a share from 0 to {MOST_TOLERANCE}; to compare more, unequal=true or --unequal",
            )


@dataclass(frozen=True)
class FolderTable:
    """A folder's comparison.

    Attributes:
        sections: one for each task and backbone.
        unfinished: place -> state of the runs that are not in it.
    """

    sections: Sequence[Section]
    unfinished: Mapping[str, str] = field(default_factory=dict)

    def show(self) -> None:
        """On the terminal."""
        print_table(self.sections)

    def write(self, folder: Path) -> None:
        """As ``table.csv``, ``table.md`` and ``table.tex``."""
        write_whole(folder / "table.csv", partial(as_frame(self.sections).to_csv, index=False))
        write_text(folder / "table.md", as_markdown(self.sections))
        write_text(folder / "table.tex", as_latex(self.sections))

    @property
    def missing(self) -> str:
        """One line about the runs that are not in it; empty if there are none."""
        if not self.unfinished:
            return ""
        shown = ", ".join(f"{place} ({state})" for place, state in list(self.unfinished.items())[:3])
        more = f" and {len(self.unfinished) - 3} more" if len(self.unfinished) > 3 else ""
        return f"{len(self.unfinished)} runs are not finished and not in the table: {shown}{more}"


def table_of(folder: Path, settings: TableSettings) -> FolderTable:
    """Compare all finished runs below a folder; what is unfinished is named, and may be compared later.

    Raises:
        SettingError: if there are none, budgets are unequal, or a name does not exist.
    """
    return tabulate(find_results(folder), settings)


def tabulate(found: Found, settings: TableSettings) -> FolderTable:
    """Compare runs that were found.

    Raises:
        SettingError: if budgets are unequal, or a name does not exist.
    """
    settings = _as_declared(settings, found)
    sections = compare(
        found.results,
        split=settings.split,
        metric=settings.metric,
        baseline=settings.baseline,
        primary=settings.primary,
        tolerance=settings.tolerance,
        allow_unequal=settings.unequal,
    )
    return FolderTable(sections, found.unfinished)


def _as_declared(settings: TableSettings, found: Found) -> TableSettings:
    """With a tournament's own baseline, primary comparison and tolerance, which cannot be chosen afterwards.

    Raises:
        SettingError: if another primary comparison is asked for.
    """
    said = set(found.declared.values())
    for one in said:
        if settings.primary is not None and settings.primary != one.primary:
            raise SettingError("--primary", settings.primary, f"the tournament declared {one.primary}")
        if settings.primary is not None and settings.baseline != one.baseline:
            raise SettingError("--baseline", settings.baseline, f"the tournament declared {one.baseline}")
    if len(said) != 1 or settings.baseline is not None:
        return settings
    (one,) = said
    if {result.section for result in found.results} != set(found.declared):
        return settings
    return replace(
        settings, baseline=one.baseline, primary=one.primary, tolerance=min(settings.tolerance, one.tolerance)
    )
