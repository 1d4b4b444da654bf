"""train.py as a user starts it: a process, a terminal, an exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.jobs import TINY

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.medium


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "question", [["--help"], ["--cfg", "job"], ["--cfg", "job", "task=mrpc", "proxy=snip"]], ids=str
)
def test_questions_are_answered_before_anything_heavy_is_imported(question):
    """The best of three, since the machine may be busy; the claim is 2 seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = command(*question)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 2, times


@pytest.mark.slow
def test_a_multirun_with_the_flag_last_makes_one_complete_folder_a_job(tmp_path):
    done = command(*TINY, f"outputs={tmp_path}", "trainer.max_steps=2", "proxy=snip,grad_norm", "seed=0,1", "-m")
    assert done.returncode == 0, done.stderr
    folders = sorted(path.parent for path in tmp_path.glob("multirun/*/*/summary.json"))
    names = [folder.name for folder in folders]
    assert [name.rpartition("_")[0] for name in names] == [
        f"{n}_rotten_tomatoes_{p}_s{s}"
        for n, (p, s) in enumerate((p, s) for p in ("snip", "grad_norm") for s in (0, 1))
    ]
    marks = {name.rpartition("_")[2] for name in names}
    assert len(marks) == 4, "what else was overridden is part of the name"
    assert all(re.fullmatch("[0-9a-f]{6}", mark) for mark in marks)
    assert all((folder / "adapter.safetensors").exists() for folder in folders)
    table = pd.read_csv(folders[0].parent / "table.csv")
    assert list(zip(table["group"], table["n"], strict=True)) == [("proxy=snip", 2), ("proxy=grad_norm", 2)]
    accuracy = [json.loads((folder / "summary.json").read_text())["metrics"]["test"]["accuracy"] for folder in folders]
    assert table["mean"].tolist() == pytest.approx([sum(accuracy[:2]) / 2, sum(accuracy[2:]) / 2])
    assert "rotten_tomatoes, tiny_bert: test accuracy" in done.stdout
    assert {path.name for path in folders[0].parent.glob("table.*")} == {"table.csv", "table.md", "table.tex"}


def test_a_failing_job_does_not_stop_the_others_and_the_exit_code_says_so(tmp_path):
    done = command("-m", *TINY, f"outputs={tmp_path}", "trainer.max_steps=1", "probe.init=lora", "proxy=snip,grad_norm")
    assert done.returncode == 1
    assert "proxy=snip: every score is 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.glob("multirun/*/1_*/summary.json"))) == 1
    failed = next(iter(tmp_path.glob("multirun/*/0_*")))
    assert {path.name for path in failed.iterdir()} == {".hydra", "train.log", "status.json"}
    assert "1 runs are not finished and not in the table" in done.stdout
    assert pd.read_csv(failed.parent / "table.csv")["n"].tolist() == [1]


def test_an_error_is_one_line_and_a_traceback_only_on_request(tmp_path):
    bad = [*TINY, f"outputs={tmp_path}", "search_space.include=[nope]"]
    done = command(*bad)
    assert done.returncode == 1
    assert "search_space.include=nope: matches no site" in done.stderr
    assert "Traceback" not in done.stderr
    full = command(*bad, HYDRA_FULL_ERROR="1")
    assert full.returncode == 1
    assert "Traceback" in full.stderr


@pytest.mark.parametrize(("signal_name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("moment", ["searching", "training"])
def test_a_signal_ends_the_job_and_says_so(tmp_path, signal_name, code, moment):
    """A scheduler must not read success, and nobody may find a dead run that calls itself running."""
    long = {
        "searching": ["probe.head_warmup_steps=100000"],
        "training": ["trainer.max_epochs=100000"],
    }[moment]
    sign = {"searching": "warming up", "training": "epoch 2 of"}[moment]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TINY, f"outputs={tmp_path}", *long],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that started the tests in the background made them, and so their children, deaf to SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            if sign in line:
                break
        time.sleep(0.5)
        process.send_signal(getattr(signal, signal_name))
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, seen[-3:]
    (status,) = tmp_path.glob("*/*/status.json")
    assert json.loads(status.read_text())["state"] == "interrupted"


@pytest.mark.slow
def test_a_tournament_that_is_stopped_keeps_its_rows_leaves_no_process_and_goes_on(tmp_path):
    arguments = ["experiment=tournament_small", *TINY, f"outputs={tmp_path}", "trainer.accelerator=cpu"]
    arguments += ["tournament.workers=1", "trainer.max_epochs=1", "~tournament.methods.random"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments, "trainer.threads=1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            if "1 of 9" in line:
                break
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert children
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, seen[-3:]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    rows = tmp_path / "tournaments" / "small_rotten_tomatoes" / "rows.jsonl"
    before = rows.read_text()
    assert before.count("\n") >= 1
    done = command(*arguments, "trainer.threads=1")
    assert done.returncode == 0, done.stderr
    assert rows.read_text().startswith(before)
    assert len({json.loads(line)["key"] for line in rows.read_text().splitlines()}) == 9
    assert "the same bit for bit" in done.stdout
    assert "difference from uniform" in done.stdout


def test_it_runs_from_another_folder(tmp_path):
    done = command(*TINY, "trainer.max_steps=1", "logger=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/*/*/summary.json"))) == 1
    assert "test accuracy" in done.stdout


def test_an_experiment_overrides_what_the_config_itself_says(tmp_path):
    """``_self_`` comes before ``experiment``; the other order loses the seed without a word."""
    import yaml

    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /proxy: snip\nseed: 13\n")
    done = command("--config-dir", str(tmp_path / "conf"), "experiment=mine", "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["seed"] == 13
    assert config["proxy"]["_target_"] == "heterolora.proxies.snip.Snip"


@pytest.mark.parametrize("flag", [[], ["-m"]], ids=str)
def test_the_ladder_is_a_sweep_over_its_rungs_with_a_table(tmp_path, flag):
    """It needs no flag: its rungs are options of the sweeper."""
    small = ["budget=params", "budget.value=6000", "trainer.max_steps=1"]  # tiny_bert has a short table
    done = command("experiment=ladder", *TINY, *small, f"outputs={tmp_path}", *flag)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("multirun/*")
    table = pd.read_csv(folder / "table.csv")
    rungs = ["attention", "embeddings", "feed_forward", "everything"]
    assert [group.removeprefix("search_space=lora_") for group in table["group"]] == rungs
    sites = []
    for path in sorted(folder.glob("*/allocation.json")):
        ranks = json.loads(path.read_text())["ranks"]
        sites.append({name.split(".")[1] for name, rank in ranks.items() if rank})
    assert sites == [set("qkvo"), {"embed"}, {"up", "down"}, {*"qkvo", "embed", "up", "down"}]


@pytest.mark.slow
def test_own_files_are_trained_on_and_predicted_from_the_command_line(tmp_path):
    """As in docs/tasks.md: a CSV, a run, and its predictions for new text."""
    words = ["good", "bad", "fine", "awful"]
    rows = [f'"a {words[i % 4]} film, {i}",{"pos" if i % 2 == 0 else "neg"}' for i in range(80)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,mood", *rows]) + "\n")
    files = [f"task.source.train={tmp_path}/reviews.csv", "task.text=[review]", "task.source.label=mood"]
    done = command("task=files", *files, *TINY, f"outputs={tmp_path}/outputs", "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("outputs/*/*/summary.json")
    (tmp_path / "new.csv").write_text('id,review\n7,"an ""awful"" film"\n8,a nice one\n')
    done = subprocess.run(
        [sys.executable, "-m", "heterolora", "predict", str(run.parent), "--file", "new.csv"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    header, *lines = done.stdout.splitlines()
    assert header == "id,review,prediction,logit_neg,logit_pos"
    assert [line.rsplit(",", 3)[0] for line in lines] == ['7,"an ""awful"" film"', "8,a nice one"]
    assert {line.split(",")[-3] for line in lines} <= {"neg", "pos"}
