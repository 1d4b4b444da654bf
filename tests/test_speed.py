"""The benchmarks: who takes turns with whom, what is compared is the same, what the tables say."""

import ast
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.speed import cases, end_to_end, latency, memory, peers, scaling, scoring, steps
from benchmarks.speed import results as results_module
from benchmarks.speed.__main__ import is_done, main, settings
from benchmarks.speed.bench import Bench
from benchmarks.speed.machine import ROOT, code_digest, facts
from benchmarks.speed.pairs import alternate, calls_for, paired_ratio
from benchmarks.speed.peft_trainer import digest, read
from benchmarks.speed.render import BEGIN, END, fragment, put_into
from benchmarks.speed.results import Found, Result, Target, WrongResultError, alone, compared, differing
from benchmarks.speed.subjects import ALL_R2, DROPOUT, FULL, QV_R8, Shelf, lower_bound, ours, random_batch
from heterolora.errors import SettingError

TINY = "tiny_bert"


@pytest.fixture(scope="module")
def shelf():
    return Shelf(0)


@pytest.fixture
def bench(tmp_path, shelf):
    return Bench(True, 2, torch.get_num_threads(), 0, (0,), tmp_path, None, shelf)


# -- taking turns ------------------------------------------------------------------------------------------------------


class Clock:
    """Moves on by what each thing says it takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def thing(self, *seconds):
        taken = itertools.cycle(seconds)

        def do():
            self.now += next(taken)

        return do


def test_things_take_turns_and_each_is_first_as_often_as_last():
    clock = Clock()
    found = alternate({"a": clock.thing(1), "b": clock.thing(2)}, 4, warmup=0, clock=clock)
    assert found.order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_seconds_are_paired_by_repetition_and_the_warm_up_is_not_timed():
    clock = Clock()
    things = {"a": clock.thing(50, 1, 2, 3), "b": clock.thing(90, 10, 20, 30)}
    found = alternate(things, 3, warmup=1, clock=clock)
    assert found.seconds == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert found.median("b") == 20


def test_seconds_are_those_of_one_call():
    clock = Clock()
    found = alternate({"a": clock.thing(1, 3)}, 2, warmup=0, calls=4, clock=clock)
    assert found.seconds == {"a": [2, 2]}


def test_a_drift_of_the_machine_cancels():
    """A thing beside itself, on a machine that gets slower by the same amount with every call."""
    clock, age = Clock(), itertools.count(10)

    def slower():
        clock.now += next(age)

    found = alternate({"a": slower, "b": slower}, 16, warmup=0, clock=clock)
    assert sum(found.seconds["a"]) == sum(found.seconds["b"])


def test_as_many_calls_as_it_takes():
    clock = Clock()
    assert calls_for(clock.thing(9, 0.03), 0.2, clock) == 7  # the first call is warm-up


def test_no_repetition_is_refused():
    with pytest.raises(SettingError, match="--repeats"):
        alternate({"a": lambda: None}, 0)


# -- ratios ------------------------------------------------------------------------------------------------------------


def test_the_interval_is_scipys_percentile_bootstrap_of_the_median_of_paired_ratios():
    generator = np.random.default_rng(3)
    peer = generator.uniform(1, 2, 15)
    mine = peer * generator.normal(0.9, 0.05, 15)
    found = paired_ratio(list(mine), list(peer))
    expected = stats.bootstrap(
        (mine / peer,), np.median, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(np.median(mine / peer))
    assert found.low == pytest.approx(expected.low, abs=0.004)
    assert found.high == pytest.approx(expected.high, abs=0.004)
    assert found.n == 15


def test_ratios_are_of_pairs_and_not_of_medians():
    found = paired_ratio([1, 10, 100], [2, 10, 25])
    assert found.value == 1.0  # of 0.5, 1 and 4; the medians' would be 10 / 10 as well, so:
    assert paired_ratio([1, 10, 100], [10, 25, 2]).value == 0.4


def test_one_pair_has_a_ratio_and_no_interval():
    found = paired_ratio([1], [4])
    assert (found.value, found.n) == (0.25, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(("mine", "peer"), [([1, 2], [1]), ([], []), ([1, 0], [1, 1]), ([1], [-1])])
def test_what_are_no_pairs_is_refused(mine, peer):
    with pytest.raises(SettingError, match="pairs"):
        paired_ratio(mine, peer)


def test_the_exponent_is_that_of_a_power_law():
    sizes = [10, 100, 1000]
    assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0)


# -- what is compared is the same --------------------------------------------------------------------------------------


def pair(shelf, placement=ALL_R2, **changed):
    mine = ours(shelf.backbone(TINY), placement, TINY, 0)
    theirs = peers.peft(shelf.backbone(TINY), replace(placement, **changed), mine.model)
    return mine, theirs, random_batch(shelf.backbone(TINY), 3, 12, 0)


def test_ours_and_pefts_are_equal_and_share_nothing(shelf):
    mine, theirs, batch = pair(shelf)
    checks = peers.check_equal(mine, theirs, batch)
    assert len(checks) == 2
    assert not {id(p) for p in mine.model.parameters()} & {id(p) for p in theirs.model.parameters()}
    # 12 linears at rank 2, and the head: counted from the shapes (width 32, inner width 48)
    assert sum(p.numel() for p in mine.trained) == 2 * 2 * (4 * 64 + 2 * 80) + 2 * 32 + 2


def test_after_the_check_every_delta_is_zero_again_and_nothing_has_a_gradient(shelf):
    mine, theirs, batch = pair(shelf)
    first = {name: a.detach().clone() for name, (a, _) in mine.factors.items()}
    peers.check_equal(mine, theirs, batch)
    for learner in (mine, theirs):
        assert all(not b.any() for _, b in learner.factors.values())
        assert all(torch.equal(a, first[name]) for name, (a, _) in learner.factors.items())
        assert all(p.grad is None for p in learner.trained)


def test_another_scale_is_found(shelf, monkeypatch):
    monkeypatch.setattr(peers, "SCALE", 3.0)
    mine, theirs, batch = pair(shelf)
    with pytest.raises(WrongResultError, match=r"with the same factors|gradients of"):
        peers.check_equal(mine, theirs, batch)


def test_another_rank_is_found(shelf):
    mine, theirs, batch = pair(shelf, rank=3)
    with pytest.raises(WrongResultError, match="parameters"):
        peers.check_equal(mine, theirs, batch)


def test_another_backbone_is_found_at_step_0(shelf):
    mine, theirs, batch = pair(shelf)
    with torch.no_grad():
        next(p for p in theirs.model.parameters() if p.dim() == 2 and not p.requires_grad).mul_(1.5)
    with pytest.raises(WrongResultError, match="at step 0"):
        peers.check_equal(mine, theirs, batch)


def test_a_gradient_that_is_wrong_where_the_loss_is_right_is_found(shelf):
    mine, theirs, batch = pair(shelf)
    some = next(iter(theirs.factors.values()))[0]
    some.register_hook(lambda gradient: gradient * 1.01)
    with pytest.raises(WrongResultError, match="gradients of"):
        peers.check_equal(mine, theirs, batch)


def test_other_places_are_found(shelf):
    mine, theirs, batch = pair(shelf)
    theirs.factors.pop(next(iter(theirs.factors)))
    with pytest.raises(WrongResultError, match="different places"):
        peers.check_equal(mine, theirs, batch)


def test_dropout_that_does_nothing_is_found(shelf):
    batch = random_batch(shelf.backbone(TINY), 3, 12, 0)
    dropping = ours(shelf.backbone(TINY), DROPOUT, TINY, 0)
    assert "ours" in peers.check_drops(dropping, batch)
    with pytest.raises(WrongResultError, match="drop"):
        peers.check_drops(ours(shelf.backbone(TINY), QV_R8, TINY, 0), batch)


def test_with_shortcuts_ours_holds_what_lora_on_q_and_v_does(shelf):
    mine = ours(shelf.backbone(TINY), FULL, TINY, 0)
    assert mine.model.held_parameters == 2 * 2 * 8 * (32 + 32)
    assert any(mine.model.space[name].kind == "shortcut" for name in mine.factors)


def test_the_bound_goes_back_to_the_lowest_layer_and_trains_the_head_alone(shelf):
    learner, seen = lower_bound(shelf.backbone(TINY), QV_R8, TINY), []
    layer = learner.model.bert.encoder.layer[0]

    def watch(module, args, out):
        out.register_hook(seen.append)

    def look(module, args, out):
        seen.append(out.requires_grad)

    layer.attention.self.query.register_forward_hook(watch)
    learner.model.bert.embeddings.register_forward_hook(look)
    learner.step(random_batch(shelf.backbone(TINY), 3, 12, 0))
    assert seen[0] is False
    assert isinstance(seen[1], torch.Tensor)
    assert {id(p) for p in learner.trained} == {id(p) for p in learner.head.values()}


def test_a_step_trains_and_leaves_no_gradient(shelf):
    mine, _, batch = pair(shelf)
    mine.optimizer.param_groups[0]["lr"] = 0.1
    before = mine.loss(batch).item()
    for _ in range(5):
        mine.step(batch)
    assert mine.loss(batch).item() < before
    assert all(p.grad is None for p in mine.trained)


# -- tables ------------------------------------------------------------------------------------------------------------


def result(*rows, case="memory", short=False, **more):
    machine = facts() | {"cpu": "a | processor", "date": "2026-01-02T03:04:05+0000", "commit": "abc"}
    return Result(case, {"short": short, "repeats": 2, "threads": 1, "seed": 0}, machine, 9.0, Found(rows, **more))


def cells(text, what):
    row = next(line for line in text.splitlines() if line.startswith(f"| {what}"))
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_a_missed_target_is_not_met_and_a_reached_one_is():
    missed = compared("missed", [0.10, 0.10], [0.10, 0.10], "PEFT", target=0.97)
    reached = compared("reached", [0.10, 0.10], [0.20, 0.20], "PEFT", target=0.5)
    text = fragment([result(missed, reached, compared("free", [1.0], [2.0], "PEFT"))], {"memory": "Memory"})
    assert cells(text, "missed")[-2:] == ["<= 0.97", "**not met**"]
    assert cells(text, "reached")[-2:] == ["<= 0.50", "met"]
    assert cells(text, "missed")[1:4] == ["100 ms", "100 ms (PEFT)", "1.000 [1.000, 1.000]"]
    assert "met" not in cells(text, "free")


def test_targets_of_our_own_number_and_of_a_difference():
    rows = [
        alone("slow", [2.5, 2.5, 9.0], target=2.0),
        alone("fast", [1.5, 1.5, 9.0], target=2.0),
        differing("worse", [0.80, 0.81, 0.82], [0.84, 0.85, 0.86], "PEFT"),
        differing("as good", [0.80, 0.84, 0.82], [0.82, 0.81, 0.83], "PEFT"),
        differing("one seed", [0.80], [0.82], "PEFT"),
    ]
    assert [row.met for row in rows] == [False, True, False, True, None]
    text = fragment([result(*rows)], {"memory": "Memory"})
    assert cells(text, "worse")[1:] == ["81.0 %", "85.0 % (PEFT)", "-4.0 points [-4.0, -4.0]", "0 in the interval",
                                        "**not met**"]  # fmt: skip
    assert cells(text, "slow")[1:] == ["2.5 s", "", "", "<= 2 s", "**not met**"]


def test_a_table_says_with_what_it_was_made_and_a_short_run_that_it_means_nothing():
    row = compared("a | b", [1.0], [2.0], "PEFT", note="mind this")
    text = fragment([result(row, checks=["one"])], {"memory": "Memory"})
    for part in ("### Memory", "2026-01-02", "commit abc", f"torch {torch.__version__}", "- mind this", "a \\| b"):
        assert part in text
    assert "means nothing" not in text
    assert "mean nothing" in fragment([result(row, short=True)], {"memory": "Memory"})


def test_cases_stand_in_the_order_of_the_titles():
    text = fragment([result(case="b"), result(case="a")], {"a": "First", "b": "Second", "c": "Third"})
    assert text.index("First") < text.index("Second")
    assert "Third" not in text


def test_a_document_keeps_what_is_outside_the_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for text in ("new\n", "newer\n"):
        put_into(path, text)
    assert path.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"


@pytest.mark.parametrize("content", ["nothing", f"{END}\n{BEGIN}", BEGIN, f"{BEGIN}{BEGIN}{END}"])
def test_a_document_without_its_markers_is_refused_and_left(tmp_path, content):
    path = tmp_path / "page.md"
    path.write_text(content)
    with pytest.raises(SettingError, match="--write"):
        put_into(path, "new")
    assert path.read_text() == content


def test_the_page_of_the_repository_has_its_markers():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)
    assert {name for name in cases.CASES if f"`{name}`" in text} == cases.CASES.keys()


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_result_comes_back_from_its_file(tmp_path):
    rows = [compared("x", [1.0], [2.0], "PEFT", target=1.0), alone("y", [3.0])]
    made = result(*rows, checks=("fine",), more={"k": [1]})
    made.write(tmp_path)
    found = results_module.read_result(tmp_path / "memory.json")
    assert found.found.rows == rows
    assert (found.case, found.settings, found.machine) == (made.case, made.settings, made.machine)
    content = json.loads((tmp_path / "memory.json").read_text())
    assert [row["met"] for row in content["found"]["rows"]] == [True, None]
    assert {"cpu", "cores", "threads", "versions", "date", "commit"} <= content["machine"].keys()


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 0}', '{"format": 1, "found": {"rows": [{}]}}', "no json"])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SettingError, match="--out"):
        results_module.read_results(tmp_path)


def fake(name, seen, rows=()):
    def run(bench):
        seen.append(name)
        if name == "wrong":
            raise WrongResultError("values differ")
        if name == "broken":
            raise ZeroDivisionError("a bug")
        return Found(rows)

    return cases.Case(f"Case {name}", run)


@pytest.fixture
def fakes(monkeypatch):
    seen: list[str] = []
    missed = compared("slow", [2.0, 2.0], [1.0, 1.0], "PEFT", target=0.5)
    made = {name: fake(name, seen, [missed]) for name in ("one", "two")}
    made["wrong"] = fake("wrong", seen)
    made["broken"] = fake("broken", seen)
    made["long"] = replace(fake("long", seen), hours=True)
    monkeypatch.setattr("benchmarks.speed.__main__.CASES", made)
    monkeypatch.setattr("benchmarks.speed.__main__.TITLES", {name: case.title for name, case in made.items()})
    threads = torch.get_num_threads()
    yield seen
    torch.set_num_threads(threads)


def test_a_case_that_is_done_is_skipped_unless_it_is_asked_for_again(fakes, tmp_path, capsys):
    given = ["one", "two", "--out", str(tmp_path), "--threads", "1"]
    assert main(given) == 0  # a missed target is no failure
    assert "**not met**" in capsys.readouterr().out
    assert main(given) == 0
    assert fakes == ["one", "two"]
    assert "Case two" in capsys.readouterr().out
    assert main([*given, "--repeats", "3"]) == 0  # other settings
    assert main([*given, "--repeats", "3", "--again"]) == 0
    assert fakes == ["one", "two"] * 3


def test_other_code_makes_results_old(fakes, tmp_path, monkeypatch):
    given = ["one", "--out", str(tmp_path), "--threads", "1"]
    main(given)
    monkeypatch.setattr("benchmarks.speed.machine.code_digest", lambda: "other")
    main(given)
    assert fakes == ["one", "one"]


@pytest.mark.parametrize("case", ["wrong", "broken"])
def test_a_wrong_result_fails_after_the_other_cases_and_leaves_no_file(fakes, tmp_path, capsys, case):
    assert main([case, "one", "--out", str(tmp_path), "--threads", "1"]) == 1
    assert fakes == [case, "one"]
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    assert f"Case {case}" not in capsys.readouterr().out


@pytest.mark.parametrize(("case", "left"), [("wrong", 0), ("broken", 1)])
def test_an_old_result_of_a_case_that_is_wrong_now_goes_and_is_not_shown(fakes, tmp_path, capsys, case, left):
    result(case=case).write(tmp_path)
    assert main([case, "--out", str(tmp_path), "--threads", "1"]) == 1
    assert f"Case {case}" not in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == left


def test_what_takes_hours_is_measured_only_by_name(fakes, tmp_path):
    main(["--out", str(tmp_path), "--threads", "1"])
    assert "long" not in fakes
    main(["long", "--out", str(tmp_path), "--threads", "1"])
    assert fakes[-1] == "long"
    assert json.loads((tmp_path / "long.json").read_text())["settings"]["seeds"] == [0, 1, 2, 3, 4]


def test_tables_are_written_from_files_but_not_those_of_a_short_run(fakes, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    write = ["--write", str(page), "--out", str(tmp_path / "out")]
    assert main(write) == 2
    main(["one", "--out", str(tmp_path / "out"), "--threads", "1"])
    assert main(write) == 0
    assert "### Case one" in page.read_text()
    main(["two", "--short", "--out", str(tmp_path / "out"), "--threads", "1"])
    before = page.read_text()
    assert main(write) == 2
    assert page.read_text() == before
    assert fakes == ["one", "two"]


@pytest.mark.parametrize(
    ("given", "word"),
    [(["no_such"], "no_such"), (["one", "--repeats", "0"], "--repeats"), (["one", "--seeds", "a"], "--seeds")],
)
def test_bad_arguments_get_one_line(fakes, tmp_path, capsys, given, word):
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert word in capsys.readouterr().err
    assert not fakes


def test_a_damaged_file_is_measured_again(bench):
    (bench.out / "memory.json").write_text("{")
    assert not is_done(bench.out / "memory.json", bench, "memory")


def test_the_digest_of_the_code_changes_with_it(monkeypatch, tmp_path):
    for folder in ("heterolora", "conf", "benchmarks/speed"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "train.py").write_text("a")
    (tmp_path / "conf" / "x.yaml").write_text("b")
    monkeypatch.setattr("benchmarks.speed.machine.ROOT", tmp_path)
    first = code_digest()
    (tmp_path / "README.md").write_text("of no importance")
    assert code_digest() == first
    (tmp_path / "conf" / "x.yaml").write_text("c")
    assert code_digest() != first


# -- cases, on tiny models ---------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_steps_of_both_models(bench):
    for case, targets in ((steps.encoder, 9), (steps.decoder, 8)):
        found = case(bench)
        assert len(found.rows) == targets
        assert [row.what for row in found.rows if row.target] == [
            "q,v r=8", "q,v r=8: ours to the bound", "all linears r=2",
        ]  # fmt: skip
        assert all(row.n == 2 and len(row.samples["ours"]) == len(row.samples["peer"]) == 2 for row in found.rows)
        assert len(found.checks) >= 9


@pytest.mark.medium
def test_scaling_has_rows_for_sites_lengths_and_ranks(bench):
    by_sites = scaling.by_sites(bench)
    assert by_sites.more["sites"] == [9, 29, 99]  # 6 L + 4 L - 1
    assert by_sites.rows[0].target == Target("ours", 2.0)
    assert {row.unit for row in by_sites.rows} == {"s", "exponent"}
    assert [row.what for row in scaling.by_length_and_rank(bench).rows] == [
        "4 tokens, q,v r=8", "8 tokens, q,v r=8", "12 tokens, all linears r=1", "12 tokens, all linears r=2",
    ]  # fmt: skip


@pytest.mark.medium
def test_scoring_is_timed_beside_steps_and_its_memory_asked_for(bench, monkeypatch):
    asked: list[dict] = []

    def peaks(questions):
        asked.extend(questions)
        return [10.0 if "proxies" in question else 8.0 for question in questions]

    monkeypatch.setattr(memory, "peaks", peaks)
    found = scoring.every_proxy(bench)
    assert [row.unit for row in found.rows] == ["s", "s", "MiB", "MiB"]
    assert [row.met for row in found.rows] == [None, None, False, False]  # 1.25 of a step
    found = scoring.all_first_order(bench)
    assert found.rows[0].target == Target("ratio", 1.6)
    assert found.rows[1].estimate == pytest.approx(1.25)
    assert all(question["model"] == TINY for question in asked)


def test_proxies_that_share_a_pass_are_those_that_need_one():
    from heterolora.build import build
    from heterolora.shipped import option, options

    made = {name: build(option("proxy", name), "proxy") for name in options("proxy")}
    needs_backward = {n for n, p in made.items() if p.statistics and all(s.needs_gradient for s in p.statistics)}
    assert set(scoring.FIRST_ORDER) <= needs_backward


@pytest.mark.medium
def test_memory_of_training_is_ours_beside_pefts(bench, monkeypatch):
    monkeypatch.setattr(memory, "peaks", lambda asked: [9.0 if q["who"] == "ours" else 10.0 for q in asked])
    (row,) = memory.training(bench).rows
    assert (row.ours, row.peer, row.estimate, row.met) == (9.0, 10.0, 0.9, True)


@pytest.mark.slow
def test_peaks_come_from_processes_of_their_own(bench):
    found = memory.peaks([memory.train(bench, "ours", QV_R8), memory.score(bench, ["snip"])])
    assert all(0 < mib < 200 for mib in found)


@pytest.mark.medium
def test_inference_is_that_of_the_same_function(bench, monkeypatch):
    plain = bench.shelf.backbone(TINY).model
    monkeypatch.setattr(latency, "_merged", lambda bench, folder: (plain, "as if"))
    monkeypatch.setattr(latency, "_LEAST_SECONDS", 1e-6)
    rows = latency.inference(bench).rows
    assert [row.what.partition(",")[0] for row in rows[:4]] == ["merged", "all linears r=8", FULL.name[:25], "PEFT"]
    assert len(rows) == 8
    assert all(row.peer_name == "backbone" for row in rows)


def test_the_peers_script_has_nothing_of_ours():
    tree = ast.parse((ROOT / "benchmarks" / "speed" / "peft_trainer.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "peft" in found
    assert not {name.partition(".")[0] for name in found} & {"heterolora", "benchmarks", "lightning", "hydra"}


# -- whole runs --------------------------------------------------------------------------------------------------------


def measured(**changed):
    one = {"seconds": 10.0, "training_seconds": 8.0, "validation_accuracy": 0.8, "test_accuracy": 0.7}
    one |= {"tokenising_seconds": 0.5, "steps": 3, "held": 5, "head": 2, "rows": {"train": 4}, "digest": {"train": "x"}}
    return one | changed


def test_rows_of_whole_runs_pair_seeds(monkeypatch):
    monkeypatch.setattr(end_to_end, "OURS", {"ours": ()})
    mine = [measured(seconds=s, validation_accuracy=a) for s, a in ((6.0, 0.80), (9.0, 0.82), (7.0, 0.81))]
    theirs = [measured(seconds=s, validation_accuracy=a) for s, a in ((10.0, 0.81), (10.0, 0.81), (10.0, 0.80))]
    rows = end_to_end.rows_of({"ours": mine, **dict.fromkeys(end_to_end.PEERS, theirs)})
    assert len(rows) == 4 * len(end_to_end.PEERS)
    assert rows[0].estimate == pytest.approx(0.7)
    assert rows[0].met is True
    # t interval of (-0.01, 0.01, 0.01), from scipy
    expected = stats.ttest_1samp([-0.01, 0.01, 0.01], 0).confidence_interval(0.95)
    assert (rows[2].low, rows[2].high) == pytest.approx((expected.low, expected.high))
    assert rows[2].met is True


@pytest.mark.parametrize("key", ["steps", "held", "head", "rows", "digest"])
def test_runs_that_did_other_work_are_refused(key):
    found = {"ours": [measured()], **{peer: [measured()] for peer in end_to_end.PEERS}}
    end_to_end.check_same_work(found, {"train": "x"})
    last = list(end_to_end.PEERS)[-1]
    found[last] = [measured(**{key: {"train": "other"}})]
    with pytest.raises(WrongResultError):
        end_to_end.check_same_work(found, {"train": "x"})


def test_without_local_data_whole_runs_are_refused(bench):
    with pytest.raises(SettingError, match="glue/MRPC"):
        end_to_end.end_to_end(bench)


def test_the_peer_reads_the_rows_that_ours_does(data_root, bench):
    runs = end_to_end._Runs(replace(bench, data_root=str(data_root), short=False))
    folder = data_root / "glue" / "MRPC"
    files = {"train": "train.tsv", "validation": "dev.tsv", "test": "msr_paraphrase_test.txt"}
    assert {split: digest(read(folder / name, None)) for split, name in files.items()} == runs.expected


@pytest.mark.slow
def test_whole_runs_are_made_once_and_then_read(data_root, bench, monkeypatch):
    asking = replace(bench, data_root=str(data_root))
    found = end_to_end.end_to_end(asking)
    assert len(found.rows) == 4 * len(end_to_end.OURS) * len(end_to_end.PEERS)
    monkeypatch.setattr(end_to_end, "python", None)  # no further process
    assert end_to_end.end_to_end(asking).rows == found.rows


@pytest.mark.slow
def test_the_command_measures_and_shows(tmp_path):
    command = [sys.executable, "-m", "benchmarks.speed", "step_minilm", "first_step", "--short", "--threads", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "command to first step" in done.stdout
    assert {path.name for path in tmp_path.glob("*.json")} == {"step_minilm.json", "first_step.json"}


def test_settings_name_seeds_only_where_they_matter(bench):
    assert "seeds" in settings(bench, "end_to_end")
    assert "seeds" not in settings(bench, "memory")
