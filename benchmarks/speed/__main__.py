"""``python -m benchmarks.speed [case ...]``: ours beside peers; what is measured and how: docs/performance.md."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed.bench import Bench
from benchmarks.speed.cases import CASES
from benchmarks.speed.machine import facts
from benchmarks.speed.process import CommandFailedError
from benchmarks.speed.render import fragment, put_into
from benchmarks.speed.results import Result, WrongResultError, read_result, read_results
from benchmarks.speed.subjects import Shelf
from heterolora.errors import SettingError
from heterolora.quiet import quieten

_log = logging.getLogger("benchmarks.speed")

TITLES = {name: case.title for name, case in CASES.items()}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    usual = [name for name, case in CASES.items() if not case.hours]
    made.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)} (default: {', '.join(usual)})")
    made.add_argument("--short", action="store_true", help="tiny models, 2 repetitions: are results right?")
    made.add_argument("--out", type=Path, help="folder for results (default: outputs/speed, or speed_short)")
    made.add_argument("--repeats", type=int, help="repetitions of what takes seconds (default: 15; short: 2)")
    made.add_argument("--threads", type=int, default=2, help="of torch (2)")
    made.add_argument("--seed", type=int, default=0, help="of models and batches (0)")
    made.add_argument("--seeds", default="0,1,2,3,4", help="of whole runs, with commas (0,1,2,3,4; short: the first)")
    made.add_argument("--data", default=os.environ.get("HETEROLORA_DATA"), help="as data.root (HETEROLORA_DATA)")
    made.add_argument("--again", action="store_true", help="also what was measured with this code and these settings")
    made.add_argument("--write", type=Path, metavar="DOCUMENT", help="measure nothing; put the tables into a document")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write down what was measured; 0 if all results are right, whatever they took."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        out = given.out or Path("outputs") / ("speed_short" if given.short else "speed")
        if given.write is not None:
            _write(given.write, out)
            return 0
        return _measure(given, out)
    except SettingError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _write(document: Path, out: Path) -> None:
    results = read_results(out)
    if not results:
        raise SettingError("--out", out, "holds no results; measure first")
    if short := sorted(name for name, result in results.items() if result.settings["short"]):
        raise SettingError("--write", document, f"{short} are of a short run, whose numbers mean nothing")
    put_into(document, fragment(results.values(), TITLES))
    _log.info("%s: %d cases", document, len(results))


def _measure(given: argparse.Namespace, out: Path) -> int:
    if out.exists() and not out.is_dir():
        raise SettingError("--out", out, "a folder for results")
    chosen = given.cases or [name for name, case in CASES.items() if not case.hours]
    if unknown := sorted(set(chosen) - CASES.keys()):
        raise SettingError("case", unknown, f"possible: {list(CASES)}")
    bench = _bench(given, out)
    _quieten()
    torch.set_num_threads(bench.threads)
    failed = []
    for number, name in enumerate(chosen, 1):
        place = f"{name} ({number} of {len(chosen)})"
        if not given.again and is_done(out / f"{name}.json", bench, name):
            _log.info("%s: measured before with this code and these settings; --again measures anew", place)
            continue
        _log.info("%s: %s", place, CASES[name].title)
        try:
            run(name, bench)
        except WrongResultError as error:
            _log.error("%s: %s", place, error)
            (out / f"{name}.json").unlink(missing_ok=True)  # an earlier result would look as if it still held
            failed.append(name)
        except (CommandFailedError, SettingError) as error:
            _log.error("%s: %s", place, error)
            failed.append(name)
        except Exception:  # the other cases are worth an hour; this one counts as wrong
            _log.exception("%s failed", place)
            failed.append(name)
    results = [read_result(path) for name in chosen if (path := out / f"{name}.json").exists()]
    sys.stdout.write(fragment([result for result in results if result.case not in failed], TITLES))
    if failed:
        _log.error("wrong: %s", ", ".join(failed))
    return 1 if failed else 0


def _bench(given: argparse.Namespace, out: Path) -> Bench:
    repeats = given.repeats if given.repeats is not None else 2 if given.short else 15
    for name, value in (("--repeats", repeats), ("--threads", given.threads)):
        if value < 1:
            raise SettingError(name, value, "a whole number of at least 1")
    try:
        seeds = tuple(int(text) for text in given.seeds.split(","))
    except ValueError:
        raise SettingError("--seeds", given.seeds, "whole numbers with commas between") from None
    out.mkdir(parents=True, exist_ok=True)
    root = str(Path(given.data).expanduser().absolute()) if given.data else None
    seeds = seeds[:1] if given.short else seeds
    return Bench(
        given.short, repeats, given.threads, given.seed, seeds, out.absolute(), root, Shelf(given.seed)
    )  # fmt: skip


def settings(bench: Bench, name: str) -> dict[str, object]:
    """On what a case's result depends, beside the code."""
    return bench.settings | ({"seeds": list(bench.seeds)} if CASES[name].hours else {})


def is_done(path: Path, bench: Bench, name: str) -> bool:
    """Whether a case was measured with this code, these versions and these settings."""
    if not path.exists():
        return False
    try:
        before = read_result(path)
    except SettingError:
        return False
    now = facts()
    same = all(before.machine[key] == now[key] for key in ("code", "versions", "cpu"))
    return same and dict(before.settings) == settings(bench, name)


def run(name: str, bench: Bench) -> Result:
    """Measure a case and write its file.

    Raises:
        WrongResultError: if things that are compared compute different values.
    """
    start = time.perf_counter()
    found = CASES[name].run(bench)
    result = Result(name, settings(bench, name), facts(), time.perf_counter() - start, found)
    result.write(bench.out)
    for row in found.rows:
        if row.met is False:
            _log.info("  not met: %s", row.what)
    return result


def _quieten() -> None:
    from transformers.utils import logging as theirs

    quieten()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
