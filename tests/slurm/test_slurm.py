"""Sweeps on a real SLURM: arrays, jobs that are queued again, cancelled or of several processes.

``make slurm-test`` installs what this needs, and runs it alone.
"""

import json
import os
import subprocess
import time

import pytest

from tests.slurm.cluster import cluster, missing
from tests.sweeps import Sweep, until

pytestmark = pytest.mark.slurm

LAUNCHER = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=null",
    "hydra.launcher.poll_s=1",
    "hydra.launcher.grace_s=2",
)


@pytest.fixture(scope="module")
def slurm():
    """The environment in which commands find the cluster."""
    assert not missing(), f"{missing()}: run make slurm-test"
    with cluster(cpus=2) as environment:
        yield environment


def ask(slurm, *command):
    for _ in range(20):
        done = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True, check=False)
        if "try again later" not in done.stderr:
            break
        time.sleep(0.5)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def state(slurm, job):
    """SLURM's word for it; empty once it has ended."""
    return ask(slurm, "squeue", "--noheader", "--array", "--format=%i %T").partition(f"{job} ")[2].split("\n")[0]


def start_again(slurm, job):
    """A job that was queued again may begin after two minutes; an operator can say: now."""
    until(lambda: state(slurm, job) == "PENDING", 60)
    time.sleep(1)
    ask(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    """The results of four jobs that nothing happened to."""
    sweep = Sweep(tmp_path_factory.mktemp("whole"), "whole", *LAUNCHER, "seed=0,1,2,3", environment=slurm)
    code, said = sweep.end()
    assert code == 0, said
    assert "4 jobs are SLURM's array" in said
    assert "all runs" in said  # the table
    assert {status["state"] for status in sweep.statuses().values()} == {"finished"}
    results = sweep.results()
    assert sorted(results) == [0, 1, 2, 3]
    assert len({json.dumps(result, sort_keys=True, default=str) for result in results.values()}) == 4
    return results


def test_jobs_that_are_queued_again_or_cancelled_and_a_sweep_that_is_gone_on_with(slurm, undisturbed, tmp_path):
    """One is queued again by an operator, one preempted by the signal that time is over, one cancelled."""
    sweep = Sweep(tmp_path, "hit", *LAUNCHER, "seed=0,1,2,3", held_up=[0, 1], environment=slurm)
    sweep.wait_for(0, 1)
    main = ask(slurm, "squeue", "--noheader", "--format=%F").split()[0]
    ask(slurm, "scancel", f"{main}_3")  # before it began
    ask(slurm, "scontrol", "requeue", f"{main}_0")
    ask(slurm, "scancel", "--signal=USR2", f"{main}_1")
    time.sleep(1)
    sweep.release(0, 1)
    start_again(slurm, f"{main}_0")
    start_again(slurm, f"{main}_1")
    code, said = sweep.end()
    assert code == 1, said  # a sweep of which a job failed has failed
    assert f"job 3 (seed=3): ended without a result (SLURM {main}_3" in said
    assert sweep.results() == {seed: undisturbed[seed] for seed in (0, 1, 2)}
    for seed, last in ((0, "step_00000006"), (1, "step_00000009")):  # SLURM kills what it queues again at once
        earlier = sweep.runs()[seed] / "attempts" / "1"
        assert json.loads((earlier / "status.json").read_text())["state"] == "continued"
        resumed = json.loads((sweep.runs()[seed] / "summary.json").read_text())["resumed_from"]
        assert resumed == str(earlier)
        assert [path.stem for path in sorted((earlier / "checkpoints").glob("*.ckpt"))][-1] == last
    assert not (sweep.runs()[2] / "attempts").exists()

    again = Sweep(tmp_path, "hit", *LAUNCHER, "seed=0,1,2,3", "sweep.resume=true", environment=slurm)
    code, said = again.end()
    assert code == 0, said
    assert again.results() == undisturbed


def test_a_job_that_is_cancelled_while_it_runs_says_so_and_keeps_what_it_had(slurm, undisturbed, tmp_path):
    sweep = Sweep(tmp_path, "cancelled", *LAUNCHER, "seed=0,1", held_up=[1], environment=slurm)
    sweep.wait_for(1)
    main = ask(slurm, "squeue", "--noheader", "--format=%F").split()[0]
    ask(slurm, "scancel", f"{main}_1")
    time.sleep(2)  # the signal has come, and waits for the step to end
    sweep.release(1)
    code, said = sweep.end()
    assert code == 1
    assert "CANCELLED" in said
    assert sweep.results() == {0: undisturbed[0]}
    assert [status["state"] for status in sweep.statuses().values()] == ["finished", "interrupted"]
    again = Sweep(tmp_path, "cancelled", *LAUNCHER, "seed=0,1", "sweep.resume=true", environment=slurm)
    code, said = again.end()
    assert code == 0, said
    assert again.results() == {seed: undisturbed[seed] for seed in (0, 1)}
    assert "step_00000009.ckpt" in (again.runs()[1] / "train.log").read_text()


def test_a_job_of_two_processes(slurm, tmp_path):
    sweep = Sweep(
        tmp_path, "two", *LAUNCHER, "hydra.launcher.tasks_per_node=2", "trainer.devices=2", "seed=0", environment=slurm
    )
    code, said = sweep.end()
    assert code == 0, said
    assert json.loads((sweep.runs()[0] / "summary.json").read_text())["processes"] == 2


def test_what_slurm_refuses_is_one_line(slurm, tmp_path):
    sweep = Sweep(tmp_path, "bad", *LAUNCHER, "hydra.launcher.partition=nowhere", environment=slurm)
    code, said = sweep.end()
    assert code == 1
    assert "hydra/launcher: SLURM refuses the sweep" in said
    assert "invalid partition" in said
    assert "Traceback" not in said
