"""Sweeps on one machine: launchers, names, going on after anything, and Optuna. Those on SLURM: tests/slurm."""

import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from heterolora.names import short
from hydra_plugins.heterolora.tuning import Optuna, _distribution
from tests.jobs import TINY, compose_job
from tests.sweeps import ROOT, Sweep

TWO = ("seed=0,1", "-m")

LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local", "hydra.launcher.at_once=2"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of three jobs, one after the other in one process."""
    sweep = Sweep(tmp_path_factory.mktemp("whole"), "whole", "seed=0,1,2")
    code, said = sweep.end()
    assert code == 0, said
    return sweep.results()


def statuses(sweep):
    return [status["state"] for status in sweep.statuses().values()]


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two jobs at once need two cores")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_in_processes_of_their_own_give_the_same_bits_and_a_killed_one_stops_no_other(
    tmp_path, undisturbed, launcher
):
    sweep = Sweep(tmp_path, "hit", *LAUNCHERS[launcher], "seed=0,1,2", held_up=[1])
    sweep.wait_for(1)
    (victim,) = [status["pid"] for status in sweep.statuses().values() if "seed=1" in status["overrides"]]
    os.kill(victim, signal.SIGKILL)
    code, said = sweep.end()
    assert code == 1, said
    assert "#1 seed=1 failed: job 1 (seed=1)" in said
    assert sweep.results() == {seed: undisturbed[seed] for seed in (0, 2)}
    again = Sweep(tmp_path, "hit", *LAUNCHERS[launcher], "seed=0,1,2", "sweep.resume=true", held_up=[1])
    again.release(1)
    code, said = again.end()
    assert code == 0, said
    assert again.results() == undisturbed
    assert "all runs" in said


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [("joblib", signal.SIGINT), ("submitit_local", signal.SIGTERM)])
def test_a_sweep_that_is_stopped_saves_and_leaves_nothing_running(tmp_path, undisturbed, launcher, number):
    sweep = Sweep(tmp_path, "hit", *LAUNCHERS[launcher], "seed=0,1,2", held_up=[0, 1])
    sweep.wait_for(0, 1)
    pids = [status["pid"] for status in sweep.statuses().values()]
    sweep.signal(number)
    time.sleep(1)
    sweep.release(0, 1)
    code, said = sweep.end()
    assert code == 128 + number, said
    assert "Traceback" not in said
    assert "sweep.name=hit sweep.resume=true goes on" in said
    assert statuses(sweep) == ["interrupted", "interrupted"]  # the third did not begin
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert len(list(sweep.folder.glob("*/checkpoints/step_00000009.ckpt"))) == 2  # saved in the middle of an epoch
    again = Sweep(tmp_path, "hit", *LAUNCHERS[launcher], "seed=0,1,2", "sweep.resume=true", held_up=[0, 1])
    code, said = again.end()
    assert code == 0, said
    assert again.results() == undisturbed


@pytest.mark.slow
def test_a_local_job_that_is_preempted_goes_on_in_its_folder(tmp_path, undisturbed):
    sweep = Sweep(tmp_path, "hit", *LAUNCHERS["submitit_local"], "seed=0,1", held_up=[1])
    sweep.wait_for(1)
    (job,) = [status for status in sweep.statuses().values() if "seed=1" in status["overrides"]]
    os.kill(job["pid"], signal.SIGUSR2)
    sweep.release(1)
    code, said = sweep.end()
    assert code == 0, said
    assert sweep.results() == {seed: undisturbed[seed] for seed in (0, 1)}
    earlier = sweep.runs()[1] / "attempts" / "1"
    assert (earlier / "checkpoints" / "step_00000009.ckpt").exists()  # saved when it was told


@pytest.mark.slow
def test_a_sweep_whose_machine_went_down_goes_on_also_with_more_seeds(tmp_path, undisturbed):
    sweep = Sweep(tmp_path, "hit", "seed=1,2", held_up=[2])
    sweep.wait_for(2)
    sweep.kill()
    code, said = Sweep(tmp_path, "hit", "seed=1,2").end()
    assert code == 1
    assert "sweep.resume=true goes on with it" in said
    again = Sweep(tmp_path, "hit", "seed=0,1,2", "sweep.resume=true", held_up=[2])  # what was job 0 is job 1 now
    again.release(2)
    code, said = again.end()
    assert code == 0, said
    assert again.results() == undisturbed
    assert sorted(statuses(again)) == ["continued", "finished", "finished", "finished", "skipped"]
    assert pd.read_csv(again.folder / "table.csv")["n"].tolist() == [3]
    before = {path: path.stat().st_mtime_ns for path in again.folder.glob("*/summary.json")}
    code, said = Sweep(tmp_path, "hit", "seed=0,1,2", "sweep.resume=true", held_up=[2]).end()
    assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in again.folder.glob("*/summary.json")} == before


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_its_study(tmp_path):
    options = ["experiment=tune", "seed=3", "hydra.sweeper.trials=4", "hydra.sweeper.startup=2", "trainer.max_epochs=2"]
    options += ["~hydra.sweeper.params.budget", "hydra.sweeper.params.proxy='choice(snip,spectral)'"]
    sweep = Sweep(tmp_path, "tuned", *options, held_up=[3])
    sweep.wait_for(3)
    sweep.kill()
    again = Sweep(tmp_path, "tuned", *options, "sweep.resume=true", held_up=[3])
    again.release(3)
    code, said = again.end()
    assert code == 0, said
    assert "best of 4 finished trials, on validation" in said
    study = optuna.load_study(study_name="tuned", storage=f"sqlite:///{again.folder}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert {tuple(sorted(trial.params)) for trial in study.trials} == {("optimizer.lr", "proxy")}
    values = {}
    for folder in again.folder.glob("*/summary.json"):
        number = int(folder.parent.name.partition("_")[0])
        summary = json.loads(folder.read_text())
        values[number] = summary["metrics"]["validation"]["accuracy"]
        assert list(summary["metrics"]) == ["validation"]  # the test set is not looked at
    assert values == {trial.number: trial.value for trial in study.trials}
    assert json.loads((again.folder / "best.json").read_text())["value"] == max(values.values())
    assert pd.read_csv(again.folder / "trials.csv")["value"].tolist() == [values[number] for number in range(4)]
    first = next(again.folder.glob("0_*"))
    assert (first / "attempts" / "1").is_dir()  # it went on where it was


@pytest.mark.slow
def test_two_commands_share_a_study(tmp_path):
    options = ["experiment=tune", "seed=3", "hydra.sweeper.trials=5", "trainer.max_epochs=2"]
    first = Sweep(tmp_path, "shared", *options, held_up=[3])
    first.wait_for(3)
    second = Sweep(tmp_path, "shared", *options, "sweep.resume=true")  # is held up by nothing
    code, said = second.end()
    assert code == 0, said
    assert "best of 4 finished trials" in said  # the first command is at the fifth
    first.release(3)
    code, said = first.end()
    assert code == 0, said
    assert "best of 5 finished trials" in said
    study = optuna.load_study(study_name="shared", storage=f"sqlite:///{first.folder}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5
    assert len({trial.params["optimizer.lr"] for trial in study.trials}) == 5
    assert len({trial.user_attrs["process"]["pid"] for trial in study.trials}) == 2


def refused(*overrides):
    done = subprocess.run(
        [sys.executable, "train.py", *TINY, *overrides], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sweep.name=a/b", "-m"], "sweep.name=a/b: letters, digits and ._- alone"),
        (["sweep.resume=true"], "sweep.resume=True: true or false, for sweeps (-m)"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "-m"], "0 jobs at once"),
        (
            ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.threads=64", "seed=0,1", "-m"],
            "trainer.threads=64: 2 jobs at once would fight for",
        ),
        (
            [
                "hydra/launcher=submitit_local",
                "hydra.launcher.devices=[0]",
                "hydra.launcher.at_once=2",
                "seed=0,1",
                "-m",
            ],
            "hydra.launcher.at_once=2: there are 1 devices",
        ),
        (["hydra/sweeper=optuna", "hydra.sweeper.trials=0", "-m"], "hydra.sweeper.trials=0: a whole number"),
        (["hydra/sweeper=optuna", "seed=0", "-m"], "nothing to search"),
        (["hydra/sweeper=optuna", "hydra.sweeper.direction=up", "-m"], "hydra.sweeper.direction=up: maximize or"),
        (["hydra/sweeper=optuna", "run=dry", "proxy=snip,fisher", "-m"], "run=dry: has no result to search by"),
        (["hydra/sweeper=optuna", "optimizer.lr=interval(2,1)", "-m"], "optimizer.lr=interval(2,1)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value[:20],
)
def test_what_cannot_be_swept_is_said_in_one_line(tmp_path, overrides, said):
    assert said in refused(f"outputs={tmp_path}", *overrides)


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("nonsense", "Could not parse"),
        ("sqlite:////nonexistent/study.db", "unable to open database file"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
    ],
)
def test_a_storage_that_cannot_be_used_is_said_in_one_line(tmp_path, storage, reason):
    (tmp_path / "text.db").write_text("no database, but a text of some length " * 5)
    given = storage.format(folder=tmp_path)
    with pytest.raises(CompactHydraException, match=reason) as caught:
        study_of(given)._opened()
    assert str(caught.value).startswith(f"hydra.sweeper.storage={given}: cannot be used")
    assert "\n" not in str(caught.value)


def test_a_study_is_not_turned_round(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    assert study_of(storage)._opened().direction.name == "MAXIMIZE"
    with pytest.raises(CompactHydraException, match=r"direction=minimize: study a is to maximize"):
        study_of(storage, "minimize")._opened()


def study_of(storage, direction="maximize"):
    return Optuna("a", storage, direction, trials=1, at_once=1, startup=0, seed=0, params=None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=1,2", CategoricalDistribution(["1", "2"])),
        ("a=choice(snip,2.5)", CategoricalDistribution(["snip", "2.5"])),
        ("a=interval(0.5,2)", FloatDistribution(0.5, 2.0)),
        ("a=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("a=int(interval(1,8))", IntDistribution(1, 8)),
        ("a=tag(log,int(interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("a=range(1,8,2)", IntDistribution(1, 7, step=2)),
        ("a=range(0.5,1.6,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
    ],
)
def test_sweeps_of_hydra_are_distributions_of_optuna(given, expected):
    (override,) = OverridesParser.create().parse_overrides([given])
    assert _distribution(override) == expected


def test_names_tell_texts_apart_and_are_short_and_safe():
    names = {short(f"optimizer.lr={rate},seed={seed}") for rate in (1e-3, 2e-3) for seed in range(200)}
    assert len(names) == 400
    assert all(len(name) == 6 and name.isalnum() for name in names)


@pytest.mark.parametrize(
    "launcher", sorted(path.stem for path in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
)
def test_every_launcher_composes_and_names_a_class_that_takes_its_arguments(launcher):
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    node = compose_job(f"hydra/launcher={launcher}").hydra.launcher
    with_folder = OmegaConf.create(OmegaConf.to_container(node, resolve=False))
    if "submitit_folder" in with_folder:
        with_folder.submitit_folder = "somewhere"
    made = Plugins.instance()._instantiate(with_folder)
    assert type(made).__module__ == "hydra_plugins.heterolora.launchers"
