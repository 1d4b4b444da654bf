"""Results as Markdown, and where they stand in a document."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.speed.results import Result, Row, Target
from heterolora.errors import SettingError
from heterolora.report.files import write_text

BEGIN = "<!-- speed:begin -->"
END = "<!-- speed:end -->"

_HEADER = "| what | ours | peer | ratio | target | met |\n| --- | ---: | ---: | ---: | ---: | --- |\n"


def fragment(results: Iterable[Result], titles: Mapping[str, str]) -> str:
    """A table for each case, in the order of the titles, and what they were measured with.

    Args:
        results: of the cases.
        titles: case -> title.
    """
    found = {result.case: result for result in results}
    parts = [_part(found[name], title) for name, title in titles.items() if name in found]
    return "\n".join(parts)


def _part(result: Result, title: str) -> str:
    rows = "".join(map(_line, result.found.rows))
    notes = "".join(f"- {note}\n" for note in dict.fromkeys(row.note for row in result.found.rows if row.note))
    checks, count = "", len(result.found.checks)
    if count:
        checks = f"- what is compared was shown to compute the same ({count} checks, see `{result.case}.json`)\n"
    return f"### {title}\n\n{_HEADER}{rows}\n{notes}{checks}- {_measured(result)}\n"


def _measured(result: Result) -> str:
    machine, settings = result.machine, result.settings
    versions = machine["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    short = " **A short run: its numbers mean nothing.**" if settings["short"] else ""
    return (
        f"`python -m benchmarks.speed {result.case}`, {machine['date'][:10]}, commit {machine['commit']}, seed "
        f"{settings['seed']}, {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {named}; "
        f"{result.seconds:,.0f} s.{short}"
    )


def _line(row: Row) -> str:
    peer = "" if row.peer is None else f"{number(row.peer, row.unit)} ({row.peer_name})"
    what = f"{row.what} (n = {row.n})"
    cells = [what, number(row.ours, row.unit), peer, ratio(row), target(row.target, row.unit), met(row)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def number(value: float, unit: str) -> str:
    """A measured number with its unit, to three digits."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "MiB":
        return f"{value:,.0f} MiB"
    if unit == "exponent":
        return f"{value:.2f}"
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 99.5 else f"{value:,.0f} s"


def ratio(row: Row) -> str:
    """The estimate and its interval."""
    if row.estimate is None:
        return ""
    if row.kind == "difference":
        points = [row.estimate, row.low, row.high]
        shown = ["?" if value is None else f"{100 * value:+.1f}" for value in points]
        return f"{shown[0]} points [{shown[1]}, {shown[2]}]"
    interval = "" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]"
    return f"{row.estimate:.3f}{interval}"


def target(wanted: Target | None, unit: str) -> str:
    """What shall hold."""
    if wanted is None:
        return ""
    if wanted.of == "difference":
        return "0 in the interval"
    return f"<= {number(wanted.limit, unit)}" if wanted.of == "ours" else f"<= {wanted.limit:.2f}"


def met(row: Row) -> str:
    """``met``, ``not met``, or nothing where nothing shall hold."""
    return "" if row.met is None else "met" if row.met else "**not met**"


def put_into(document: Path, text: str) -> None:
    """Replace what stands between the two markers of a document.

    Raises:
        SettingError: if it cannot be read, or has no markers.
    """
    try:
        before = document.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingError("--write", document, f"cannot be read ({error})") from error
    start, end = before.find(BEGIN), before.find(END)
    if start < 0 or end < start or before.count(BEGIN) != 1 or before.count(END) != 1:
        raise SettingError("--write", document, f"needs one line {BEGIN} and, after it, one line {END}")
    write_text(document, f"{before[: start + len(BEGIN)]}\n{text}{before[end:]}")
