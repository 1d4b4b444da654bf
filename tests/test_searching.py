"""search.py: what it leaves, what it refuses, and that train.py would do the same."""

import json
import os
import subprocess
import sys
from functools import cache

import pandas as pd
import pytest
import yaml
from peft import LoraConfig, get_peft_model

from heterolora.allocation import read_ranks
from heterolora.backbone import Pretrained, Tiny
from heterolora.build import build
from heterolora.findings import read_scores
from heterolora.run import RunFailed, search
from heterolora.shipped import default, option, options
from heterolora.step_time import times_from
from tests.conftest import ROOT
from tests.jobs import TINY, compose_job, prepare, run_job

# PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")


PARAMS = "{{_target_: heterolora.budget.Params, value: {}}}"


def run(folder, *overrides):
    """Search in ``folder``; what it wrote about itself."""
    folder.mkdir(parents=True)
    search(prepare(folder, *overrides, config="search"))
    return json.loads((folder / "search.json").read_text())


@pytest.mark.medium
def test_it_leaves_everything_and_it_agrees(tmp_path):
    folder = tmp_path / "a"
    summary = run(folder, "proxies=[grad_norm,snip,fisher,spectral]", "budgets=[qv_r2,3000]", "search_space=lora_all")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    scores = read_scores(folder / "scores.json", "scores")
    assert list(scores.scores) == ["grad_norm", "snip", "fisher", "spectral"]
    assert scores.proxy == "spectral"  # the default, which is among them
    table = pd.read_csv(folder / "scores.csv")
    assert list(table) == ["site", "grad_norm", "snip", "fisher", "spectral"]
    for proxy in scores.scores:
        for site, value in zip(table["site"], table[proxy], strict=True):
            given = scores.scores[proxy][site]
            assert value == pytest.approx(sum(given) if isinstance(given, list) else given)
    assert len(summary["allocations"]) == 8
    for row in summary["allocations"]:
        inner = folder / row["folder"]
        content = json.loads((inner / "allocation.json").read_text())
        assert content["spent"] == row["parameters"] <= row["allowed"]
        assert content["provenance"]["proxy"]["_target_"].lower().endswith(row["proxy"].replace("_", ""))
        config = json.loads((inner / "adapter_config.json").read_text())
        assert len(config["target_modules"]) == row["sites"]
        assert (inner / "allocation.png").stat().st_size > 1000
    main = summary["allocations"][0]
    assert (main["proxy"], main["budget"]) == ("spectral", "qv_r2")
    assert read_ranks(folder / "allocation.json") == read_ranks(folder / main["folder"] / "allocation.json")
    agreement = json.loads((folder / "agreement.json").read_text())
    assert len(agreement["pairs"]) == 6
    for pair in agreement["pairs"]:
        assert -1 <= pair["spearman"]["low"] <= pair["spearman"]["high"] <= 1
    assert agreement["stability"].keys() == scores.scores.keys()


@pytest.mark.medium
def test_a_proxy_of_trained_adapters_beside_one_of_the_pretrained_function(tmp_path):
    trained = ["probe.adapter_warmup_steps=40", "probe.adapter_warmup_lr=0.02", "probe.head_warmup_lr=0.02"]
    summary = run(tmp_path / "a", "proxies=[grad_norm,alpha_test]", *trained)
    scores = read_scores(tmp_path / "a" / "scores.json", "scores").scores
    assert list(scores) == ["grad_norm", "alpha_test"]
    assert {round(10 * gate) / 10 for gate in scores["alpha_test"].values()} == set(scores["alpha_test"].values())
    notes = summary["notes"]["alpha_test"]
    assert notes["metric"] == "accuracy"
    assert 0 <= notes["all gates at 1"] <= 1
    run(tmp_path / "b", "proxies=[grad_norm]", "probe.head_warmup_lr=0.02")
    assert read_scores(tmp_path / "b" / "scores.json", "scores").scores["grad_norm"] == scores["grad_norm"]


@pytest.mark.medium
def test_train_py_finds_the_same(tmp_path):
    run(tmp_path / "search", "proxy=snip", "budget.rank=3")
    run_job(tmp_path / "train", "proxy=snip", "budget.rank=3")
    found, trained = (read_ranks(tmp_path / name / "allocation.json") for name in ("search", "train"))
    assert found == trained
    scores = [read_scores(tmp_path / name / "scores.json", "scores") for name in ("search", "train")]
    assert scores[0].rows == scores[1].rows
    assert scores[0].backbone == scores[1].backbone
    for site, value in scores[0].scores["snip"].items():
        assert value == pytest.approx(scores[1].scores["snip"][site], rel=1e-6)
    run_job(
        tmp_path / "fixed",
        "allocator=fixed",
        f"allocator.path={tmp_path / 'search' / 'allocation.json'}",
        "budget.rank=3",
    )


@pytest.mark.medium
def test_peft_trains_the_config_that_was_written(tmp_path):
    run(tmp_path / "a", "search_space=lora_all")
    config = LoraConfig.from_pretrained(str(tmp_path / "a"))
    model = build(option("model", "tiny_bert"), "model").load(2, 0).model
    theirs = get_peft_model(model, config)
    held = sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name and p.requires_grad)
    assert held == json.loads((tmp_path / "a" / "allocation.json").read_text())["spent"]


@pytest.mark.medium
def test_shortcuts_are_left_out_of_pefts_config_and_that_is_said(tmp_path, capsys):
    summary = run(tmp_path / "a", "search_space=full", "budget.rank=6")
    left = summary["left_out_of_peft"]
    ranks = read_ranks(tmp_path / "a" / "allocation.json")
    sites = json.loads((tmp_path / "a" / "sites.json").read_text())
    assert left["sites"] == [site["name"] for site in sites if site["kind"] == "shortcut" and ranks[site["name"]]] != []
    assert "PEFT cannot hold" in capsys.readouterr().out
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == sum(map(bool, ranks.values())) - len(left["sites"])


@pytest.mark.medium
def test_given_scores_lead_to_the_same_ranks_and_read_neither_weights_nor_data(tmp_path, monkeypatch):
    first = run(tmp_path / "a", "proxies=[snip,spectral]", "budgets=[qv_r2,4000]")

    def refuse(*args, **kwargs):
        raise AssertionError("read")

    monkeypatch.setattr(Tiny, "load", refuse)
    monkeypatch.setattr(Pretrained, "load", refuse)
    monkeypatch.setattr("heterolora.data.module.Data.splits", refuse)
    given = f"scores={tmp_path / 'a' / 'scores.json'}"
    again = run(tmp_path / "b", given, "proxies=[snip,spectral]", "budgets=[qv_r2,4000]")
    assert again["backbone"] == first["backbone"]
    for row in first["allocations"]:
        one, other = (read_ranks(tmp_path / x / row["folder"] / "allocation.json") for x in "ab")
        assert one == other
    run(tmp_path / "c", given, "search_space=lora_all", "allocator=knapsack", "proxy=snip")
    with pytest.raises(RunFailed, match=r"of proxy=fisher; give proxy= or proxies= of \['snip', 'spectral'\]"):
        run(tmp_path / "d", given, "proxy=fisher")
    with pytest.raises(RunFailed, match="lacks sites of this space"):
        run(tmp_path / "e", given, "model=tiny_gpt2")


@pytest.mark.medium
def test_scores_of_another_model_are_not_recorded_as_this_ones(tmp_path, caplog):
    run(tmp_path / "a", "proxy=snip", "search_space=lora_all")
    again = run(tmp_path / "b", f"scores={tmp_path / 'a'}", "proxy=snip", "search_space=lora_qv")
    assert again["backbone"] is not None
    other = run(tmp_path / "c", f"scores={tmp_path / 'a'}", "proxy=snip", "search_space=lora_qv", "model=tiny_roberta")
    assert other["backbone"] is None
    assert json.loads((tmp_path / "c" / "allocation.json").read_text())["provenance"]["backbone"] is None
    assert "other model settings" in caplog.text


def test_arguments_of_a_listed_budget_count(tmp_path):
    summary = run(tmp_path / "a", "budget=params", "budget.value=300", "budgets=[params,qv_r2]", "probe.batches=1")
    assert [row["allowed"] for row in summary["allocations"]] == [300, 512]
    assert not (tmp_path / "a" / "agreement.json").exists()  # one batch cannot be drawn in two ways


def test_an_allocator_that_looks_at_no_scores_needs_none(tmp_path):
    summary = run(tmp_path / "a", "allocator=uniform", "search_space=lora_qv")
    assert not (tmp_path / "a" / "scores.json").exists()
    assert [row["proxy"] for row in summary["allocations"]] == ["uniform"]


@pytest.mark.medium
def test_proxies_that_cannot_be_resampled_have_no_interval(tmp_path):
    run(tmp_path / "a", "proxies=[snip,grasp,depth]", "search_space=lora_all")
    found = json.loads((tmp_path / "a" / "agreement.json").read_text())
    assert found["stability"].keys() == {"snip"}
    assert all(pair["spearman"]["low"] is None for pair in found["pairs"])
    run(tmp_path / "b", "proxy=depth")
    assert not (tmp_path / "b" / "agreement.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["proxies=[snip,nope]"], r"proxies=nope: possible: \["),
        (["proxies=snip"], "proxies=snip: a list of different names"),
        (["proxies=[snip,snip]"], "a list of different names"),
        (["proxies=[]"], "a list of different names"),
        (["proxies=[snip]", "proxy=fisher"], r"proxy=fisher was given, and proxies=\['snip'\] leaves it out"),
        (["proxies=[snip]", "+proxy.x=1"], "x=1|leaves it out"),
        (["budgets=[300]", "budget=qv_r8"], r"budget=qv_r8 was given, and budgets=\['300'\] leaves it out"),
        (
            [f"budgets=[{PARAMS.format(300)},{PARAMS.format(400)}]"],
            "two of them would be called params",
        ),
        (["resamples=true"], "resamples=True"),
        (["budgets=[1]"], "cheapest site costs"),
        (["budgets=[qv_r8,1]"], "budgets=1: budget=1: one unit"),
        (["budgets=[nope]"], "budgets=nope: possible"),
        (["budgets=[-5]"], r"budgets\.value=-5"),
        (["run=dry"], "run=dry: is for train.py"),
        (["resume=true"], "resume=True: is for train.py"),
        (["allocation=dynamic"], "allocation=dynamic: is for train.py"),
        (["resamples=-1"], "resamples=-1: a whole number"),
        (["scores=/nowhere.json"], "scores=/nowhere.json: cannot be read"),
        (["proxies=[gora]", "search_space=full"], "use search_space=lora_all"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, overrides, message):
    with pytest.raises(RunFailed, match=message) as caught:
        run(tmp_path / "a", *overrides)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["status.json"]


def test_its_config_is_that_of_train_py_and_a_few_keys_more():
    train, found = (yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text()) for name in ("train", "search"))
    composed = compose_job(config="search")
    assert set(composed) - {"hydra"} == (set(compose_job()) - {"hydra"}) | {"proxies", "budgets", "scores", "resamples"}
    assert composed.table is None
    assert set(found) - set(train) == {"proxies", "budgets", "scores", "resamples"}


def test_shipped_options_are_what_hydra_composes():
    composed = compose_job("proxy=eva", "allocator=knapsack", "seed=5")
    assert option("proxy", "eva") == dict(composed.proxy)
    assert build(option("allocator", "knapsack", seed=5), "a") == build(dict(composed.allocator), "a")
    assert build(default("probe"), "probe") == build(
        dict(compose_job().probe) | {"batches": 32, "head_warmup_steps": 100}, "p"
    )
    assert "spectral" in options("proxy")


@pytest.mark.slow
def test_a_multirun_of_searches(tmp_path):
    command = [sys.executable, "search.py", "-m", *TINY, f"outputs={tmp_path}", "proxy=snip,spectral", "seed=0,1"]
    command.remove("export.peft=false")
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert len(list(tmp_path.glob("multirun/*/*/allocation.json"))) == 4


_MEMORY = """
import sys, torch
torch.set_num_threads(1)
from heterolora.build import build
from heterolora.model import AdaptedModel
from heterolora.report.memory import now_mib, peak_mib, reset_peak
from heterolora.scoring import Probe, score_all
from heterolora.shipped import default, option
from heterolora.space import survey
what, tokens = sys.argv[1], int(sys.argv[2])
backbone = build(option("model", "minilm"), "model").load(2, 0)
space = build(option("search_space", "lora_all"), "s").resolve(survey(backbone.model))
model = AdaptedModel(backbone.model, space, build(default("adapter"), "a"), backbone.head)
ids = [torch.randint(1000, 20000, (16, tokens), generator=torch.Generator().manual_seed(i)) for i in range(3)]
batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i[:, 0] % 2} for i in ids]
loss = lambda m, batch: m(**batch).loss
if what == "step":
    model.enable(dict.fromkeys(model.ranks, 1), 0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
before = now_mib()
reset_peak()
if what == "step":
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
else:
    proxies = {name: build(option("proxy", name), "p") for name in what.split(",")}
    probe = Probe("random", False, 0.02, 1, 3, "mean", 0, 1e-3, 0, 1e-3)
    score_all(model, loss, batches, [], proxies=proxies, probe=probe, seed=0)
print(peak_mib() - before)
"""


@cache
def peak(what, tokens):
    """MiB above the loaded model, of a process of its own that gives memory back at once."""
    thrifty = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEMORY, what, str(tokens)]
    out = subprocess.run(command, env=os.environ | thrifty, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(out.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("what", ["grad_norm,snip,fisher,spectral", "eva", "plop,gora"])
@pytest.mark.parametrize("tokens", [32, 128])
def test_scoring_keeps_to_the_memory_of_a_training_step(what, tokens):
    assert peak(what, tokens) <= 1.1 * peak("step", tokens)


# -- time as a second budget -------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_limit_on_the_step_holds_in_every_allocation_and_is_said(tmp_path, capsys):
    budgets = [
        "budgets=[qv_r2,all_r2]",
        "budget=qv_r2",
        "budget.step_time=0.85",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    summary = run(tmp_path / "a", "search_space=lora_all", *budgets)
    limited, free = summary["allocations"]
    assert limited["step_time"]["predicted"] <= 0.85 == limited["step_time"]["limit"]
    assert "step_time" not in free
    record = json.loads((tmp_path / "a" / "allocation.json").read_text())["provenance"]["step_time"]
    assert record["seconds"] == pytest.approx(record["predicted"] * record["reference_seconds"])
    assert times_from(record["times"]).blocks == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert f"(predicted step {record['predicted']:.2f} of uniform, limit 0.85)" in printed
    again = run(tmp_path / "b", "search_space=lora_all", *budgets)  # from the kept calibration, to the last bit
    assert [row["step_time"] for row in again["allocations"][:1]] == [limited["step_time"]]
    ranks = [json.loads((tmp_path / name / "allocation.json").read_text())["ranks"] for name in "ab"]
    assert ranks[0] == ranks[1]


@pytest.mark.medium
def test_no_limit_that_cannot_be_kept_and_none_without_weights(tmp_path):
    with pytest.raises(
        RunFailed, match=r"budget\.step_time=0\.001: the fastest allocation here is predicted .* 0\.\d+ of"
    ):
        run(tmp_path / "a", "budget.step_time=0.001")
    with pytest.raises(RunFailed, match=r"budget\.step_time=-1.*a share above 0"):
        run(tmp_path / "b", "budget.step_time=-1")
    with pytest.raises(RunFailed, match=r"budget\.step_time=0\.5: goes with a number of parameters"):
        run(tmp_path / "c", "budget=fraction", "allocator=top", "budget.step_time=0.5")
    with pytest.raises(RunFailed, match=r"budget\.step_time=0\.5: is timed on the model, of which scores="):
        run(tmp_path / "d", "budget.step_time=0.5", f"scores={tmp_path / 'scores.json'}")
