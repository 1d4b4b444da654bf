"""Runs as rows: written whole, read from anywhere, grouped by what tells them apart."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from heterolora.errors import SettingError
from heterolora.results import ROWS, RowFile, check_controls, find_results, group_names, method_hash


def row(**changes):
    found = {
        "key": "run-a-s0",
        "section": "mrpc, minilm",
        "group": "a",
        "stage": "run",
        "seed": 0,
        "state": "finished",
        "metrics": {"validation": {"accuracy": 0.5, "loss": 0.7}},
        "parameters": {"held": 100},
        "ranks": {"0.q": 1},
        "steps": 10,
        "digest": "d",
        "data": {"sha256": "0" * 64},
        "backbone": "1" * 64,
        "method_hash": "m",
        "commit": "c",
        "versions": {"torch": "2"},
    }
    return found | changes


# -- the file ----------------------------------------------------------------------------------------------------------


@given(rows=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3), max_size=5))
def test_rows_come_back_in_their_order(tmp_path_factory, rows):
    file = RowFile(tmp_path_factory.mktemp("rows") / ROWS)
    for content in rows:
        file.append(content)
    assert file.rows() == rows


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_what_a_dead_process_left_of_a_row_is_no_row_and_goes_with_the_next(tmp_path, cut, caplog):
    file = RowFile(tmp_path / ROWS)
    file.append(row(key="first"))
    whole = file.path.read_bytes()
    file.append(row(key="torn"))
    torn = file.path.read_bytes()
    file.path.write_bytes(torn[: len(whole) + cut])
    assert [found["key"] for found in file.rows()] == ["first"]
    file.append(row(key="second"))
    assert [found["key"] for found in file.rows()] == ["first", "second"]
    assert "unfinished row" in caplog.text


def test_a_damaged_line_and_a_value_that_is_no_json_are_refused(tmp_path):
    file = RowFile(tmp_path / ROWS)
    with pytest.raises(ValueError, match="JSON"):
        file.append({"loss": float("nan")})
    assert file.rows() == []
    file.path.write_text("{}\nnonsense\n")
    with pytest.raises(SettingError, match="line 2"):
        file.rows()
    file.path.write_text("[1]\n")
    with pytest.raises(SettingError, match="no JSON object"):
        file.rows()


# -- folders -----------------------------------------------------------------------------------------------------------


def make_run(folder: Path, seed=0, state="finished", overrides=(), **config) -> Path:
    folder.mkdir(parents=True)
    choices = {"task": "mrpc", "model": "minilm", "proxy": config.pop("proxy", "snip"), "logger": "csv"}
    node = {"seed": seed, "proxy": {"_target_": choices["proxy"]}, "allocator": {"seed": seed}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(node))
    (folder / "status.json").write_text(json.dumps({"state": state, "overrides": list(overrides)}))
    if state == "finished":
        summary = {
            "choices": choices,
            "seed": seed,
            "metrics": {"test": {"accuracy": 0.5, "loss": None}},
            "parameters": {"held": 7},
            "steps": 3,
            "data": {"sha256": "0" * 64},
            "backbone": "1" * 64,
            "versions": {"torch": "2"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_sweep_is_read_job_by_job_and_what_is_unfinished_is_named(tmp_path):
    for number in range(11):
        make_run(tmp_path / f"{number}_mrpc", seed=number % 2, proxy=("snip", "fisher")[number // 2 % 2])
    make_run(tmp_path / "11_mrpc", state="failed")
    make_run(tmp_path / "12_mrpc", state="running")
    make_run(tmp_path / "13_mrpc", state="planned")
    found = find_results(tmp_path)
    assert [Path(result.place).name for result in found.results] == [f"{number}_mrpc" for number in range(11)]
    assert {result.group for result in found.results} == {"proxy=snip", "proxy=fisher"}
    assert {(result.section, result.held, result.steps) for result in found.results} == {("mrpc, minilm", 7, 3)}
    assert {result.material for result in found.results} == {"data 000000000000, backbone 111111111111"}
    assert {Path(place).name: state for place, state in found.unfinished.items()} == {
        "11_mrpc": "failed",
        "12_mrpc": "running",
    }


def test_rows_count_once_and_hide_the_folders_below_them(tmp_path):
    file = RowFile(tmp_path / ROWS)
    file.append(row(state="failed", error="..."))
    file.append(row())
    file.append(row(key="control-a-s0", stage="control"))
    file.append(row(key="tuning-a-s9", stage="tuning", seed=9))
    file.append(row(key="run-b-s0", group="b", state="failed"))
    make_run(tmp_path / "runs" / "run-a-s0")
    found = find_results(tmp_path)
    assert [(result.group, result.seed) for result in found.results] == [("a", 0)]
    assert list(found.unfinished.values()) == ["failed"]


def declare(folder: Path, name: str, **changes) -> Path:
    folder.mkdir()
    content = {"name": name, "baseline": "a", "primary": None, "tolerance": 0.01} | changes
    (folder / "declaration.json").write_text(json.dumps(content))
    return folder


def test_a_tournaments_runs_come_by_their_role_and_not_by_which_ended_first(tmp_path):
    file = RowFile(declare(tmp_path / "one", "one", baseline="b", primary="c") / ROWS)
    for group, seed in (("a", 1), ("c", 0), ("b", 1), ("a", 0), ("b", 0)):
        file.append(row(key=f"run-{group}-s{seed}", group=group, seed=seed))
    found = [(result.group, result.seed) for result in find_results(tmp_path).results]
    assert found == [("b", 0), ("b", 1), ("c", 0), ("a", 0), ("a", 1)]


def test_every_tournament_is_a_section_of_its_own(tmp_path):
    for name in ("one", "two"):
        RowFile(declare(tmp_path / name, name, primary="b") / ROWS).append(row(seed=len(name)))
    found = find_results(tmp_path)
    assert [result.section for result in found.results] == [
        "mrpc, minilm; tournament one",
        "mrpc, minilm; tournament two",
    ]
    assert {said.primary for said in found.declared.values()} == {"b"}


def test_runs_of_one_method_that_differ_in_more_than_the_seed_are_refused(tmp_path):
    file = RowFile(tmp_path / ROWS)
    file.append(row())
    file.append(row(key="run-a-s1", seed=1, method_hash="other"))
    with pytest.raises(SettingError, match="another config"):
        find_results(tmp_path)


def test_the_hash_of_a_method_forgets_the_seed_and_nothing_else():
    config = {"seed": 3, "allocator": {"seed": 3, "rank": 8}, "optimizer": {"lr": 1}}
    assert method_hash(config) == method_hash({**config, "seed": 4, "allocator": {"seed": 4, "rank": 8}})
    assert method_hash(config) != method_hash({**config, "optimizer": {"lr": 2}})
    assert method_hash(config) != method_hash({**config, "seed": 4})  # an allocator with a seed of its own


def test_folders_without_finished_runs_are_refused(tmp_path):
    with pytest.raises(SettingError, match="no such folder"):
        find_results(tmp_path / "missing")
    with pytest.raises(SettingError, match="no finished run"):
        find_results(tmp_path)
    make_run(tmp_path / "a", state="failed")
    with pytest.raises(SettingError, match=r"no finished run; unfinished: .*failed"):
        find_results(tmp_path)


def test_a_run_whose_status_is_damaged_is_unfinished(tmp_path):
    make_run(tmp_path / "a")
    (make_run(tmp_path / "b") / "status.json").write_text("")
    found = find_results(tmp_path)
    assert len(found.results) == 1
    assert list(found.unfinished.values()) == ["damaged"]


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_damaged_files_are_one_line(tmp_path, name):
    run = make_run(tmp_path / "a")
    (run / name).write_text("{")
    with pytest.raises(SettingError, match=name):
        find_results(tmp_path)


def test_a_row_or_a_summary_that_lacks_something_says_what(tmp_path):
    RowFile(tmp_path / ROWS).append({key: value for key, value in row().items() if key != "steps"})
    with pytest.raises(SettingError, match="lacks 'steps'"):
        find_results(tmp_path)
    run = make_run(tmp_path / "b" / "a")
    (run / "summary.json").write_text("{}")
    with pytest.raises(SettingError, match="lacks 'choices'"):
        find_results(run.parent)


# -- controls ----------------------------------------------------------------------------------------------------------


def test_controls_that_agree_are_counted_and_one_that_differs_is_refused(tmp_path):
    control = row(key="control-a-s0", stage="control")
    assert check_controls([row(), control]) == [0]
    assert (
        check_controls([row(), row(key="run-b-s0", group="b"), row(key="failed", stage="control", state="failed")])
        == []
    )
    for change in (
        {"digest": "e"},
        {"ranks": {"0.q": 2}},
        {"metrics": {"validation": {"accuracy": 0.5, "loss": 0.7000000001}}},
    ):
        with pytest.raises(SettingError, match=f"{next(iter(change))} differ"):
            check_controls([row(), control | change])
        file = RowFile(tmp_path / next(iter(change)) / ROWS)
        file.path.parent.mkdir()
        file.append(row())
        file.append(control | change)
        with pytest.raises(SettingError, match="differ"):
            find_results(file.path.parent)


# -- names -------------------------------------------------------------------------------------------------------------


def names(*runs, given=()):
    return group_names([(choices, config, given) for choices, config in runs])


def test_seeds_are_repetitions_wherever_the_seed_stands():
    first, second = ({"seed": s, "allocator": {"seed": s, "rank": 8}, "outputs": f"o{s}"} for s in (0, 1))
    assert names(({}, first), ({}, second)) == ["all runs", "all runs"]
    third = {"seed": 1, "allocator": {"seed": 7, "rank": 8}}
    assert names(({}, first), ({}, third)) == ["allocator.seed=None", "allocator.seed=7"]


def test_what_follows_from_a_named_option_is_left_out_and_what_the_user_gave_comes_first():
    config = {"proxy": {"kind": 1}, "probe": {"head_lr": 1}, "optimizer": {"lr": 1}}
    other = {"proxy": {"kind": 2}, "probe": {"head_lr": 2}, "optimizer": {"lr": 2}}
    both = [({"proxy": "snip"}, config), ({"proxy": "fisher"}, other)]
    assert names(*both) == ["proxy=snip", "proxy=fisher"]
    assert names(({}, config), ({}, other), given=["optimizer.lr=1"]) == ["optimizer.lr=1", "optimizer.lr=2"]
    crossed = [*both, ({"proxy": "snip"}, config | {"optimizer": {"lr": 2}})]
    assert names(*crossed, given=["+optimizer.lr=2"]) == [
        "proxy=snip optimizer.lr=1",
        "proxy=fisher optimizer.lr=2",
        "proxy=snip optimizer.lr=2",
    ]


def test_what_was_given_and_differs_is_always_said():
    config = {"proxy": {"kind": 1}, "optimizer": {"lr": 1}}
    other = {"proxy": {"kind": 2}, "optimizer": {"lr": 5}}
    both = [({"proxy": "snip"}, config), ({"proxy": "random"}, other)]
    assert names(*both, given=["optimizer.lr=5"]) == ["proxy=snip optimizer.lr=1", "proxy=random optimizer.lr=5"]


def test_equal_configs_are_one_group_however_they_were_asked_for():
    config = {"budget": {"rank": 2, "roles": None}}
    found = names(({"budget": "all_r2"}, config), ({"budget": "qv_r2"}, config), ({"experiment": "mine"}, config))
    assert found == ["all runs"] * 3


def test_a_seed_that_was_given_to_an_allocator_is_none_of_the_run():
    runs = [({}, {"seed": seed, "allocator": {"seed": 0}}) for seed in (0, 1, 2)]
    assert names(*runs, given=["allocator.seed=0", "seed=1"]) == ["all runs"] * 3


def test_task_and_backbone_are_sections_and_no_part_of_a_name():
    runs = [({"task": task, "model": "minilm"}, {"task": {"source": task}, "steps": 1}) for task in ("mrpc", "rte")]
    assert names(*runs) == ["all runs", "all runs"]


@given(st.permutations(range(6)))
def test_runs_of_other_configs_never_share_a_name(order):
    configs = [{"a": {"x": x}, "b": y} for x in (0, 1, 2) for y in (None, [1])]
    found = names(*(({"proxy": str(n % 2)}, configs[n]) for n in order))
    assert len(set(found)) == 6
