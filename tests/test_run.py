"""Whole jobs on tiny models: what they leave, that they repeat, that they resume, how they refuse."""

import json
import logging
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from heterolora.checkpoints import FOLDER, newest_first
from heterolora.report.memory import Kept
from heterolora.run import RunFailed, train
from tests.jobs import CONF, StopAt, prepare, run_job

pytestmark = pytest.mark.medium

FILES = {
    "adapter.safetensors",
    "allocation.json",
    "allocation.png",
    "checkpoints",
    "config.yaml",
    "metrics.csv",
    "predictions_test.csv",
    "predictions_validation.csv",
    "scores.json",
    "sites.csv",
    "sites.json",
    "status.json",
    "summary.json",
}


def same_bits(a: Path, b: Path) -> bool:
    """Adapters, head, final metrics and the predictions' logits of two runs."""
    first, second = load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    predictions = [(run / "predictions_test.csv").read_text() for run in (a, b)]
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[key], second[key]) for key in first)
        and summaries[0]["metrics"] == summaries[1]["metrics"]
        and predictions[0] == predictions[1]
    )


def test_a_run_leaves_everything_and_it_agrees(tmp_path):
    summary = run_job(tmp_path / "a")
    run = tmp_path / "a"
    assert {path.name for path in run.iterdir()} == FILES
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished"
    allocation = json.loads((run / "allocation.json").read_text())
    sites = {site["name"]: site for site in json.loads((run / "sites.json").read_text())}
    cost = sum(rank * (sites[n]["in_features"] + sites[n]["out_features"]) for n, rank in allocation["ranks"].items())
    parameters = summary["parameters"]
    assert cost == allocation["spent"] == parameters["held"] == parameters["active"]
    assert parameters["budget"] == 2048 == 2 * 2 * 8 * 64  # layers x (q, v) x rank x (in + out)
    assert parameters["unspent"] == 2048 - cost < 64  # less than the cheapest unit
    tensors = load_file(run / "adapter.safetensors")
    active = {name for name, rank in allocation["ranks"].items() if rank}
    assert {key.removeprefix("adapter.")[:-2] for key in tensors if key.startswith("adapter.")} == active
    assert {key for key in tensors if key.startswith("head.")} == {"head.classifier.weight", "head.classifier.bias"}
    with safe_open(run / "adapter.safetensors", "pt") as file:
        assert file.metadata()["backbone"] == summary["backbone"] == allocation["provenance"]["backbone"]
    table = pd.read_csv(run / "sites.csv")
    assert list(table["site"]) == list(sites)
    assert table["parameters"].sum() == cost
    predictions = pd.read_csv(run / "predictions_test.csv")
    assert list(predictions["index"]) == list(range(summary["data"]["sizes"]["test"]))
    accuracy = (predictions["label"] == predictions["prediction"]).mean()
    assert summary["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
    steps = pd.read_csv(run / "metrics.csv")
    assert {"train/loss_step", "validation/accuracy", "test/accuracy"} <= set(steps)


def test_the_checkpoint_holds_only_what_is_trained_and_loads_weights_only(tmp_path):
    run_job(tmp_path / "a")
    checkpoint = torch.load(next(newest_first(tmp_path / "a" / FOLDER)), weights_only=True)
    adapters = load_file(tmp_path / "a" / "adapter.safetensors")
    assert checkpoint["state_dict"].keys() == adapters.keys()
    assert checkpoint["ranks"] == {
        name: rank
        for name, rank in json.loads((tmp_path / "a" / "allocation.json").read_text())["ranks"].items()
        if rank
    }


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_opt"])
def test_the_same_command_twice_gives_the_same_bits(tmp_path, model):
    run_job(tmp_path / "a", f"model={model}")
    torch.rand(5)  # whatever happened in the process before must not matter
    run_job(tmp_path / "b", f"model={model}")
    assert same_bits(tmp_path / "a", tmp_path / "b")
    run_job(tmp_path / "c", f"model={model}", "seed=1")
    assert not same_bits(tmp_path / "a", tmp_path / "c")


def test_fine_tuning_after_a_search_equals_fine_tuning_under_the_file(tmp_path):
    run_job(tmp_path / "a")
    run_job(tmp_path / "b", "allocator=fixed", f"allocator.path={tmp_path}/a/allocation.json")
    assert same_bits(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "scores.json").exists()


@pytest.mark.parametrize("how", ["true", "path"])
def test_a_run_broken_off_between_epochs_resumes_to_the_same_bits(tmp_path, how):
    settings = ["trainer.max_epochs=3", "adapter.dropout=0.1"]
    run_job(tmp_path / "whole", *settings)
    stop = [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", "+callbacks.stop.epoch=2"]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *settings, *stop)
    assert json.loads((tmp_path / "first" / "status.json").read_text())["state"] == "failed"
    resume = "resume=true" if how == "true" else f"resume={tmp_path}/first"
    summary = run_job(tmp_path / "second", *settings, resume)
    assert summary["resumed_from"] == str(tmp_path / "first")
    status = json.loads((tmp_path / "first" / "status.json").read_text())
    assert (status["state"], status["continued_in"]) == ("continued", str(tmp_path / "second"))
    assert same_bits(tmp_path / "whole", tmp_path / "second")
    curves = [
        pd.read_csv(tmp_path / run / "metrics.csv")["validation/accuracy"].dropna() for run in ("whole", "second")
    ]
    assert list(curves[0]) == list(curves[1])
    assert (tmp_path / "second" / "allocation.json").read_text() == (tmp_path / "whole" / "allocation.json").read_text()


def test_a_resumed_run_does_not_search_and_refuses_another_backbone(tmp_path, monkeypatch):
    """The allocation is the one it was trained under, whatever a search would find now."""
    stop = [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", "+callbacks.stop.epoch=1"]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *stop)

    def search(*arguments, **options):
        raise AssertionError("searched")

    monkeypatch.setattr("heterolora.baselines.base.search", search)
    with monkeypatch.context() as patch:
        patch.setattr("heterolora.backbone.fingerprint", lambda model, without: "another")
        with pytest.raises(RunFailed, match="other backbone weights"):
            run_job(tmp_path / "other", "resume=true")
    summary = run_job(tmp_path / "second", "resume=true")
    allocation = json.loads((tmp_path / "first" / "allocation.json").read_text())
    assert summary["parameters"]["held"] == allocation["spent"]
    assert summary["seconds"]["search"] > 0  # of the first process


def test_a_chain_of_resumes_keeps_all_curves_and_is_done_with_at_the_end(tmp_path):
    def stop(epoch):
        return [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", f"+callbacks.stop.epoch={epoch}"]

    for name, epoch in (("a", 1), ("b", 2)):
        with pytest.raises(RuntimeError, match="broken off"):
            run_job(tmp_path / name, "trainer.max_epochs=3", "resume=true", *stop(epoch))
    run_job(tmp_path / "c", "trainer.max_epochs=3", "resume=true")
    epochs = pd.read_csv(tmp_path / "c" / "metrics.csv").dropna(subset=["train/loss_epoch"])["epoch"]
    assert list(epochs) == [0, 1, 2]
    states = [json.loads((tmp_path / run / "status.json").read_text())["state"] for run in "abc"]
    assert states == ["continued", "continued", "finished"]
    with pytest.raises(RunFailed, match="that run is continued"):
        run_job(tmp_path / "d", "trainer.max_epochs=3", f"resume={tmp_path}/a")


def test_a_folder_that_holds_a_run_is_not_used_again(tmp_path):
    run_job(tmp_path / "a", "trainer.max_steps=1", "logger=none")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    cfg = prepare(tmp_path / "a", "trainer.max_steps=1", "logger=none")
    with pytest.raises(RunFailed, match="holds another run"):
        train(cfg)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


def test_a_fraction_run_can_be_repeated_from_its_file(tmp_path):
    run_job(tmp_path / "a", "allocator=top", "budget=fraction")
    run_job(tmp_path / "b", "allocator=fixed", f"allocator.path={tmp_path}/a/allocation.json", "budget=fraction")
    assert same_bits(tmp_path / "a", tmp_path / "b")


def test_resume_true_without_an_unfinished_run_starts_anew(tmp_path, caplog):
    run_job(tmp_path / "a")
    with caplog.at_level(logging.INFO):
        run_job(tmp_path / "b", "resume=true")
    assert "starting anew" in caplog.text
    assert same_bits(tmp_path / "a", tmp_path / "b")


def test_resuming_a_run_with_another_config_is_refused(tmp_path):
    run_job(tmp_path / "a")
    with pytest.raises(RunFailed, match="another config"):
        run_job(tmp_path / "b", f"resume={tmp_path}/a", "seed=3")
    with pytest.raises(RunFailed, match="no checkpoint"):
        run_job(tmp_path / "c", f"resume={tmp_path}/nowhere")


GROUPS = ("search_space", "proxy", "allocator", "budget", "adapter", "allocation", "init")
LOR2C = ["search_space=lor2c", "search_space.spans=[2,4]", "allocation=lor2c", "allocation.until=0.5"]
LOR2C += ["trainer.max_steps=8"]
OPTIONS = [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name in GROUPS]


def test_options_of_every_group_were_found():
    assert {option.partition("=")[0] for option in OPTIONS} == set(GROUPS)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(tmp_path, option):
    extra = {
        "allocator=fixed": [f"allocator.path={tmp_path}/ranks.json"],
        "allocator=uniform": ["search_space=lora_qv"],
        "budget=fraction": ["allocator=top"],
        "budget=params": ["budget.value=2000"],
        "budget=qv_r2": ["allocator=top", "allocator.rank=2"],
        **{f"proxy={name}": ["search_space=lora_all"] for name in ("gora", "magnitude", "plop")},  # of frozen weights
        **{f"allocator={name}": ["search_space=lora_all"] for name in ("gora", "plop")},
        **{f"adapter={name}": ["search_space=lora_all"] for name in ("dora", "lora_xs")},
        **{f"allocation={name}": ["trainer.max_steps=8"] for name in ("alora", "dynamic", "para")},
        "allocation=adalora": ["adapter=svd", "trainer.max_steps=8"],
        **{f"{group}=lor2c": LOR2C for group in ("allocation", "allocator", "search_space")},
        **{
            f"allocator={name}": ["search_space=lora_all", "trainer.max_steps=8"]
            for name in ("adalora", "alora", "para")
        },
        "proxy=alpha_test": [
            "probe.adapter_warmup_steps=8",
            "probe.adapter_warmup_lr=0.02",
            "proxy.metric=loss",
            "proxy.tolerance=0",
        ],
    }
    (tmp_path / "ranks.json").write_text(json.dumps({"0.q": 2, "1.shortcut_ffn": 3}))
    summary = run_job(tmp_path / "a", "trainer.max_steps=2", option, *extra.get(option, []), "logger=none")
    assert summary["steps"] in (2, 8)
    assert summary["parameters"]["held"] > 0
    assert not (tmp_path / "a" / "metrics.csv").exists()


def test_a_run_that_predicts_one_class_is_reported_as_collapsed(tmp_path, capsys):
    summary = run_job(tmp_path / "a", "optimizer.lr=1e-9", "trainer.max_steps=1")
    predictions = pd.read_csv(tmp_path / "a" / "predictions_test.csv")
    one_class = predictions["prediction"].nunique() == 1
    assert summary["collapsed"]["test"] == one_class
    assert one_class, "the tiny model is expected to predict one class after one tiny step"
    assert "COLLAPSED" in capsys.readouterr().out


BAD = [
    (["optimizer.lr=abc"], r"optimizer\.lr=abc: "),
    (["optimizer.lr=-1"], r"optimizer\.lr=-1"),
    (["seed=-1"], "seed=-1: a whole number"),
    (["seed=1.5"], "seed=1.5: a whole number"),
    (["probe.batches=0"], r"probe\.batches=0: a whole number of at least 1"),
    (["probe.batches=1000"], r"probe\.batches=1000: the training split has \d+ batches of 8"),
    (["trainer.devices=0"], r"trainer\.devices=0: a whole number of at least 1"),
    (["trainer.devices=2"], r"trainer\.devices=2: processes are started by repeating the command"),
    (["trainer.strategy=fsdp"], r"trainer\.strategy=fsdp: divides a model among several processes"),
    (["trainer.precision=7"], r"trainer\.precision=7"),
    (["trainer.precision=16-mixed"], r"trainer\.precision=16-mixed: needs a GPU"),
    (["seed=99999999999"], "seed=99999999999: a whole number"),
    (["trainer.accelerator=gpu"], "trainer=.*Lightning refuses"),
    (["search_space.include=[{kind: lora, role: [q, vv]}]"], r"search_space\.include=.*vv.*matches no site"),
    (["adapter.scale={lora: 2, other: 3}"], r"adapter\.scale=\[.other.\]"),
    (["task.max_length=600"], r"task\.max_length=600: this model.s limit is 512"),
    (["data.cache_dir=/proc/nowhere"], r"data\.cache_dir=/proc/nowhere"),
    (["data.root=/nowhere"], r"data\.root=/nowhere: no such folder"),
    (["task=mrpc", "data.root=null"], r"data\.root=None: .*HETEROLORA_DATA"),
    (["search_space.include=[nope]"], r"search_space\.include=nope: matches no site; roles of kind lora: \['q'"),
    (["search_space.spans=[9]"], r"search_space\.spans=\[9\]: spans from 1 to 4"),
    (["search_space.renorm=true"], r"search_space\.renorm=True: the layout of bert names no norm"),
    (["budget=params", "budget.value=3"], "cheapest site costs 64"),
    (["budget=fraction"], "allocator=top"),
    (["allocator=fixed"], r"allocator\.path=None: "),
    (["allocator=uniform", "budget=params", "budget.value=200"], r"budget=200: rank 1 at all"),
    (["proxy=snip", "probe.init=lora"], r"proxy=snip: every score is 0.*probe\.init=random"),
    (["proxy=alpha_test"], r"probe\.adapter_warmup_steps=0: proxy=alpha_test needs trained adapters; the paper: 32"),
    (["proxy=alpha_test", "proxy.tolerance=2"], r"proxy\.tolerance=2\.0: a share"),
    (["proxy._target_=nowhere.Proxy"], r"proxy\._target_=nowhere\.Proxy: cannot be imported"),
    (["task.max_length=2"], r"task\.max_length=2"),
    (["resume=7"], "resume=7: true, false or the folder"),
    (["model.dropout=2"], r"model\.dropout=2"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), BAD, ids=lambda value: str(value[0]) if isinstance(value, list) else ""
)
def test_bad_input_gets_one_line_and_leaves_only_the_status(tmp_path, overrides, message):
    with pytest.raises(RunFailed, match=message) as error:
        run_job(tmp_path / "a", *overrides)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["status.json"]
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["error"] == str(error.value)


def test_a_list_of_options_for_one_group_is_refused(tmp_path):
    with pytest.raises(RunFailed, match=r"proxy=\[snip,grad_norm\]: one option"):
        run_job(tmp_path / "a", "proxy=[snip,grad_norm]")


def test_a_last_step_that_diverges_leaves_no_results(tmp_path):
    huge = ["optimizer.lr=1e20", "optimizer.head_lr=1e-3", "optimizer.warmup=0", "optimizer.clip=null"]
    with pytest.raises(RunFailed, match=r"is not finite after training; lower optimizer\.lr"):
        run_job(tmp_path / "a", *huge, "trainer.max_steps=1")
    assert not (tmp_path / "a" / "adapter.safetensors").exists()


def test_a_diverging_run_fails_and_says_what_to_change(tmp_path):
    with pytest.raises(RunFailed, match=r"training loss is .*lower optimizer\.lr"):
        run_job(tmp_path / "a", "optimizer.lr=1e30", "optimizer.clip=null")


def test_a_proxy_from_outside_the_project(tmp_path):
    summary = run_job(tmp_path / "a", "proxy._target_=tests.test_run.ByLayer", "trainer.max_steps=2")
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]["spectral"]
    assert scores["1.q"] == 2.0
    assert summary["parameters"]["held"] > 0


class ByLayer:
    """A proxy as a user would write one."""

    control = False
    remedy = ""
    statistics = ()

    def score(self, evidence):
        return {site.name: site.layer + 1.0 for site in evidence.sites}


def test_a_dry_run_plans_and_trains_nothing(tmp_path, capsys):
    cfg = prepare(tmp_path / "full", "trainer.max_epochs=3", "trainer.accumulate=2")
    (tmp_path / "full").mkdir()
    train(cfg)
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    (tmp_path / "dry").mkdir()
    assert math.isnan(train(prepare(tmp_path / "dry", "run=dry", "trainer.max_epochs=3", "trainer.accumulate=2")))
    assert {path.name for path in (tmp_path / "dry").iterdir()} == {"status.json", "config.yaml", "plan.json"}
    plan = json.loads((tmp_path / "dry" / "plan.json").read_text())
    assert plan["steps"]["optimizer steps"] == summary["steps"]
    assert plan["budget"] == summary["parameters"]["budget"]
    assert plan["head_parameters"] == summary["parameters"]["head"]
    assert plan["backbone_parameters"] == summary["parameters"]["backbone"]
    assert sum(plan["sites"].values()) == summary["sites"]["candidates"]
    assert plan["sizes"] == summary["data"]["sizes"]
    assert plan["memory_mib"]["kept for the backward pass"] > 0
    assert "expected peak" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_a_dry_run_leaves_an_unfinished_run_alone(tmp_path, model):
    stop = [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", "+callbacks.stop.epoch=1"]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", f"model={model}", *stop)
    (tmp_path / "dry").mkdir()
    train(prepare(tmp_path / "dry", f"model={model}", "run=dry", "resume=true"))
    assert json.loads((tmp_path / "first" / "status.json").read_text())["state"] == "failed"


def test_what_a_step_keeps_for_its_backward_pass_is_counted():
    """Against the sizes that torch documents: a product keeps its two factors, a view of one is the same storage."""
    a, b = torch.ones(100, 50, requires_grad=True), torch.ones(50, 30, requires_grad=True)
    kept = Kept()
    with kept.counting([b]):
        product = (a * 2) @ b  # keeps a * 2 (and b, which is there anyway)
        squared = product.square() * product.view(-1, 30)  # keeps product once, and its square
    assert kept.mib * 2**20 == (100 * 50 + 2 * 100 * 30) * 4
    assert squared.requires_grad


def test_tensorboard_gets_curves_the_table_the_picture_and_the_final_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = run_job(tmp_path / "a", "logger=tensorboard", "trainer.max_steps=2", "seed=3")
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert "validation/accuracy" in tags["scalars"]
    assert events.Scalars("final/test/accuracy")[-1].value == pytest.approx(summary["metrics"]["test"]["accuracy"])
    assert tags["images"] == ["allocation/picture"]
    table = events.Tensors("allocation/sites/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 0.q | lora | q | 0 |" in table


def test_a_dry_run_refuses_what_the_run_would(tmp_path):
    (tmp_path / "ranks.json").write_text(json.dumps({"7.q": 1}))
    fixed = ["allocator=fixed", f"allocator.path={tmp_path}/ranks.json"]
    for name, overrides, message in (
        ("a", ["probe.batches=100"], "probe.batches=100"),
        ("b", fixed, "not in this search space"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(RunFailed, match=message):
            train(prepare(tmp_path / name, "run=dry", *overrides))


def test_resuming_on_other_data_is_refused(tmp_path):
    def write(kind):
        rows = [f"a {word} film {i},{label}" for i in range(30) for word, label in (("good", "pos"), ("bad", kind))]
        (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")

    files = ["task=files", f"task.source.train={tmp_path}/mine.csv"]
    stop = [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", "+callbacks.stop.epoch=1"]
    write("neg")
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *files, *stop)
    write("other")
    with pytest.raises(RunFailed, match="it was made with other data than there are now"):
        run_job(tmp_path / "second", *files, "resume=true")
    write("neg")
    assert run_job(tmp_path / "third", *files, "resume=true")["resumed_from"] == str(tmp_path / "first")


def test_a_chain_of_resumes_whose_first_link_is_gone_still_finishes(tmp_path, caplog):
    def stop(epoch):
        return [f"+callbacks.stop._target_={StopAt.__module__}.StopAt", f"+callbacks.stop.epoch={epoch}"]

    for name, epoch in (("a", 1), ("b", 2)):
        with pytest.raises(RuntimeError, match="broken off"):
            run_job(tmp_path / name, "trainer.max_epochs=3", "resume=true", *stop(epoch))
    shutil.rmtree(tmp_path / "a")
    run_job(tmp_path / "c", "trainer.max_epochs=3", "resume=true")
    states = [json.loads((tmp_path / run / "status.json").read_text())["state"] for run in "bc"]
    assert states == ["continued", "finished"]
    assert "cannot be marked as continued" in caplog.text


def test_a_dry_run_plans_no_warmed_up_head_for_what_looks_at_inputs_alone(tmp_path):
    steps = {}
    for proxy in ("grad_norm", "eva", "synflow", "alpha_test"):
        (tmp_path / proxy).mkdir()
        train(prepare(tmp_path / proxy, "run=dry", f"proxy={proxy}", "probe.adapter_warmup_steps=3"))
        steps[proxy] = json.loads((tmp_path / proxy / "plan.json").read_text())["steps"]
    found = {proxy: (plan["head warm-up steps"], plan["batches scored"]) for proxy, plan in steps.items()}
    assert found == {"grad_norm": (2, 2), "eva": (0, 2), "synflow": (0, 0), "alpha_test": (2, 2)}
    trained = {proxy: plan["adapter warm-up steps"] for proxy, plan in steps.items()}
    assert trained == {"grad_norm": 0, "eva": 0, "synflow": 0, "alpha_test": 3}


def test_a_full_disk_is_one_line(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(RunFailed, match=r"/a: No space left on device$"):
        train(prepare(folder, "+callbacks.full={_target_: tests.jobs.FullDisk}"))
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


@pytest.mark.medium
def test_a_run_keeps_to_a_limit_on_its_step_and_says_what_was_predicted(tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO):
        summary = run_job(tmp_path / "a", "search_space=lora_all", "proxy=grad_norm", "budget.step_time=0.9")
    step = summary["step_time"]
    assert step["predicted"] <= step["limit"] == 0.9
    allocation = json.loads((tmp_path / "a" / "allocation.json").read_text())
    assert allocation["provenance"]["step_time"].keys() == step.keys() | {"times"}
    assert f"(predicted step {step['predicted']:.2f} of uniform, limit 0.90)" in caplog.text
    assert "measured anew" in caplog.text  # data.cache_dir=null
    assert "predicted step" in capsys.readouterr().out
    assert allocation["spent"] == summary["parameters"]["held"] <= summary["parameters"]["budget"]


def test_no_limit_changes_no_hash_and_a_limit_does():
    from heterolora.parts import config_hash
    from heterolora.results import method_hash

    config = {"seed": 0, "data": {"cache_dir": None}, "budget": {"value": 3}}
    for hashed in (config_hash, method_hash):
        off, on = ({**config, "budget": {"value": 3, "step_time": share}} for share in (None, 0.5))
        assert hashed(config) == hashed(off) != hashed(on)
