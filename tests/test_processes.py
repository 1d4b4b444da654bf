"""Several processes of one run: they hold the same, decide the same, and end with what one alone would have."""

import json
import time

import lightning as L
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from heterolora.allocation import read_ranks
from heterolora.checkpoints import newest_good
from heterolora.data.sampler import Batches, SimilarLength
from heterolora.errors import ProcessLostError, SettingError
from heterolora.history import HISTORY, read_history
from heterolora.lit import LitAdapted
from heterolora.loading import load_run
from heterolora.parts import config_hash
from heterolora.processes import ALONE, Processes
from heterolora.resume import Resume
from heterolora.strategy import Sharded
from heterolora.trainer import TrainerSettings
from tests.jobs import run_job
from tests.test_dynamic import FEW, TOP, VARIANTS
from tests.test_resume import stop, what_came_out
from tests.together import ProcessFailedError, together, train_together

EXACT = ("model.dropout=0.0", "adapter.dropout=0", "trainer.threads=1", "probe.batches=4")
"""Without what processes draw by themselves, so that only the order of sums is left to differ in."""

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


# -- rows ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 120), size=st.integers(1, 17), processes=st.integers(1, 5), epoch=st.integers(0, 2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_processes_share_the_batches_that_one_alone_has(count, size, processes, epoch):
    def batches(rank, of):
        order = SimilarLength([row % 13 + 1 for row in range(count)], size, 7)
        order.set_epoch(epoch)
        made = Batches(order, size, Processes(rank, of))
        return made, list(made)

    _, whole = batches(0, 1)
    parts = [batches(rank, processes) for rank in range(processes)]
    for number, batch in enumerate(whole):
        shares = [made.share(number) for made, _ in parts]
        assert sum(shares) == pytest.approx(1)
        rows = [row for (_, mine), share in zip(parts, shares, strict=True) if share for row in mine[number]]
        assert sorted(rows) == sorted(batch)
        for (_, mine), share in zip(parts, shares, strict=True):
            assert mine[number]  # all have something to compute
            assert share in (0, len(mine[number]) / len(batch))
    assert {len(mine) for _, mine in parts} == {len(whole)}


# -- what they tell each other -----------------------------------------------------------------------------------------


def _talk(processes):
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2,), processes.rank + 1.0)
    if processes.rank == 1:
        parameters[1].grad = torch.full((3,), 5.0)
    processes.sum_gradients(parameters)
    return {
        "sum": processes.summed(torch.tensor([1.0, processes.rank])).tolist(),
        "each": [v.tolist() for v in processes.summed_each([torch.ones(2, 2), torch.tensor(processes.rank)])],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "gathered": processes.gathered(processes.rank * 10),
        "told": processes.told(f"from {processes.rank}"),
        "once": processes.once(lambda: processes.rank),
        "agreed": processes.agreed(lambda: processes.rank, ValueError),
        "mine": list(processes.mine("abcdefg")),
    }


def test_every_process_hears_the_same(tmp_path):
    found = together(3, tmp_path, _talk)
    mine = [answers.pop("mine") for answers in found]
    assert mine == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert found[0] == found[1] == found[2]
    assert found[0] == {
        "sum": [3.0, 3.0],
        "each": [[[3.0, 3.0], [3.0, 3.0]], 3],
        "gradients": [[6.0, 6.0], [5.0, 5.0, 5.0], None],
        "gathered": [0, 10, 20],
        "told": "from 0",
        "once": 0,
        "agreed": 0,
    }


def test_one_alone_is_told_what_it_says():
    value = torch.ones(2)
    assert ALONE.summed(value) is value
    assert ALONE.gathered(3) == [3]
    assert ALONE.agreed(lambda: 4, ValueError) == ALONE.once(lambda: 4) == ALONE.told(4) == 4
    ALONE.check_equal("nothing", "a")


def _refuse(processes):
    def find():
        if processes.leads:
            raise SettingError("a", 1, "two")
        return 5

    try:
        return processes.agreed(find, SettingError)
    except SettingError as error:
        return str(error)


def test_a_refusal_of_the_first_process_is_one_of_all(tmp_path):
    assert together(2, tmp_path, _refuse) == ["a=1: two"] * 2


def _differ(processes):
    with pytest.raises(SettingError, match="the config must be the same in all of them"):
        processes.check_equal("the config", str(processes.rank))


def test_processes_that_differ_are_refused(tmp_path):
    together(2, tmp_path, _differ)


def _sum_for_ever(processes):
    while True:
        processes.summed(torch.ones(1))


def _leave(processes):
    if processes.rank == 1:
        return None
    start = time.monotonic()
    with pytest.raises(ProcessLostError, match="another process of this run is gone"):
        _sum_for_ever(processes)
    assert time.monotonic() - start < 20
    return "noticed"


def test_nobody_waits_for_a_process_that_is_gone(tmp_path):
    assert together(2, tmp_path, _leave)[0] == "noticed"


# -- runs --------------------------------------------------------------------------------------------------------------


def weights(run):
    return load_file(run / "adapter.safetensors")


def flat(node, path=""):
    """Numbers of nested values, by their place."""
    if isinstance(node, (dict, list)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {key: value for name, part in items for key, value in flat(part, f"{path}/{name}").items()}
    return {path: node} if isinstance(node, (int, float)) else {}


def assert_close(one, other):
    """Two runs that differ by the order of their sums."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **CLOSE)
    for name in ("validation", "test"):
        mine, theirs = (pd.read_csv(run / f"predictions_{name}.csv") for run in (one, other))
        assert list(mine.columns) == list(theirs.columns)
        assert list(mine["label"]) == list(theirs["label"])
        logits = [column for column in mine if column.startswith("logit")]
        assert mine[logits].to_numpy() == pytest.approx(theirs[logits].to_numpy(), abs=1e-3)
    losses = [json.loads((run / "summary.json").read_text())["metrics"]["test"]["loss"] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """The same run in one process and in two, with batches whose last one leaves a process without a row."""
    folder = tmp_path_factory.mktemp("static")
    run_job(folder / "one", *EXACT, "data.limit=41", "trainer.max_steps=9")
    summaries = train_together(2, folder / "two", *EXACT, "data.limit=41", "trainer.max_steps=9")
    return folder, summaries


@pytest.mark.medium
def test_two_processes_find_the_sites_of_one_and_end_where_it_does(static):
    folder, (summary, nothing) = static
    assert nothing == {}
    assert summary["processes"] == 2
    assert read_ranks(folder / "one" / "allocation.json") == read_ranks(folder / "two" / "allocation.json")
    one, two = (json.loads((folder / run / "scores.json").read_text()) for run in ("one", "two"))
    assert flat(one["scores"]) == pytest.approx(flat(two["scores"]), rel=1e-4)
    assert_close(folder / "one", folder / "two")


@pytest.mark.medium
def test_curves_and_losses_are_those_of_whole_batches(static):
    folder, _ = static
    one, two = (pd.read_csv(folder / run / "metrics.csv") for run in ("one", "two"))
    assert list(one.columns) == list(two.columns)
    assert len(one) == len(two)
    for name in ("train/loss_epoch", "validation/loss", "validation/accuracy"):
        assert one[name].dropna().to_numpy() == pytest.approx(two[name].dropna().to_numpy(), abs=1e-4)


def margin(decision):
    """How far the last site that was chosen is from the first that was not, as a share of its score."""
    chosen = [score for name, score in decision.scores.items() if decision.ranks.get(name)]
    others = [score for name, score in decision.scores.items() if not decision.ranks.get(name)]
    return (min(chosen) - max(others)) / min(chosen)


@pytest.mark.medium
@pytest.mark.parametrize("variant", ["top", "greedy", "paper"])
def test_dynamic_runs_decide_the_same_at_every_step(tmp_path, variant):
    chosen = [*EXACT, *VARIANTS[variant], "optimizer.lr=3e-2", "optimizer.warmup=0"]
    run_job(tmp_path / "one", *chosen)
    train_together(2, tmp_path / "two", *chosen)
    one, two = (read_history(tmp_path / run / HISTORY) for run in ("one", "two"))
    assert [decision.ranks for decision in one] == [decision.ranks for decision in two]
    assert len({tuple(decision.ranks.items()) for decision in two}) > 1
    if variant == "top":
        assert min(map(margin, two)) > 1e-3
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.medium
def test_accumulated_and_clipped_gradients_are_those_of_whole_batches(tmp_path):
    chosen = [*EXACT, "trainer.accumulate=2", "optimizer.clip=0.05", "data.limit=41"]
    run_job(tmp_path / "one", *chosen)
    train_together(3, tmp_path / "three", *chosen)
    assert_close(tmp_path / "one", tmp_path / "three")


@pytest.mark.medium
@pytest.mark.parametrize("proxy", ["grasp", "synflow", "snip", "eva"])
def test_every_kind_of_pass_leads_to_the_same_allocation(tmp_path, proxy):
    chosen = [*EXACT, f"proxy={proxy}", "search_space=lora_all", "trainer.max_steps=1", "trainer.test=false"]
    run_job(tmp_path / "one", *chosen)
    train_together(2, tmp_path / "two", *chosen)
    assert read_ranks(tmp_path / "one" / "allocation.json") == read_ranks(tmp_path / "two" / "allocation.json")


@pytest.mark.medium
def test_fewer_scoring_batches_than_processes_are_looked_at_by_all(tmp_path):
    chosen = [*EXACT[:-1], "probe.batches=1", "trainer.max_steps=1", "trainer.test=false"]
    run_job(tmp_path / "one", *chosen)
    train_together(2, tmp_path / "two", *chosen)
    one, two = (json.loads((tmp_path / run / "scores.json").read_text()) for run in ("one", "two"))
    assert one["scores"] == two["scores"]


@pytest.mark.medium
def test_the_kept_prefix_serves_every_process(tmp_path):
    chosen = [*EXACT, "search_space=lora_qv", "allocator=fixed", "data.pad_to_multiple_of=8"]
    chosen.append("allocator.ranks={1.q: 4, 1.v: 4}")
    train_together(2, tmp_path / "plain", *chosen)
    summary, _ = train_together(2, tmp_path / "kept", *chosen, "prefix.cache=true")
    assert summary["prefix"]["reused"] > 0
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "kept")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.medium
@pytest.mark.parametrize("chosen", [(), (*TOP, *FEW, "optimizer.lr=1e-2")], ids=["static", "dynamic"])
def test_two_processes_repeat_and_resume_to_the_bit(tmp_path, chosen):
    settings = [*chosen, "trainer.checkpoint_every=2", "adapter.dropout=0.1", "data.limit=41"]
    train_together(2, tmp_path / "whole", *settings)
    with pytest.raises(ProcessFailedError, match="broken off by the test"):
        train_together(2, tmp_path / "first", *settings, *stop(1, 3))
    hashed = config_hash(_config(tmp_path / "first", settings))
    checkpoint, wrong = newest_good(tmp_path / "first", hashed)
    assert wrong == []
    resume = Resume(tmp_path / "first", checkpoint)
    train_together(2, tmp_path / "second", *settings, resume=resume)
    assert what_came_out(tmp_path / "second") == what_came_out(tmp_path / "whole")


def _config(folder, overrides):
    from omegaconf import OmegaConf

    from tests.jobs import prepare

    return OmegaConf.to_container(prepare(folder, "trainer.devices=2", *overrides), resolve=True)


def _look_at_shares(processes):
    """Each process holds about its share of every block once training starts."""
    original = Sharded.setup

    def looked_at(self, trainer):
        original(self, trainer)
        model = self.lightning_module.model
        names = [name for stack in model.space.survey.stacks.values() for name in stack.blocks]
        held = [p for name in names for p in model.backbone.get_submodule(name).parameters()]
        assert sum(p.to_local().numel() for p in held) <= 0.55 * sum(p.numel() for p in held)

    Sharded.setup = looked_at


@pytest.mark.medium
def test_divided_blocks_give_the_bits_of_whole_ones(tmp_path):
    chosen = [*EXACT, "data.limit=41", "adapter.dropout=0.1"]
    train_together(2, tmp_path / "whole", *chosen)
    train_together(2, tmp_path / "divided", *chosen, "trainer.strategy=fsdp", watch=_look_at_shares)
    assert what_came_out(tmp_path / "divided") == what_came_out(tmp_path / "whole")
    run = load_run(tmp_path / "divided")
    written = pd.read_csv(tmp_path / "divided" / "predictions_test.csv")
    assert list(run.predict(run.split("test"))["prediction"]) == list(written["prediction"])


@pytest.mark.medium
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (VARIANTS["top"], r"allocation=dynamic: with trainer\.strategy=fsdp: static"),
        (("prefix.cache=true",), r"prefix\.cache=True: with trainer\.strategy=fsdp: false"),
        (("prefix.dropout=false",), r"prefix\.dropout=False: with trainer\.strategy=fsdp: true"),
        (("export.peft=true",), r"export\.peft=True: with trainer\.strategy=fsdp: false"),
    ],
    ids=["dynamic", "cache", "dropout", "export"],
)
def test_what_divided_blocks_cannot_do_is_said_in_one_line(tmp_path, chosen, message):
    with pytest.raises(ProcessFailedError, match=message):
        train_together(2, tmp_path / "run", *EXACT, *chosen, "trainer.strategy=fsdp")


def _nudge(processes):
    """One process's adapters change by themselves, as a fault would have it."""
    original = LitAdapted.on_train_batch_start

    def nudged(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.trainer.global_step == 3 and not processes.leads:
            with torch.no_grad():
                for parameter in self.model.adapters.parameters():
                    parameter[0, 0] += 1e-6

    LitAdapted.on_train_batch_start = nudged


@pytest.mark.medium
def test_replicas_that_part_are_found_out_at_the_next_decision(tmp_path):
    chosen = [*EXACT, *VARIANTS["top"]]
    with pytest.raises(ProcessFailedError, match="processes hold different adapters at step 4"):
        train_together(2, tmp_path / "run", *chosen, watch=_nudge)


@pytest.mark.medium
def test_nothing_is_trained_where_data_differ(tmp_path):
    with pytest.raises(ProcessFailedError, match="backbone and data must be the same in all of them"):
        train_together(2, tmp_path / "run", *EXACT, watch=_other_labels)


def _other_labels(processes):
    import heterolora.training as training

    original = training.digest
    training.digest = lambda splits, task: original(splits, task) + str(processes.rank)


# -- settings ----------------------------------------------------------------------------------------------------------


def made(**given):
    usual = {"max_epochs": 1, "max_steps": -1, "precision": "32-true", "accumulate": 1, "accelerator": "cpu"}
    usual |= {"devices": 2, "strategy": "auto", "threads": None, "test": True, "compile": False}
    return TrainerSettings(**{**usual, "checkpoint_every": None, **given})


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ({}, ALONE, r"trainer\.devices=2: this command trains in one process on this machine: give 1"),
        ({"devices": 1}, Processes(0, 2, 0, 2), r"trainer\.devices=1: so many processes were started .*: give 2"),
        (
            {"accelerator": "mps"},
            Processes(0, 2, 0, 2),
            r"trainer\.accelerator=mps: several processes need cpu, or GPUs",
        ),
    ],
)
def test_what_processes_cannot_do_is_said_in_one_line(given, processes, message):
    with pytest.raises(SettingError, match=message):
        made(**given).check_processes(processes)


def test_lightning_sees_one_device_of_several(tmp_path):
    trainer = made().make(tmp_path, [], False, None, Processes(1, 2, 1, 2))
    assert isinstance(trainer, L.Trainer)
    assert (trainer.world_size, trainer.global_rank, trainer.is_global_zero) == (1, 1, False)
