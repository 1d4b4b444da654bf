"""From a composed config to a finished run: the only file that knows Hydra."""

import errno
import logging
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from heterolora.build import build
from heterolora.callbacks.allocate import Static
from heterolora.errors import ProcessLostError, SettingError
from heterolora.launch import OURS, Followers, Place, find_place, leave_with_starter
from heterolora.parts import NODES, Parts, config_hash, make_parts
from heterolora.processes import ALONE, Processes, joined, listening, waiting
from heterolora.proxies.base import DegenerateScores
from heterolora.quiet import quieten
from heterolora.report.files import read_json, write_json
from heterolora.resume import STATUS, Resume, find_finished, find_resume, make_room, mark_continued, this_process
from heterolora.searching import Questions, run_search
from heterolora.shipped import config_folder, option
from heterolora.tables import TableSettings, table_of
from heterolora.tournament import Compose, Tournament, forecast, run_tournament
from heterolora.training import run_training

_log = logging.getLogger(__name__)

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)
"""Errors of a disk or a folder that only the user can mend."""


_EXPECTED = (SettingError, DegenerateScores, FloatingPointError, ProcessLostError)
"""Errors whose message says it all."""


class RunFailed(CompactHydraException):
    """Shown by Hydra as its message alone, without a traceback unless HYDRA_FULL_ERROR=1."""


def train(cfg: DictConfig) -> float:
    """One run, in the folder that Hydra made for it.

    Returns:
        The task's first metric on the validation split; NaN for ``run=dry``, which trains nothing.

    Raises:
        RunFailed: for anything that a user can mend, with one line that says what.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    choices = own_choices(hydra.runtime.choices)
    quieten()
    place = find_place(os.environ)
    if place is not None and place.rank:
        _follow(cfg, choices, place)
        return math.nan
    scope, finished = _before(cfg, folder, hydra)
    if finished:
        return _first_metric(folder)
    with _preemptible(place), _status(folder) as status:
        _check_choices(choices, hydra.overrides.task)
        config = _resolved(cfg)
        if config["tournament"] is not None:
            if place is not None:
                raise SettingError("tournament", place.starter, "a tournament starts its processes itself")
            _hold_tournament(config, hydra.overrides.task)
            return math.nan
        parts = make_parts(config, choices)
        status["config_hash"] = config_hash(config)
        status["overrides"] = list(hydra.overrides.task)
        if (done := scope and find_finished(scope, status["config_hash"])) is not None:
            status |= {"state": "skipped", "done_in": str(done)}
            return _first_metric(done)
        write_json(folder / STATUS, status)
        with _together(parts, folder, place, hydra.mode == RunMode.MULTIRUN) as processes:
            status["processes"] = processes.size
            _, resume = _shared(parts, config, folder, processes, scope)
            if resume is not None:
                status["resumed_from"] = str(resume.run)
            write_json(folder / STATUS, status)
            summary = run_training(parts, config, folder, resume, processes=processes)
        if parts.dry:
            status["state"] = "planned"
        if resume is not None:
            mark_continued(resume.run, folder)
    if parts.dry:
        return math.nan
    first = parts.task.metrics[0]
    return float(summary["metrics"]["validation"][first])


def _before(cfg: DictConfig, folder: Path, hydra: Any) -> tuple[Path | None, bool]:
    """Make room in a job's folder.

    Returns:
        The folder of the sweep that is gone on with, if one is; and whether the job was finished before.

    Raises:
        RunFailed: if the folder holds something else.
    """
    swept = hydra.mode == RunMode.MULTIRUN
    asked = cfg.sweep.resume
    try:
        if not isinstance(asked, bool) or (asked and not swept):
            raise SettingError("sweep.resume", asked, "true or false, for sweeps (-m); one run has resume=true")
        if not swept:
            cfg.sweep.name = None  # it is in none
        finished = make_room(folder, asked)
        if finished:
            config = _resolved(cfg)
            if read_json(folder / STATUS, "sweep.resume").get("config_hash") != config_hash(config):
                raise SettingError("hydra.run.dir", folder, "holds a finished run with another config")
            _log.info("%s is finished already", folder)
    except SettingError as error:
        raise RunFailed(str(error)) from error
    return Path(hydra.sweep.dir) if asked else None, finished


def _first_metric(folder: Path) -> float:
    """Of a finished run, what it returned; NaN where that is not defined, or it has none, as a search."""
    if not (folder / "summary.json").exists():
        return math.nan
    metrics = read_json(folder / "summary.json", "sweep.resume")["metrics"]["validation"]
    first = next(iter(metrics.values()))
    return math.nan if first is None else float(first)


def _follow(cfg: DictConfig, choices: Mapping[str, Any], place: Place) -> None:
    """The part of every process of a run but the first.

    Raises:
        RunFailed: for anything that a user can mend, and where another process is gone.
    """
    leave_with_starter(os.environ)
    logging.getLogger("heterolora").setLevel(logging.WARNING)  # what happens is told once
    try:
        config = _resolved(cfg)
        parts = make_parts(config, choices)
        with _terminable(), joined(place, parts.trainer.uses_cuda()) as processes:
            folder, resume = _shared(parts, config, Path(), processes)
            run_training(parts, config, folder, resume, processes=processes)
    except _EXPECTED as error:
        raise RunFailed(str(error)) from error


@contextmanager
def _together(parts: Parts, folder: Path, place: Place | None, multirun: bool) -> Iterator[Processes]:
    """All processes of the run whose first one this is; they are started here, or were by torchrun or srun.

    Raises:
        SettingError: if these settings start processes where none can be started.
        ProcessLostError: if one ends before its time, saying which and why.
    """
    trainer = parts.trainer
    if place is None and (trainer.devices == 1 or parts.dry):
        yield ALONE
        return
    if multirun and (place is None or "SUBMITIT_EXECUTOR" not in os.environ):
        raise SettingError(
            "trainer.devices",
            trainer.devices if place is None else f"{place.size}, by {place.starter}",
            "not in a sweep (-m), whose jobs would each start their processes by the sweep's own command: give one run "
            "at a time, or hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=2",
        )
    if place is not None:
        with joined(place, trainer.uses_cuda()) as processes:
            yield processes
        return
    store = listening()
    followers = Followers(trainer.devices - 1, folder, store.port, waiting)
    finished = False
    try:
        own = Place(0, trainer.devices, 0, trainer.devices, "127.0.0.1", store.port, OURS)
        with joined(own, trainer.uses_cuda(), store, followers.lost) as processes:
            yield processes
        finished = True
    except (ProcessLostError, SystemExit) as error:
        if (lost := followers.lost_soon(5.0 if isinstance(error, ProcessLostError) else 0.0)) is not None:
            raise ProcessLostError(lost) from error
        raise
    finally:
        followers.end(finished)


def _shared(
    parts: Parts, config: Mapping[str, Any], folder: Path, processes: Processes, scope: Path | None = None
) -> tuple[Path, Resume | None]:
    """The run's folder, and the run to go on with, as the first process has them."""
    processes.check_equal("the config", config_hash(config))

    def find() -> tuple[Path, Resume | None]:
        look = processes.leads and not parts.dry
        return folder.absolute(), find_resume(config, folder, scope) if look else None

    return processes.agreed(find, SettingError)


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError("config", error.full_key or "?", str(error).splitlines()[0]) from error
    found: dict[str, Any] = config
    return found


def search(cfg: DictConfig) -> None:
    """One search without fine-tuning, in the folder that Hydra made for it.

    Raises:
        RunFailed: for anything that a user can mend, with one line that says what.
    """
    hydra = HydraConfig.get()
    folder, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
    choices = own_choices(hydra.runtime.choices)
    quieten()
    scope, finished = _before(cfg, folder, hydra)
    if finished:
        return
    with _status(folder) as status:
        _check_choices(choices, overrides)
        config = _resolved(cfg)
        if (place := find_place(os.environ)) is not None:
            raise SettingError("search.py", f"{place.size} processes, by {place.starter}", "a search takes one")
        for key, only in (
            ("tournament", None),
            ("run", "full"),
            ("resume", False),
            ("start_from", None),
            ("baseline", None),
        ):
            if config[key] != only:
                raise SettingError(key, config[key], f"is for train.py; a search has {str(only).lower()} there")
        parts = make_parts(config, choices)
        if not isinstance(parts.allocation, Static):
            raise SettingError(
                "allocation", choices.get("allocation"), "is for train.py; a search allocates once: static"
            )
        status["config_hash"] = config_hash(config)
        status["overrides"] = overrides
        if (done := scope and find_finished(scope, status["config_hash"])) is not None:
            status |= {"state": "skipped", "done_in": str(done)}
            return
        write_json(folder / STATUS, status)
        run_search(parts, config, folder, _questions(parts, config, overrides))


def _questions(parts: Parts, config: Mapping[str, Any], overrides: Sequence[str]) -> Questions:
    """What ``proxies``, ``budgets``, ``scores`` and ``resamples`` ask for."""
    proxies = _asked("proxies", "proxy", parts, config, overrides)
    budgets = _asked("budgets", "budget", parts, config, overrides)
    chosen = str(parts.choices.get("proxy"))
    if config["proxies"] is None and parts.allocator.gain_rule is None:
        proxies = {}  # scores would serve nothing
    resamples, scores = config["resamples"], config["scores"]
    if not isinstance(resamples, int) or isinstance(resamples, bool) or resamples < 0:
        raise SettingError("resamples", resamples, "a whole number of at least 0")
    if scores is not None and not isinstance(scores, str):
        raise SettingError("scores", scores, "the scores.json of an earlier search, or its folder; or null")
    return Questions(
        proxies={name: build(node, "proxies") for name, node in proxies.items()},
        first=chosen if chosen in proxies or not proxies else next(iter(proxies)),
        budgets={name: build(node, "budgets") for name, node in budgets.items()},
        nodes={"proxy": proxies, "budget": budgets},
        scores=None if scores is None else Path(scores).expanduser(),
        resamples=resamples,
    )


def _asked(
    setting: str, group: str, parts: Parts, config: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Name -> node of everything that a list asks for, or of the group's one choice.

    Raises:
        SettingError: if two have one name, or the group was chosen and is not in the list.
    """
    chosen = str(parts.choices.get(group))
    if config[setting] is None:
        return {chosen: config[group]}
    asked: dict[str, dict[str, Any]] = {}
    for entry in _list(config, setting):
        name, node = _named(setting, entry, group, parts.seed)
        if name in asked:
            raise SettingError(setting, config[setting], f"two of them would be called {name}")
        asked[name] = node
    given = [text for text in overrides if text.lstrip("+~").startswith((f"{group}=", f"{group}."))]
    if given and chosen not in asked:
        raise SettingError(group, chosen, f"{given[0]} was given, and {setting}={list(asked)} leaves it out")
    if chosen in asked:
        asked[chosen] = config[group]  # with the arguments that were given
    return asked


def _list(config: Mapping[str, Any], setting: str) -> list[Any]:
    given = config[setting]
    if not isinstance(given, list) or not given or len({str(item) for item in given}) < len(given):
        raise SettingError(setting, given, f"a list of different names, such as '{setting}=[a,b]'; or null")
    return given


def _named(setting: str, given: Any, group: str, seed: int) -> tuple[str, dict[str, Any]]:
    """Name and node of an entry of a list: an option of the group, a number of parameters, or a node of its own."""
    if isinstance(given, dict) and isinstance(given.get("_target_"), str):
        return given["_target_"].rpartition(".")[2].lower(), given
    if group == "budget" and isinstance(given, int) and not isinstance(given, bool):
        return str(given), {**option("budget", "params"), "value": given}
    return str(given), option(group, str(given), setting, seed)


def _hold_tournament(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Several methods, as declared; its folder is the declaration's, whatever folder Hydra made for the log.

    Raises:
        SettingError: for anything that a user can mend, also where a run failed.
    """
    tournament: Tournament = build(config["tournament"], "tournament")
    if config["resume"] is not False:
        raise SettingError("resume", config["resume"], "a tournament goes on by itself: give the same command again")
    folder = Path(config["outputs"]) / "tournaments" / tournament.name
    with composer() as config_of:
        if config["run"] == "dry":
            for method, held in forecast(tournament, config_of, overrides).items():
                _log.info("%s: %s", method, f"{held:,} parameters" if held else "as many as its scores lead to")
            return
        outcome = run_tournament(tournament, config_of, overrides, folder)
    settings = TableSettings(
        split=None,
        metric=None,
        baseline=tournament.baseline,
        primary=tournament.primary,
        tolerance=tournament.tolerance,
        unequal=False,
    )
    if len(outcome.failed) < len(outcome.rows):
        table = table_of(folder, settings)
        table.show()
        table.write(folder)
    for note in outcome.notes:
        _log.info("%s", note)
    if outcome.failed:
        row = outcome.failed[0]
        raise SettingError(
            "tournament",
            tournament.name,
            f"{len(outcome.failed)} of {len(outcome.rows)} runs failed, the first is {row['key']}: {row['error']}; "
            "the same command tries them again",
        )
    _log.info("all %d runs are done; rows, runs and tables are in %s", len(outcome.rows), folder)


def _check_choices(choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Hydra merges the options of ``group=[a,b]`` into one node, which no group of ours is meant for."""
    for group in {*NODES, "baseline"} - {"data", "probe", "optimizer", "prefix", "export"}:
        if not isinstance(choices.get(group), str):
            given = next((text.partition("=")[2] for text in overrides if text.startswith(f"{group}=")), None)
            raise SettingError(group, given, f"one option is needed; for several runs: -m {group}=a,b")


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The objects that ``train.py`` would make of these overrides, by node; nothing is loaded.

    Raises:
        SettingError: for an override or a value that cannot be used.
    """
    with composer() as config_of:
        config, _ = config_of(overrides)
    return {node: build(config[node], node) for node in NODES}


@contextmanager
def composer() -> Iterator[Compose]:
    """A function that makes of overrides what ``train.py`` would: the resolved config, and the choice of each group.

    Inside a job of Hydra's it looks where that job looked. It raises SettingError for overrides that cannot be used.
    """
    if GlobalHydra.instance().is_initialized():
        yield _compose
        return
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield _compose


def _compose(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        cfg = hydra_compose("train", overrides=list(overrides), return_hydra_config=True)
        choices = own_choices(cfg.hydra.runtime.choices)
        _check_choices(choices, overrides)
        with open_dict(cfg):
            del cfg["hydra"]
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError("overrides", " ".join(overrides), " ".join(str(error).split())) from error
    return config, choices


def own_choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Group -> option, without Hydra's own groups."""
    return {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}


@contextmanager
def _status(folder: Path) -> Iterator[dict[str, Any]]:
    """Keep ``status.json`` true: running, finished (planned: a dry run; skipped), failed or interrupted.

    The file is made exclusively, so that two jobs cannot share a folder.
    """
    status: dict[str, Any] = {
        "state": "running",
        **this_process(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        (folder / STATUS).touch(exist_ok=False)
    except FileExistsError as error:
        raise RunFailed(f"hydra.run.dir={folder}: holds another run; give a new folder") from error
    write_json(folder / STATUS, status)

    def end(state: str, **more: Any) -> None:
        status.update(state=state, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more)
        try:
            write_json(folder / STATUS, status)
        except OSError as error:  # the disk that ended the job may be full for its status, too
            _log.error("%s: %s", folder / STATUS, error)

    try:
        with _terminable():
            yield status
    except _EXPECTED as error:
        end("failed", error=str(error))
        raise RunFailed(str(error)) from error
    except OSError as error:
        end("failed", error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        if error.errno in _NO_PLACE:
            place = f" ({error.filename})" if error.filename else ""
            raise RunFailed(f"{folder}: {error.strerror}{place}") from error
        raise
    except Exception as error:
        end("failed", error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        raise
    except BaseException as error:  # Lightning turns both signals into SystemExit
        by_keyboard = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        end("interrupted", error="keyboard" if by_keyboard else f"SIGTERM or {type(error).__name__}")
        raise SystemExit(130 if by_keyboard else 143) from error
    end(status["state"] if status["state"] in ("planned", "skipped") else "finished")


@contextmanager
def _preemptible(place: Place | None) -> Iterator[None]:
    """A scheduler's signal that time is over ends the run as SIGTERM does, which saves; then the job is queued again.

    What queues it is the handler that submitit has set before it called; nothing listens where there is none. Of
    several processes the first queues the job at once, and it goes on from its last checkpoint.
    """
    queue_again = signal.getsignal(signal.SIGUSR2)
    main_thread = threading.current_thread() is threading.main_thread()
    if not callable(queue_again) or place is not None or not main_thread:
        yield
        return
    asked: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append((number, frame))
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGUSR2, note)
    try:
        yield
    except SystemExit:
        if asked:
            queue_again(*asked[0])
        raise
    finally:
        signal.signal(signal.SIGUSR2, queue_again)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the job like an exception, also before Lightning listens to it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
