"""The contract of every family of adapters: it joins by one line of ``FAMILIES`` (SYSTEMS.md 0.6, G1 to G8, and more).

In float64 on tiny random models; what is particular to one family is in ``test_family_oracles``.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from heterolora.adapters.base import plain_factors
from heterolora.adapters.dora import DoRA
from heterolora.adapters.factored import Factored
from heterolora.adapters.lora import LoRA
from heterolora.adapters.lora_xs import LoRAXS
from heterolora.adapters.prolora import PRoLoRA
from heterolora.adapters.shared import TiedLoRA, VeRA
from heterolora.adapters.svd import SVD
from heterolora.errors import SettingError
from heterolora.export import export_peft
from heterolora.model import AdaptedModel
from heterolora.proxies.activation import Activation
from heterolora.proxies.alpha_test import AlphaTest
from heterolora.proxies.evidence import Bench, FactorGradients, gather
from heterolora.proxies.fisher import Fisher
from heterolora.proxies.grad_norm import GradNorm
from heterolora.proxies.grasp import Grasp
from heterolora.proxies.snip import Snip
from heterolora.proxies.spectral import Spectral
from heterolora.proxies.synflow import Synflow
from heterolora.scoring import Probe, score_all, untracked
from heterolora.space import SearchSpace, survey
from tests.architectures import make_backbone, make_batch
from tests.conftest import randomise
from tests.test_model import logits

SETTINGS = ("constant", 2.0, 0.0)

FAMILIES = {
    "lora": LoRA(*SETTINGS),
    "rslora": LoRA("alpha_over_sqrt_r", 4.0, 0.0),
    "dora": DoRA(*SETTINGS),
    "svd": SVD(*SETTINGS, std=0.02),
    "lora_xs": LoRAXS("alpha_over_r", 16.0, 0.0, core_std=0.0, frozen="svd"),
    "lora_xs_random": LoRAXS(*SETTINGS, core_std=0.0, frozen="random"),
    "prolora": PRoLoRA(*SETTINGS, sharing_in=3, sharing_out=5, unshared=1),
    "vera": VeRA("constant", 1.0, 0.0, initial=0.1),
    "tl1": TiedLoRA(*SETTINGS, tie=True, train_A=True, train_B=False, train_uv=False, initial=0.1),
    "tl2": TiedLoRA(*SETTINGS, tie=True, train_A=True, train_B=False, train_uv=True, initial=0.1),
    "tl3": TiedLoRA(*SETTINGS, tie=True, train_A=False, train_B=True, train_uv=False, initial=0.1),
    "tl4": TiedLoRA(*SETTINGS, tie=True, train_A=False, train_B=True, train_uv=True, initial=0.1),
    "tl5": TiedLoRA(*SETTINGS, tie=True, train_A=True, train_B=True, train_uv=False, initial=0.1),
    "tl6": TiedLoRA(*SETTINGS, tie=True, train_A=True, train_B=True, train_uv=True, initial=0.1),
    "untied": TiedLoRA(*SETTINGS, tie=False, train_A=True, train_B=True, train_uv=True, initial=0.1),
}

SHAPES = ("bert", "llama", "gpt2")
"""Post-LN and biases; grouped attention and a gate; transposed weights and a fused qkv."""

EACH = pytest.mark.parametrize("name", FAMILIES)
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def made(name, shape="bert", include=None, training=False):
    """The family on a tiny model, at every site where it makes sense."""
    family = FAMILIES[name]
    backbone = make_backbone(shape, dtype=torch.float64)
    include = include or (["lora"] if family.needs_weights else ["lora", "shortcut"])
    space = SearchSpace(include, [], None, [1, 2], False, "kind").resolve(survey(backbone))
    inside = {id(p) for p in backbone.base_model.parameters()}
    head = [key for key, p in backbone.named_parameters() if id(p) not in inside]
    return AdaptedModel(backbone, space, family, head).train(training), make_batch(backbone)


def mixed(model, most=4):
    """Ranks from 0 to ``most``, site by site."""
    return {site.name: number % (most + 1) for number, site in enumerate(model.space.sites)}


def loss_of(model, batch):
    return torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"])


def step(model, batch, times=1, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(times):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def trained_tensors(model) -> dict[str, torch.Tensor]:
    """Each once."""
    return dict(model.adapters.named_parameters())


@EACH
@EACH_SHAPE
def test_at_step_0_the_model_is_the_backbone(name, shape):
    """G1, to the bit."""
    model, batch = made(name, shape)
    expected = logits(model, batch)
    model.enable(mixed(model), seed=0)
    assert torch.equal(logits(model, batch), expected)
    with torch.no_grad():
        assert torch.equal(logits(model, batch), expected)


@EACH
def test_switched_off_it_is_the_backbone_after_training_too(name):
    """G2 and G5: nothing but adapters and head has moved, and no other tensor has a gradient."""
    model, batch = made(name, training=True)
    head = {key: value.clone() for key, value in model.head_state_dict().items()}
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.enable(mixed(model), seed=0)
    step(model, batch, times=3)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items() if key not in head)
    assert all(p.grad is None for key, p in model.backbone.named_parameters() if key not in head)
    model.eval()
    with torch.no_grad():
        for key, value in head.items():
            model.head_parameters[key].copy_(value)
        trained = logits(model, batch)
        with model.disabled():
            off = logits(model, batch)
        model.enable({}, seed=0)
        assert torch.equal(off, logits(model, batch))
        assert not torch.allclose(off, trained)


@EACH
@EACH_SHAPE
def test_the_matrix_is_the_map(name, shape):
    """G3: folded into the weights, the same logits; taken out again, the same weights."""
    model, batch = made(name, shape, include=["lora"])
    model.enable(mixed(model), seed=0)
    randomise(model)
    expected = logits(model, batch).detach()
    deltas = {site: model.adapter(site).delta_weight() for site in model.held}
    folded = {site: model.backbone.get_submodule(model.site(site).sink.module) for site in model.held}
    before = {site: module.weight.clone() for site, module in folded.items()}
    with model.disabled(), torch.no_grad():
        for site, module in folded.items():
            module.weight += deltas[site].T if hasattr(module, "nx") else deltas[site]
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
        for site, module in folded.items():
            module.weight -= deltas[site].T if hasattr(module, "nx") else deltas[site]
            torch.testing.assert_close(module.weight, before[site], rtol=1e-12, atol=1e-12)


@EACH
@pytest.mark.parametrize("most", [1, 4])
def test_what_is_held_is_what_the_cost_says(name, most):
    """G4, each shared tensor once; and a unit's price is what it adds."""
    model, _ = made(name)
    cost = model.family.cost(model.space.sites)
    ranks = mixed(model, most)
    model.enable(ranks, seed=0)
    held = {id(p): p.numel() for p in model.adapters.parameters() if p.requires_grad}
    assert sum(held.values()) == cost(ranks) == model.held_parameters == model.active_parameters
    assert model.ranks == ranks
    for site in model.space.sites:
        more = ranks | {site.name: ranks[site.name] + 1}
        assert cost.marginal(ranks, site.name) == cost(more) - cost(ranks)
    assert cost(dict.fromkeys(ranks, 0)) == 0


@EACH
@EACH_SHAPE
def test_all_that_is_trained_has_a_gradient_by_the_second_step(name, shape):
    """G6; and what is frozen stays to the bit."""
    model, batch = made(name, shape, training=True)
    model.enable({site.name: 2 for site in model.space.sites}, seed=0)
    frozen = {key: value.clone() for key, value in model.adapters.named_buffers()}
    step(model, batch, times=2)
    for key, parameter in trained_tensors(model).items():
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key
    assert all(torch.equal(value, frozen[key]) for key, value in model.adapters.named_buffers())


@EACH
def test_a_saved_adapter_gives_the_same_elsewhere(name):
    """G7: into a fresh model whose own draw was another; and each tensor is stored once."""
    model, batch = made(name, training=True)
    model.enable(mixed(model), seed=0)
    step(model, batch, times=2)
    state = {key: value.clone() for key, value in model.trained_state_dict().items()}
    pointers = [value.data_ptr() for value in model.adapter_state_dict().values() if value.numel()]
    assert len(set(pointers)) == len(pointers)
    other, _ = made(name)
    other.enable(mixed(other), seed=99)
    other.load_trained_state_dict(state)
    assert torch.equal(logits(other, batch), logits(model.eval(), batch))
    with pytest.raises(KeyError, match="adapter tensors differ"):
        other.load_adapter_state_dict({})


@EACH
def test_a_copied_model_is_one_of_its_own(name):
    model, batch = made(name)
    model.enable(mixed(model), seed=0)
    randomise(model)
    twin = copy.deepcopy(model)
    expected = logits(model, batch)
    assert torch.equal(logits(twin, batch), expected)
    with torch.no_grad():
        for parameter in twin.adapters.parameters():
            parameter += 1.0
    assert torch.equal(logits(model, batch), expected)
    assert not torch.allclose(logits(twin, batch), expected)
    assert twin.held_parameters == model.held_parameters


@EACH
@EACH_SHAPE
def test_two_parts_give_the_gradients_of_the_whole(name, shape, monkeypatch):
    model, batch = made(name, shape, training=True)
    model.enable({site.name: 3 for site in model.space.sites}, seed=0)
    randomise(model)
    parameters = list(model.adapters.parameters())
    fast = torch.autograd.grad(loss_of(model, batch), parameters)
    monkeypatch.setattr(Factored, "down", None)
    for found, expected in zip(fast, torch.autograd.grad(loss_of(model, batch), parameters), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@EACH
def test_the_factors_are_the_map(name):
    model, _ = made(name)
    if name == "dora":
        pytest.skip("lengths of rows are no product of factors")
    model.enable({site.name: 3 for site in model.space.sites}, seed=0)
    randomise(model)
    for site in model.space.sites:
        adapter = model.adapter(site.name)
        down, up = plain_factors(adapter)
        x = torch.randn(2, 5, site.in_features, dtype=torch.float64)
        assert (down.shape, up.shape) == ((3, site.in_features), (site.out_features, 3))
        torch.testing.assert_close(adapter(x), adapter.scale * x @ down.T @ up.T)
        torch.testing.assert_close(adapter.delta_weight(), adapter.scale * up @ down)


@EACH
def test_lower_ranks_are_the_first_units_of_higher_ones(name):
    """What lets two allocations differ only where ranks differ, and ranks change in training where that is allowed."""
    small, large = ({s.name: r for s in made(name)[0].space.sites} for r in (2, 3))
    model, _ = made(name)
    if name == "prolora":
        assert model.family.switching == "sites"  # another rank is another rotation
        return
    fewer, more = model.fresh(small, seed=5), model.fresh(large, seed=5)
    for site in model.space.sites:
        down, up = plain_factors(fewer[site.name])
        wide_down, wide_up = plain_factors(more[site.name])
        torch.testing.assert_close(down, wide_down[:2], rtol=1e-6, atol=0)
        if name != "vera":  # whose B is drawn within bounds that depend on the rank, as in PEFT
            torch.testing.assert_close(up, wide_up[:, :2], rtol=1e-6, atol=0)
        if model.family.switching == "ranks":
            units = fewer[site.name].units
            assert units.keys() == fewer[site.name].trained.keys()
            for key, value in fewer[site.name].trained.items():
                part = more[site.name].trained[key]
                for dim in units[key]:
                    part = part.narrow(dim, 0, 2)
                assert torch.equal(part, value)


@EACH
def test_another_site_does_not_change_the_draw(name):
    """Adapters are drawn from the seed and their site's name (shared ones from their pool's)."""
    model, _ = made(name)
    everywhere = model.fresh({site.name: 2 for site in model.space.sites}, seed=3)
    site = model.space.sites[-1]
    alone = model.fresh({site.name: 2}, seed=3)[site.name]
    if name == "vera":  # the part of a larger pair is drawn within other bounds
        assert alone.shared.A.shape[1] == site.in_features
        return
    for key, value in alone.state_dict().items():
        assert torch.equal(value, everywhere[site.name].state_dict()[key])
    other = model.fresh({site.name: 2}, seed=4)[site.name]
    fixed = name == "lora_xs"  # singular vectors and a core of 0
    assert fixed == all(torch.equal(value, other.state_dict()[key]) for key, value in alone.state_dict().items())


@EACH
@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_gathered_gradients_are_those_of_training(name, shape):
    """Of every trained tensor; where sites share one, its gradient is the sum of what each of them is told."""
    model, batch = made(name, shape)
    if name == "dora":
        pytest.skip("scored with the lengths of rows as constants: test_family_oracles has it")
    adapters = model.probes(2, 0.3, seed=1)
    values = {key: value for key, value in batch.items() if key != "labels"} | {"labels": batch["labels"]}
    bench = Bench(model, [values], lambda m, b: loss_of(m, b), live=True, reduction="sum", track=untracked)
    found = gather(bench, adapters, [FactorGradients()])[FactorGradients()]
    with model.swapped(adapters):
        loss_of(model, values).backward()
    sums: dict[int, torch.Tensor] = {}
    for site, adapter in adapters.items():
        for tensor, gradient in zip(adapter.trained.values(), found[site], strict=True):
            sums[id(tensor)] = sums.get(id(tensor), torch.zeros_like(gradient)) + gradient
    tensors = {id(p): p for adapter in adapters.values() for p in adapter.parameters()}
    assert sums.keys() == tensors.keys()
    for key, parameter in tensors.items():
        torch.testing.assert_close(sums[key], parameter.grad, rtol=1e-9, atol=1e-12)


PROXIES = {
    "grad_norm": GradNorm(),
    "snip": Snip(),
    "fisher": Fisher(),
    "grasp": Grasp(),
    "spectral": Spectral(),
    "alpha_test": AlphaTest(0.01, "loss"),
    "activation": Activation(),
    "synflow": Synflow(),
}


@EACH
def test_every_proxy_scores_it_and_leaves_no_trace(name):
    model, batch = made(name, training=True)
    model.enable(mixed(model), seed=0)
    before = copy.deepcopy(model.state_dict())
    probe = Probe("random", False, 0.05, 2, 2, "mean", 2, 1e-3, 6, 0.05)
    batches = [batch, {key: value.flip(0) for key, value in batch.items()}]
    found = score_all(model, loss_of, batches, batches, proxies=PROXIES, probe=probe, seed=0)
    assert found.scores.keys() == PROXIES.keys()
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    again = score_all(model, loss_of, batches, batches, proxies=PROXIES, probe=probe, seed=0)
    assert again.scores == found.scores


@EACH
def test_grasp_is_theta_times_the_hessian_times_the_gradient(name):
    """Against a Hessian-vector product by autograd on the live model; a shared tensor counts for one site at a time."""
    if name == "dora" or "tl" in name or name in ("vera",):
        pytest.skip("theta of one site is a part of what is shared, or lengths are constants")
    model, batch = made(name, include=[{"kind": "lora", "role": ["q", "v"]}])
    adapters = model.probes(2, 0.3, seed=1)
    probe = Probe("random", True, 0.3, 2, 1, "mean", 0, 1e-3, 0, 1e-3)
    with model.swapped(adapters), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        parameters = list(model.adapters.parameters())
        gradients = torch.autograd.grad(loss_of(model, batch), parameters, create_graph=True)
        along = sum((g * g.detach()).sum() for g in gradients)
        products = dict(zip(parameters, torch.autograd.grad(along, parameters), strict=True))
        expected = {
            site: sum((p * products[p]).sum().item() for p in adapter.parameters())
            for site, adapter in adapters.items()
        }
    found = score_all(model, loss_of, [batch], [batch], proxies={"grasp": Grasp()}, probe=probe, seed=1)
    for site, value in expected.items():
        assert found.scores["grasp"][site] == pytest.approx(value, rel=1e-8, abs=1e-12)


@EACH
@EACH_SHAPE
def test_peft_computes_the_same_from_an_export(name, shape, tmp_path):
    model, batch = made(name, shape, include=["lora"], training=True)
    model.enable(mixed(model), seed=0)
    step(model, batch, times=2, lr=0.05)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    found = export_peft(model.eval(), tmp_path / "peft", lambda m: m(**inputs).logits, fold_scale=True)
    assert found.difference <= 1e-6 * found.largest
    assert found.sites == {site: rank for site, rank in mixed(model).items() if rank}


@EACH
def test_dropout_acts_in_training_alone(name):
    model, batch = made(name)
    model.family = dataclasses.replace(FAMILIES[name], dropout=0.5)
    model.enable({site.name: 2 for site in model.space.sites}, seed=0)
    randomise(model)
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.adapters.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))


@EACH
def test_where_no_weight_acts_a_family_of_weights_is_refused_before_anything_else(name):
    if not FAMILIES[name].needs_weights:
        made(name, include=["shortcut"])
        return
    with pytest.raises(SettingError, match=r"adapter=.*none acts at .*search_space=lora_all"):
        made(name, include=["lora", "shortcut"])


@EACH
@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": float("nan")}, {"dropout": 1.0}, {"scale": {"x": 1.0}}])
def test_settings_that_cannot_be_are_refused(name, wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        dataclasses.replace(FAMILIES[name], **wrong)


def test_the_contract_covers_every_family_that_a_config_names():
    files = sorted((Path(__file__).parents[1] / "conf" / "adapter").glob("*.yaml"))
    named = {yaml.safe_load(path.read_text())["_target_"].rpartition(".")[2] for path in files}
    assert named == {type(family).__name__ for family in FAMILIES.values()}
