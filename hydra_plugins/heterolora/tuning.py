"""A search over settings: Optuna asks for runs, Hydra's launchers run them, and a study in SQLite remembers.

Hydra's own Optuna plugin pins Optuna 2, whose SQLite storage fails with the SQLAlchemy of today, and ends at the first
failure. Asking and telling takes few lines with the Optuna of today, and leaves the launchers as they are.

Hydra imports this whenever it starts, so everything heavy is imported where it is needed.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import optuna

    _Space = dict[str, optuna.distributions.BaseDistribution]

_log = logging.getLogger(__name__)

_Trial = tuple[int, dict[str, Any]]
"""Number and settings."""

_HOPELESS = 5
"""Trials that may fail in a row, before any has succeeded."""


class Optuna(Sweeper):
    """Tree-structured Parzen estimators over the settings that are given as sweeps.

    ``a=1,2`` and ``a=choice(1,2)`` are choices; ``a=interval(1e-4,1e-2)`` is a number between, on a logarithmic scale
    with ``tag(log, interval(...))``, whole with ``int(interval(...))``; ``a=range(1,9,2)`` has steps. The rest is the
    same for all trials.

    A study is gone on with by ``sweep.name=NAME sweep.resume=true``, also by several commands at a time: they share
    what is known. Trials whose process is gone are asked for again, and their runs go on from their checkpoints.

    Args:
        study: its name in the storage.
        storage: an address as Optuna has them.
        direction: ``maximize`` or ``minimize`` what runs return: the task's first metric on validation.
        trials: how many are finished at the end, those of earlier commands included.
        at_once: trials that are asked for, and given to the launcher, together.
        startup: trials that are drawn at random before the estimators have enough to go by.
        seed: of what is drawn.
        params: settings and their sweeps, before those of the command line.
    """

    def __init__(
        self,
        study: str,
        storage: str,
        direction: str,
        trials: int,
        at_once: int,
        startup: int,
        seed: int,
        params: Mapping[str, Any] | None,
    ) -> None:
        if direction not in ("maximize", "minimize"):
            raise CompactHydraException(f"hydra.sweeper.direction={direction}: maximize or minimize")
        for name, value, least in (("trials", trials, 1), ("at_once", at_once, 1), ("startup", startup, 0)):
            if value < least:
                raise CompactHydraException(f"hydra.sweeper.{name}={value}: a whole number of at least {least}")
        self.study = study
        self.storage = storage
        self.direction = direction
        self.trials = trials
        self.at_once = at_once
        self.startup = startup
        self.seed = seed
        self.params = {} if params is None else dict(params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra asks for."""
        self.config: DictConfig = config
        self.hydra_context: HydraContext = hydra_context
        self.jobs: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> float:
        """Ask, run and tell until there are enough trials.

        Returns:
            The best value.

        Raises:
            CompactHydraException: if there is nothing to search, or nothing works.
        """
        try:
            import optuna
        except ImportError as error:
            raise CompactHydraException(
                "hydra/sweeper=optuna: needs the package optuna: pip install 'heterolora[tune]'"
            ) from error

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if self.config.run == "dry":
            raise CompactHydraException("run=dry: has no result to search by; leave hydra/sweeper=optuna out")
        fixed, space = self._space(arguments)
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        study = self._opened()
        self._check_space(study, space)
        waiting = _left_behind(study, space)
        failures: list[str] = []
        while True:
            while len(waiting) < self.at_once and len(study.trials) < self.trials:
                waiting += self._asked(study, space)
            if not waiting:
                break
            batch, waiting = waiting[: self.at_once], waiting[self.at_once :]
            jobs = [[*fixed, *_overrides(params)] for _, params in batch]
            self.validate_batch_is_legal(jobs)
            outcomes = self.jobs.launch(jobs, initial_job_idx=batch[0][0])
            failures += _tell(study, batch, outcomes)
            if len(failures) >= _HOPELESS and not _finished(study):
                break
        if not _finished(study):
            raise CompactHydraException(f"hydra/sweeper=optuna: no trial succeeded; {failures[-1]}")
        return self._conclude(study, folder, failures)

    def _space(self, arguments: Sequence[str]) -> tuple[list[str], "_Space"]:
        """Overrides of all trials, and what is searched."""
        given = [f"{key}={value}" for key, value in self.params.items()] + list(arguments)
        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(given)
        latest = {override.get_key_element(): override for override in parsed}
        fixed = [
            f"{key}={override.get_value_element_as_str()}"
            for key, override in latest.items()
            if not override.is_sweep_override()
        ]
        space = {key: _distribution(override) for key, override in latest.items() if override.is_sweep_override()}
        if not space:
            raise CompactHydraException(
                "hydra/sweeper=optuna: nothing to search; give proxy=snip,fisher, 'optimizer.lr=interval(1e-4,1e-2)'"
            )
        return fixed, space

    def _opened(self) -> "optuna.Study":
        """The study, made where there is none."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            study = optuna.create_study(
                storage=self.storage,
                study_name=self.study,
                direction="maximize" if self.direction == "maximize" else "minimize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CompactHydraException(
                f"hydra.sweeper.storage={self.storage}: cannot be used ({reason}); an address such as "
                "sqlite:////folder/that/exists/study.db"
            ) from error
        if (found := study.direction.name.lower()) != self.direction:
            raise CompactHydraException(f"hydra.sweeper.direction={self.direction}: study {self.study} is to {found}")
        return study

    def _check_space(self, study: "optuna.Study", space: "_Space") -> None:
        """A study whose choices change half-way can be read by nobody."""
        for trial in study.get_trials(deepcopy=False):
            if trial.distributions and dict(trial.distributions) != dict(space):
                raise CompactHydraException(
                    f"hydra.sweeper.study={self.study}: its trials searched {_shown(trial.distributions)}, "
                    f"this asks for {_shown(space)}; give another name"
                )

    def _asked(self, study: "optuna.Study", space: "_Space") -> list[_Trial]:
        """A new trial; none if one with the same settings is finished, whose value is this one's, too.

        What is drawn follows from seed, number and what is known: a study that was broken off draws no number twice,
        and commands that share it draw different ones.
        """
        from optuna.samplers import TPESampler

        from heterolora.resume import this_process
        from heterolora.seeds import derive

        trial = study.ask()
        trial.set_user_attr("process", {**this_process(), "state": "running"})
        seed = derive(self.seed, "trial", trial.number) % 2**32
        study.sampler = TPESampler(seed=seed, n_startup_trials=self.startup)
        for key, distribution in space.items():
            _draw(trial, key, distribution)
        for other in _finished(study):
            if other.params == trial.params:
                study.tell(trial, other.value)
                return []
        return [(trial.number, trial.params)]

    def _conclude(self, study: "optuna.Study", folder: Path, failures: Sequence[str]) -> float:
        best, value = study.best_trial, study.best_value
        overrides = _overrides(best.params)
        study.trials_dataframe(attrs=("number", "value", "state", "params", "duration")).to_csv(
            folder / "trials.csv", index=False
        )
        found = {"trial": best.number, "value": value, "overrides": overrides, "trials": len(study.trials)}
        (folder / "best.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for failure in failures:
            _log.warning("failed: %s", failure)
        _log.info("best of %d finished trials, on validation: %.4f", len(_finished(study)), value)
        _log.info("it had %s", " ".join(overrides))
        _log.info("trials.csv, best.json and the study are in %s", folder)
        return value


def _draw(trial: "optuna.Trial", key: str, distribution: "optuna.distributions.BaseDistribution") -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(key, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _left_behind(study: "optuna.Study", space: "_Space") -> list[_Trial]:
    """Trials whose process is gone; they are this one's from now on."""
    import optuna

    from heterolora.resume import this_process

    found = []
    for frozen in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        if not _is_gone(frozen.user_attrs.get("process", {})):
            continue
        if set(frozen.params) != set(space):  # it was gone before it had all its settings
            study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            continue
        optuna.trial.Trial(study, frozen._trial_id).set_user_attr("process", {**this_process(), "state": "running"})
        found.append((frozen.number, frozen.params))
    return found


def _is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a command that was at a trial is at work no more; of another machine's only SLURM can say so."""
    from heterolora.resume import is_running, this_process

    here = this_process()
    known = process.get("host") == here["host"] or str(process.get("job")).startswith("SLURM")
    return not process or (known and not is_running(process))


def _tell(study: "optuna.Study", batch: Sequence[_Trial], outcomes: Sequence[JobReturn]) -> list[str]:
    """Tell what came of each trial; the reasons of those that failed."""
    from optuna.trial import TrialState

    failures = []
    for (number, params), outcome in zip(batch, outcomes, strict=True):
        value = outcome._return_value
        if outcome.status == JobStatus.COMPLETED and isinstance(value, float) and math.isfinite(value):
            study.tell(number, value)
            continue
        reason = f"returned {value}" if outcome.status == JobStatus.COMPLETED else str(value)
        failures.append(f"trial {number} ({' '.join(_overrides(params))}): {reason}")
        study.tell(number, state=TrialState.FAIL)
    return failures


def _finished(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def _overrides(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def _distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    """What Optuna draws from, for a sweep of Hydra's."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, key = override.value(), override.get_key_element()
    log = isinstance(sweep, IntervalSweep | RangeSweep) and "log" in sweep.tags
    if isinstance(sweep, ChoiceSweep):
        return CategoricalDistribution([Override._get_value_element_as_str(value) for value in sweep.list])
    try:
        if isinstance(sweep, RangeSweep) and sweep.start is not None and sweep.stop is not None:
            values = list(sweep.range())
            if all(isinstance(value, int) for value in values):
                return IntDistribution(int(values[0]), int(values[-1]), step=int(sweep.step))
            return FloatDistribution(float(values[0]), float(values[-1]), step=float(sweep.step))
        if isinstance(sweep, IntervalSweep):
            low, high = sweep.start, sweep.end
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low or 0), float(high or 0), log=log)
    except (ValueError, IndexError) as error:
        raise CompactHydraException(f"{key}={override.get_value_string()}: {error}") from error
    raise CompactHydraException(f"{key}={override.get_value_string()}: give choice(...), range(...) or interval(...)")


def _shown(space: "Mapping[str, optuna.distributions.BaseDistribution]") -> str:
    return ", ".join(f"{key} in {distribution}" for key, distribution in sorted(space.items()))
