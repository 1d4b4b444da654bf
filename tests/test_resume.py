"""Going on after a crash: the same bits, whatever was lost, and only from what is whole."""

import json
import logging
import random
import signal
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch

from benchmarks.crash_test import main as crash_test
from benchmarks.crash_test import what_came_out
from heterolora.checkpoints import FOLDER, digest_of, newest_first, newest_good, random_states, restore_random_states
from heterolora.resume import is_running, this_process
from heterolora.run import RunFailed, train
from tests.jobs import SignalAt, StopBefore, prepare, run_job

pytestmark = pytest.mark.medium

STATIC = ("trainer.max_epochs=3", "adapter.dropout=0.1", "trainer.checkpoint_every=2")
"""48 sentences in batches of 8 are 6 batches an epoch."""


def stop(epoch, batch):
    return [
        f"+callbacks.stop._target_={StopBefore.__module__}.StopBefore",
        f"+callbacks.stop.epoch={epoch}",
        f"+callbacks.stop.batch={batch}",
    ]


def break_off(folder, *overrides):
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(folder, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_job(folder, *STATIC)
    return what_came_out(folder)


@pytest.mark.parametrize("place", [(0, 3), (0, 5), (1, 0), (1, 1), (2, 2), (2, 5)], ids=str)
def test_a_run_broken_off_anywhere_resumes_to_the_same_bits(tmp_path, whole, place):
    break_off(tmp_path / "first", *STATIC, *stop(*place))
    summary = run_job(tmp_path / "second", *STATIC, "resume=true")
    assert summary["resumed_from"] == str(tmp_path / "first")
    assert what_came_out(tmp_path / "second") == whole


def test_a_chain_of_crashes_within_epochs_ends_with_the_same_bits(tmp_path, whole):
    for name, place in (("a", (0, 4)), ("b", (1, 3)), ("c", (1, 5))):
        break_off(tmp_path / name, *STATIC, "resume=true", *stop(*place))
    run_job(tmp_path / "d", *STATIC, "resume=true")
    assert what_came_out(tmp_path / "d") == whole


def test_gradients_of_several_batches_make_a_step_after_a_resume_too(tmp_path):
    settings = [*STATIC, "trainer.accumulate=2", "trainer.checkpoint_every=1"]
    run_job(tmp_path / "whole", *settings)
    for batch in (3, 4, 5):
        break_off(tmp_path / f"{batch}", *settings, *stop(1, batch))
        run_job(tmp_path / f"{batch}_on", *settings, f"resume={tmp_path}/{batch}")
        assert what_came_out(tmp_path / f"{batch}_on") == what_came_out(tmp_path / "whole")


def signalled(epoch, batch, number=signal.SIGTERM):
    return [
        f"+callbacks.signal._target_={SignalAt.__module__}.SignalAt",
        f"+callbacks.signal.epoch={epoch}",
        f"+callbacks.signal.batch={batch}",
        f"+callbacks.signal.number={int(number)}",
    ]


@pytest.mark.parametrize("place", [(0, 2), (1, 5), (2, 4)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_is_asked_to_end_saves_first(tmp_path, place, accumulate):
    settings = [*STATIC, "trainer.checkpoint_every=null", f"trainer.accumulate={accumulate}"]
    run_job(tmp_path / "whole", *settings)
    with pytest.raises(SystemExit) as ended:
        run_job(tmp_path / "first", *settings, *signalled(*place))
    assert ended.value.code == 143
    batches = place[0] * 6 + place[1] + 1
    newest = next(newest_first(tmp_path / "first" / FOLDER))
    assert newest.stem == f"step_{-(-batches // accumulate):08d}"  # the step that was under way
    run_job(tmp_path / "second", *settings, "resume=true")
    assert what_came_out(tmp_path / "second") == what_came_out(tmp_path / "whole")


def test_what_a_scheduler_preempts_is_queued_after_it_has_saved_and_goes_on_in_its_folder(
    tmp_path, whole, monkeypatch, caplog
):
    class QueuedError(Exception):
        pass

    def queue(number, frame):
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
        raise QueuedError

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.signal(signal.SIGUSR2, queue)
    settings = [*STATIC, "trainer.checkpoint_every=null"]
    try:
        with pytest.raises(QueuedError):
            run_job(tmp_path / "run", *settings, *signalled(1, 2, signal.SIGUSR2))
        assert signal.getsignal(signal.SIGUSR2) is queue
        with caplog.at_level(logging.INFO):
            train(prepare(tmp_path / "run", *settings))  # the same folder
        value = train(prepare(tmp_path / "run", *settings))  # queued once more, though it had finished
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert "step_00000009.ckpt" in caplog.text
    assert what_came_out(tmp_path / "run") == whole
    assert value == json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["validation"]["accuracy"]
    status = json.loads((tmp_path / "run" / "attempts" / "1" / "status.json").read_text())
    assert status["state"] == "continued"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(RunFailed, match="holds another run"):
        train(prepare(tmp_path / "run", *settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"job": "SLURM 7"}, "is still at work"),  # another process of the same job is at it, on this machine
        ({"job": "SLURM 7", "host": "elsewhere"}, None),  # it was there before its node went down
        ({"job": "SLURM 8", "host": "elsewhere"}, "holds another run"),
        ({"job": None}, "holds another run"),
    ],
)
def test_only_the_job_itself_goes_on_in_a_folder(tmp_path, monkeypatch, change, said):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "run").mkdir()
        status = {"state": "running", **this_process(), "pid": other.pid, "born": None, **change}
        (tmp_path / "run" / "status.json").write_text(json.dumps(status))
        job = prepare(tmp_path / "run", *STATIC, "trainer.max_steps=1")
        if said is None:
            train(job)
            assert (tmp_path / "run" / "attempts" / "1" / "status.json").exists()
            with pytest.raises(RunFailed, match="a finished run with another config"):
                train(prepare(tmp_path / "run", *STATIC, "trainer.max_steps=2"))
        else:
            with pytest.raises(RunFailed, match=said):
                train(job)
    finally:
        other.kill()
        other.wait()


def test_an_attempt_that_was_put_aside_halfway_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    break_off(tmp_path / "run", *STATIC, *stop(1, 3))
    (tmp_path / "run" / "attempts" / ".1").mkdir(parents=True)
    (tmp_path / "run" / FOLDER).rename(tmp_path / "run" / "attempts" / ".1" / FOLDER)  # and then it was killed
    train(prepare(tmp_path / "run", *STATIC))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["resumed_from"] == str(tmp_path / "run" / "attempts" / "1")


def test_how_often_checkpoints_are_written_changes_nothing(tmp_path, whole):
    run_job(tmp_path / "a", *STATIC, "trainer.checkpoint_every=null")
    assert what_came_out(tmp_path / "a") == whole
    assert len(list(newest_first(tmp_path / "a" / FOLDER))) == 2


def test_a_torn_checkpoint_is_said_and_the_older_one_used(tmp_path, whole, caplog):
    break_off(tmp_path / "first", *STATIC, *stop(1, 3))
    newest, older = newest_first(tmp_path / "first" / FOLDER)
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.INFO):
        run_job(tmp_path / "second", *STATIC, "resume=true")
    assert f"{newest.name} is torn" in caplog.text
    assert f"resuming {older}" in caplog.text
    assert what_came_out(tmp_path / "second") == whole


def test_no_checkpoint_is_used_that_was_not_written_to_its_end_or_belongs_elsewhere(tmp_path):
    break_off(tmp_path / "first", *STATIC, *stop(1, 3))
    newest, older = newest_first(tmp_path / "first" / FOLDER)
    settings = torch.load(newest, weights_only=True)["identity"]["settings"]
    assert newest_good(tmp_path / "first", settings) == (newest, [])
    path, wrong = newest_good(tmp_path / "first", "another")
    assert path is None
    assert [text.partition(" ")[2] for text in wrong] == [f"belongs to another config (hash {settings})"] * 2
    digest_of(newest).unlink()
    assert newest_good(tmp_path / "first", settings) == (older, [f"{newest.name} was not written to its end"])
    older.write_bytes(b"nothing")
    with pytest.raises(RunFailed, match=r"none of its checkpoints can be used: .* is torn"):
        run_job(tmp_path / "second", *STATIC, f"resume={tmp_path}/first")


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(tmp_path, whole, caplog):
    break_off(tmp_path / "first", *STATIC, *stop(0, 1))
    with caplog.at_level(logging.INFO):
        run_job(tmp_path / "second", *STATIC, f"resume={tmp_path}/first")
    assert "stopped before its first checkpoint" in caplog.text
    assert what_came_out(tmp_path / "second") == whole


class StopTest(L.Callback):
    """Breaks off when training is over."""

    def on_test_start(self, trainer, pl_module):
        raise RuntimeError("broken off by the test")


def test_a_run_broken_off_after_training_is_only_evaluated(tmp_path, whole):
    break_off(tmp_path / "first", *STATIC, f"+callbacks.stop._target_={StopTest.__module__}.StopTest")
    run_job(tmp_path / "second", *STATIC, "resume=true")
    assert what_came_out(tmp_path / "second") == whole


class Draws(L.Callback):
    """Uses all global generators after each batch, and keeps the sum of what they gave."""

    total = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Draws.total += random.random() + np.random.rand() + torch.rand(()).item()


def test_the_global_generators_go_on_where_they_were(tmp_path):
    draws = [f"+callbacks.draws._target_={Draws.__module__}.Draws"]
    Draws.total = 0.0
    run_job(tmp_path / "whole", *STATIC, *draws)
    whole, Draws.total = Draws.total, 0.0
    break_off(tmp_path / "first", *STATIC, *draws, *stop(1, 2))  # a checkpoint was written just before
    run_job(tmp_path / "second", *STATIC, *draws, "resume=true")
    assert Draws.total == pytest.approx(whole, rel=1e-12)


def test_random_states_come_back(tmp_path):
    random.random(), np.random.rand(), torch.rand(1)
    path = tmp_path / "states.ckpt"
    torch.save(random_states(), path)
    first = random.random(), np.random.rand(), torch.rand(3).tolist()
    restore_random_states(torch.load(path, weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it():
    me = this_process()
    parent = {"state": "running", "host": me["host"], "pid": 1, "born": None}
    assert is_running(parent)  # nobody knows when it started
    assert not is_running({**parent, "born": 12345678987})
    assert not is_running({**parent, "host": "elsewhere"})
    assert not is_running({"state": "running", **me})  # this very process runs one job at a time


@pytest.mark.slow
def test_runs_that_are_killed_end_as_those_that_are_not(capfd):
    assert crash_test(["--points", "3", "--seed", "7"]) == 0
    assert "3 of 3 identical" in capfd.readouterr().out


def test_a_job_on_another_machine_is_at_work_while_slurm_has_it(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$2" = --jobs=7 ] && echo 7 || { echo "Invalid job id" >&2; exit 1; }\n')
    squeue.chmod(0o755)
    there = {"state": "running", "host": "elsewhere", "pid": 1}
    monkeypatch.setenv("PATH", "/nowhere")
    assert not is_running({**there, "job": "SLURM 7"})  # nobody to ask
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert is_running({**there, "job": "SLURM 7"})
    assert not is_running({**there, "job": "SLURM 8"})
    assert not is_running({**there, "job": None})
    assert not is_running({**there, "job": "SLURM 7", "state": "interrupted"})
