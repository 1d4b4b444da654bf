"""Exports: PEFT, transformers and a reader that knows r and lora_alpha alone load what was trained, or none is left."""

import copy
import json
import re
import warnings

import pytest
import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from heterolora import export
from heterolora.adapters.lora import LoRA
from heterolora.errors import SettingError
from heterolora.export import ExportError, export_peft, head_modules
from tests.architectures import ARCHITECTURES, make_backbone, make_batch, make_config
from tests.conftest import adapt, randomise

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated"),  # PEFT's use of transformers
]

NAMED = ("bert", "roberta", "opt_pre", "gpt2", "llama", "qwen2", "gemma")  # by the issue

BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}


def answer(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trained(name, dtype=torch.float32, include=("lora",), scaling="constant", scale=2.0):
    """An adapted model with ranks 0 to 3 in turn, all factors and the head away from what is drawn at first."""
    model = adapt(make_backbone(name, dtype=dtype), include=include, spans=(1, 2) if "shortcut" in include else ())
    model.family = LoRA(scaling, scale, 0.0)
    model.enable({site.name: number % 4 for number, site in enumerate(model.space.sites)}, seed=0)
    randomise(model)
    with torch.no_grad():
        for parameter in model.head_parameters.values():
            parameter.add_(0.1)
    return model


def lost_head(name, dtype, head):
    """The backbone as a user has it: the same weights, and a head that was never trained."""
    base = make_backbone(name, dtype=dtype)
    with torch.no_grad():
        for parameter in head:
            base.get_parameter(parameter).fill_(torch.nan)
    return base


def gap(theirs, ours):
    return ((theirs - ours).abs().max() / ours.abs().max()).item()


@pytest.fixture(
    params=[name if name in NAMED else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ARCHITECTURES)]
)
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_peft_and_transformers_give_our_logits(name, dtype, tmp_path):
    model, scaling = trained(name, dtype, scaling="alpha_over_r", scale=3.0), BOUND[dtype]
    batch = make_batch(model.backbone)
    ours = answer(model, batch)
    for fold in (True, False):
        folder = tmp_path / f"fold_{fold}"
        found = export_peft(model, folder, lambda m: answer(m, batch), fold_scale=fold)
        loaded = PeftModel.from_pretrained(lost_head(name, dtype, model.head), folder).eval()
        assert gap(answer(loaded, batch), ours) < scaling
        native = lost_head(name, dtype, model.head)
        native.load_adapter(str(folder))
        assert gap(answer(native.eval(), batch), ours) < scaling
        ranks = {
            path: layer.r["default"]
            for path, layer in loaded.get_base_model().named_modules()
            if isinstance(layer, LoraLayer)
        }
        assert ranks == found.modules
        assert sorted(ranks.values()) == sorted(rank for rank in model.ranks.values() if rank)


@pytest.mark.parametrize("architecture", NAMED)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("fold", [True, False])
def test_powers_of_two_as_scale_come_back_to_the_bit(architecture, dtype, fold, tmp_path):
    model = trained(architecture, dtype, scale=0.5)
    batch = make_batch(model.backbone)
    found = export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=fold)
    assert found.difference == 0
    loaded = PeftModel.from_pretrained(lost_head(architecture, dtype, model.head), tmp_path / "peft").eval()
    assert torch.equal(answer(loaded, batch), answer(model, batch))


def read_simply(folder, base):
    """Serve an adapter as engines do that know r and lora_alpha alone: one scale for all modules, patterns ignored."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for key, value in tensors.items():
            path = key.removeprefix("base_model.model.")
            if path.endswith("lora_A.weight"):
                weight = base.get_submodule(path.removesuffix(".lora_A.weight")).weight
                delta = scale * tensors[key.replace("lora_A", "lora_B")] @ value
                weight.add_(delta.T if config["fan_in_fan_out"] else delta)
            elif "lora_" not in path:
                base.get_parameter(path).copy_(value)
    return base


@pytest.mark.parametrize("architecture", NAMED)
def test_a_reader_of_r_and_lora_alpha_alone_is_right_where_the_scale_is_folded(architecture, tmp_path):
    model = trained(architecture, torch.float64, scaling="alpha_over_r", scale=3.0)
    batch = make_batch(model.backbone)
    found = {}
    for fold in (True, False):
        export_peft(model, tmp_path / str(fold), lambda m: answer(m, batch), fold_scale=fold)
        base = lost_head(architecture, torch.float64, model.head)
        found[fold] = gap(answer(read_simply(tmp_path / str(fold), base), batch), answer(model, batch))
    assert found[True] < 1e-9
    assert found[False] > 1e-3, "without folding, such a reader is wrong: that is why folding is the default"


def test_layers_1_and_11_are_told_apart_by_peft(tmp_path):
    """Were patterns not anchored and whole, the rank of one would be the other's: PEFT takes the first that matches."""
    config = make_config("llama")
    config.num_hidden_layers = 12
    base = AutoModelForSequenceClassification.from_config(config).eval()
    model = adapt(base, include=["lora"], spans=())
    model.enable({"1.q": 3, "11.q": 1, "0.v": 5, "10.v": 2, "1.o": 2, "11.down": 4}, 0)
    randomise(model)
    batch = make_batch(base)
    for fold in (True, False):
        found = export_peft(model, tmp_path / str(fold), lambda m: answer(m, batch), fold_scale=fold)
        assert found.modules["model.layers.1.self_attn.q_proj"] == 3
        assert found.modules["model.layers.11.self_attn.q_proj"] == 1
        assert len(found.modules) == 6


def test_a_model_that_recomputes_activations_is_exported(tmp_path):
    model = trained("llama", include=("lora", "shortcut"))
    model.gradient_checkpointing()
    model.train()
    batch = make_batch(model.backbone)
    found = export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    assert found.difference == 0


def test_shortcuts_are_said_to_be_missing_and_are_saved_beside(tmp_path):
    model = trained("bert", include=("lora", "shortcut"))
    batch = make_batch(model.backbone)
    before = answer(model, batch)
    found = export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    shortcuts = [name for name in model.held if model.space[name].kind == "shortcut"]
    assert list(found.missing) == shortcuts
    assert torch.equal(answer(model, batch), before)
    state = load_file(tmp_path / "peft" / "shortcuts.safetensors")
    assert {name: value.tolist() for name, value in state.items()} == {
        f"adapter.{name}": value.tolist()
        for name, value in model.adapter_state_dict().items()
        if name.rpartition(".")[0] in shortcuts
    }
    loaded = PeftModel.from_pretrained(lost_head("bert", torch.float32, model.head), tmp_path / "peft").eval()
    assert gap(answer(loaded, batch), before) > 1e-3
    model.switch_off(shortcuts)
    assert gap(answer(loaded, batch), answer(model, batch)) < 1e-5
    notes = json.loads((tmp_path / "peft" / "heterolora.json").read_text())
    assert notes["not_in_peft"] == {name: model.ranks[name] for name in shortcuts}
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f"{len(shortcuts)} of them" in card
    assert "another function than the one that was trained" in card


def test_only_shortcuts_leave_nothing_for_peft_but_everything_for_us(tmp_path):
    model = trained("bert", include=("shortcut",))
    batch = make_batch(model.backbone)
    found = export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    assert (found.modules, found.difference) == ({}, None)
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "heterolora.json",
        "shortcuts.safetensors",
        "README.md",
    }
    assert {f"head.{name}" for name in model.head} < load_file(tmp_path / "peft" / "shortcuts.safetensors").keys()


def test_sites_that_are_switched_off_are_not_part_of_the_function_and_not_exported(tmp_path):
    model = trained("llama")
    batch = make_batch(model.backbone)
    off = model.held[:3]
    model.switch_off(off)
    found = export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    assert not set(found.sites) & set(off)
    assert [name for name in model.held if model.active_adapter(name) is None] == off


def test_the_model_is_left_as_it_was_and_the_weights_are_not_copied(tmp_path, monkeypatch):
    model = trained("bert", include=("lora", "shortcut")).train()
    batch = make_batch(model.backbone)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    bits = copy.deepcopy(model.state_dict())
    places = {parameter.data_ptr() for name, parameter in model.backbone.named_parameters() if name not in model.head}
    seen = {}

    def spied(*arguments):
        loaded = original(*arguments)
        seen["theirs"] = {p.data_ptr() for n, p in loaded.named_parameters() if "lora_" not in n and "to_save" not in n}
        return loaded

    original = export._reloaded
    monkeypatch.setattr(export, "_reloaded", spied)
    export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    assert places <= seen["theirs"]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


MUTATIONS = {
    "a module is missing": lambda config, state: config["target_modules"].pop(),
    "a module too many": lambda config, state: config["target_modules"].append(
        "bert.encoder.layer.0.attention.self.query"
    ),
    "a wrong rank": lambda config, state: config["rank_pattern"].popitem(),
    "a wrong scale": lambda config, state: config.update(lora_alpha=config["lora_alpha"] * 2),
    "one wrong alpha": lambda config, state: config["alpha_pattern"].popitem(),
    "rslora": lambda config, state: config.update(use_rslora=True),
    "the head is missing": lambda config, state: [state.pop(key) for key in list(state) if "classifier" in key],
    "the head is not named": lambda config, state: config.update(modules_to_save=None, task_type=None),
    "half of the head": lambda config, state: state.pop("base_model.model.classifier.bias"),
    "another head": lambda config, state: state["base_model.model.classifier.bias"].add_(1),
    "a factor that was changed": lambda config, state: next(iter(state.values())).mul_(1.001),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_what_does_not_come_back_raises_and_leaves_nothing(mutation, tmp_path, monkeypatch):
    model = trained("bert")
    batch = make_batch(model.backbone)
    given = {}

    def config(*arguments, **options):
        given["config"] = original_config(*arguments, **options)
        return given["config"]

    def tensors(*arguments):
        state = original_tensors(*arguments)
        mutation(given["config"], state)
        (tmp_path / next(tmp_path.glob(".peft-*")) / "adapter_config.json").write_text(json.dumps(given["config"]))
        return state

    original_config, original_tensors = export.adapter_config, export.peft_tensors
    monkeypatch.setattr(export, "adapter_config", config)
    monkeypatch.setattr(export, "peft_tensors", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT hints at some of them
        with pytest.raises(ExportError) as error:
            export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_logits_that_differ_raise_with_the_largest_difference(tmp_path):
    model = trained("bert")
    batch = make_batch(model.backbone)

    def logits(m):
        return answer(m, batch) + (0.25 if isinstance(m, PeftModel) else 0)

    with pytest.raises(ExportError, match=r"differ by up to 0\.25"):
        export_peft(model, tmp_path / "peft", logits, fold_scale=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path):
    model = trained("bert")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.txt").write_text("")
    for folder, message in ((tmp_path / "peft", "not empty"), (tmp_path / "a" / "b", "is not there")):
        with pytest.raises(SettingError, match=message):
            export_peft(model, folder, lambda m: answer(m, {}), fold_scale=True)
    assert [path.name for path in (tmp_path / "peft").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [
        ("bert", (), ["classifier"]),
        ("bert", ("bert.pooler.dense.weight", "bert.pooler.dense.bias"), ["bert.pooler", "classifier"]),
        ("roberta", (), ["classifier"]),
        ("deberta_v2", (), ["classifier", "pooler"]),
        ("distilbert", (), ["classifier", "pre_classifier"]),
        ("t5", (), ["classification_head"]),
    ],
)
def test_the_head_is_stored_as_whole_modules(architecture, more, expected):
    model = trained(architecture)
    assert head_modules(model.backbone, model.head | set(more)) == expected


def test_a_pooler_that_was_trained_with_the_head_is_exported(tmp_path):
    base = make_backbone("bert", dtype=torch.float32)
    model = adapt(base, include=["lora"], spans=())
    model.head |= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    model.enable({"0.q": 2, "1.v": 1}, 0)
    randomise(model)
    batch = make_batch(base)
    export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    loaded = PeftModel.from_pretrained(lost_head("bert", torch.float32, model.head), tmp_path / "peft").eval()
    assert gap(answer(loaded, batch), answer(model, batch)) < 1e-5


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_half_precision_says_what_peft_rounds(architecture, tmp_path):
    from heterolora.backbone import _head_in_float32

    base = make_backbone(architecture, dtype=torch.bfloat16)
    inside = {id(p) for p in base.base_model.parameters()}
    _head_in_float32(base, [name for name, p in base.named_parameters() if id(p) not in inside])
    model = adapt(base, include=["lora"], spans=())
    model.enable(dict.fromkeys(model.ranks, 2), 0)
    randomise(model, std=0.05)
    batch = make_batch(base)
    found = export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert found.dtype == "bfloat16"
    assert "PEFT loads it in bfloat16" in (tmp_path / "peft" / "README.md").read_text()


def test_the_card_has_front_matter_and_the_ranks(tmp_path):
    model = trained("bert")
    batch = make_batch(model.backbone)
    export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    text = (tmp_path / "peft" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert "base_model" not in front
    for layer in range(3):
        row = next(line for line in text.splitlines() if line.startswith(f"| {layer} |"))
        cells = [int(cell) for cell in re.findall(r"\d+", row)][1:]
        assert cells == [model.ranks[f"{layer}.{role}"] for role in ("q", "k", "v", "o", "up", "down")]


# -- at the end of a run ---------------------------------------------------------------------------------------------


def test_a_run_leaves_a_folder_for_peft_with_its_own_predictions(tmp_path):
    from tests.jobs import run_job

    summary = run_job(tmp_path / "a", "export.peft=true", "search_space=lora_all", "seed=3")
    assert summary["export"]["largest_difference"] <= 1e-5 * summary["export"]["largest_logit"]
    assert summary["export"]["parameters"] == summary["parameters"]["held"]
    folder = tmp_path / "a" / "peft"
    notes = json.loads((folder / "heterolora.json").read_text())
    assert notes["backbone"] == summary["backbone"]
    assert notes["allocation"]["ranks"] == json.loads((tmp_path / "a" / "allocation.json").read_text())["ranks"]
    card = (folder / "README.md").read_text()
    for text in (f"{summary['metrics']['test']['accuracy']:.4f}", "Seed 3", "`positive`", summary["backbone"]):
        assert text in card


def test_a_run_of_shortcuts_alone_finishes_and_says_that_peft_can_load_nothing(tmp_path, caplog):
    from tests.jobs import run_job

    with caplog.at_level("INFO"):
        summary = run_job(tmp_path / "a", "export.peft=true", "search_space=shortcuts", "budget=params",
                          "budget.value=512", "trainer.max_steps=2")  # fmt: skip
    assert summary["export"]["modules"] == 0
    assert "nothing for PEFT to load" in caplog.text
    assert (tmp_path / "a" / "peft" / "shortcuts.safetensors").is_file()


def test_an_export_that_fails_is_said_and_loses_nothing(tmp_path, monkeypatch, caplog):
    import heterolora
    from tests.jobs import run_job

    def fail(*arguments):
        raise ExportError("the logits differ, says the test")

    monkeypatch.setattr(export, "_compare", fail)
    summary = run_job(tmp_path / "a", "export.peft=true", "search_space=lora_all", "trainer.max_steps=2")
    assert summary["export"] == {"folder": None, "error": "the logits differ, says the test"}
    assert "nothing was exported: the logits differ" in caplog.text
    assert not list((tmp_path / "a").glob("*peft*"))
    assert heterolora.load(tmp_path / "a").held_parameters == summary["parameters"]["held"]


def test_what_a_run_hands_over_changes_no_hash():
    from heterolora.parts import config_hash
    from heterolora.results import method_hash
    from tests.jobs import compose_job

    configs = []
    for override in ("export.peft=true", "export.peft=false"):
        cfg = compose_job(override)
        configs.append({"seed": 0, "data": {"cache_dir": None, "root": None}, "export": dict(cfg.export)})
    without = {key: value for key, value in configs[0].items() if key != "export"}
    assert len({config_hash(config) for config in (*configs, without)}) == 1
    assert len({method_hash(config) for config in (*configs, without)}) == 1


STOCK = """
import json, sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")  # PEFT's use of transformers
folder, texts, out = sys.argv[1:]
place = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
tokenizer = AutoTokenizer.from_pretrained(place)
base = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)
model = PeftModel.from_pretrained(base, folder).eval()
pairs = json.load(open(texts))
logits = []
with torch.no_grad():
    for at in range(0, len(pairs), 64):
        batch = tokenizer(*map(list, zip(*pairs[at : at + 64])), truncation=True, max_length=128, padding=True,
                          return_tensors="pt")
        logits += model(**batch).logits.tolist()
assert not any(name.split(".")[0] == "heterolora" for name in sys.modules)
json.dump(logits, open(out, "w"))
"""


@pytest.mark.slow
def test_minilm_trained_here_predicts_the_same_in_stock_peft_in_another_process(tmp_path, data_root):
    """All 1,725 test pairs of MRPC, texts in and predictions out, with nothing of ours in the other process."""
    import subprocess
    import sys

    import pandas as pd

    import heterolora
    from tests.jobs import run_job

    run = tmp_path / "run"
    summary = run_job(run, "model=minilm", "task=mrpc", f"data.root={data_root}", "data.limit=null", "proxy=random",
                      "search_space=lora_all", "task.max_length=128", "data.batch_size=16", "trainer.max_steps=40",
                      "optimizer.lr=1e-3", "optimizer.head_lr=3e-2",
                      "export.peft=true", "seed=1")  # fmt: skip
    table = heterolora.load_run(run).split("test")
    (tmp_path / "texts.json").write_text(json.dumps(table[["sentence1", "sentence2"]].to_numpy().tolist()))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(run / "peft"), str(tmp_path / "texts.json"), str(tmp_path / "out.json")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads((tmp_path / "out.json").read_text()), dtype=torch.float64)
    recorded = pd.read_csv(run / "predictions_test.csv")
    names = ["not_equivalent", "equivalent"]
    assert len(recorded) == 1725
    assert recorded["prediction"].nunique() == 2, "a run that learnt nothing would show nothing"
    assert [names[code] for code in theirs.argmax(-1)] == list(recorded["prediction"])
    ours = torch.tensor(recorded[[f"logit_{name}" for name in names]].to_numpy(), dtype=torch.float64)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    accuracy = (recorded["prediction"] == recorded["label"]).mean()
    assert accuracy == pytest.approx(summary["metrics"]["test"]["accuracy"])
    ranks = json.loads((run / "allocation.json").read_text())["ranks"]
    assert len(set(ranks.values())) > 2, "ranks differ between modules"
    snippet = re.search(r"```python\n(.*?)```", (run / "peft" / "README.md").read_text(), re.DOTALL).group(1)
    config = json.loads((run / "peft" / "adapter_config.json").read_text())
    found = {}
    exec(
        snippet.replace('BASE_MODEL"', config["base_model_name_or_path"] + '"').replace("THIS_FOLDER", f"{run}/peft"),
        found,
    )
    held = sum(parameter.numel() for name, parameter in found["model"].named_parameters() if "lora_" in name)
    assert held == summary["parameters"]["held"]
