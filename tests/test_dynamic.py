"""Whole runs whose allocation changes while they train."""

import json
import logging

import pandas as pd
import pytest
import torch

from heterolora.allocation import read_ranks
from heterolora.callbacks.reallocate import Dynamic
from heterolora.checkpoints import FOLDER, newest_first
from heterolora.history import HISTORY, read_history
from heterolora.loading import load_run
from heterolora.proxies.base import DegenerateScores
from heterolora.run import RunFailed, train
from tests.jobs import prepare, run_job
from tests.test_resume import break_off, stop, what_came_out

pytestmark = pytest.mark.medium

TOP = ("allocation=dynamic", "allocation.every=2", "allocator=top", "allocator.rank=4", "proxy=grad_norm")
GREEDY = ("allocation=dynamic", "allocation.every=0.5", "proxy=spectral", "budget.rank=2")
FEW = ("budget.rank=2", "seed=1")
"""A budget for two or three sites, which do move."""
VARIANTS = {
    "top": (*TOP, *FEW),
    "greedy": GREEDY,
    "paper": (*TOP, "allocation.held=all", "allocator.mode=separate", "budget=fraction", "budget.rank=4", "proxy=snip"),
    "paper_own": (*TOP, "allocation.held=all", "allocation.factors=own", "budget=fraction", "budget.rank=4"),
    "kept_greedy": (*GREEDY, "allocation.held=all"),
    "frozen": (*TOP, *FEW, "allocation.held=all", "allocation.off=freeze"),
}
TRAINED = ("adapter.dropout=0.1", "trainer.checkpoint_every=1", "optimizer.lr=3e-2", "optimizer.warmup=0")


def history(run):
    return read_history(run / HISTORY)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decisions_are_kept_within_the_budget_and_the_last_one_is_the_runs(tmp_path, variant):
    summary = run_job(tmp_path / "a", *VARIANTS[variant], *TRAINED)
    decisions = history(tmp_path / "a")
    every = 3 if "allocation.every=0.5" in VARIANTS[variant] else 2
    assert [decision.step for decision in decisions] == list(range(0, 12, every))
    moves = len({tuple(decision.ranks.items()) for decision in decisions}) > 1
    assert moves or variant == "paper_own"  # by their own factors, trained sites keep the lead here
    run = load_run(tmp_path / "a")
    cost = run.model.family.cost(run.model.space.sites)
    budget = summary["parameters"]["budget"]
    assert all(cost(decision.ranks) <= budget for decision in decisions if budget)
    ranks = read_ranks(tmp_path / "a" / "allocation.json")
    frozen = {name for name, rank in ranks.items() if rank and not decisions[-1].ranks[name]}
    assert bool(frozen) == (variant == "frozen")
    assert {**ranks, **dict.fromkeys(frozen, 0)} == decisions[-1].ranks
    assert summary["parameters"]["active"] == cost(ranks)
    if variant in ("top", "greedy"):
        assert summary["parameters"]["held"] == max(cost(decision.ranks) for decision in decisions)
    elif variant != "kept_greedy":
        assert summary["parameters"]["held"] == cost(dict.fromkeys(ranks, 4))
    found, written = run.predict(run.split("test")), pd.read_csv(tmp_path / "a" / "predictions_test.csv")
    assert list(found["prediction"]) == list(written["prediction"])
    assert found["logit_positive"].to_numpy() == pytest.approx(written["logit_positive"].to_numpy(), abs=1e-6)
    assert (tmp_path / "a" / "history.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("variant", "place"), [*((variant, (0, 3)) for variant in VARIANTS), ("top", (1, 0)), ("paper", (1, 1))], ids=str
)
def test_a_run_broken_off_anywhere_resumes_to_the_same_bits_and_decisions(tmp_path, variant, place):
    settings = [*VARIANTS[variant], *TRAINED]
    run_job(tmp_path / "whole", *settings)
    break_off(tmp_path / "first", *settings, *stop(*place))
    run_job(tmp_path / "second", *settings, "resume=true")
    assert what_came_out(tmp_path / "second") == what_came_out(tmp_path / "whole")
    assert history(tmp_path / "second") == history(tmp_path / "whole")


def test_decisions_that_change_nothing_leave_the_static_run_to_the_bit(tmp_path):
    """Scoring in the middle of training leaves no trace, in dropout, data order, optimizer or curves."""
    static = [*TOP[2:], *TRAINED, "search_space=lora_qv", "budget.rank=2"]  # where nothing more fits
    run_job(tmp_path / "static", *static)
    run_job(tmp_path / "dynamic", *static, *TOP[:2], "allocation.margin=1e9")
    found = [what_came_out(tmp_path / name) for name in ("static", "dynamic")]
    decisions = found[1].pop("history")
    assert found[0].pop("history") == []
    assert found[0] == found[1]
    assert {tuple(decision["ranks"].items()) for decision in decisions} == {tuple(decisions[0]["ranks"].items())}
    assert len(history(tmp_path / "dynamic")) == 6


def test_the_first_decision_is_the_static_one_and_start_and_stop_bound_the_others(tmp_path):
    run_job(tmp_path / "static", *TOP[2:])
    run_job(tmp_path / "a", *TOP, "allocation.every=1", "allocation.start=0.25", "allocation.stop=7")
    decisions = history(tmp_path / "a")
    assert [decision.step for decision in decisions] == [0, 3, 4, 5, 6]
    assert decisions[0].ranks == read_ranks(tmp_path / "static" / "allocation.json")


def test_with_accumulated_gradients_steps_are_counted_and_decisions_come_between_them(tmp_path):
    run_job(tmp_path / "a", *TOP, "trainer.accumulate=4", "allocation.every=1")
    assert [decision.step for decision in history(tmp_path / "a")] == [0, 1, 2, 3]  # 6 batches: 2 steps an epoch


@pytest.mark.parametrize("proxy", ["snip", "synflow"])
def test_no_site_is_locked_out_by_never_having_been_trained(tmp_path, proxy):
    run_job(tmp_path / "a", *TOP, f"proxy={proxy}", "search_space.include=[{role:[v,o,up]}]", "budget.rank=2")
    decisions = history(tmp_path / "a")
    never = [name for name, rank in decisions[0].ranks.items() if not rank]
    assert never
    assert all(decision.scores[name] > 0 for decision in decisions for name in never)


def test_own_factors_score_what_was_trained_and_the_probes_what_was_not(tmp_path):
    shared = [*TOP, *TRAINED, "trainer.max_steps=3"]
    run_job(tmp_path / "probe", *shared)
    run_job(tmp_path / "own", *shared, "allocation.factors=own")
    probe, own = (history(tmp_path / name)[1] for name in ("probe", "own"))
    on = {name for name, rank in history(tmp_path / "own")[0].ranks.items() if rank}
    assert {name for name in own.scores if own.scores[name] != probe.scores[name]} == on


def test_scores_that_say_nothing_change_nothing_later_on(tmp_path, monkeypatch, caplog):
    import heterolora.baselines.base as module

    real, calls = module.search, []

    def search(*arguments, **options):
        calls.append(options["standing"])
        if len(calls) == 3:
            raise DegenerateScores("proxy=grad_norm: all scores are 0")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "search", search)
    with caplog.at_level(logging.WARNING):
        run_job(tmp_path / "a", *TOP, *TRAINED)
    decisions = history(tmp_path / "a")
    assert decisions[2].ranks == decisions[1].ranks
    assert decisions[2].scores == {}
    assert "nothing changed, proxy=grad_norm: all scores are 0" in decisions[2].reason
    assert decisions[3].scores
    assert [standing is None for standing in calls] == [True] + [False] * 5


def test_the_kept_prefix_is_right_while_sites_come_and_go(tmp_path):
    settings = [
        *TOP,
        *TRAINED,
        "search_space=lora_all",
        "data.pad_to_multiple_of=8",
        "budget.rank=2",
        "model.dropout=0",
    ]
    run_job(tmp_path / "a", *settings)
    run_job(tmp_path / "b", *settings, "prefix.cache=true")
    a, b = (what_came_out(tmp_path / name) for name in "ab")
    assert a["tensors"] == b["tensors"]
    assert history(tmp_path / "a") == history(tmp_path / "b")


def test_checkpoints_hold_what_is_kept_and_load_weights_only(tmp_path):
    run_job(tmp_path / "a", *VARIANTS["paper"], *TRAINED)
    checkpoint = torch.load(next(newest_first(tmp_path / "a" / FOLDER)), weights_only=True)
    on = {name for name, rank in history(tmp_path / "a")[-1].ranks.items() if rank}
    assert set(checkpoint["ranks"]) == on
    assert not on & set(checkpoint["switch"]["kept"])
    sites = json.loads((tmp_path / "a" / "sites.json").read_text())
    assert on | set(checkpoint["switch"]["kept"]) == {site["name"] for site in sites}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["allocation.every=0"], r"allocation.every=0: a whole number of steps"),
        (["allocation.every=1.5"], r"allocation.every=1.5: .* a share of an epoch"),
        (["allocation.every=true"], r"allocation.every=True"),
        (["allocation.stop=2.0"], r"allocation.stop=2.0: a whole number of steps, or a share"),
        (["allocation.start=0.5", "allocation.stop=0.5"], r"allocation.stop=0.5: must come after start=0.5"),
        (["allocation.margin=-1"], r"allocation.margin=-1"),
        (["allocation.off=keep"], r"allocation.off=keep: holds more than the budget pays for: held=all"),
        (["allocation.off=gone"], r"allocation.off=gone"),
        (["allocator=uniform"], r"allocation=dynamic: allocator=uniform looks at no scores"),
        (["allocator=greedy", "adapter.scaling=alpha_over_r"], r"adapter.scaling=alpha_over_r: .* constant, or top"),
        (["allocator=greedy", "allocation.held=all", "allocation.off=freeze"], r"allocation.off=freeze: .* top"),
        (["probe.live=true"], r"probe.live=True: with allocation=dynamic"),
        (["trainer.compile=true"], r"trainer.compile=True: not with allocation=dynamic"),
        (["budget.step_time=0.9"], r"data.cache_dir=None: budget.step_time with allocation=dynamic"),
        (["allocation.every=100"], r"no decision would come in 12 steps, 6 an epoch"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, overrides, message):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunFailed, match=message):
        train(prepare(tmp_path / "a", "allocation=dynamic", "allocator=top", *overrides))


def test_what_becomes_of_sites_follows_from_what_is_held():
    given = {"every": 0.2, "start": 0, "stop": 1.0, "margin": 0, "factors": "probe"}
    assert Dynamic(**given, held="budget", off=None).dropping == "reset"
    assert Dynamic(**given, held="all", off=None).dropping == "keep"
    assert Dynamic(**given, held="all", off="reset").dropping == "reset"
