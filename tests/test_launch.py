"""How processes of a run are started and found, and what becomes of those that are left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heterolora import launch
from heterolora.errors import SettingError
from heterolora.launch import Followers, Place, arguments, find_place
from tests.jobs import TINY, FailsInFollower
from tests.test_resume import what_came_out

ROOT = Path(__file__).parents[1]

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "7",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[08-09]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_a_process_by_itself_has_no_place():
    assert find_place({}) is None
    assert find_place({"SLURM_JOB_ID": "12", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}) is None  # sbatch's own


def test_torchrun_says_where_a_process_stands():
    assert find_place(TORCHRUN) == Place(3, 4, 1, 2, None, 7, "torchrun")


def test_srun_says_where_a_process_stands():
    place = find_place(SRUN)
    assert place == Place(2, 4, 0, 2, "node08", place.port, "srun")
    assert 1024 < place.port < 65536
    assert place.port != find_place(SRUN | {"SLURM_STEP_ID": "1"}).port
    with pytest.raises(SettingError, match=r"srun=3,1: every node needs as many tasks"):
        find_place(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("a[01-03,07]", "a01"), ("a[5,7]-x,b2", "a5-x"), ("rack2-n[3-4],z", "rack2-n3")],
)
def test_the_first_host_of_a_list_of_nodes(nodes, first):
    assert find_place(SRUN | {"SLURM_STEP_NODELIST": nodes}).address == first


def test_only_the_first_process_gets_a_folder():
    assert arguments(["task=mrpc"], {}) == ["task=mrpc"]
    assert arguments(["task=mrpc"], TORCHRUN | {"RANK": "0"}) == ["task=mrpc"]
    assert "hydra.run.dir=." in arguments(["task=mrpc"], TORCHRUN)
    assert arguments(["-m", "task=mrpc"], {}) == ["-m", "task=mrpc"]


def test_a_single_process_is_alone_whoever_started_it():
    assert find_place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) is None
    assert arguments(["-m", "seed=0,1"], {"RANK": "0", "WORLD_SIZE": "1"}) == ["-m", "seed=0,1"]


def test_tasks_that_are_spread_unevenly_are_one_line():
    with pytest.raises(SystemExit, match="every node needs as many tasks"):
        arguments([], SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN])
@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_is_refused_where_each_process_would_hold_its_own(environ, flag):
    with pytest.raises(SystemExit, match="each of which would run the whole sweep"):
        arguments([flag, "seed=0,1"], environ)


def test_what_cannot_be_repeated_starts_no_processes(tmp_path):
    with pytest.raises(SettingError, match=r"trainer\.devices=2: processes are started by repeating the command"):
        Followers(1, tmp_path, 1, lambda: 0.0)


def followers(monkeypatch, folder, code):
    monkeypatch.setattr(launch, "own_command", lambda: [sys.executable, "-c", code])
    return Followers(2, folder, 1, lambda: 0.0)


def test_followers_know_their_place_and_leave_no_empty_logs(monkeypatch, tmp_path):
    code = "import os; print(*(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')))"
    started = followers(monkeypatch, tmp_path, f"{code} if os.environ['RANK'] == '2' else None")
    started.end(finished=True)
    assert started.lost() is None
    assert (tmp_path / "process_2.log").read_text() == "2 2 3 3\n"
    assert not (tmp_path / "process_1.log").exists()


def test_a_lost_follower_is_named_with_its_last_words(monkeypatch, tmp_path):
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('no memory'); time.sleep(60)"
    started = followers(monkeypatch, tmp_path, code)
    assert started.lost_soon(30).startswith("process 1 of 3 ended with code 1: no memory (")
    start = time.monotonic()
    started.end(finished=False)
    assert time.monotonic() - start < 20
    assert all(process.poll() is not None for process in started._started)


def test_a_process_leaves_with_the_one_that_started_it(tmp_path):
    inner = (
        "import os, time; from heterolora.launch import leave_with_starter; leave_with_starter(os.environ); "
        "print(os.getpid(), flush=True); time.sleep(120)"
    )
    outer = (
        "import os, subprocess, sys, time\n"
        f"os.environ['{launch._STARTER}'] = str(os.getpid())\n"
        f"subprocess.Popen([sys.executable, '-c', {inner!r}])\n"
        "time.sleep(120)"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as first:
        left = int(first.stdout.readline())
        first.kill()
    assert gone(left, 10)


def gone(pid, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


# -- the command -------------------------------------------------------------------------------------------------------


def command(folder, *overrides):
    return ["train.py", *TINY, f"hydra.run.dir={folder}", f"outputs={folder.parent}", "trainer.threads=1", *overrides]


def environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))} | {"HYDRA_FULL_ERROR": "0"}


def run(arguments, timeout=300):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.mark.slow
def test_the_command_starts_its_processes_and_torchrun_gives_the_same(tmp_path):
    ours = run(command(tmp_path / "ours", "trainer.devices=2"))
    assert ours.returncode == 0, ours.stderr
    assert status(tmp_path / "ours")["state"] == "finished"
    assert not list((tmp_path / "ours").glob("process_*.log"))
    assert ours.stdout.count("allocated") == 1
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    theirs = run([*start, *command(tmp_path / "theirs", "trainer.devices=2")])
    assert theirs.returncode == 0, theirs.stderr
    assert what_came_out(tmp_path / "ours") == what_came_out(tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def started(folder, *overrides):
    """A run in two processes that has written a checkpoint: its leader, and the number of its follower."""
    chosen = command(folder, "trainer.devices=2", *overrides)
    leader = subprocess.Popen(
        [sys.executable, *chosen],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 120
    while not list(folder.glob("checkpoints/*.sha256")) and time.monotonic() < until and leader.poll() is None:
        time.sleep(0.02)
    return leader, int(subprocess.check_output(["pgrep", "-P", str(leader.pid)], text=True).split()[0])


LONG = ("trainer.max_epochs=2000", "trainer.checkpoint_every=5")


def end_follower(leader, follower, folder, number, code):
    """The run fails, in one line."""
    os.kill(follower, number)
    said = leader.communicate(timeout=60)[0]
    assert leader.returncode == 1
    assert f"process 1 of 2 ended with code {code}" in said
    assert "Traceback" not in said
    assert status(folder)["state"] == "failed"
    assert f"process 1 of 2 ended with code {code}" in status(folder)["error"]


@pytest.mark.slow
def test_a_run_fails_in_one_line_when_a_follower_is_told_to_end(tmp_path):
    leader, follower = started(tmp_path / "run", *LONG)
    end_follower(leader, follower, tmp_path / "run", signal.SIGTERM, 143)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "int"])
def test_nobody_is_left_behind_when_the_first_process_ends(tmp_path, number):
    folder = tmp_path / "run"
    leader, follower = started(folder, *LONG)
    os.kill(leader.pid, number)
    leader.communicate(timeout=60)
    assert gone(follower, 60)
    assert status(folder)["state"] == ("running" if number == signal.SIGKILL else "interrupted")


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_go_on_to_the_same_bits(tmp_path):
    chosen = ("trainer.checkpoint_every=2", "trainer.max_epochs=8", "adapter.dropout=0.1")
    assert run(command(tmp_path / "a" / "whole", "trainer.devices=2", *chosen)).returncode == 0
    leader, follower = started(tmp_path / "b" / "first", *chosen)
    end_follower(leader, follower, tmp_path / "b" / "first", signal.SIGKILL, -9)
    resumed = run(command(tmp_path / "b" / "second", "trainer.devices=2", *chosen, "resume=true"))
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / "b" / "second" / "summary.json").read_text())
    assert summary["resumed_from"] == str(tmp_path / "b" / "first")
    assert what_came_out(tmp_path / "b" / "second") == what_came_out(tmp_path / "a" / "whole")


@pytest.mark.slow
def test_a_follower_that_fails_is_named_with_its_last_words(tmp_path):
    failing = f"+callbacks.fail._target_={FailsInFollower.__module__}.FailsInFollower"
    refused = run(command(tmp_path / "run", "trainer.devices=2", failing))
    assert refused.returncode == 1
    assert "process 1 of 2 ended with code 1: the loss is lost" in refused.stderr
    assert "process 1 of 2 ended with code 1: the loss is lost (" in status(tmp_path / "run")["error"]
    assert status(tmp_path / "run")["state"] == "failed"


@pytest.mark.slow
def test_tasks_that_srun_would_start_make_one_run(tmp_path):
    task = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    task |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *command(tmp_path / "run", "trainer.devices=2")],
            cwd=ROOT,
            env=environment() | task | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in tasks]
    assert [process.returncode for process in tasks] == [0, 0], said
    assert status(tmp_path / "run")["state"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_bad_settings_are_one_line_whoever_starts_the_processes(tmp_path):
    sweep = command(tmp_path / "run", "trainer.devices=2", f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=0,1", "-m")
    refused = run(sweep)
    assert refused.returncode != 0
    assert "trainer.devices=2: not in a sweep (-m)" in refused.stderr
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    refused = run([*start, *command(tmp_path / "other")])
    assert refused.returncode != 0
    assert "trainer.devices=1: so many processes were started on this machine: give 2" in refused.stderr
