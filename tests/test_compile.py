"""``trainer.compile``: the same results from another way to compute them, in every path of a run."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from heterolora.build import build
from heterolora.run import RunFailed
from heterolora.trainer import TrainerSettings
from tests.jobs import StopAt, compose_job, run_job

COMPILED = ("trainer.compile=true", "model.dropout=0", "allocator=uniform", "search_space=lora_qv", "logger=csv")


def settings(**values) -> TrainerSettings:
    node = dict(compose_job().trainer) | values
    return build(node, "trainer")


def test_nothing_is_compiled_unless_that_is_wanted():
    model = nn.Linear(2, 2)
    settings().compile_model(model)
    assert model._compiled_call_impl is None


def test_a_machine_without_a_compiler_gets_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunFailed, match=r"trainer\.compile=True: needs a C\+\+ compiler"):
        run_job(tmp_path / "run", *COMPILED)


def test_a_compiled_model_and_a_frozen_prefix_exclude_each_other(tmp_path):
    with pytest.raises(RunFailed, match=r"trainer\.compile=True: not with prefix"):
        run_job(tmp_path / "run", *COMPILED, "prefix.cache=true", "prefix.dropout=false")


def test_a_compiled_model_and_recomputed_activations_exclude_each_other(tmp_path):
    with pytest.raises(RunFailed, match=r"trainer\.compile=True: not with model\.gradient_checkpointing"):
        run_job(tmp_path / "run", *COMPILED, "model.gradient_checkpointing=true")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_a_compiled_run_agrees_with_an_eager_one_and_goes_on_from_its_checkpoint(tmp_path):
    torch._dynamo.reset()
    eager = run_job(tmp_path / "eager", "export.peft=true", *COMPILED, "trainer.compile=false")
    compiled = run_job(tmp_path / "compiled", "export.peft=true", *COMPILED)
    assert compiled["metrics"]["validation"]["loss"] == pytest.approx(eager["metrics"]["validation"]["loss"], abs=1e-5)
    assert compiled["export"]["modules"] == eager["export"]["modules"]
    for split in ("validation", "test"):
        ours, theirs = (pd.read_csv(tmp_path / run / f"predictions_{split}.csv") for run in ("compiled", "eager"))
        logits = [column for column in ours if column.startswith("logit_")]
        assert (ours[logits] - theirs[logits]).abs().to_numpy().max() < 1e-5

    stop = [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", "+callbacks.stop.epoch=1"]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *COMPILED, *stop)
    run_job(tmp_path / "second", *COMPILED, f"resume={tmp_path}/first")
    held = [load_file(tmp_path / run / "adapter.safetensors") for run in ("compiled", "second")]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
