"""The promises of the README on a real pretrained model and real data; minutes each."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def train(outputs: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "train.py", *arguments, f"outputs={outputs}"],  # Hydra wants -m first or last
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def summaries(outputs: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(outputs.glob("**/summary.json"))]


def test_the_main_job_on_the_embedded_default(tmp_path):
    """Shortened to one epoch of a quarter of the data; a majority vote has 0.5."""
    done = train(tmp_path, "data.limit=1600", "trainer.max_epochs=1")
    (summary,) = summaries(tmp_path)
    parameters = summary["parameters"]
    assert parameters["budget"] == 73_728
    assert 0 <= parameters["unspent"] < 768
    assert parameters["held"] == parameters["active"] == 73_728 - parameters["unspent"]
    assert summary["sites"]["candidates"] == 36 + 23
    assert summary["metrics"]["test"]["accuracy"] > 0.65
    assert not any(summary["collapsed"].values())
    assert "peak memory" in done.stdout


def test_six_jobs_on_two_glue_tasks_make_six_complete_folders(tmp_path, data_root):
    train(
        tmp_path,
        "-m",
        "task=mrpc,rte",
        "proxy=snip,grad_norm,spectral",
        "trainer.max_steps=20",
        "probe.batches=8",
        "probe.head_warmup_steps=20",
        f"data.root={data_root}",
    )
    found = summaries(tmp_path)
    assert len(found) == 6
    assert {(s["choices"]["task"], s["choices"]["proxy"]) for s in found} == {
        (task, proxy) for task in ("mrpc", "rte") for proxy in ("snip", "grad_norm", "spectral")
    }
    for path in tmp_path.glob("**/summary.json"):
        assert json.loads((path.parent / "status.json").read_text())["state"] == "finished"
        assert (path.parent / "allocation.png").stat().st_size > 5000
    sizes = {s["choices"]["task"]: s["data"]["sizes"] for s in found}
    assert sizes["mrpc"] == {"train": 3668, "validation": 408, "test": 1725}
    assert sizes["rte"] == {"train": 2241, "validation": 249, "test": 277}
    assert "hidden" in next(s["data"]["note"] for s in found if s["choices"]["task"] == "rte")


def test_uniform_lora_on_mrpc_learns_the_task(tmp_path, data_root):
    """The README's reference run, seed 0, three of its four epochs; a majority vote has 66.5 % on the test split."""
    train(
        tmp_path, "task=mrpc", "model=minilm", "search_space=lora_all", "allocator=uniform", "budget=all_r2",
        "adapter.scale=2.0", "adapter.dropout=0", "optimizer.lr=1e-3", "optimizer.weight_decay=0", "data.batch_size=16",
        "task.max_length=128", "trainer.max_epochs=3", f"data.root={data_root}",
    )  # fmt: skip
    (summary,) = summaries(tmp_path)
    assert summary["parameters"]["held"] == summary["parameters"]["budget"] == 82_944
    assert summary["metrics"]["test"]["accuracy"] > 0.77
    assert not any(summary["collapsed"].values())


def test_regression_on_sts_b_learns_the_task(tmp_path, data_root):
    """A part of the data and one epoch; a backbone that is not adapted knows the order already in part."""
    train(
        tmp_path, "task=stsb", "data.limit=1500", "trainer.max_epochs=1", "probe.batches=8",
        "probe.head_warmup_steps=20", f"data.root={data_root}",
    )  # fmt: skip
    (summary,) = summaries(tmp_path)
    assert summary["data"]["sizes"] == {"train": 1500, "validation": 575, "test": 1500}
    assert summary["metrics"]["test"]["pearson"] > 0.4
    assert summary["metrics"]["test"]["spearman"] > 0.4
    assert summary["parameters"]["held"] <= summary["parameters"]["budget"]


def test_the_wheel_holds_the_configs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("heterolora/conf/") for name in names if name.startswith("heterolora/conf/")}
    ours = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").glob("**/*.yaml")}
    assert ours <= inside
    assert "torch" in _requirements(wheel)


def _requirements(wheel: Path) -> list[str]:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    return [line.split(":")[1].split(">")[0].strip() for line in lines if line.startswith("Requires-Dist")]
