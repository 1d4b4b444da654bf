import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterolora.allocation import FORMAT, Allocation, read_ranks

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
NAMES = st.text(min_size=1, max_size=8)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "allocation.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_what_is_left_and_who_is_active():
    allocation = Allocation({"0.q": 2, "0.v": 0, "1.shortcut_attn": 1}, spent=18, budget=20)
    assert allocation.unspent == 2
    assert allocation.active == {"0.q": 2, "1.shortcut_attn": 1}


def test_a_budget_of_sites_has_nothing_left_to_speak_of():
    assert Allocation({"0.q": 2}, spent=18, budget=None).unspent is None


def test_the_whole_budget_may_be_spent_but_no_parameter_more():
    assert Allocation({"0.q": 1}, spent=8, budget=8).unspent == 0
    with pytest.raises(ValueError, match="spends 9 parameters of a budget of 8"):
        Allocation({"0.q": 1}, spent=9, budget=8)


def test_negative_ranks_are_impossible():
    with pytest.raises(ValueError, match=r"negative ranks: \{'0.v': -1\}"):
        Allocation({"0.q": 1, "0.v": -1}, spent=0, budget=8)


@PROPERTY
@given(ranks=st.dictionaries(NAMES, st.integers(0, 99)), budget=st.none() | st.integers(10**6, 10**9))
def test_a_written_allocation_is_read_back(tmp_path_factory, ranks, budget):
    allocation = Allocation(ranks, sum(ranks.values()), budget, {"seed": 0, "proxy": "snip"})
    text = json.dumps(allocation.as_dict())
    assert read_ranks(written(tmp_path_factory.mktemp("run"), text)) == ranks
    content = json.loads(text)
    assert Allocation(content["ranks"], content["spent"], content["budget"], content["provenance"]) == allocation
    assert (content["format"], content["unspent"]) == (FORMAT, allocation.unspent)


def test_a_plain_object_of_ranks_is_read(tmp_path):
    assert read_ranks(written(tmp_path, '{"0.q": 8, "0.v": 0}')) == {"0.q": 8, "0.v": 0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a JSON file"),
        ("0.q: 8", "not a JSON file"),
        (b"\xff\xfe\x00", "not a JSON file"),
        ('["0.q"]', "a JSON object of site name -> rank"),
        ("8", "a JSON object of site name -> rank"),
        (f'{{"format": {FORMAT}}}', "a JSON object of site name -> rank"),
        (f'{{"format": {FORMAT}, "ranks": [8]}}', "a JSON object of site name -> rank"),
        (f'{{"format": {FORMAT + 1}, "ranks": {{"0.q": 8}}}}', f"allocation format {FORMAT + 1}, .* reads format"),
        ('{"format": null, "ranks": {"0.q": 8}}', "allocation format None"),
        ('{"0.q": -1}', "at least 0.*'0.q': -1"),
        ('{"0.q": 8.0}', "whole numbers"),
        ('{"0.q": "8"}', "whole numbers"),
        ('{"0.q": true}', "whole numbers"),
        ('{"0.q": null}', "whole numbers"),
        ('{"0.q": NaN}', "whole numbers"),
        ('{"0.q": {"rank": 8}}', "whole numbers"),
    ],
)
def test_anything_else_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        read_ranks(written(tmp_path, content))


def test_a_site_named_twice_is_refused(tmp_path):
    # JSON readers keep the last one, and half of a hand-written allocation would be lost without a word.
    with pytest.raises(ValueError, match=r"0\.q"):
        read_ranks(written(tmp_path, '{"0.q": 8, "0.q": 4}'))
