"""Many runs in few processes: every finished run a row, none lost, none twice, all as if run alone."""

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from heterolora.errors import ProcessLostError, SettingError
from heterolora.farm import Cell, pending, run_cells
from heterolora.provenance import code_version
from heterolora.results import ROWS, RowFile
from heterolora.run import composer
from tests.jobs import TINY, prepare, train

pytestmark = pytest.mark.medium

OVERRIDES = (*TINY, "trainer.threads=1", "trainer.max_epochs=1", "search_space=lora_qv", "logger=none")


def cell(*overrides: str, group="a", stage="run", held=None) -> Cell:
    with composer() as compose:
        config, choices = compose([*OVERRIDES, *overrides])
    key = f"{stage}-{group}-s{config['seed']}"
    return Cell(key, group, stage, config, choices, f"python train.py {' '.join(overrides)}", held)


class Exit:
    """An allocator that ends its process once, as the kernel does when memory runs out, or as SIGTERM does."""

    counts_sites = False
    gain_rule = None

    def allocate(self, gains, cost, budget, groups):
        trap = Path(os.environ["EXIT_ONCE"])
        if trap.exists():
            how = trap.read_text()
            trap.unlink()
            if how == "killed":
                os._exit(9)
            raise SystemExit(143)  # what Lightning makes of SIGTERM
        from heterolora.allocators.uniform import Uniform

        return Uniform(None).allocate(gains, cost, budget, groups)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Three runs and a repetition of the first, one of which is refused; in two processes."""
    folder = tmp_path_factory.mktemp("farm")
    uniform = ("allocator=uniform", "budget=qv_r2")
    cells = [
        cell(*uniform, "seed=0"),
        cell(*uniform, "seed=1"),
        cell("proxy=snip", "probe.init=lora", group="degenerate"),  # every SNIP score is 0 at B = 0
        cell(*uniform, "seed=0", stage="control"),
    ]
    told = []
    rows = run_cells(cells, folder, workers=None, keep=True, on_row=told.append)
    return folder, cells, rows, told


def test_every_cell_has_a_row_in_the_order_of_the_cells(played):
    folder, cells, rows, told = played
    assert [row["key"] for row in rows] == [cell.key for cell in cells]
    assert sorted(row["key"] for row in told) == sorted(row["key"] for row in RowFile(folder / ROWS).rows())
    for one, row in zip(cells, rows, strict=True):
        assert (row["group"], row["stage"], row["seed"]) == (one.group, one.stage, one.config["seed"])
        assert row["command"] == one.command
        assert row["section"] == "rotten_tomatoes, tiny_bert"
        assert row["commit"] == code_version()
        assert row["started"] <= row["ended"]


def test_a_run_that_fails_says_why_and_stops_no_other(played):
    _, _, rows, _ = played
    assert [row["state"] for row in rows] == ["finished", "finished", "failed", "finished"]
    assert "snip" in rows[2]["error"]


def test_a_repetition_has_the_same_bits_and_another_seed_has_not(played):
    _, _, rows, _ = played
    assert rows[0]["digest"] == rows[3]["digest"]
    assert rows[0]["metrics"] == rows[3]["metrics"]
    assert rows[0]["digest"] != rows[1]["digest"]


def test_the_runs_folder_is_whole_and_the_row_agrees_with_it(played):
    folder, cells, rows, _ = played
    run = folder / "runs" / cells[1].key
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == rows[1]["parameters"]
    assert summary["steps"] == rows[1]["steps"] == 6
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert "allocated" in (run / "log.txt").read_text()
    allocation = json.loads((run / "allocation.json").read_text())
    assert {name: rank for name, rank in allocation["ranks"].items() if rank} == rows[1]["ranks"]


def test_train_py_gives_the_bits_of_the_row(played, tmp_path):
    """A process of its own, or one that has run others before: it must not matter."""
    from heterolora.farm import _digest

    _, _, rows, _ = played
    (tmp_path / "run").mkdir()
    train(prepare(tmp_path / "run", *OVERRIDES[len(TINY) :], "allocator=uniform", "budget=qv_r2", "seed=1"))
    assert _digest(tmp_path / "run" / "adapter.safetensors") == rows[1]["digest"]


def test_what_is_done_is_not_done_again_and_what_failed_is(played):
    folder, cells, _, _ = played
    assert [one.key for one in pending(cells, folder)] == ["run-degenerate-s0"]
    before = (folder / ROWS).read_bytes()
    assert len(run_cells([cells[0], cells[3]], folder, workers=None, keep=True)) == 2  # starts no process
    assert (folder / ROWS).read_bytes() == before


def test_a_row_of_another_config_is_refused(played):
    folder, cells, _, _ = played
    other = replace(cells[0], config={**cells[0].config, "optimizer": {"lr": 1}})
    with pytest.raises(SettingError, match="another config"):
        pending([other], folder)


def test_an_allocation_outside_the_bounds_is_not_trained(tmp_path):
    one = cell("allocator=uniform", "budget=qv_r2", held=(1, 511))
    (row,) = run_cells([one], tmp_path, workers=1, keep=False)
    assert row["state"] == "failed"
    assert row["error"] == "held=512: a must hold 1 to 511 parameters to be compared"
    assert "metrics" not in row
    assert not (tmp_path / "runs").exists()


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SettingError, match="another process"):
            run_cells([cell("allocator=uniform", "budget=qv_r2")], tmp_path, workers=1, keep=False)


def test_processes_that_would_fight_for_cores_are_refused(tmp_path):
    one = cell("allocator=uniform", "budget=qv_r2")
    with pytest.raises(SettingError, match="workers=1000"):
        run_cells([one], tmp_path, workers=1000, keep=False)
    unset = replace(one, config={**one.config, "trainer": {**one.config["trainer"], "threads": None}})
    with pytest.raises(SettingError, match="bits depend on it"):
        run_cells([unset], tmp_path, workers=1, keep=False)
    with pytest.raises(ValueError, match="not unique"):
        run_cells([one, one], tmp_path, workers=1, keep=False)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "terminated"])
def test_a_process_that_is_ended_from_outside_loses_its_own_run_only(tmp_path, monkeypatch, how):
    trap = tmp_path / "trap"
    trap.write_text(how)
    monkeypatch.setenv("EXIT_ONCE", str(trap))
    good = cell("allocator=uniform", "budget=qv_r2", "seed=0")
    bad = cell("allocator=uniform", "budget=qv_r2", "seed=1", group="killed")
    bad.config["allocator"] = {"_target_": "tests.test_farm.Exit"}
    with pytest.raises(ProcessLostError, match="killed-s1"):
        run_cells([good, bad], tmp_path / "rows", workers=1, keep=False)
    assert [one.key for one in pending([good, bad], tmp_path / "rows")] == [bad.key]
    rows = run_cells([good, bad], tmp_path / "rows", workers=1, keep=False)
    assert [row["state"] for row in rows] == ["finished", "finished"]
