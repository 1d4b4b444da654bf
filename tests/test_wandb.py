"""Weights & Biases, offline: what is written is read back with W&B's own program."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from heterolora.cli import main
from heterolora.run import RunFailed, train
from heterolora.wandb_runs import find_wandb_runs
from tests.jobs import prepare, run_job
from tests.test_resume import signalled

pytestmark = pytest.mark.medium

SHORT = ("logger=wandb", "trainer.max_steps=4")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def inspected(folder):
    """What ``wandb leet inspect`` says of the one run of a folder."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary_of(text):
    """Name -> value, as text."""
    lines = text.partition("\nsummary\n")[2].partition("\nconfig\n")[0].splitlines()
    return dict(line.split(None, 1) for line in lines if line.strip())


def test_a_run_is_there_with_its_metrics_sites_and_name(tmp_path):
    summary = run_job(tmp_path / "a", *SHORT)
    said = inspected(tmp_path / "a")
    noted = json.loads((tmp_path / "a" / "wandb.json").read_text())
    assert f"a ({noted['id']})" in said
    assert "finished (exit code 0)" in said
    assert noted["group"] is None
    found = summary_of(said)
    assert float(found["test/accuracy"]) == summary["metrics"]["test"]["accuracy"]
    ranks = json.loads((tmp_path / "a" / "allocation.json").read_text())["ranks"]
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]["spectral"]
    assert {name: int(found[f"rank/{name}"]) for name in ranks} == ranks
    for name, score in scores.items():
        assert float(found[f"score/{name}"]) == pytest.approx(sum(score), rel=1e-6)
    media = tmp_path / "a" / "wandb"
    assert list(media.glob("offline-run-*/files/media/table/allocation/sites*.json"))
    assert list(media.glob("offline-run-*/files/media/images/allocation/picture*.png"))


def test_every_decision_of_a_dynamic_run_is_a_row(tmp_path):
    run_job(tmp_path / "a", "logger=wandb", "allocation=dynamic", "allocation.every=3", "allocator=top")
    history = [json.loads(line) for line in (tmp_path / "a" / "history.jsonl").read_text().splitlines()]
    (table,) = (tmp_path / "a").glob("wandb/offline-run-*/files/media/table/allocation/decisions*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "site", "rank", "score"]
    rows = [[line["step"], name, rank] for line in history for name, rank in line["ranks"].items()]
    assert [row[:3] for row in content["data"]] == rows
    assert len(history) == 4
    last = {
        name: int(value) for name, value in summary_of(inspected(tmp_path / "a")).items() if name.startswith("rank/")
    }
    assert last == {f"rank/{name}": rank for name, rank in history[-1]["ranks"].items()}


def test_jobs_of_one_process_are_runs_of_their_own_also_after_a_failure(tmp_path):
    run_job(tmp_path / "a", *SHORT)
    with pytest.raises(RunFailed):
        run_job(tmp_path / "b", *SHORT, "optimizer.lr=1e30", "optimizer.clip=null")
    run_job(tmp_path / "c", *SHORT)
    codes = [inspected(tmp_path / name).partition("exit code ")[2][0] for name in "abc"]
    assert codes == ["0", "1", "0"]
    assert len({json.loads((tmp_path / name / "wandb.json").read_text())["id"] for name in "abc"}) == 3


def test_what_is_gone_on_with_is_one_run_for_wandb_too(tmp_path, monkeypatch):
    """A job that is queued again in its folder, and a run that another folder goes on with."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit):
        run_job(tmp_path / "a", "logger=wandb", *signalled(0, 3, signal.SIGTERM))
    first = json.loads((tmp_path / "a" / "wandb.json").read_text())
    assert find_wandb_runs(tmp_path)[0].id == first["id"]  # written before the fit
    train(prepare(tmp_path / "a", "logger=wandb"))
    assert json.loads((tmp_path / "a" / "wandb.json").read_text()) == first
    assert [run.id for run in find_wandb_runs(tmp_path / "a")] == [first["id"]] * 2

    with pytest.raises(SystemExit):
        run_job(tmp_path / "b", "logger=wandb", "seed=1", *signalled(0, 3, signal.SIGTERM))
    run_job(tmp_path / "c", "logger=wandb", "seed=1", "resume=true")
    ids = [json.loads((tmp_path / name / "wandb.json").read_text())["id"] for name in "bc"]
    assert ids[0] == ids[1] != first["id"]


def test_runs_are_listed_and_those_that_are_not_there_are_uploaded(tmp_path, monkeypatch, capsys):
    for name in "ab":
        run_job(tmp_path / name, *SHORT)
    done, todo = find_wandb_runs(tmp_path)
    next(done.folder.glob("*.wandb")).with_suffix(".wandb.synced").touch()  # as W&B leaves it
    capsys.readouterr()
    assert main(["wandb", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["synced", done.id], ["offline", todo.id]]
    program = tmp_path / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit $(cat {tmp_path}/code)\n')
    program.chmod(0o755)
    monkeypatch.setattr("heterolora.wandb_runs.sys.executable", str(program.with_name("python")))
    (tmp_path / "code").write_text("0")
    assert main(["wandb", str(tmp_path), "--sync"]) == 0
    assert (tmp_path / "asked").read_text().split() == ["sync", str(todo.folder)]
    (tmp_path / "code").write_text("3")
    assert main(["wandb", str(tmp_path), "--sync"]) == 1
    assert "wandb ended with code 3" in capsys.readouterr().err


def test_a_folder_without_runs_is_said(tmp_path, capsys):
    assert main(["wandb", str(tmp_path)]) == 1
    assert "holds no offline run of W&B" in capsys.readouterr().err
