"""Several adapters on one backbone: single calls of adapted models and of PEFT are what everything is compared with."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import heterolora
from heterolora.adapters.lora import LoRA
from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.several import Several
from heterolora.shipped import option
from heterolora.space import SearchSpace, survey
from tests.architectures import SINGLE, make_backbone, make_batch, shown
from tests.conftest import adapt, randomise
from tests.jobs import run_job

MODELS = ("bert", "opt_pre", "opt_post", "llama", "gpt2", "gpt_neox", "t5_gated", "bloom", "albert_groups", "roberta")


def head_of(model):
    inside = {id(p) for p in model.base_model.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in inside]


def adapter_on(name, seed, ranks, include=("lora", "shortcut"), spans=(1, 2), scale=2.0, dtype=torch.float64):
    """An adapted model on a copy of the backbone, with random factors and a random head."""
    model = make_backbone(name, dtype=dtype)
    space = SearchSpace(list(include), [], None, list(spans), False, "kind").resolve(survey(model))
    adapted = AdaptedModel(model, space, LoRA("constant", scale, 0.0), head_of(model)).eval()
    every = [site.name for site in space.sites]
    adapted.enable({site: ranks[at % len(ranks)] for at, site in enumerate(every)}, 0)
    randomise(adapted, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in adapted.head_parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return adapted


def two(name, dtype=torch.float64):
    """Adapters of unequal ranks, scales and sites, and both on one backbone."""
    models = {
        "a": adapter_on(name, 1, (3, 0, 1), scale=2.0, dtype=dtype),
        "b": adapter_on(name, 2, (0, 2, 4, 5), include=("lora",), scale=0.5, dtype=dtype),
    }
    several = Several(make_backbone(name, dtype=dtype))
    for key, model in models.items():
        several.add(key, model)
    return models, several


def answer(model, batch, **more):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **more).logits


@pytest.mark.parametrize("name", shown(MODELS, ("bert", "opt_pre", "t5_gated")))
def test_each_answers_as_it_did_alone_to_the_bit_and_there_and_back_again(name):
    models, several = two(name)
    batch = make_batch(several.backbone)
    alone = answer(make_backbone(name), batch)
    assert several.names == ["a", "b"]
    assert several.used is None
    assert torch.equal(answer(several, batch), alone)
    for key in ("a", "b", "a", "b"):
        several.use(key)
        assert several.used == key
        assert torch.equal(answer(several, batch), answer(models[key], batch))
    several.use(None)
    assert torch.equal(answer(several, batch), alone)
    assert not torch.equal(answer(models["a"], batch), answer(models["b"], batch))


@pytest.mark.parametrize("name", shown(MODELS, ("bert", "opt_pre", "t5_gated")))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_mixed_batch_equals_single_calls_sample_by_sample(name, dtype):
    models, several = two(name, dtype)
    batch = make_batch(several.backbone)
    names = ["a", None, "b", "a"]
    several.use("b")
    before = answer(several, batch)
    got = answer(several, batch, adapters=names)
    alone = make_backbone(name, dtype=dtype)
    for row, key in enumerate(names):
        single = {key_: value[row : row + 1] for key_, value in batch.items()}
        expected = answer(models[key] if key else alone, single)[0]
        bound = 2e-5 if dtype == torch.float32 or name in SINGLE else 1e-12
        assert (got[row] - expected).abs().max() <= bound * max(1, expected.abs().max())
    assert torch.equal(answer(several, batch), before)
    again = answer(several, batch, adapters=names)
    assert torch.equal(got, again)


def test_a_language_model_and_prompts_of_one_token():
    model = make_backbone("gpt2", auto=AutoModelForCausalLM)
    several = Several(model)
    sources = {}
    for seed, key in enumerate("ab"):
        other = make_backbone("gpt2", auto=AutoModelForCausalLM)
        space = SearchSpace(["lora"], [], None, [1], False, "kind").resolve(survey(other))
        sources[key] = AdaptedModel(other, space, LoRA("constant", 1.0, 0.0)).eval()
        sources[key].enable({"0.qkv": 2, "1.down": 1 + seed}, 0)
        randomise(sources[key], seed)
        several.add(key, sources[key])
    ids = torch.tensor([[3], [4], [5]])
    got = several(ids, adapters=["b", None, "a"]).logits
    for row, one in enumerate((sources["b"], make_backbone("gpt2", auto=AutoModelForCausalLM), sources["a"])):
        assert torch.allclose(got[row], one(ids[row : row + 1]).logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["dora", "lora_xs", "vera", "svd", "prolora", "tied_lora"])
def test_other_families(family):
    def adapted():
        model = make_backbone("bert")
        space = SearchSpace([{"kind": "lora", "role": ["q", "v"]}], [], None, [1], False, "kind").resolve(survey(model))
        made = AdaptedModel(model, space, build(option("adapter", family), "adapter"), head_of(model)).eval()
        made.enable(dict.fromkeys((site.name for site in space.sites), 2), 0)
        return made

    source, lora = adapted(), adapter_on("bert", 3, (2,))
    randomise(source, 4)
    several = Several(make_backbone("bert"))
    several.add("one", source)
    several.add("lora", lora)
    batch = make_batch(several.backbone)
    several.use("one")
    assert torch.equal(answer(several, batch), answer(source, batch))
    got = answer(several, batch, adapters=["one", "lora", "one", None])
    assert torch.allclose(got[[0, 2]], answer(source, batch)[[0, 2]], rtol=0, atol=1e-12)
    assert torch.allclose(got[1], answer(lora, batch)[1], rtol=0, atol=1e-12)
    assert torch.allclose(got[3], answer(make_backbone("bert"), batch)[3], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")
def test_folders_of_peft_answer_as_peft(tmp_path):
    theirs = {}
    for seed, rank in enumerate((2, 5)):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "output.dense"], r=rank, lora_alpha=3,
                            init_lora_weights=False)  # fmt: skip
        model = get_peft_model(make_backbone("bert", dtype=torch.float32), config).eval()
        model.save_pretrained(tmp_path / str(rank))
        theirs[str(rank)] = model
    several = Several(make_backbone("bert", dtype=torch.float32))
    batch = make_batch(several.backbone)
    for name in theirs:
        several.add(name, tmp_path / name)
    got = answer(several, batch, adapters=["5", "2", "2", "5"])
    for row, name in enumerate(("5", "2", "2", "5")):
        assert torch.allclose(got[row], answer(theirs[name], batch)[row], rtol=0, atol=1e-5)


def test_trained_in_use_without_touching_the_others():
    models, several = two("bert")
    batch = make_batch(several.backbone)
    several.use("a")
    several.train()
    optimizer = torch.optim.SGD([p for p in several.parameters() if p.requires_grad], lr=0.1)
    several(**batch).loss.backward()
    optimizer.step()
    several.eval()
    assert not torch.equal(answer(several, batch), answer(models["a"], batch))
    several.use("b")
    assert torch.equal(answer(several, batch), answer(models["b"], batch))
    several.use(None)
    assert torch.equal(answer(several, batch), answer(make_backbone("bert"), batch))


def test_removed():
    models, several = two("bert")
    batch = make_batch(several.backbone)
    answer(several, batch, adapters=["a", "b", "a", None])
    several.use("a")
    several.remove("a")
    assert several.names == ["b"]
    assert torch.equal(answer(several, batch), answer(make_backbone("bert"), batch))
    several.use("b")
    assert torch.equal(answer(several, batch), answer(models["b"], batch))
    several.remove("b")
    assert not [hook for module in several.backbone.modules() for hook in module._forward_hooks.values()]
    several.add("a", models["a"])
    several.use("a")
    assert torch.equal(answer(several, batch), answer(models["a"], batch))


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    models, several = two("bert")
    batch = make_batch(several.backbone)
    other = adapt(make_backbone("bert"))
    with torch.no_grad():
        next(other.backbone.parameters()).add_(1)
    for call, message in (
        (lambda: several.use("c"), r"no adapter of this name; there are \['a', 'b'\]"),
        (lambda: several.remove("c"), "no adapter of this name"),
        (lambda: several.add("a", models["a"]), "is taken"),
        (lambda: several.add("", models["a"]), "is empty"),
        (lambda: several.add("c", other), "other backbone weights"),
        (lambda: several.add("c", tmp_path), "no folder of a finished run"),
        (lambda: several(**batch, adapters=["a"]), "the batch has 4 samples"),
        (lambda: several(**batch, adapters=["a", "x", "a", "a"]), "no adapter of this name"),
        (lambda: several(attention_mask=batch["attention_mask"], adapters=["a"]), "without input_ids"),
        (lambda: Several(models["a"]), "has adapters attached"),
        (lambda: Several(models["a"].backbone), "has adapters attached"),
        (lambda: several.train()(**batch, adapters=["a"] * 4), "in training mode"),
    ):
        with pytest.raises(SettingError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert several.names == ["a", "b"]


def test_what_samples_share_is_refused():
    """deberta sends its table of relative positions through q and k; albert's are fine."""
    models, several = two("deberta_v2")
    batch = make_batch(several.backbone)
    several.use("a")
    assert torch.equal(answer(several, batch), answer(models["a"], batch))
    with pytest.raises(SettingError, match="which is no row for each sample"):
        answer(several, batch, adapters=["a", "b", "a", "b"])
    assert torch.equal(answer(several, batch), answer(models["a"], batch))


def test_heads_of_unequal_shapes_are_used_one_after_the_other():
    backbone = make_backbone("bert")
    backbone.classifier = torch.nn.Linear(32, 5, dtype=torch.float64)
    space = SearchSpace(["lora"], [], None, [1], False, "kind").resolve(survey(backbone))
    five = AdaptedModel(backbone, space, LoRA("constant", 1.0, 0.0), head_of(backbone)).eval()
    five.enable({"0.q": 2}, 0)
    models, several = two("bert")
    several.add("five", five)
    batch = make_batch(several.backbone)
    for name in ("five", "a", "five"):
        several.use(name)
        assert torch.equal(answer(several, batch), answer((models | {"five": five})[name], batch))
    for names in (["five", "a", "a", "a"], ["five", "five", "five", None]):
        with pytest.raises(SettingError, match="heads of unequal shapes"):
            answer(several, batch, adapters=names)
    assert torch.equal(answer(several, batch, adapters=["five"] * 4), answer(five, batch))
    assert torch.equal(answer(several, batch), answer(five, batch))


def test_renorm_is_refused_in_a_mixed_batch_alone():
    source = adapt(make_backbone("opt_pre"), renorm=True)
    source.enable({"1.shortcut_attn": 2}, 0)
    randomise(source)
    several = Several(make_backbone("opt_pre"))
    several.add("a", source)
    several.use("a")
    batch = make_batch(several.backbone)
    assert torch.equal(answer(several, batch), answer(source, batch))
    with pytest.raises(SettingError, match="renorm"):
        answer(several, batch, adapters=["a"] * 4)


def test_what_is_switched_off_stays_off():
    source = adapter_on("bert", 1, (2,))
    source.switch_off(source.held[:5])
    several = Several(make_backbone("bert"))
    several.add("a", source)
    several.use("a")
    batch = make_batch(several.backbone)
    assert torch.equal(answer(several, batch), answer(source, batch))
    got = answer(several, batch, adapters=["a"] * 4)
    assert torch.allclose(got, answer(source, batch), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_runs_and_their_exports(tmp_path):
    for seed, space in enumerate(("full", "lora_qv")):
        run_job(tmp_path / space, f"search_space={space}", "trainer.max_steps=3", "optimizer.lr=3e-2", f"seed={seed}",
                "export.peft=true")  # fmt: skip
    several = heterolora.Several.load({"full": tmp_path / "full", "qv": tmp_path / "lora_qv"})
    several.add("exported", tmp_path / "full" / "peft")
    batch = make_batch(several.backbone)
    runs = {"full": heterolora.load(tmp_path / "full"), "qv": heterolora.load(tmp_path / "lora_qv")}
    for name, run in runs.items():
        several.use(name)
        assert torch.equal(answer(several, batch), answer(run, batch))
    got = answer(several, batch, adapters=["full", "qv", "exported", "qv"])
    for row, name in enumerate(("full", "qv", "full", "qv")):
        assert torch.allclose(got[row], answer(runs[name], batch)[row], rtol=0, atol=1e-5)
    exported = heterolora.Several.load({"one": tmp_path / "full" / "peft"})
    exported.use("one")
    assert torch.allclose(answer(exported, batch), answer(runs["full"], batch), rtol=0, atol=1e-5)
