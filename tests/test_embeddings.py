"""The word embedding as a LoRA site: tables worked out by hand, one-hot vectors, and PEFT are the oracles."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import heterolora
from heterolora.adapters.base import plain_factors
from heterolora.adapters.lora import LoRA
from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.export import export_peft
from heterolora.linear import frozen_weight, outer, reads
from heterolora.merge import merge
from heterolora.model import AdaptedModel
from heterolora.peft_in import from_peft
from heterolora.run import RunFailed
from heterolora.scoring import score
from heterolora.several import Several
from heterolora.shipped import default, option, options
from heterolora.space import SearchSpace, survey
from tests.architectures import ARCHITECTURES, make_backbone, make_batch, shown
from tests.conftest import randomise
from tests.jobs import run_job
from tests.surroundings import ALONE
from tests.test_peft_in import backbone_of
from tests.test_several import adapter_on, answer, head_of

WITH = sorted(name for name in ARCHITECTURES if not name.startswith("gemma"))
QUICK = ("bert", "opt_pre", "llama", "gpt2", "t5")
RULE = [{"kind": "lora", "role": ["embed"]}]


def word_site(model):
    """The word embedding; of t5, the encoder's."""
    return next(site for site in model.space.sites if site.lookup)


def of_words(name="bert", include=(*RULE, "lora"), scale=2.0, ranks=None, **more):
    model = make_backbone(name, **more)
    space = SearchSpace(list(include), [], None, [1], False, "kind").resolve(survey(model))
    adapted = AdaptedModel(model, space, LoRA("constant", scale, 0.0), head_of(model)).eval()
    adapted.enable(ranks or {word_site(adapted).name: 3}, 0)
    return adapted


# -- the search space ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_off_unless_a_rule_names_the_role(name):
    found = survey(make_backbone(name))
    for include in (["lora"], [{"kind": "lora"}], [{"layer": 0}], [{"kind": "lora", "layer": [0]}], ["q", "qkv"]):
        if include[0] in ("q", "qkv") and not all(any(role in s.roles for s in found.lora_sites) for role in include):
            continue
        space = SearchSpace(include, [], None, [1, 2], False, "kind").resolve(found)
        assert not [site for site in space.sites if site.lookup]
    everything = SearchSpace(["lora"], [], None, [1, 2], False, "kind").resolve(found)
    assert everything.sites == found.lora_sites


@pytest.mark.parametrize(
    "preset", [name for name in options("search_space") if name not in ("lora_embeddings", "lora_everything")]
)
def test_presets_are_what_they_were(preset):
    space = build(option("search_space", preset), "search_space").resolve(survey(make_backbone("bert")))
    assert "embed" not in {site.role for site in space.sites}


@pytest.mark.parametrize("name", WITH)
def test_the_site(name):
    model = make_backbone(name)
    space = SearchSpace(RULE, [], None, [1], False, "kind").resolve(survey(model))
    site, table = space.sites[0], model.get_input_embeddings().weight
    assert [site.name for site in space.sites] == (
        ["encoder.0.embed", "decoder.0.embed"] if name.startswith("t5") else ["0.embed"]
    )
    assert (site.in_features, site.out_features) == tuple(table.shape)
    assert (site.kind, site.role, site.layer) == ("lora", "embed", 0)
    assert LoRA("constant", 1.0, 0.0).cost([site])({site.name: 3}) == 3 * (61 + table.shape[1])
    both = SearchSpace(["lora", "embed"], [], None, [1], False, "kind").resolve(survey(model))
    names = {one.name for one in (*space.sites, *survey(model).lora_sites)}
    assert {site.name for site in both.sites} == names
    without = SearchSpace(["lora", "embed"], ["lora"], None, [1], False, "kind")
    with pytest.raises(SettingError, match="no site is left"):
        without.resolve(survey(model))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_scaled_embeddings_are_no_sites(name):
    with pytest.raises(SettingError, match="matches no site"):
        SearchSpace(RULE, [], None, [1], False, "kind").resolve(survey(make_backbone(name)))


def test_a_tied_output_layer_is_said_once(caplog):
    model = make_backbone("gpt2", auto=AutoModelForCausalLM)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with caplog.at_level(logging.WARNING):
        SearchSpace(RULE, [], None, [1], False, "kind").resolve(survey(model))
    (record,) = caplog.records
    assert "0.embed is the table of the output layer lm_head, too" in record.getMessage()


# -- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shown(WITH, QUICK))
def test_nothing_changes_at_step_0_and_a_trained_delta_is_that_of_a_changed_table(name):
    adapted, batch = of_words(name), make_batch(make_backbone(name))
    plain = make_backbone(name)
    assert torch.equal(answer(adapted, batch), answer(plain, batch))
    randomise(adapted)
    site = word_site(adapted)
    adapter = adapted.adapter(site.name)
    table = plain.get_submodule(site.sink.module)
    with torch.no_grad():  # a table of its own, where others have the same
        table.weight = nn.Parameter(table.weight + 2.0 * (adapter.B @ adapter.A).T)
    expected = answer(plain, batch)
    bound = 1e-12 if name in ("bert", "opt_pre", "gpt2") else 1e-5
    assert (answer(adapted, batch) - expected).abs().max() <= bound * expected.abs().max()
    assert (expected - answer(make_backbone(name), batch)).abs().max() > 1e-3


@pytest.mark.parametrize("name", shown(WITH, QUICK))
def test_gradients_are_those_of_the_table(name):
    adapted, batch = of_words(name), make_batch(make_backbone(name))
    randomise(adapted)
    adapted(**batch).loss.backward()
    adapter = adapted.adapter(word_site(adapted).name)
    plain = make_backbone(name)
    down, up = (value.detach().clone().requires_grad_() for value in (adapter.A, adapter.B))
    path = f"{word_site(adapted).sink.module}.weight"
    weights = {path: plain.get_parameter(path).detach() + 2.0 * (up @ down).T}
    torch.func.functional_call(plain, weights, (), batch, tie_weights=False).loss.backward()
    for got, expected in ((adapter.A.grad, down.grad), (adapter.B.grad, up.grad)):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-12


@pytest.mark.parametrize("family", ["lora", "svd", "lora_xs", "vera", "tied_lora", "prolora"])
def test_families_of_factors_take_ids_as_the_unit_vectors_they_stand_for(family):
    model = make_backbone("bert")
    space = SearchSpace(RULE, [], None, [1], False, "kind").resolve(survey(model))
    adapted = AdaptedModel(model, space, build(option("adapter", family), "adapter"), head_of(model)).eval()
    adapted.enable({"0.embed": 2}, 0)
    randomise(adapted)
    adapter = adapted.adapter("0.embed")
    ids = make_batch(model)["input_ids"]
    vectors = functional.one_hot(ids, 61).double()
    got = adapter(ids)
    assert torch.allclose(got, adapter(vectors), rtol=0, atol=1e-13)
    assert got.any()


def test_dropout_drops_whole_ids_as_it_would_drop_entries_of_unit_vectors():
    adapter = of_words().adapter("0.embed")
    adapter.dropout = 0.25
    with torch.no_grad():
        adapter.B.normal_()
    adapter.train()
    ids = torch.randint(0, 61, (20000,))
    with torch.no_grad():
        delta, whole = adapter(ids), adapter.eval()(ids)
    kept = delta.abs().sum(1) > 0
    assert torch.allclose(delta[kept], whole[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 4 * (0.25 * 0.75 / 20000) ** 0.5


def test_dora_is_refused():
    model = make_backbone("bert")
    space = SearchSpace(RULE, [], None, [1], False, "kind").resolve(survey(model))
    adapted = AdaptedModel(model, space, build(option("adapter", "dora"), "adapter"), head_of(model))
    with pytest.raises(SettingError, match=r"0\.embed reads ids"):
        adapted.enable({"0.embed": 2}, 0)


def test_products_with_ids_are_products_with_unit_vectors():
    ids, weight, left = torch.randint(0, 7, (11,)), torch.randn(3, 7).double(), torch.randn(11, 4).double()
    vectors = functional.one_hot(ids, 7).double()
    assert torch.equal(reads(ids, weight), vectors @ weight.T)
    assert torch.allclose(outer(left, ids, 7), left.T @ vectors, rtol=0, atol=1e-14)
    table = nn.Embedding(7, 3)
    assert torch.equal(frozen_weight(table) @ torch.eye(7), table.weight.T)


# -- proxies ---------------------------------------------------------------------------------------------------------


def scores_of(adapted, proxies, **probe):
    batches = [make_batch(adapted.backbone, seed=seed) for seed in range(3)]
    settings = build(default("probe") | {"batches": 3, "head_warmup_steps": 0} | probe, "probe")
    return {
        name: score(adapted, lambda model, batch: model(**batch).loss, batches, batches,
                    proxy=build(option("proxy", name), "proxy"), probe=settings, seed=0, proxy_name=name)
        for name in proxies
    }  # fmt: skip


@pytest.mark.parametrize("live", [False, True])
def test_first_order_scores_are_those_of_autograd(live):
    adapted = of_words()
    site = word_site(adapted)
    found = scores_of(
        adapted, ["grad_norm", "snip", "fisher", "grasp", "gora", "spectral", "magnitude", "random"], live=live
    )
    assert all(site.name in values for values in found.values())
    # The same by autograd, through the probe's factors put into the table of a plain model.
    plain = make_backbone("bert")
    probe = adapted.probes(default("probe")["rank"], default("probe")["std"], 0)
    down, up = (value.detach().clone().requires_grad_() for value in plain_factors(probe[site.name]))
    own = plain.bert.embeddings.word_embeddings.weight.detach()
    if live:
        return  # all other sites are live, too: that they agree is tested in test_proxies; here it must only run
    table = own.clone().requires_grad_()
    gradients, g_down, g_up, squares = torch.zeros_like(own), 0, 0, 0
    for seed in range(3):
        batch = make_batch(plain, seed=seed)
        loss = torch.func.functional_call(plain, {"bert.embeddings.word_embeddings.weight": table}, (), batch).loss
        (g,) = torch.autograd.grad(loss, table)
        gradients += g / 3
        of_down, of_up = 2.0 * up.T @ g.T, 2.0 * g.T @ down.T
        g_down, g_up = g_down + of_down / 3, g_up + of_up / 3
        squares += (of_down.square().sum() + of_up.square().sum()) / 3
    expected = {
        "grad_norm": g_down.norm() + g_up.norm(),
        "snip": (down * g_down).abs().sum() + (up * g_up).abs().sum(),
        "fisher": squares,
        "gora": (own * gradients).abs().mean(),
        "magnitude": own.square().mean().sqrt(),
    }
    for name, value in expected.items():
        assert found[name][site.name] == pytest.approx(value.item(), rel=1e-6), name
    values = torch.linalg.svdvals(gradients).square()
    assert found["spectral"][site.name][:5] == pytest.approx(values[:5].tolist(), rel=1e-6)


def test_grasp_is_the_second_derivative():
    adapted = of_words(include=RULE)
    found = scores_of(adapted, ["grasp"])["grasp"]["0.embed"]
    plain = make_backbone("bert")
    probe = adapted.probes(default("probe")["rank"], default("probe")["std"], 0)["0.embed"]
    down, up = plain_factors(probe)
    own = plain.bert.embeddings.word_embeddings.weight.detach()

    def loss(a, b):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        table = own + 2.0 * (b @ a - up @ down).T
        with sdpa_kernel(SDPBackend.MATH):
            return sum(
                torch.func.functional_call(plain, {"bert.embeddings.word_embeddings.weight": table}, (),
                                           make_batch(plain, seed=seed)).loss
                for seed in range(3)
            ) / 3  # fmt: skip

    a, b = down.clone().requires_grad_(), up.clone().requires_grad_()
    first = torch.autograd.grad(loss(a, b), (a, b), create_graph=True)
    along = sum((g * g.detach()).sum() for g in first)
    second = torch.autograd.grad(along, (a, b))
    expected = sum((theta * h).sum() for theta, h in zip((down, up), second, strict=True))
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("proxy", ["eva", "spectral_inputs", "spectral_both", "plop", "activation", "synflow"])
def test_what_needs_vectors_is_refused_in_one_line(proxy):
    with pytest.raises(SettingError, match="embed") as error:
        scores_of(of_words(), [proxy])
    assert "\n" not in str(error.value)


def test_no_vectors_as_long_as_the_vocabulary_are_made(monkeypatch):
    """Whatever has as many rows as there are tokens has not as many columns as there are ids."""
    from torch.utils._python_dispatch import TorchDispatchMode

    adapted, tokens, shapes = of_words(), 4 * 9, set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.add(tuple(out.shape))
            return out

    with Watch():
        scores_of(adapted, ["grad_norm", "snip", "fisher", "grasp", "gora", "spectral"])
    assert not [shape for shape in shapes if shape[-1:] == (61,) and torch.Size(shape[:-1]).numel() == tokens]
    assert (32, 61) in shapes


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "opt_pre", "llama", "gpt2"])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")
def test_an_export_is_loaded_by_peft_and_read_back(name, fold, tmp_path):
    adapted = of_words(name, dtype=torch.float32)
    first = next(site.name for site in adapted.space.sites if not site.lookup)
    adapted.enable({word_site(adapted).name: 3, first: 2}, 0)
    randomise(adapted)
    batch = make_batch(adapted.backbone)
    export_peft(adapted, tmp_path / "out", lambda model: answer(model, batch), fold_scale=fold)
    theirs = PeftModel.from_pretrained(make_backbone(name, dtype=torch.float32), tmp_path / "out").eval()
    expected = answer(adapted, batch)
    largest = expected.abs().max()
    assert (answer(theirs, batch) - expected).abs().max() <= 1e-5 * largest
    back = from_peft(backbone_of(name), tmp_path / "out")
    assert back.ranks == {**dict.fromkeys(back.ranks, 0), word_site(adapted).name: 3, first: 2}
    assert (answer(back, batch) - expected).abs().max() <= 1e-5 * largest


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("save", [True, False])
def test_what_peft_trained_at_an_embedding_answers_the_same_here(save, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["word_embeddings", "query"], r=3, lora_alpha=5,
                        init_lora_weights=False)  # fmt: skip
    theirs = get_peft_model(make_backbone("bert", dtype=torch.float32), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=save)
    ours = from_peft(backbone_of("bert"), tmp_path)
    batch = make_batch(ours.backbone)
    assert torch.allclose(answer(ours, batch), answer(theirs, batch), rtol=0, atol=1e-5)
    if save:
        other = make_backbone("bert", dtype=torch.float32)
        with torch.no_grad():
            other.bert.embeddings.word_embeddings.weight.add_(1)
        with pytest.raises(SettingError, match="another table"):
            from_peft(backbone_of("bert", model=other), tmp_path)


def test_a_mixed_batch_with_ids():
    models = {
        "words": of_words(),
        "both": of_words(ranks={"0.embed": 2, "1.q": 3}, scale=0.5),
        "lora": adapter_on("bert", 3, (2,)),
    }
    several = Several(make_backbone("bert"))
    for seed, (name, model) in enumerate(models.items()):
        randomise(model, seed)
        several.add(name, model)
    batch = make_batch(several.backbone)
    names = ["words", "both", None, "lora"]
    got = answer(several, batch, adapters=names)
    for row, name in enumerate(names):
        expected = answer(models[name] if name else make_backbone("bert"), batch)[row]
        assert torch.allclose(got[row], expected, rtol=0, atol=1e-11)


@pytest.mark.medium
@pytest.mark.parametrize("model", ["bert", "opt", "gpt2", "llama", "t5"])
def test_a_run_merges_and_loads(model, tmp_path):
    summary = run_job(tmp_path / "run", f"model=tiny_{model}", "search_space=lora_embeddings", "trainer.max_steps=3",
                      "optimizer.lr=3e-2", "budget=params", "budget.value=1000", "allocator=uniform",
                      "export.peft=true")  # fmt: skip
    loaded = heterolora.load_run(tmp_path / "run")
    rows, width = loaded.model.backbone.get_input_embeddings().weight.shape
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text())
    cost = (rows + width) * (2 if model == "t5" else 1)
    assert allocation["spent"] == 1000 // cost * cost > 0
    assert summary["export"]["folder"] == "peft"
    if model == "t5":
        with pytest.raises(SettingError, match="its weight is that of"):  # the two stacks' tables are one
            merge(loaded, tmp_path / "out")
        return
    merged = merge(loaded, tmp_path / "out")
    assert merged.folded == 1
    batch = {"input_ids": torch.randint(3, 200, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["input_ids"][:, -1] = 2
    plain = heterolora.load(tmp_path / "out")
    assert torch.allclose(answer(plain, batch), answer(loaded.model, batch), rtol=0, atol=1e-5)
    table = plain.backbone.get_input_embeddings().weight
    adapter = next(iter(loaded.model.adapters.values()))
    own = loaded.model.backbone.get_input_embeddings().weight
    assert torch.allclose(table, own + adapter.delta_weight().T, rtol=0, atol=1e-6)
    assert not torch.equal(table, own)


@pytest.mark.medium
@pytest.mark.parametrize("allocator", ["alora", "adalora", "gora", "para"])
def test_schedules_that_look_into_adapters_take_ids_too(allocator, tmp_path):
    everything = ["search_space=lora_everything", "budget=params", "budget.value=30000", "trainer.max_epochs=2"]
    summary = run_job(tmp_path / "run", *everything, f"allocator={allocator}")
    assert 0 < summary["parameters"]["held"] <= 30000


@pytest.mark.parametrize("family", ["lora", "prolora", "tied_lora"])
def test_factors_of_ids_are_as_large_as_those_of_vectors(family):
    """What A reads: for an id, and for a vector of independent entries of variance 1."""
    made = build(option("adapter", family), "adapter")
    sites = of_words().space.sites
    spread = {}
    for site in (next(site for site in sites if site.lookup), next(site for site in sites if not site.lookup)):
        source = torch.arange(site.in_features) if site.lookup else torch.randn(4000, site.in_features)
        read = [reads(source, plain_factors(made.build(site, 8, seed, ALONE))[0]) for seed in range(20)]
        spread[site.lookup] = float(torch.cat(read).std())
    assert spread[True] == pytest.approx(3**-0.5, rel=0.1)
    assert spread[False] == pytest.approx(3**-0.5, rel=0.1)


@pytest.mark.parametrize("lookup", [True, False])
def test_factors_of_another_make_are_refused(lookup, tmp_path):
    """PEFT leaves them out and says nothing."""
    adapted = of_words(dtype=torch.float32)
    words, first = word_site(adapted), next(site for site in adapted.space.sites if not site.lookup)
    adapted.enable({words.name: 3, first.name: 3}, 0)
    batch = make_batch(adapted.backbone)
    export_peft(adapted, tmp_path / "out", lambda model: answer(model, batch), fold_scale=True)
    path = tmp_path / "out" / "adapter_model.safetensors"
    given = load_file(path)
    kinds = ["lora_{}.weight", "lora_embedding_{}"]
    old, new = kinds if lookup else kinds[::-1]  # what is turned into what
    turned = {}
    for name, value in given.items():
        for factor in "AB":
            name = name.replace(old.format(factor), new.format(factor))
        turned[name] = value
    save_file(turned, path)
    with pytest.raises(SettingError, match=r"factors for|another table|are no sites of this backbone"):
        from_peft(backbone_of("bert"), tmp_path / "out")


@pytest.mark.parametrize(("name", "shared"), [("t5", True), ("bert", False)])
def test_the_card_says_where_a_merge_by_peft_would_change_more(name, shared, tmp_path, caplog):
    adapted = of_words(name, dtype=torch.float32)
    batch = make_batch(adapted.backbone)
    found = export_peft(adapted, tmp_path / "out", lambda model: answer(model, batch), fold_scale=True)
    assert bool(found.shared) == shared
    assert ("Do not merge with PEFT" in (tmp_path / "out" / "README.md").read_text()) == shared
    assert ("merge_and_unload would change" in caplog.text) == shared


def test_a_table_that_peft_stored_in_fewer_digits_is_the_same_one(tmp_path):
    adapted = of_words(dtype=torch.float32)
    batch = make_batch(adapted.backbone)
    export_peft(adapted, tmp_path / "out", lambda model: answer(model, batch), fold_scale=True)
    path = tmp_path / "out" / "adapter_model.safetensors"
    own = adapted.backbone.bert.embeddings.word_embeddings.weight.detach()
    name = "base_model.model.bert.embeddings.word_embeddings.base_layer.weight"
    save_file({**load_file(path), name: own.bfloat16()}, path)
    back = from_peft(backbone_of("bert"), tmp_path / "out")
    assert torch.equal(answer(back, batch), answer(adapted, batch))
    save_file({**load_file(path), name: (own + 0.1).bfloat16()}, path)
    with pytest.raises(SettingError, match="another table"):
        from_peft(backbone_of("bert"), tmp_path / "out")


def test_a_dry_run_refuses_what_the_run_would(tmp_path):
    with pytest.raises(RunFailed, match="proxy=eva: is computed from vectors"):
        run_job(tmp_path / "run", "search_space=lora_everything", "proxy=eva", "run=dry")
