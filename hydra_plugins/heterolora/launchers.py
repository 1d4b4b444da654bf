"""Where the jobs of a sweep run: in processes of this machine, or on a SLURM cluster.

Hydra's own plugins for joblib and submitit are of 2022. They stop waiting at the first job that was cancelled or
killed, do not divide a machine's threads, start all local jobs at once, and learn about ended SLURM jobs from ``sacct``
alone, which clusters without accounting do not have. These here wait for every job, whatever becomes of the others.

Hydra imports this whenever it starts, so everything heavy is imported where it is needed.
"""

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from heterolora.names import register

_log = logging.getLogger(__name__)


class JobLostError(CompactHydraException):
    """A job ended without a result: cancelled, killed, or out of time or memory."""


class _Job:
    """One job, as a process of its own runs it.

    Args:
        launcher: where it comes from.
        overrides: of the task.
        number: in the sweep.
        name: what tells it from the others.
    """

    def __init__(self, launcher: "WholeSweep", overrides: Sequence[str], number: int, name: str) -> None:
        self.context = launcher.context
        self.function = launcher.function
        self.config = launcher.config
        self.overrides = list(overrides)
        self.number = number
        self.name = name
        self.state = Singleton.get_state()  # Hydra's own, which another process lacks

    def __call__(self) -> JobReturn:
        register()
        setup_globals()
        Singleton.set_state(self.state)
        config = self.context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.id = os.environ.get("SLURM_JOB_ID", f"{config.hydra.job.name}_{self.number}")
            config.hydra.job.num = self.number
        HydraConfig.instance().set_config(config)
        return run_job(
            hydra_context=self.context,
            task_function=self.function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def checkpoint(self) -> Any:
        """What submitit is to run where this job was preempted: the same again, which goes on in the same folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def lost(self, why: str) -> JobReturn:
        """What the sweep gets where the job could not say what became of it."""
        found = JobReturn(overrides=self.overrides, status=JobStatus.FAILED)
        found.return_value = JobLostError(f"job {self.number} ({self.name}): {why}")
        return found


class _Stop:
    """Ctrl-C and SIGTERM while jobs run: what is to be done is done, once; the sweep ends when its jobs have.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.then: Callable[[], None] = lambda: None

    def __enter__(self) -> "_Stop":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: object) -> None:
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number
        _log.warning("%s; once more ends the sweep at once", signal.Signals(number).name)
        self.then()


class WholeSweep(Launcher):
    """A launcher that returns when every job has ended, and says of each how."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra asks for."""
        self.context = hydra_context
        self.function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; failures are in what is returned, and raised by the sweeper at the end."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        shared = set.intersection(*(set(overrides) for overrides in job_overrides)) if len(job_overrides) > 1 else set()
        jobs = [
            _Job(self, given, number, " ".join(text for text in filter_overrides(given) if text not in shared))
            for number, given in enumerate(job_overrides, initial_job_idx)
        ]
        names = {job.number: job.name for job in jobs}
        found: dict[int, JobReturn] = {}
        with _Stop() as stop:
            for number, outcome in self.outcomes(jobs, folder, stop):
                found[number] = outcome
                _say(f"{len(found)} of {len(jobs)}: #{number} {names[number]}", outcome)
        if stop.number is not None and len(found) < len(jobs) + any(map(_failed, found.values())):
            _log.warning("stopped; the same command with sweep.name=%s sweep.resume=true goes on", folder.name)
            raise SystemExit(128 + stop.number)
        return [found[job.number] for job in jobs]

    @abstractmethod
    def outcomes(self, jobs: Sequence[_Job], folder: Path, stop: _Stop) -> Iterator[tuple[int, JobReturn]]:
        """Number and result of each job, as they end; once it is to stop, of those that had begun."""

    def divided(self, at_once: int) -> int:
        """Threads of each of so many jobs that share this machine.

        Raises:
            CompactHydraException: if the run's own setting would let them fight for cores.
        """
        cores = _cores()
        if at_once < 1:
            raise CompactHydraException(f"hydra.launcher: {at_once} jobs at once; at least 1, or -1: as many as cores")
        asked = OmegaConf.select(self.config, "trainer.threads")
        if asked is not None and at_once > 1 and asked * at_once > cores:
            raise CompactHydraException(
                f"trainer.threads={asked}: {at_once} jobs at once would fight for {cores} cores; give at most "
                f"{max(1, cores // at_once)}, or fewer jobs at once"
            )
        return max(1, cores // at_once)


def _failed(outcome: JobReturn) -> bool:
    return bool(outcome.status != JobStatus.COMPLETED)


def _say(job: str, outcome: JobReturn) -> None:
    if _failed(outcome):
        _log.error("%s failed: %s", job, outcome._return_value)
    elif isinstance(value := outcome.return_value, float):
        _log.info("%s: validation %.4f", job, value)
    else:
        _log.info("%s: done", job)


class Joblib(WholeSweep):
    """Several processes of this machine, each of which runs one job after the other.

    Args:
        n_jobs: processes; -1: as many as there are cores. Each has its share of the threads.
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def outcomes(self, jobs: Sequence[_Job], folder: Path, stop: _Stop) -> Iterator[tuple[int, JobReturn]]:
        """Each process is a pool of its own, as one that is killed takes its pool with it."""
        from concurrent.futures import FIRST_COMPLETED, Future, wait

        from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor
        from joblib.parallel import ParallelBackendBase

        at_once = min(len(jobs), _cores() if self.n_jobs == -1 else self.n_jobs)
        threads = self.divided(at_once)
        _log.info("%d jobs, %d at a time with %d threads each; %s", len(jobs), at_once, threads, folder)
        limits = dict.fromkeys(ParallelBackendBase.MAX_NUM_THREADS_VARS, str(threads))
        waiting = list(reversed(jobs))
        running: dict[Future[JobReturn | None], tuple[_Job, ProcessPoolExecutor]] = {}
        free: list[ProcessPoolExecutor] = []
        with tempfile.TemporaryDirectory() as folder_of_marks:
            marks = Path(folder_of_marks)

            def ask_to_end() -> None:
                (marks / _NO_MORE).touch()
                for job, _ in list(running.values()):
                    if (pid := _pid(marks / str(job.number))) is not None:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGTERM)

            stop.then = ask_to_end
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        job = waiting.pop()
                        free = [pool for pool in free if not pool._flags.broken]  # an idle one may be killed too
                        pool = free.pop() if free else ProcessPoolExecutor(1, initializer=_deaf_to_ctrl_c, env=limits)
                        running[pool.submit(_marked, job, marks)] = job, pool
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job, pool = running.pop(future)
                        try:
                            outcome = future.result()
                        except BrokenProcessPool:
                            pool.shutdown(kill_workers=True)
                            outcome = job.lost("its process was killed (out of memory?)")
                        else:
                            free.append(pool)
                        if outcome is not None:
                            yield job.number, outcome
            finally:
                for pool in [*free, *(pool for _, pool in running.values())]:
                    pool.shutdown(kill_workers=True)


_NO_MORE = "no more"
"""Name of the mark by which no further job begins."""


def _deaf_to_ctrl_c() -> None:
    """In a process of the pool: the terminal tells all, but the sweep's own process tells the jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _marked(job: _Job, marks: Path) -> JobReturn | None:
    """In a process of the pool: leave a mark that the job has begun, and run it; None: it may not begin."""
    if (marks / _NO_MORE).exists():
        return None
    (marks / str(job.number)).write_text(str(os.getpid()))
    try:
        return job()
    except SystemExit as error:  # SIGTERM; it must not end the process, in which other jobs will run
        return job.lost(f"was stopped (exit code {error.code})")


def _pid(mark: Path) -> int | None:
    """Of the process that runs a job; None: it has not begun."""
    text = mark.read_text() if mark.exists() else ""
    return int(text) if text else None


class SubmititLocal(WholeSweep):
    """A process of this machine for each job, so many at a time; one that is preempted goes on in another.

    Args:
        submitit_folder: for submitit's files and the output of each job.
        at_once: jobs at a time; -1: as many as there are cores, or as devices.
        devices: numbers of GPUs of which each job sees one; empty: none sees any.
        timeout_min: minutes after which a job is preempted.
        signal_delay_s: seconds that it then has to save.
        max_num_timeout: how often it may go on after that.
    """

    def __init__(
        self,
        submitit_folder: str,
        at_once: int,
        devices: Sequence[int],
        timeout_min: int,
        signal_delay_s: int,
        max_num_timeout: int,
    ) -> None:
        self.folder = submitit_folder
        self.at_once = at_once
        self.devices = tuple(devices)
        self.parameters = {"timeout_min": timeout_min, "signal_delay_s": signal_delay_s}
        self.max_num_timeout = max_num_timeout

    def outcomes(self, jobs: Sequence[_Job], folder: Path, stop: _Stop) -> Iterator[tuple[int, JobReturn]]:
        """As many at a time as there is room for."""
        from submitit import LocalExecutor

        room = len(self.devices) or _cores()
        at_once = min(len(jobs), room if self.at_once == -1 else self.at_once)
        if self.devices and at_once > room:
            raise CompactHydraException(f"hydra.launcher.at_once={at_once}: there are {room} devices")
        threads = self.divided(at_once)
        seen = f"one GPU of {list(self.devices)} each" if self.devices else "no GPU (hydra.launcher.devices=[0,1,...])"
        _log.info("%d jobs, %d at a time with %d threads and %s; %s", len(jobs), at_once, threads, seen, folder)
        waiting, free = list(reversed(jobs)), list(reversed(self.devices))
        running: dict[int, tuple[_Job, Any, list[int]]] = {}

        def ask_to_end() -> None:
            waiting.clear()
            for _, handle, _ in running.values():
                handle._process.send_signal(signal.SIGTERM)  # which it passes on

        stop.then = ask_to_end
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop()
                    device = [free.pop()] if free else []
                    executor = LocalExecutor(self.folder, max_num_timeout=self.max_num_timeout)
                    executor.update_parameters(gpus_per_node=len(device), visible_gpus=device, **self.parameters)
                    with _environment(OMP_NUM_THREADS=str(threads)), _no_ctrl_c():
                        running[job.number] = job, executor.submit(job), device
                time.sleep(0.5)
                for number, (job, handle, device) in list(running.items()):
                    if handle.done():
                        del running[number]
                        free += device
                        yield number, _outcome(job, handle, f"submitit {handle.job_id}")
        finally:
            ask_to_end()


_GENERAL = ("name", "nodes", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb")
"""What submitit calls the same for every kind of cluster."""


class SubmititSlurm(WholeSweep):
    """An array of SLURM jobs; one that is preempted or out of time is queued again and goes on in its folder.

    Arguments that are null are not given to ``sbatch``.

    Args:
        submitit_folder: for submitit's files and the output of each job; all nodes must see it.
        poll_s: seconds between two looks at the queue.
        grace_s: seconds for which the queue may have a job no more before it counts as lost: between two states it is
            in neither, and results come through a network.
        max_num_timeout: how often a job may go on after its time was over.
        python: what runs a job; null: this interpreter.
        parameters: ``name``, ``partition``, ``timeout_min``, ``cpus_per_task``, ``mem_gb``, ``gpus_per_node``,
            ``array_parallelism``, ``signal_delay_s``, ``setup`` and whatever else submitit's SlurmExecutor has.
    """

    def __init__(
        self,
        submitit_folder: str,
        poll_s: float,
        grace_s: float,
        max_num_timeout: int,
        python: str | None,
        **parameters: Any,
    ) -> None:
        self.folder = submitit_folder
        self.poll_s = poll_s
        self.grace_s = grace_s
        self.max_num_timeout = max_num_timeout
        self.python = python
        self.parameters = {key: _plain(value) for key, value in parameters.items() if value is not None}

    def outcomes(self, jobs: Sequence[_Job], folder: Path, stop: _Stop) -> Iterator[tuple[int, JobReturn]]:
        """One array; each job is done when its result is there, or lost when the queue has it no more."""
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError

        try:
            own = {"slurm_max_num_timeout": self.max_num_timeout, "slurm_python": self.python}
            executor = AutoExecutor(self.folder, cluster="slurm", **own)
            executor.update_parameters(
                **{key if key in _GENERAL else f"slurm_{key}": value for key, value in self.parameters.items()}
            )
            with executor.batch():
                handles = [executor.submit(job) for job in jobs]
        except (RuntimeError, ValueError, FailedJobError, FileNotFoundError, subprocess.CalledProcessError) as error:
            raise CompactHydraException(f"hydra/launcher: SLURM refuses the sweep: {_line(error)}") from error
        main = handles[0].job_id.partition("_")[0]
        _log.info("%d jobs are SLURM's array %s; output in %s", len(jobs), main, Path(self.folder).parent)
        # Of several processes of a run, the first one has the result.
        running = {handle.job_id: (job, handle.task(0)) for job, handle in zip(jobs, handles, strict=True)}
        gone: dict[str, float] = {}
        """When the queue was first without a job."""

        def leave() -> None:
            _log.warning("SLURM goes on with %d jobs; scancel %s ends them", len(running), main)
            raise SystemExit(128 + (stop.number or 0))

        stop.then = leave
        while running:
            time.sleep(self.poll_s)
            queued = _queued(main)
            for name, (job, handle) in list(running.items()):
                ended = handle.paths.result_pickle.exists()
                if not ended and (queued is None or name in queued):
                    gone.pop(name, None)
                    continue
                if not ended and time.monotonic() - gone.setdefault(name, time.monotonic()) < self.grace_s:
                    continue
                del running[name]
                yield job.number, _outcome(job, handle, f"SLURM {name}, {_state(name)}")


def _outcome(job: _Job, handle: Any, where: str) -> JobReturn:
    """What an ended job of submitit's left."""
    error = handle.exception() if handle.paths.result_pickle.exists() else None
    if error is None and handle.paths.result_pickle.exists():
        found: JobReturn = handle.results()[0]
        return found
    lines = [line for line in (handle.stderr() or "").splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    return job.lost(f"ended without a result ({where}){said}; see {handle.paths.stderr}")


def _queued(main: str) -> set[str] | None:
    """Names of the jobs of an array that wait or run; None: SLURM does not answer."""
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={main}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return set(done.stdout.split())
    if "Invalid job id" in done.stderr:
        return set()  # all have ended, some time ago
    _log.warning("squeue: %s; asking again", done.stderr.strip())
    return None


def _state(name: str) -> str:
    """SLURM's word for what became of a job; it forgets after some minutes."""
    done = subprocess.run(["scontrol", "--oneliner", "show", "job", name], capture_output=True, text=True, check=False)
    words = dict(word.partition("=")[::2] for word in done.stdout.split())
    return words.get("JobState", "no longer known")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """What is started within is deaf to the terminal's signal; the sweep's own process tells it to end."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for what is started within."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
