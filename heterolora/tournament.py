"""A declared comparison: methods, seeds and learning rates are fixed before the first run, and so is what is compared.

The rules, and why they are these, are in ``docs/protocol.md``.
"""

import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.farm import Cell, processes, run_cells
from heterolora.parts import make_parts, result_settings
from heterolora.report.files import write_json
from heterolora.results import ROWS, RowFile, check_controls
from heterolora.scoring import no_gains
from heterolora.space import survey
from heterolora.tables import MOST_TOLERANCE

_log = logging.getLogger(__name__)

Compose: TypeAlias = Callable[[Sequence[str]], tuple[dict[str, Any], dict[str, Any]]]
"""Overrides -> resolved config, and group -> option."""

METHOD = ("search_space", "proxy", "probe", "allocator", "budget", "allocation", "adapter", "init")
"""What methods may change: where and how large adapters are, and what they are. All else is shared, so that they see
the same data in the same order for the same steps; the learning rate is chosen for each by as many trials."""

SCALE = ("scaling", "scale", "dropout")
"""What of ``adapter`` is shared, too: one scale rule."""

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@dataclass(frozen=True)
class Tournament:
    """What is compared, declared before anything is run.

    Args:
        name: of its folder; a folder holds one declaration, and another one is refused there.
        methods: name -> overrides of the config that make it.
        baseline: the method that the others are compared with; runs hold what it may hold.
        primary: the method whose comparison with the baseline is the claim; the others' p-values are corrected. Null:
            none is, and all are.
        control: a method that is run a second time under each seed and must agree bit for bit; null: none.
        seeds: of the runs that are reported.
        rates: learning rates; if there are several, each method is run with each under ``tuning_seeds`` and keeps the
            one with the best mean first metric on validation.
        tuning_seeds: seeds of those trials, none of which is in ``seeds``.
        workers: processes; null: as many as the cores allow with ``trainer.threads`` each.
        tolerance: by how much held parameters may differ from the baseline's, as a share of them; at most 0.01.
    """

    name: str
    methods: Mapping[str, Sequence[str]]
    baseline: str
    primary: str | None
    control: str | None
    seeds: Sequence[int]
    rates: Sequence[float]
    tuning_seeds: Sequence[int]
    workers: int | None
    tolerance: float

    def __post_init__(self) -> None:
        names = list(self.methods)
        if wrong := [name for name in (self.name, *names) if not name or set(name) - _NAME]:
            raise SettingError("name", wrong[0], "names have letters, digits, - and _")
        if len(names) < 2:
            raise SettingError("methods", names, "at least two are needed")
        for key in ("baseline", "primary", "control"):
            given = getattr(self, key)
            if given not in names and (given is not None or key == "baseline"):
                raise SettingError(key, given, f"possible: {names}")
        if self.primary == self.baseline:
            raise SettingError("primary", self.primary, "is the baseline; name another method, or null")
        if not 0 <= self.tolerance <= MOST_TOLERANCE:
            raise SettingError("tolerance", self.tolerance, f"a share from 0 to {MOST_TOLERANCE}")
        self._check_lists()

    def _check_lists(self) -> None:
        for key in ("seeds", "rates", "tuning_seeds"):
            given = list(getattr(self, key))
            if not given and key != "tuning_seeds":
                raise SettingError(key, given, "at least one")
            if len(set(given)) < len(given):
                raise SettingError(key, given, "each once")
        if wrong := [rate for rate in self.rates if not 0 < rate < math.inf]:
            raise SettingError("rates", wrong, "numbers above 0")
        if unusable := [seed for seed in (*self.seeds, *self.tuning_seeds) if not 0 <= seed < 2**32]:
            raise SettingError("seeds", unusable, "whole numbers from 0 to 2^32 - 1")
        if len(self.rates) > 1 and not self.tuning_seeds:
            raise SettingError("tuning_seeds", [], f"at least one, to choose among {len(self.rates)} rates")
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise SettingError("tuning_seeds", both, "are seeds of reported runs, too; choose on others")

    def declaration(self) -> dict[str, Any]:
        """Everything on which the outcome depends."""
        return {key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key != "workers"}


@dataclass(frozen=True)
class Outcome:
    """What a tournament found.

    Attributes:
        rows: of the reported runs and the controls; some may have failed.
        rates: method -> the learning rate that it was run with.
        notes: what a reader should know.
    """

    rows: tuple[Mapping[str, Any], ...]
    rates: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        """Rows of runs that did not finish."""
        return [row for row in self.rows if row["state"] != "finished"]


def run_tournament(tournament: Tournament, compose: Compose, overrides: Sequence[str], folder: Path) -> Outcome:
    """Choose the learning rates, run everything, and check it.

    What is done already is not done again.

    Args:
        tournament: the declaration.
        compose: makes configs of overrides.
        overrides: what all runs have in common.
        folder: where its rows and runs are, or will be.

    Raises:
        SettingError: if methods differ in what they must share, hold unequal parameters as far as is known before
            scores are, the folder holds another declaration, a trial failed, or a control differs from the run that it
            repeats.
        ProcessLostError: see ``run_cells``.
    """
    plan = _Plan(tournament, compose, overrides)
    plan.check()
    _declare(folder, {**tournament.declaration(), "shared": plan.shared})
    _log.info(
        "tournament %s: %d methods, %d seeds, %d learning rates; %s",
        tournament.name,
        len(tournament.methods),
        len(tournament.seeds),
        len(tournament.rates),
        folder,
    )
    rates, notes = plan.tune(folder)
    cells = plan.cells(rates)
    rows = run_cells(cells, folder, workers=tournament.workers, keep=True)
    if repeated := check_controls(rows):
        notes.append(f"control: the runs with seeds {repeated} were repeated, and are the same bit for bit")
    return Outcome(tuple(rows), rates, tuple(notes))


def forecast(tournament: Tournament, compose: Compose, overrides: Sequence[str]) -> dict[str, int | None]:
    """What each method will hold, None where that depends on scores; nothing is run.

    Raises:
        SettingError: as ``run_tournament`` does before the first run.
    """
    return _Plan(tournament, compose, overrides).check()


class _Plan:
    """The runs of a tournament."""

    def __init__(self, tournament: Tournament, compose: Compose, overrides: Sequence[str]) -> None:
        self.tournament = tournament
        self.compose = compose
        self.overrides = [
            *(text for text in overrides if not text.lstrip("+~").startswith("tournament")),
            "tournament=null",
        ]
        self.held: tuple[int, int] | None = None
        self.shared: dict[str, Any] = {}

    def cell(self, method: str, seed: int, rate: float, stage: str) -> Cell:
        """One run."""
        given = merged(self.overrides, self.tournament.methods[method])
        given = merged(given, [f"seed={seed}", f"optimizer.lr={rate!r}"])
        if stage == "tuning":
            given = merged(given, ["trainer.test=false"])  # what is reported is not looked at
        try:
            config, choices = self.compose(given)
        except SettingError as error:
            raise self._refused(method, error.possible) from error
        key = f"{stage}-{method}-lr{rate!r}-s{seed}"
        return Cell(key, method, stage, config, choices, command(given), self.held)

    def check(self) -> dict[str, int | None]:
        """Refuse what can be refused before anything is run.

        Returns:
            What each method will hold, as far as that does not depend on scores.
        """
        tournament = self.tournament
        first = {name: self.cell(name, tournament.seeds[0], tournament.rates[0], "run") for name in tournament.methods}
        for cell in first.values():
            make_parts(cell.config, cell.choices)
        try:
            processes(tournament.workers, list(first.values()))
        except SettingError as error:
            raise (error.under("tournament") if error.setting == "workers" else error) from None
        self.shared = _shared(first[tournament.baseline].config)
        for name, cell in first.items():
            if (given := _shared(cell.config)) != self.shared:
                raise self._refused(name, f"changes what all must share: {_difference(self.shared, given)}")
        if not self.shared["trainer"]["test"]:
            raise SettingError(
                "trainer.test", False, "a tournament reports on the test split; its trials leave it alone"
            )
        forecasts = {name: _forecast(cell) for name, cell in first.items()}
        budget, spent = forecasts[tournament.baseline]
        reference = budget if spent is None else spent
        known = {name: found for name, (_, found) in forecasts.items()}
        if reference is None:
            return known  # the budget counts sites: what they hold is known, and checked, when they have run
        share, least = tournament.tolerance, math.ceil(reference * (1 - tournament.tolerance))
        most = math.floor(reference * (1 + share))
        most = max(reference, most if budget is None else min(budget, most))  # nobody may buy more than the baseline
        self.held = least, most
        for name, found in known.items():
            if found is not None and not least <= found <= most:
                raise self._refused(
                    name, f"would hold {found} parameters, {tournament.baseline} {reference}; {least} to {most} will do"
                )
        return known

    def _refused(self, method: str, why: str) -> SettingError:
        return SettingError(f"tournament.methods.{method}", list(self.tournament.methods[method]), why)

    def tune(self, folder: Path) -> tuple[dict[str, float], list[str]]:
        """The learning rate of each method, and what a reader should know about the choice.

        Raises:
            SettingError: if no rate of a method could be run to its end.
        """
        tournament, rates, seeds = self.tournament, self.tournament.rates, self.tournament.tuning_seeds
        if len(rates) == 1:
            return dict.fromkeys(tournament.methods, rates[0]), []
        path = folder / "rates.json"
        if path.exists():
            kept = _read(path)
            return kept["rates"], kept["notes"]
        trials = [(method, rate, seed) for method in tournament.methods for rate in rates for seed in seeds]
        cells = [self.cell(method, seed, rate, "tuning") for method, rate, seed in trials]
        rows = run_cells(cells, folder, workers=tournament.workers, keep=False)
        if broken := [row for row in rows if row["state"] != "finished" and not row.get("diverged")]:
            raise SettingError(
                "tournament",
                tournament.name,
                f"{len(broken)} of {len(rows)} trials failed, the first is {broken[0]['key']}: {broken[0]['error']}; a "
                "learning rate is chosen from all of them, and the same command tries them again",
            )
        larger = make_parts(cells[0].config, cells[0].choices).task.mode == "max"
        found: dict[str, dict[float, list[float]]] = {}
        for (method, rate, _), row in zip(trials, rows, strict=True):
            value = _first(row, worst=-math.inf if larger else math.inf)
            found.setdefault(method, {}).setdefault(rate, []).append(value)
        chosen, notes = {}, []
        for method, values in found.items():
            chosen[method], note = self._best(method, values, larger)
            notes.append(note)
            _log.info("%s", note)
        write_json(path, {"rates": chosen, "notes": notes})  # chosen once, whatever is run again
        return chosen, notes

    def _best(self, method: str, values: Mapping[float, Sequence[float]], larger: bool) -> tuple[float, str]:
        """The rate with the best mean, the lowest of equals, and a note about it."""
        means = {rate: sum(given) / len(given) for rate, given in values.items()}
        best = (max if larger else min)(means.values())
        if not math.isfinite(best):
            raise self._refused(
                method, f"diverged, or has no defined metric, with every learning rate of {list(means)}"
            )
        chosen = min(rate for rate, mean in means.items() if mean == best)
        shown = ", ".join(f"{rate!r}: {mean:.4f}" for rate, mean in means.items())
        seeds = list(self.tournament.tuning_seeds)
        note = f"{method}: learning rate {chosen!r}, by validation with seeds {seeds} ({shown})"
        if len(means) > 2 and chosen in (min(means), max(means)):
            note += "; it is at the edge of the grid"
        return chosen, note

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """The reported runs, seed by seed, so that one that is broken off has whole pairs; then the controls."""
        methods, seeds, control = self.tournament.methods, self.tournament.seeds, self.tournament.control
        cells = [self.cell(method, seed, rates[method], "run") for seed in seeds for method in methods]
        if control is not None:
            cells += [self.cell(control, seed, rates[control], "control") for seed in seeds]
        return cells


def merged(overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """Overrides in which later ones replace earlier ones of the same name."""
    table = {text.partition("=")[0].lstrip("+~"): text for text in overrides}
    for text in more:
        name = text.partition("=")[0].lstrip("+~")
        table.pop(name, None)
        table[name] = text
    return list(table.values())


def command(overrides: Sequence[str]) -> str:
    """What a shell runs with these overrides."""
    return " ".join(["python", "train.py", *map(shlex.quote, overrides)])


def _forecast(cell: Cell) -> tuple[int | None, int | None]:
    """The budget in parameters, and what will be held where that does not depend on scores; None: not known."""
    nodes = ("model", "search_space", "adapter", "allocator", "budget", "task")
    made = {node: build(cell.config[node], node) for node in nodes}
    skeleton = made["model"].skeleton(2)
    space = made["search_space"].resolve(survey(skeleton.model, skeleton.layout))
    budget = made["budget"].resolve(space)
    if made["allocator"].gain_rule is not None:
        return (budget if isinstance(budget, int) else None), None
    cost = made["adapter"].cost(space.sites)
    spent = made["allocator"].allocate(no_gains(space.sites), cost, budget, space.groups).spent
    return (budget if isinstance(budget, int) else None), spent


def _declare(folder: Path, declaration: Mapping[str, Any]) -> None:
    """Write the declaration; once a run is finished, another one than the one that is there is refused.

    Raises:
        SettingError: if it differs, with what differs.
    """
    path, declaration = folder / "declaration.json", json.loads(json.dumps(declaration))
    done = any(row.get("state") == "finished" for row in RowFile(folder / ROWS).rows())
    if done and not path.exists():
        raise SettingError("tournament.name", declaration["name"], f"{folder} holds rows, but no declaration")
    if done and (before := _read(path)) != declaration:
        raise SettingError(
            "tournament.name",
            declaration["name"],
            f"{folder} was declared otherwise: {_difference(before, declaration)}; a comparison is declared before "
            "its first run, give another name",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, declaration)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError("tournament.name", path, f"is damaged ({error})") from error
    return content


def _difference(before: Any, after: Any, name: str = "") -> str:
    """The first place in which two configs differ, and the two values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                return _difference(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
    return f"{name + ': ' if name else ''}{before} and {after}"


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that is the same for all methods, at one seed and one learning rate."""
    shared = {key: value for key, value in result_settings(config).items() if key not in METHOD}
    shared["data"] = {key: value for key, value in shared["data"].items() if key != "root"}  # rows have a digest of it
    return shared | {"adapter": {key: config["adapter"].get(key) for key in SCALE}, "callbacks": config["callbacks"]}


def _first(row: Mapping[str, Any], worst: float) -> float:
    """The first metric on validation; a run that diverged, or has none, is the worst."""
    if row["state"] != "finished":
        return worst
    value = next(iter(row["metrics"]["validation"].values()))
    return worst if value is None else float(value)
