"""Adapters that PEFT made are the same function here: uniform, patterns, rsLoRA, AdaLoRA; and our own exports."""

import copy
import json
import logging

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import heterolora
from heterolora.backbone import Backbone, fingerprint
from heterolora.errors import SettingError
from heterolora.export import export_peft
from heterolora.peft_in import from_peft
from tests.architectures import make_backbone, make_batch
from tests.conftest import randomise
from tests.test_export import BOUND, NAMED, answer, gap, lost_head, trained

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated"),  # PEFT's use of transformers
]


def backbone_of(name, dtype=torch.float32, model=None, layout=None):
    """A tiny model as ``Pretrained.load`` gives one."""
    model = model if model is not None else make_backbone(name, dtype=dtype)
    inside = {id(p) for p in model.base_model.parameters()}
    head = tuple(n for n, p in model.named_parameters() if id(p) not in inside)
    drawn = tuple(n for n in head if model.get_parameter(n).dim() > 1)
    return Backbone(model, None, head, fingerprint(model, list(head)), layout, False, drawn)


TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "key"],
    "opt_pre": ["q_proj", "fc1"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["v_proj", "up_proj"],
    "gemma": ["o_proj", "gate_proj"],
}

KINDS = {
    "uniform": {"r": 4, "lora_alpha": 8},
    "thirds": {"r": 3, "lora_alpha": 8},
    "rslora": {"r": 3, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {r".*\.1\..*": 5},
        "alpha_pattern": {r".*\.2\..*": 3, r".*\.1\..*": 10},
        "use_rslora": True,
    },
}


def theirs(name, dtype, folder, **options):
    """An adapter that PEFT made on the tiny model, all its factors and its head random, saved to a folder."""
    base = make_backbone(name, dtype=dtype)
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", init_lora_weights=False,
        **options,
    )  # fmt: skip
    model = get_peft_model(base, config)
    return save_random(model, folder)


def save_random(model, folder):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
                parameter.copy_(noise.to(parameter.dtype))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize("architecture", NAMED)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_gives_equal_logits_here(architecture, dtype, kind, tmp_path):
    model = theirs(architecture, dtype, tmp_path, **KINDS[kind])
    ours = from_peft(backbone_of(architecture, dtype), tmp_path)
    batch = make_batch(ours.backbone)
    expected = answer(model, batch)
    assert gap(answer(ours, batch), expected) < BOUND[dtype]
    if kind == "uniform":  # a scale of 2: to the bit
        assert torch.equal(answer(ours, batch), expected)
    held = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert ours.held_parameters == held
    assert gap(answer(ours, batch), answer(lost_head(architecture, dtype, ()), batch)) > 1e-2


@pytest.mark.filterwarnings("ignore:Adapter .default.. . LoRA tensor.s. have invalid shape")  # PEFT, of rank 0
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_adaloras_final_ranks(architecture, dtype, tmp_path):
    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS[architecture], init_r=6, target_r=3, tinit=0, tfinal=1, deltaT=1,
        total_step=4, lora_alpha=12,
    )  # fmt: skip
    model = get_peft_model(make_backbone(architecture, dtype=dtype), config)
    batch = make_batch(model.get_base_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    for step in range(4):
        model.zero_grad()
        torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        ).backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = from_peft(backbone_of(architecture, dtype), tmp_path)
    ranks = [rank for rank in ours.ranks.values() if rank]
    assert len(set(ranks)) > 1, "the test is to see different ranks"
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(ranks) == sorted(rank for rank in map(sum, kept.values()) if rank)
    assert gap(answer(ours, batch), answer(model.eval(), batch)) < BOUND[dtype]


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "albert_groups", "t5_gated"])
def test_our_export_comes_back_with_its_shortcuts(architecture, tmp_path):
    model = trained(architecture, include=("lora", "shortcut"), scaling="alpha_over_r", scale=3.0)
    batch = make_batch(model.backbone)
    for fold in (True, False):
        export_peft(model, tmp_path / str(fold), lambda m: answer(m, batch), fold_scale=fold)
        again = from_peft(backbone_of(architecture), tmp_path / str(fold))
        assert gap(answer(again, batch), answer(model, batch)) < 1e-5
        assert {n: r for n, r in again.ranks.items() if r} == {n: r for n, r in model.ranks.items() if r}


def test_an_export_of_shortcuts_alone_comes_back(tmp_path):
    model = trained("bert", include=("shortcut",))
    batch = make_batch(model.backbone)
    export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    assert torch.equal(answer(from_peft(backbone_of("bert"), tmp_path / "peft"), batch), answer(model, batch))


def test_an_adapter_can_be_trained_on(tmp_path):
    theirs("bert", torch.float32, tmp_path, **KINDS["uniform"])
    model = from_peft(backbone_of("bert"), tmp_path)
    batch = make_batch(model.backbone)
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )
    loss.backward()
    trainable = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("adapters" in name for name in trainable) == 2 * len(model.held)


# -- what is refused -------------------------------------------------------------------------------------------------


def exported(tmp_path):
    model = trained("bert", include=("lora", "shortcut"))
    batch = make_batch(model.backbone)
    export_peft(model, tmp_path / "peft", lambda m: answer(m, batch), fold_scale=True)
    return tmp_path / "peft"


def test_a_base_with_other_weights_is_refused(tmp_path):
    folder = exported(tmp_path)
    other = make_backbone("bert", dtype=torch.float32)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[0, 0] += 1
    with pytest.raises(SettingError, match="other backbone weights"):
        from_peft(backbone_of("bert", model=other), folder)


def test_a_foreign_adapter_for_another_architecture_or_width_is_refused(tmp_path):
    theirs("bert", torch.float32, tmp_path, **KINDS["uniform"])
    with pytest.raises(SettingError, match="are no sites of this backbone and search space") as error:
        from_peft(backbone_of("llama"), tmp_path)
    assert "\n" not in str(error.value)
    config = copy.deepcopy(make_backbone("bert").config)
    config.hidden_size, config.num_attention_heads = 48, 4
    wide = type(make_backbone("bert"))(config)
    with pytest.raises(SettingError, match="it maps 32 features to 32, the site has 48 and 48"):
        from_peft(backbone_of("bert", model=wide), tmp_path)


def test_another_number_of_classes_is_refused(tmp_path):
    theirs("bert", torch.float32, tmp_path, **KINDS["uniform"])
    config = copy.deepcopy(make_backbone("bert").config)
    config.num_labels = 5
    with pytest.raises(SettingError, match=r"its head classifier\.\w+ is \(3,.*another number of classes"):
        from_peft(backbone_of("bert", model=type(make_backbone("bert"))(config)), tmp_path)


def test_modules_outside_the_search_space_are_refused(tmp_path):
    from heterolora.space import SearchSpace, survey

    theirs("bert", torch.float32, tmp_path, **KINDS["uniform"])
    backbone = backbone_of("bert")
    space = SearchSpace(["q"], [], None, [], False, "kind").resolve(survey(backbone.model))
    with pytest.raises(SettingError, match="are no sites of this backbone and search space"):
        from_peft(backbone, tmp_path, space)


def test_what_was_stored_whole_but_is_no_head_is_refused(tmp_path):
    theirs("bert", torch.float32, tmp_path, **KINDS["uniform"])
    state = load_file(tmp_path / "adapter_model.safetensors")
    state["base_model.model.bert.embeddings.word_embeddings.weight"] = torch.zeros(61, 32)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SettingError, match=r"stores \['bert\.embeddings.*no part of this backbone's head"):
        from_peft(backbone_of("bert"), tmp_path)


def test_a_lost_head_is_said(tmp_path, caplog):
    model = get_peft_model(make_backbone("bert", dtype=torch.float32), LoraConfig(r=2, target_modules=["query"]))
    save_random(model, tmp_path)
    with caplog.at_level(logging.WARNING):
        from_peft(backbone_of("bert"), tmp_path)
    assert "holds no classifier.weight: what was drawn from the seed stays" in caplog.text


DAMAGES = {
    "torn": lambda folder: (folder / "heterolora.json").write_text("{"),
    "another format": lambda folder: edit(folder, format=9),
    "other scales": lambda folder: edit(folder, scales={"0.residual_attn": "x"}),
    "a shortcut that is not there": lambda folder: edit(folder, scales={"7.residual_attn": 1.0}),
    "a shortcut too few": lambda folder: edit(folder, scales={}),
    "torn shortcuts": lambda folder: (folder / "shortcuts.safetensors").write_bytes(b"x"),
    "shortcuts of another": lambda folder: save_file({}, folder / "shortcuts.safetensors", {"backbone": "another"}),
}


def edit(folder, **changes):
    path = folder / "heterolora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_of_ours_are_refused_in_one_line(damage, tmp_path):
    folder = exported(tmp_path)
    damage(folder)
    with pytest.raises(SettingError) as error:
        from_peft(backbone_of("bert"), folder)
    assert "\n" not in str(error.value)


# -- of a run --------------------------------------------------------------------------------------------------------


def test_a_runs_export_is_loaded_from_its_folder_alone(tmp_path):
    from tests.jobs import run_job

    run_job(tmp_path / "a", "export.peft=true", "trainer.max_steps=3", "optimizer.lr=3e-2")
    (tmp_path / "a" / "peft").rename(tmp_path / "moved")
    whole, again = heterolora.load_run(tmp_path / "a"), heterolora.load(tmp_path / "moved")
    assert {whole.model.space[name].kind for name in whole.model.held} == {"lora", "shortcut"}
    batch = {"input_ids": torch.arange(3, 23).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    assert gap(answer(again, batch), answer(whole.model, batch)) < 1e-6
    edit(tmp_path / "moved", model=None)
    with pytest.raises(SettingError, match="names no backbone"):
        heterolora.load(tmp_path / "moved")


def test_peft_loads_what_peft_saved_of_what_we_exported(tmp_path):
    """There and back through PEFT's own writer, which sorts keys and names modules as it likes."""
    model = trained("bert", scaling="alpha_over_r", scale=3.0)
    randomise(model, seed=4)
    batch = make_batch(model.backbone)
    export_peft(model, tmp_path / "ours", lambda m: answer(m, batch), fold_scale=False)
    loaded = PeftModel.from_pretrained(lost_head("bert", torch.float32, model.head), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = from_peft(backbone_of("bert"), tmp_path / "theirs")
    assert gap(answer(again, batch), answer(model, batch)) < 1e-5


# -- as an allocation, and as a start --------------------------------------------------------------------------------


def lora_of_tiny_bert(folder, **options):
    """An adapter that PEFT trained on the model of ``model=tiny_bert``."""
    from heterolora.run import compose

    base = compose(["model=tiny_bert"])["model"].load(2, 0).model
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False, **options)
    return save_random(get_peft_model(base, config), folder)


RANKS = {"r": 2, "lora_alpha": 6, "rank_pattern": {r".*\.1\..*value": 4}}


def test_ranks_of_a_peft_adapter_are_an_allocation(tmp_path):
    from tests.jobs import run_job

    lora_of_tiny_bert(tmp_path / "peft", **RANKS)
    for number, path in enumerate((tmp_path / "peft", tmp_path / "peft" / "adapter_config.json")):
        run_job(tmp_path / str(number), "allocator=fixed", f"allocator.path={path}", "trainer.max_steps=1")
        ranks = json.loads((tmp_path / str(number) / "allocation.json").read_text())["ranks"]
        assert {name: rank for name, rank in ranks.items() if rank} == {"0.q": 2, "0.v": 2, "1.q": 2, "1.v": 4}


def test_ranks_of_our_export_are_an_allocation_shortcuts_included(tmp_path):
    from tests.jobs import run_job

    run_job(tmp_path / "a", "export.peft=true", "trainer.max_steps=1")
    run_job(tmp_path / "b", "allocator=fixed", f"allocator.path={tmp_path}/a/peft", "trainer.max_steps=1")
    ranks = [json.loads((tmp_path / run / "allocation.json").read_text())["ranks"] for run in "ab"]
    assert ranks[0] == ranks[1]


def test_training_starts_from_an_adapter_of_peft(tmp_path):
    """With a learning rate of next to nothing, the run ends where PEFT's adapter is."""
    from tests.jobs import run_job

    peft = lora_of_tiny_bert(tmp_path / "peft", **RANKS)
    still = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.max_steps=2", "trainer.test=false"]
    given = ["allocator=fixed", f"allocator.path={tmp_path}/peft", f"start_from={tmp_path}/peft"]
    run_job(tmp_path / "a", *given, *still)
    loaded = heterolora.load_run(tmp_path / "a")
    batch = {"input_ids": torch.arange(3, 23).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    assert gap(answer(loaded.model, batch), answer(peft, batch)) < 1e-5
    assert {factor.scale for factor in loaded.model.adapters.values()} == {2.0}, "the run's own, as its config says"


def test_a_start_that_does_not_fit_is_refused_in_one_line(tmp_path):
    from heterolora.run import RunFailed
    from tests.jobs import run_job

    lora_of_tiny_bert(tmp_path / "peft", **RANKS)
    fixed = ["allocator=fixed", f"allocator.path={tmp_path}/peft"]
    for name, overrides, message in (
        ("a", [f"start_from={tmp_path}/peft"], r"other ranks than were allocated at .*; add allocator=fixed"),
        ("b", ["start_from=nowhere"], "start_from=nowhere: null, or the folder of a PEFT adapter"),
        ("c", [*fixed, "budget=params", "budget.value=100"], "costs 640 parameters, the budget is 100"),
        ("d", [*fixed, "search_space=shortcuts", "budget=params", "budget.value=5000"], "no sites of this search"),
    ):
        with pytest.raises(RunFailed, match=message) as error:
            run_job(tmp_path / name, *overrides)
        assert "\n" not in str(error.value)


def test_no_start_changes_no_hash_and_a_start_does():
    from heterolora.parts import config_hash
    from heterolora.results import method_hash

    config = {"seed": 0, "data": {"cache_dir": None}}
    for hashed in (config_hash, method_hash):
        assert hashed(config) == hashed(config | {"start_from": None}) != hashed(config | {"start_from": "a"})
