"""What a step is predicted to take: sums that can be done by hand, and where a backward pass really ends."""

import json
import math
from dataclasses import replace

import pytest

from heterolora.sites import Port, Site, Tap
from heterolora.step_time import StepLimit, StepTimes, in_short, kind_of, shown, times_from
from tests.architectures import make_batch


def lora(name: str, role: str, layer: int, stream: str = "") -> Site:
    return Site(name, "lora", role, layer, Port(f"{name}.m", "in"), Port(f"{name}.m", "out"), 4, 8, stream)


def shortcut(name: str, start: int, end: int) -> Site:
    return Site(name, "shortcut", "shortcut_attn", (end - 1) // 2, Tap(start), Tap(end), 4, 4)


LOW, HIGH = lora("0.q", "q", 0), lora("2.down", "down", 2)
LONG = shortcut("1.shortcut_attn_s3", 0, 3)
LAST = shortcut("2.shortcut_attn", 4, 6)
SITES = (LOW, HIGH, LONG, LAST)
TIMES = StepTimes(
    constant=1.0,
    forward={"": [10.0, 20.0, 30.0]},
    backward={"": [100.0, 200.0, 300.0]},
    adapters={
        kind_of(LOW): (5.0, 0.5),
        kind_of(HIGH): (7.0, 0.25),
        kind_of(LONG): (3.0, 0.0),
        kind_of(LAST): (2.0, 1.0),
    },
    shares={kind_of(LOW): 0.25, kind_of(HIGH): 0.75, kind_of(LONG): 0.5, kind_of(LAST): 0.0},
)


@pytest.mark.parametrize(
    ("ranks", "cached", "expected"),
    [
        ({}, False, 61),
        ({"0.q": 0}, False, 61),
        ({"0.q": 2}, False, 61 + 0.75 * 100 + 200 + 300 + 6),
        ({"2.down": 4}, False, 61 + 0.25 * 300 + 8),
        ({"0.q": 2, "2.down": 4}, False, 61 + 575 + 6 + 8),
        ({"1.shortcut_attn_s3": 8}, False, 61 + 0.5 * 200 + 300 + 3),  # it joins in the middle of block 1
        ({"2.shortcut_attn": 1}, False, 61 + 3),  # it joins behind the last block
        ({}, True, 1),
        ({"2.down": 4}, True, 1 + 30 + 75 + 8),
        ({"1.shortcut_attn_s3": 8}, True, 61 + 400 + 3),  # but it reads before block 0
        ({"2.shortcut_attn": 1, "2.down": 4}, True, 1 + 30 + 75 + 3 + 8),
    ],
)
def test_a_prediction_is_a_sum(ranks, cached, expected):
    assert TIMES.predict(SITES, ranks, cached) == pytest.approx(expected, rel=1e-12)


def test_streams_run_one_after_the_other():
    low, high = lora("encoder.1.q", "q", 1, "encoder"), lora("decoder.0.q", "q", 0, "decoder")
    blocks = {"encoder": [1.0, 2.0], "decoder": [4.0]}
    kinds = {kind_of(low): (0.0, 0.0), kind_of(high): (0.0, 0.0)}
    times = StepTimes(0.0, blocks, {"encoder": [10.0, 20.0], "decoder": [40.0]}, kinds, dict.fromkeys(kinds, 0.0))
    assert times.predict([low, high], {"decoder.0.q": 1}) == 7 + 40
    assert times.predict([low, high], {"encoder.1.q": 1, "decoder.0.q": 1}) == 7 + 20 + 40


def test_a_site_of_a_sort_that_was_not_measured_is_an_error():
    with pytest.raises(KeyError):
        TIMES.predict([lora("0.k", "k", 0)], {"0.k": 1})


def test_a_limit_is_a_share_of_the_reference():
    limit = StepLimit(TIMES, 0.5, 200.0)
    assert limit.seconds == pytest.approx(100)
    record = limit.record(SITES, {"2.down": 4})
    assert record["seconds"] == 61 + 75 + 8
    assert shown(record) == "predicted step 0.72 of uniform, limit 0.50"
    assert json.loads(json.dumps(record)) == json.loads(json.dumps({**record, "times": TIMES.as_dict()}))
    assert "times" not in in_short({"step_time": record})["step_time"]
    assert in_short({}) == {}
    for site in SITES:
        assert limit.least(limit.level(site)) <= limit.predict(SITES, {site.name: 1})
        kept = replace(limit, cached=True)
        assert kept.least(kept.level(site)) <= kept.predict(SITES, {site.name: 1})


def test_times_are_read_as_they_were_written():
    again = times_from(json.loads(json.dumps(TIMES.as_dict())))
    assert again == TIMES


@pytest.mark.parametrize(
    "change",
    [
        {"constant": -1.0},
        {"constant": "x"},
        {"constant": math.nan},
        {"constant": None},
        {"forward": {"": [1.0, 2.0]}},
        {"forward": 3},
        {"backward": {"": [1.0, 2.0, math.inf]}},
        {"adapters": {"q 4x8": 1.0}},
        {"shares": {}},
        {"shares": dict.fromkeys(TIMES.shares, 1.0)},
    ],
)
def test_damaged_times_are_refused(change):
    with pytest.raises(ValueError, match=r"no times of a step|could not convert"):
        times_from({**TIMES.as_dict(), **change})
    with pytest.raises(ValueError, match="no times of a step"):
        times_from({key: value for key, value in TIMES.as_dict().items() if key not in change})


def test_a_backward_pass_ends_where_the_lowest_delta_joins(adapted):
    """The oracle is autograd: the input of a block requires a gradient if and only if the pass goes below it."""
    survey = adapted.space.survey
    batch = make_batch(adapted.backbone)
    for site in adapted.space.sites:
        blocks = survey.stacks[site.stream].blocks
        needs: dict[str, list[bool]] = {block: [] for block in blocks}
        handles = [
            adapted.backbone.get_submodule(block).register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0].requires_grad)
            )
            for block, seen in needs.items()
        ]
        adapted.enable({site.name: 1}, seed=0)
        adapted(**batch)
        for handle in handles:
            handle.remove()
        below = [needs[block].pop(0) for block in blocks]  # blocks that share a module take its calls in turn
        start = site.joins
        assert not any(below[:start]), site
        assert all(below[start + 1 :]), site
        if start < len(blocks):
            assert below[start] == (isinstance(site.sink, Tap) and site.sink.index % 2 == 0), site
