"""``history.jsonl``: what a dynamic run decided, also after it was killed and resumed."""

import json

import pytest

from heterolora.errors import SettingError
from heterolora.history import HISTORY, Decision, append_decision, read_history


def decision(step, rank=1, **changes):
    found = {"step": step, "scores": {"0.q": 0.5, "0.v": [0.4, 0.1]}, "ranks": {"0.q": rank, "0.v": 0}, "reason": "x"}
    return Decision(**(found | changes))


def test_decisions_come_back_as_they_were_written(tmp_path):
    path, decisions = tmp_path / HISTORY, [decision(0), decision(10, 2, scores={}), decision(25, 3, reason="a < b")]
    for one in decisions:
        append_decision(path, one)
    assert read_history(path) == decisions


def test_a_static_run_has_none(tmp_path):
    assert read_history(tmp_path / HISTORY) == []


def test_a_torn_line_is_no_decision(tmp_path):
    path = tmp_path / HISTORY
    append_decision(path, decision(0))
    with path.open("a") as file:
        file.write('{"step": 10, "sco')
    assert [one.step for one in read_history(path)] == [0]


def test_what_a_resumed_run_decides_replaces_what_it_went_back_behind(tmp_path):
    path = tmp_path / HISTORY
    for step, rank in ((0, 1), (10, 2), (20, 3), (10, 4), (20, 5), (30, 6)):
        append_decision(path, decision(step, rank))
    assert [(one.step, one.ranks["0.q"]) for one in read_history(path)] == [(0, 1), (10, 4), (20, 5), (30, 6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step -1 is no whole number"),
        ({"step": 1.5}, "step 1.5 is no whole number"),
        ({"step": True}, "step True is no whole number"),
        ({"reason": None}, "reason None is no text"),
        ({"ranks": {"0.q": -1, "0.v": 0}}, "ranks must be whole numbers"),
        ({"ranks": [1]}, "a JSON object of site name -> rank"),
        ({"scores": [1]}, "scores are no JSON object"),
        ({"scores": {"0.q": "high"}}, "the score of 0.q, 'high', is neither"),
        ({"scores": {"9.q": 1.0}}, "scores of sites without a rank: ['9.q']"),
        ({"ranks": {"0.q": 1}, "scores": {}}, "its sites are not those of the first line"),
    ],
    ids=str,
)
def test_a_damaged_line_is_named(tmp_path, change, message):
    path = tmp_path / HISTORY
    append_decision(path, decision(0))
    with path.open("a") as file:
        file.write(json.dumps(decision(1).as_dict() | change) + "\n")
    with pytest.raises(SettingError) as error:
        read_history(path)
    assert f"{path}, line 2: {message}" in str(error.value)


def test_a_line_that_lacks_something_is_named(tmp_path):
    path = tmp_path / HISTORY
    path.write_text('{"step": 0}\n')
    with pytest.raises(SettingError, match="line 1: lacks 'reason'"):
        read_history(path)
