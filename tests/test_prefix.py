"""The frozen prefix: run alone, skipped, kept; nothing of it may change what comes out."""

import contextlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from heterolora.errors import SettingError
from heterolora.prefix import Prefix, frozen_blocks
from heterolora.prefix_cache import FrozenPrefix, HiddenStore, PrefixSettings
from heterolora.run import RunFailed
from tests.architectures import ARCHITECTURES, KINDS, make_backbone, make_batch, shown
from tests.conftest import adapt, randomise
from tests.jobs import StopAt, run_job, write_copa
from tests.test_model import gradients, logits

SEVERAL = {"t5", "t5_gated", "albert", "albert_groups"}
"""Two streams, or blocks that share their weights: no prefix."""
SKIPPING = shown(sorted(set(ARCHITECTURES) - SEVERAL), KINDS)


def from_block(architecture, depth, **options):
    """Adapters at every site that reads nothing below a block."""
    model = adapt(make_backbone(architecture, **options).train())
    model.enable({site.name: 2 for site in model.space.sites if site.entry >= depth}, seed=0)
    randomise(model)
    return model, make_batch(model.backbone)


def inputs(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def depths(model):
    (stack,) = model.space.survey.stacks.values()
    return len(stack.blocks)


@pytest.mark.parametrize("architecture", SKIPPING)
def test_skipping_frozen_blocks_changes_neither_logits_nor_gradients(architecture):
    for depth in range(1, 4):
        model, batch = from_block(architecture, depth)
        assert frozen_blocks(model) == depth
        expected, slopes = logits(model, batch), gradients(model, batch)
        prefix = Prefix(model, depth)
        hidden = prefix.run(lambda model=model, batch=batch: logits(model, batch))
        names = set(model.backbone.state_dict())
        real = batch["attention_mask"].bool()[..., None]
        with prefix.entered(torch.where(real, hidden, 0.0)):  # padding plays no part
            assert torch.equal(logits(model, batch), expected)
            for name, slope in gradients(model, batch).items():
                assert torch.equal(slope, slopes[name])
        assert set(model.backbone.state_dict()) == names
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("architecture", SKIPPING)
def test_the_blocks_of_the_prefix_do_not_run_when_skipped_and_the_others_not_when_it_runs(architecture):
    model, batch = from_block(architecture, 2)
    (stack,) = model.space.survey.stacks.values()
    ran = []
    for path in stack.blocks:  # the first linear layer of each block
        linear = next(site.sink.module for site in model.space.sites if str(site.sink).startswith(f"{path}."))
        model.backbone.get_submodule(linear).register_forward_hook(lambda *_, path=path: ran.append(path))
    prefix = Prefix(model, 2)
    hidden = prefix.run(lambda: logits(model, batch))
    assert set(ran) == set(stack.blocks[:2])
    ran.clear()
    with prefix.entered(hidden):
        logits(model, batch)
    assert set(ran) == set(stack.blocks[2:])


@pytest.mark.parametrize("architecture", sorted(SEVERAL))
def test_no_prefix_where_blocks_are_shared_or_streams_are_two(architecture):
    model, _ = from_block(architecture, 2)
    assert frozen_blocks(model) == 0


@pytest.mark.parametrize("architecture", sorted(SEVERAL))
@pytest.mark.parametrize(("cache", "dropout"), [(True, True), (True, False), (False, False)])
def test_what_a_backbone_cannot_do_is_refused(architecture, cache, dropout):
    model, _ = from_block(architecture, 2)
    with pytest.raises(SettingError, match=r"prefix\.(cache=True|dropout=False): .* has no frozen prefix"):
        PrefixSettings(cache, dropout, 1, None, None).check(model)
    PrefixSettings(False, True, 1, None, None).check(model)


def test_without_adapters_all_blocks_are_frozen_and_the_lowest_source_counts():
    model, _ = from_block("llama", 9)
    assert frozen_blocks(model) == depths(model) == 3
    shortcut = next(site for site in model.space.sites if site.span == 4 and site.source.index == 2)
    model.enable({shortcut.name: 1, "2.q": 1}, seed=0)  # its sink is in the last block, its source before the second
    assert frozen_blocks(model) == 1
    model.switch_off([shortcut.name])
    assert frozen_blocks(model) == 2


def test_blocks_are_themselves_again_after_an_error():
    model, batch = from_block("bert", 2)
    expected = logits(model, batch)
    with contextlib.suppress(ZeroDivisionError):
        Prefix(model, 2).run(lambda: 1 / 0)
    with contextlib.suppress(ZeroDivisionError), Prefix(model, 2).entered(torch.zeros(4, 9, 32)):
        raise ZeroDivisionError
    assert torch.equal(logits(model, batch), expected)
    assert model.backbone.bert.encoder.layer[0].training


def test_blocks_that_hand_on_more_than_a_hidden_state_are_refused():
    model, batch = from_block("bert", 2)
    beside = []  # what the first block gives to the last one past the second
    layers = model.backbone.bert.encoder.layer
    layers[0].register_forward_hook(lambda module, args, output: beside.append(output.std()))
    layers[2].register_forward_hook(lambda module, args, output: output * beside[-1])
    settings = PrefixSettings(True, True, 10, None, None)
    frozen = FrozenPrefix(settings, {"train": [9, 8, 7, 6]}, 1)
    rows = batch | {"index": torch.arange(4)}
    with pytest.raises(SettingError, match=r"2 blocks.*skipped"), frozen.entered(model, rows, "train"):
        pass


def store(lengths, limit=1.0, dtype=torch.float32, width=3, folder=None):
    return HiddenStore(lengths, torch.zeros(1, 1, width), dtype, limit, folder)


def test_a_store_gives_back_what_it_was_given(tmp_path):
    torch.manual_seed(0)
    kept = store([2, 4, 1], folder=str(tmp_path))
    assert os.listdir(tmp_path) == []  # nothing would stay behind a killed process
    hidden = torch.randn(2, 5, 3)
    kept.put([1, 2], hidden)
    found = kept.get([2, 0, 1], tokens=4)
    assert torch.equal(found[0, :1], hidden[1, :1])
    assert torch.equal(found[2], hidden[0, :4])
    assert not found[1].any()
    assert kept.filled.tolist() == [False, True, True]


def test_a_store_keeps_to_its_limit(caplog):
    one_token = 3 * 4 / 2**20
    kept = store([2, 4, 1], limit=6 * one_token)
    assert "room for 2 of 3 inputs" in caplog.text
    kept.put([0, 1, 2], torch.ones(3, 4, 3))
    assert kept.filled.tolist() == [True, True, False]
    assert kept.mib == pytest.approx(6 * one_token)
    assert not store([2, 4, 1], limit=one_token).filled.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_a_store_rounds_the_first_use_too(dtype):
    kept, hidden = store([4], dtype=dtype), torch.randn(1, 4, 3)
    kept.put([0], hidden)
    assert torch.equal(kept.rounded(hidden), kept.get([0], 4))
    assert not torch.equal(hidden, kept.get([0], 4))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((True, True, 0, None, None), r"limit_mib=0"),
        ((True, True, float("nan"), None, None), "limit_mib=nan"),
        ((True, True, 1, None, "/no/such"), "folder=/no/such: no folder to write to"),
    ],
)
def test_settings_that_cannot_be(values, text):
    with pytest.raises(SettingError, match=text):
        PrefixSettings(*values)


def test_no_room_is_said_in_one_line(tmp_path):
    with pytest.raises(SettingError, match=r"prefix\.folder=.*MiB find no room there.*prefix\.limit_mib"):
        store([2**42], limit=2**40, folder=str(tmp_path))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that takes no file, whoever asks")
def test_a_folder_that_takes_no_file_is_one_line():
    with pytest.raises(SettingError, match=r"prefix\.folder=/proc: "):
        store([2], folder="/proc")


JOB = ("search_space.layers=[1]", "allocator=uniform", "budget=qv_r2", "search_space=lora_qv", "trainer.max_epochs=3")
JOB += ("model.dropout=0",)


def bits(folder):
    return load_file(folder / "adapter.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.medium
@pytest.mark.parametrize("limit", [64, 0.1], ids=["whole", "part"])
def test_a_run_that_keeps_its_prefix_ends_with_the_same_bits(tmp_path, limit):
    """With shuffling and batches by length, kept whole or in part."""
    padding = "data.pad_to_multiple_of=8"
    whole = run_job(tmp_path / "a", *JOB, padding)
    kept = run_job(tmp_path / "b", *JOB, padding, "prefix.cache=true", f"prefix.limit_mib={limit}")
    assert same(bits(tmp_path / "a"), bits(tmp_path / "b"))
    assert kept["metrics"] == whole["metrics"]
    assert whole["prefix"] is None
    found = kept["prefix"]
    assert (found["blocks"], found["difference"]) == (1, 0.0 if limit == 64 else found["difference"])
    assert found["mib"] <= limit
    assert (found["reused"] == pytest.approx(2 / 3)) if limit == 64 else (0 < found["reused"] < 2 / 3)


@pytest.mark.medium
def test_dropout_off_in_the_prefix_is_the_same_kept_or_not(tmp_path):
    job = (*JOB, "model.dropout=0.3", "data.pad_to_multiple_of=8")
    with pytest.raises(RunFailed, match=r"prefix\.cache=True: what dropout changes.*prefix\.dropout=false"):
        run_job(tmp_path / "refused", *job, "prefix.cache=true")
    run_job(tmp_path / "on", *job)
    run_job(tmp_path / "off", *job, "prefix.dropout=false")
    run_job(tmp_path / "kept", *job, "prefix.dropout=false", "prefix.cache=true")
    assert same(bits(tmp_path / "off"), bits(tmp_path / "kept"))
    assert not same(bits(tmp_path / "on"), bits(tmp_path / "off"))


@pytest.mark.medium
def test_a_run_that_keeps_its_prefix_goes_on_with_the_same_bits(tmp_path):
    job = (*JOB, "data.pad_to_multiple_of=8", "prefix.cache=true")
    run_job(tmp_path / "whole", *job)
    stop = [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", "+callbacks.stop.epoch=2"]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *job, *stop)
    run_job(tmp_path / "second", *job, f"resume={tmp_path / 'first'}")
    assert same(bits(tmp_path / "whole"), bits(tmp_path / "second"))


@pytest.mark.medium
def test_every_alternative_of_an_example_is_kept(tmp_path):
    write_copa(tmp_path / "sets")
    job = (*JOB, "task=copa", f"data.root={tmp_path}/sets", "task.max_length=64", "data.pad_to_multiple_of=8")
    run_job(tmp_path / "a", *job)
    summary = run_job(tmp_path / "b", *job, "prefix.cache=true")
    assert same(bits(tmp_path / "a"), bits(tmp_path / "b"))
    sizes = json.loads((tmp_path / "b" / "summary.json").read_text())["data"]["sizes"]
    assert summary["prefix"]["inputs"] == 2 * (sizes["train"] + sizes["validation"])


@pytest.mark.medium
def test_bf16_autocast_keeps_its_prefix_with_the_same_bits(tmp_path):
    job = (*JOB, "data.pad_to_multiple_of=8", "trainer.precision=bf16-mixed")
    run_job(tmp_path / "a", *job)
    summary = run_job(tmp_path / "b", *job, "prefix.cache=true")
    assert same(bits(tmp_path / "a"), bits(tmp_path / "b")) == (summary["prefix"]["difference"] == 0)


def rows_of(batch, rows):
    return {key: value[rows] for key, value in batch.items()} | {"index": torch.tensor(rows)}


def test_lower_sites_that_become_active_end_what_was_kept(caplog):
    """As dynamic allocation will: the blocks above the new lowest site are computed again."""
    caplog.set_level("INFO")
    model, batch = from_block("bert", 2)
    frozen = FrozenPrefix(PrefixSettings(True, True, 10, None, None), {"train": [9, 8, 7, 6]}, 1)

    def agree(*rows):
        part = rows_of(batch, list(rows))
        expected = logits(model, {key: part[key] for key in ("input_ids", "attention_mask")})
        with frozen.entered(model, part, "train"):
            found = logits(model, {key: part[key] for key in ("input_ids", "attention_mask")})
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        return frozen.blocks

    assert agree(0, 1) == agree(1, 3) == 2
    assert frozen.report()["inputs"] == 3
    model.enable({"1.q": 2, "2.v": 1}, seed=1)
    randomise(model)
    assert agree(0, 1) == 1
    assert frozen.report()["inputs"] == 2
    assert "shrank from 2 to 1 blocks" in caplog.text
    model.switch_off(["1.q"])  # it grows: what is kept still serves
    assert agree(1, 2) == 1
    assert frozen.report()["inputs"] == 3
    model.enable({"0.q": 2}, seed=1)
    randomise(model)
    assert agree(0, 1) == 0
    assert frozen.report()["inputs"] == 0
