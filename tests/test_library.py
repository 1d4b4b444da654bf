"""The search as a call: for models, batches and losses of somebody else's."""

import doctest
import json
import subprocess
import sys
import time

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import heterolora
from heterolora.allocation import read_ranks
from heterolora.allocators.greedy import Greedy
from heterolora.budget import UniformRank
from heterolora.errors import SettingError
from heterolora.proxies.grad_norm import GradNorm
from heterolora.scoring import Probe
from tests.architectures import make_backbone, make_batch
from tests.conftest import ROOT, SHARED
from tests.jobs import TINY, prepare

# PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")

PROBE = Probe("random", False, 0.02, 1, 3, "mean", 2, 1e-3, 0, 1e-3)


def close(a, b):
    return all(a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9) for name in a)


@pytest.fixture
def model():
    return make_backbone("bert", dropout=0.1).train()


@pytest.fixture
def loader(model):
    return [make_batch(model, seed=seed) for seed in range(6)]


def test_the_model_is_as_before(model, loader):
    model.bert.embeddings.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    heterolora.search(model, loader, budget=2000)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_names_mean_the_shipped_options_and_objects_themselves(model, loader):
    by_name = heterolora.search(
        model, loader, search_space="lora_all", proxy="grad_norm", allocator="greedy", budget="qv_r2", probe=PROBE
    )
    greedy = Greedy(0, 32, "harmonic", "none", None, exact=True, seed=0)
    made = heterolora.search(
        model, loader, search_space="lora_all", proxy=GradNorm(), allocator=greedy,
        budget=UniformRank(2, ["q", "v"], None), probe=PROBE,
    )  # fmt: skip
    assert by_name.ranks == made.ranks
    assert by_name.scores == made.scores
    assert by_name.budget == made.budget


@pytest.mark.medium
def test_it_finds_what_search_py_finds(tmp_path):
    """The same model, batches, head and seed through both entrances."""
    from heterolora.data.module import TextData
    from heterolora.findings import read_scores
    from heterolora.run import compose, search

    cfg = prepare(tmp_path / "a", "proxies=[snip,spectral]", "proxy=snip", config="search")
    (tmp_path / "a").mkdir()
    search(cfg)
    parts = compose(list(TINY))
    splits, _, task = parts["data"].splits(parts["task"])
    backbone = parts["model"].load(2, 0)
    data = TextData(splits, task, backbone.tokenizer, backbone.positions, parts["data"], 0)
    batches, _ = data.scoring_batches(2)
    warm = [batch for batch, _ in zip(data.warmup_batches(), range(2), strict=False)]
    batches = [{key: value for key, value in batch.items() if key != "index"} for batch in [*batches, *warm]]
    found = heterolora.search(
        backbone.model, batches, proxy="snip", probe=Probe("random", False, 0.02, 1, 2, "mean", 2, 1e-3, 0, 1e-3)
    )
    written = read_scores(tmp_path / "a" / "scores.json", "scores")
    for site, value in written.scores["snip"].items():
        assert found.scores[site] == pytest.approx(value, rel=1e-5), site
    assert read_ranks(tmp_path / "a" / "allocation.json") == found.ranks


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_peft_trains_what_was_found(name):
    model = make_backbone(name)
    loader = [make_batch(model, seed=seed) for seed in range(4)]
    found = heterolora.search(model, loader, search_space="lora_all", budget=3000, probe=PROBE)
    theirs = get_peft_model(model, found.peft_config())
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if "lora_" in n) == found.spent
    assert any("modules_to_save" in n for n in trained)
    scales = {m.scaling["default"] for m in theirs.modules() if hasattr(m, "lora_A")}
    assert scales == {2.0}


def test_a_language_model_has_no_head_and_gives_its_own_loss():
    model = make_backbone("llama", auto=transformers.AutoModelForCausalLM)
    batches = [make_batch(model, seed=seed) for seed in range(3)]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    found = heterolora.search(model, batches, search_space="lora_qv", budget=600)
    assert found.head == ()
    assert found.peft_config().task_type == "CAUSAL_LM"


def test_attach_starts_at_the_model_and_takes_a_file(model, loader, tmp_path):
    model.eval()
    batch = {key: value for key, value in loader[0].items() if key != "labels"}
    before = model(**batch).logits
    found = heterolora.search(model, loader, budget=3000, probe=PROBE)
    assert any(found.space[name].span for name in found.allocation.active)
    adapted = heterolora.attach(model, found)
    assert torch.equal(adapted(**batch).logits, before)
    assert adapted.held_parameters == found.spent
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(found.head)
    found.save(tmp_path / "allocation.json")
    adapted.enable({}, 0)
    again = heterolora.attach(model, tmp_path / "allocation.json")
    assert again.ranks == found.ranks
    assert all(
        torch.equal(value, again.adapter_state_dict()[name]) for name, value in adapted.adapter_state_dict().items()
    )
    other = make_backbone("bert")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[0, 0] += 1
    for given in (found, tmp_path / "allocation.json"):
        with pytest.raises(SettingError, match="other weights"):
            heterolora.attach(other, given)


def test_an_adapted_model_is_scored_where_it_is(model, loader):
    found = heterolora.search(model, loader, budget=3000, probe=PROBE)
    adapted = heterolora.attach(model, found)
    at_zero = heterolora.search(adapted, loader, budget=3000, probe=PROBE)
    assert close(at_zero.scores, found.scores)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(0.1)
    moved = heterolora.search(adapted, loader, budget=3000, probe=PROBE)
    assert not close(moved.scores, found.scores)
    assert adapted.held_parameters == found.spent
    assert all(p.requires_grad for p in adapted.adapters.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proxy": "nope"}, "proxy=nope: possible"),
        (
            {"allocator": "eva"},
            "allocator=eva: is a preset for train.py; choose what it does: redistribute@allocator, ",
        ),
        ({"search_space": "nope"}, "search_space=nope: possible"),
        ({"budget": True}, "budget=True: a name, one of"),
        ({"allocator": 3}, "allocator=3: a name, one of"),
        ({"budget": 3}, "cheapest site costs"),
        ({"budget": 0}, "budget=0: at least 1"),
        ({"dataloader": []}, "gives no batches to score"),
        ({"dataloader": None}, "dataloader=None: gives no batches"),
        ({"dataloader": [{"input_ids": [[1, 2]]}]}, "give batches of tensors"),
        ({"dataloader": [{"input_ids": torch.ones(3, dtype=torch.long)}]}, "single example"),
        ({"head": ["zzz"]}, r"head=\['zzz'\]: no such parameters"),
        ({"probe": {"batches": 2}}, "probe="),
        ({"loss_fn": lambda model, batch: model(**batch).logits}, "loss_fn=shape"),
        ({"loss_fn": lambda model, batch: 1.0}, "loss_fn=float"),
        ({"loss_fn": lambda model, batch: model(**batch).loss.detach()}, "with its graph"),
        ({"model": None}, "model=None"),
        ({"model": transformers.BertModel}, "a torch.nn.Module"),
        ({"dataloader": [1]}, "must be mappings"),
        ({"dataloader": "no labels"}, "give labels, or a loss_fn"),
        ({"probe": Probe("random", False, 0.02, 1, 9, "mean", 0, 1e-3, 0, 1e-3)}, "the dataloader gives 6 batches"),
        ({"scores": {"0.q": 1.0}}, "scores=1 sites: lacks"),
    ],
)
def test_what_cannot_be_used_is_one_line(model, loader, changes, message):
    given = {"model": model, "dataloader": loader, **changes}
    if given["dataloader"] == "no labels":
        given["dataloader"] = [{key: value for key, value in batch.items() if key != "labels"} for batch in loader]
    with pytest.raises(SettingError, match=message):
        heterolora.search(**given)


def test_what_is_attached_already_is_refused(model, loader):
    found = heterolora.search(model, loader, budget=3000, probe=PROBE)
    adapted = heterolora.attach(model, found)
    for again in (lambda: heterolora.attach(model, found), lambda: heterolora.search(model, loader, budget=3000)):
        with pytest.raises(SettingError, match="has adapters attached"):
            again()
    adapted.enable({}, seed=0)
    assert heterolora.attach(model, found).held_parameters == found.spent
    wrapped = get_peft_model(make_backbone("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(SettingError, match=r"model\.unload"):
        heterolora.search(wrapped, loader)


def test_what_was_done_is_recorded(model, loader):
    scored = heterolora.search(model, loader, budget=3000, probe=PROBE).allocation.provenance
    assert scored["probe"]["batches"] == 3
    assert scored["proxy"]["_target_"].endswith("Spectral")
    sites = heterolora.search(model, loader, budget=3000, probe=PROBE).scores
    given = heterolora.search(model, None, scores=dict.fromkeys(sites, 1), budget=3000).allocation.provenance
    assert (given["scores"], given["probe"], given["proxy"]) == ("given", None, None)
    with pytest.raises(SettingError, match="scores="):
        heterolora.search(model, None, scores=dict.fromkeys(sites, "a"), budget=3000)


@pytest.mark.parametrize("auto", [transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM])
def test_an_adapter_of_pefts_is_scored_where_it_is_and_trained_on(auto, tmp_path):
    made = [make_backbone("llama", auto=auto) for _ in range(3)]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(made[0], config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    batches = [make_batch(made[1], seed=seed) for seed in range(3)]
    if auto is transformers.AutoModelForCausalLM:
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    ours = heterolora.from_peft(made[1], tmp_path)
    inputs = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    at_it = heterolora.search(ours, batches, budget=2000, probe=PROBE)
    plain = heterolora.search(made[2], batches, search_space="lora_all", budget=2000, probe=PROBE)
    assert not close(at_it.scores, plain.scores)
    ours(**batches[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.adapters.parameters())
    wrong = make_backbone("bert")
    with pytest.raises(SettingError, match="folder="):
        heterolora.from_peft(wrong, tmp_path)


def test_peft_is_told_of_shortcuts(model, loader):
    found = heterolora.search(model, loader, search_space="shortcuts", budget=2000, probe=PROBE)
    with pytest.raises(SettingError, match=r"heterolora\.attach"):
        found.peft_config()


def test_a_model_of_400_billion_parameters_is_allocated_in_seconds():
    """Llama-3-405B's shape without weights: attached, allocated from given scores under an exact budget, enabled."""
    config = transformers.LlamaConfig(
        hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
        intermediate_size=53248, vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) > 4e11
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    roles = ("q", "k", "v", "o", "gate", "up", "down", "residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn")
    names = [f"{layer}.{role}" for layer in range(126) for role in roles]
    units = torch.rand(len(names), 32, generator=generator).sort(dim=1, descending=True).values.tolist()
    found = heterolora.search(model, None, scores=dict(zip(names, units, strict=True)), budget="qv_r8")
    adapted = heterolora.attach(model, found)
    seconds = time.perf_counter() - start
    assert found.spent == found.budget == 126 * 8 * (2 * 16384 + 16384 + 1024)
    assert adapted.held_parameters == found.spent
    assert seconds < 10


def test_types_are_for_users_too():
    assert (ROOT / "heterolora" / "py.typed").is_file()


@pytest.mark.medium
def test_neither_hydra_nor_lightning_is_imported():
    code = """
import sys, torch, transformers, heterolora
config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, num_labels=2)
model = transformers.BertForSequenceClassification(config)
ids = torch.randint(5, 50, (4, 6))
found = heterolora.search(model, [{"input_ids": ids, "labels": ids[:, 0] % 2}], search_space="lora_all", budget=500)
found.peft_config(), found.plot(), heterolora.attach(model, found)
print(sorted({"hydra", "omegaconf", "lightning", "pytorch_lightning"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SHARED.parent)
    assert out.stdout.strip() == "[]"


def test_the_examples_of_the_documentation():
    with torch.random.fork_rng():
        failed, tried = doctest.testfile(str(ROOT / "docs" / "library.md"), module_relative=False)
    assert tried > 15
    assert failed == 0


@pytest.mark.slow
def test_the_example_script_fine_tunes_with_trainer_and_peft(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "finetune_with_peft.py"), "--output", str(tmp_path / "out")]
    command += ["--train", "1000"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(out.stdout.strip().splitlines()[-1])
    assert result["adapter_parameters"] == 73_728
    assert result["accuracy"] > 0.55  # a majority vote: 0.5
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.medium
def test_a_limit_on_the_step_is_measured_on_the_model_and_leaves_it_as_before(model, loader):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    limit = UniformRank(2, None, 0.9)
    found = heterolora.search(model, loader, search_space="lora_all", budget=limit, probe=PROBE)
    record = found.allocation.provenance["step_time"]
    assert record["predicted"] <= record["limit"] == 0.9
    assert found.allocation.provenance["budget"]["step_time"] == 0.9
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(SettingError, match=r"budget\.step_time=0\.001: the fastest"):
        heterolora.search(model, loader, search_space="lora_all", budget=UniformRank(2, None, 0.001), probe=PROBE)
    with pytest.raises(SettingError, match="no batches to time a step on"):
        heterolora.search(model, None, allocator="uniform", search_space="lora_all", budget=limit)
