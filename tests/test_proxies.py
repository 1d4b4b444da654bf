"""Proxies against independent sources; a proxy joins the contract by its file in conf/proxy."""

from pathlib import Path

import pytest
import scipy.linalg
import torch
import yaml

from heterolora.build import build
from heterolora.proxies.base import DegenerateScores, check_scores, total
from heterolora.proxies.constant import Constant
from heterolora.proxies.evidence import FactorGradients, MapGradient, gather
from heterolora.proxies.grad_norm import GradNorm
from heterolora.proxies.snip import Snip
from heterolora.proxies.spectral import Spectral, squared_singular_values
from heterolora.search import Probe, score, untracked
from tests.architectures import make_batch
from tests.conftest import adapt

PROXIES = {path.stem: path for path in sorted(Path("conf/proxy").glob("*.yaml"))}


def probe(**changes) -> Probe:
    settings = {
        "init": "random",
        "live": False,
        "std": 0.02,
        "rank": 1,
        "batches": 2,
        "reduction": "mean",
        "head_warmup_steps": 0,
        "head_warmup_lr": 1e-3,
    }
    return Probe(**(settings | changes))


def loss(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return torch.nn.functional.cross_entropy(model(**inputs).logits, batch["labels"])


@pytest.fixture
def batches(backbone):
    return [make_batch(backbone, seed=seed) for seed in (3, 4)]


def weight_gradients(model, batches):
    """Gradient of every frozen weight, summed over batches, by autograd on the plain backbone."""
    weights = {
        site.name: model.backbone.get_submodule(site.source.module).weight
        for site in model.space.sites
        if site.kind == "lora"
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    with model.disabled():
        value = sum(loss(model, batch) for batch in batches)
        found = dict(zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True))
    for weight in weights.values():
        weight.requires_grad_(False)
    return found


def test_every_proxy_was_found():
    assert {"constant", "random", "grad_norm", "snip", "spectral"} <= PROXIES.keys()


@pytest.mark.parametrize("name", PROXIES)
def test_contract(name, adapted, batches):
    """A score for every site, finite, not increasing with rank, telling sites apart, repeatable, without a trace."""
    made = build(yaml.safe_load(PROXIES[name].read_text()), "proxy")
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    settings = {"proxy": made, "probe": probe(head_warmup_steps=2), "seed": 3}
    first = score(adapted, loss, batches, batches, **settings)
    torch.rand(7)  # a search must not depend on the global generator
    assert score(adapted, loss, batches, batches, **settings) == first
    assert first.keys() == {site.name for site in adapted.space.sites}
    if name != "constant":
        assert len({total(value) for value in first.values()}) == len(first)
    after = adapted.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_pass_gives_the_gradient_of_the_frozen_weights(adapted, batches):
    adapters = {site.name: adapted.family.probe(site, 1, 0.02, 0).double() for site in adapted.space.sites}
    gathered = gather(adapted, adapters, batches, loss, [MapGradient()], live=False, reduction="sum", track=untracked)[
        MapGradient()
    ]
    for name, expected in weight_gradients(adapted, batches).items():
        torch.testing.assert_close(gathered[name][0], expected, rtol=1e-9, atol=1e-13)


def test_first_order_scores_from_the_weight_gradient(adapted, batches):
    """grad_norm, snip and spectral by their formulas, from G by autograd and the probe's factors."""
    settings = {"probe": probe(rank=3, reduction="sum"), "seed": 5}
    found = {type(p): score(adapted, loss, batches, [], proxy=p, **settings) for p in (GradNorm(), Snip(), Spectral())}
    for site in adapted.space.sites:
        if site.kind != "lora":
            continue
        G = weight_gradients(adapted, batches)[site.name]
        adapter = adapted.family.probe(site, 3, 0.02, 5).double()
        g_b, g_a = 2.0 * G @ adapter.A.T, 2.0 * adapter.B.T @ G  # the fixture's scale is 2
        norm = (g_a.norm() + g_b.norm()).item()
        snip = ((adapter.A * g_a).abs().sum() + (adapter.B * g_b).abs().sum()).item()
        assert found[GradNorm][site.name] == pytest.approx(norm, rel=1e-9)
        assert found[Snip][site.name] == pytest.approx(snip, rel=1e-9)
        spectrum = scipy.linalg.svdvals(G.numpy()) ** 2
        assert found[Spectral][site.name] == pytest.approx(spectrum, rel=1e-8, abs=1e-12 * spectrum[0])


def test_shortcut_scores_are_those_of_a_numerical_derivative(adapted, batches):
    """d loss / d eps of eps * (u v^T) at a shortcut equals u^T G v."""
    name = "1.shortcut_attn"
    adapters = {name: adapted.family.probe(adapted.space[name], 1, 0.02, 0).double()}
    G = gather(adapted, adapters, batches, loss, [MapGradient()], live=False, reduction="sum", track=untracked)
    G = G[MapGradient()][name][0]
    adapted.enable({name: 1}, seed=0)
    adapter = adapted.adapter(name)

    def at(eps):
        with torch.no_grad():
            adapter.A.copy_(adapters[name].A)
            adapter.B.copy_(eps * adapters[name].B)
            return sum(loss(adapted, batch) for batch in batches).item()

    eps = 1e-2
    numerical = (at(eps) - at(-eps)) / (2 * eps)
    single = adapted.space.survey.model_type == "llama"  # its norms compute in float32
    exact = (adapter.scale * adapters[name].B.T @ G @ adapters[name].A.T).item()
    assert numerical == pytest.approx(exact, rel=2e-2 if single else 1e-5)


def test_mean_is_the_sum_over_the_number_of_batches(adapted, batches):
    found = {
        kind: score(adapted, loss, batches, [], proxy=GradNorm(), probe=probe(reduction=kind), seed=0)
        for kind in ("mean", "sum")
    }
    for name, value in found["mean"].items():
        assert value * len(batches) == pytest.approx(found["sum"][name], rel=1e-12)


def test_live_puts_the_probe_into_the_forward(adapted, batches):
    still = score(adapted, loss, batches, [], proxy=GradNorm(), probe=probe(std=0.3), seed=0)
    live = score(adapted, loss, batches, [], proxy=GradNorm(), probe=probe(std=0.3, live=True), seed=0)
    assert max(abs(live[name] / still[name] - 1) for name in live) > 0.01
    assert adapted.held_parameters == 0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)], ids=str)
def test_squared_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float32)
    expected = scipy.linalg.svdvals(matrix.double().numpy()) ** 2
    assert squared_singular_values(matrix) == pytest.approx(expected, rel=1e-10)


def test_snip_with_b_zero_is_refused_and_says_what_helps(adapted, batches):
    with pytest.raises(DegenerateScores, match=r"snip.*every score is 0.*probe\.init=random"):
        score(adapted, loss, batches, [], proxy=Snip(), probe=probe(init="lora"), seed=0)


def test_grad_norm_with_b_zero_speaks_through_g_b_alone(adapted, batches):
    found = score(adapted, loss, batches, [], proxy=GradNorm(), probe=probe(init="lora", reduction="sum"), seed=0)
    for name, G in weight_gradients(adapted, batches).items():
        a = adapted.family.build(adapted.space[name], 1, 0).A.double()
        assert found[name] == pytest.approx((2.0 * G @ a.T).norm().item(), rel=1e-6)  # factors are drawn in float32


def test_a_head_of_zeros_gives_no_gradient_and_is_refused(adapted, batches):
    with torch.no_grad():
        for name, parameter in adapted.backbone.named_parameters():
            if name in adapted.head:
                parameter.zero_()
    with pytest.raises(DegenerateScores, match=r"grad_norm.*probe\.head_warmup_steps"):
        score(adapted, loss, batches, [], proxy=GradNorm(), probe=probe(), seed=0, proxy_name="grad_norm")
    warm = probe(head_warmup_steps=3)
    assert score(adapted, loss, batches, batches, proxy=GradNorm(), probe=warm, seed=0)


def test_a_loss_that_is_not_finite_stops_the_pass(adapted, batches):
    with pytest.raises(FloatingPointError, match="scoring batch 0"):
        score(adapted, lambda m, b: loss(m, b) * float("nan"), batches, [], proxy=GradNorm(), probe=probe(), seed=0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": 1.0, "b": 1.0}, "every score is the same"),
        ({"a": 0.0, "b": 0.0}, "every score is 0"),
        ({"a": [2.0, 1.0], "b": [2.0, 1.0]}, "every score is the same"),
        ({"a": 1.0, "b": float("nan")}, "not finite at"),
        ({"a": 1.0, "b": float("inf")}, "not finite at"),
        ({"a": [1.0, 2.0], "b": [2.0, 1.0]}, "must not increase"),
        ({"a": 1.0}, r"missing \['b'\]"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, r"unknown \['c'\]"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores, message):
    with pytest.raises(DegenerateScores, match=message):
        check_scores("p", GradNorm(), scores, ["a", "b"])


def test_what_is_not_degenerate():
    check_scores("p", GradNorm(), {"a": 1.0, "b": 2.0}, ["a", "b"])
    check_scores("p", GradNorm(), {"a": 1.0}, ["a"])  # one site cannot differ from itself
    check_scores("p", Constant(), {"a": 1.0, "b": 1.0}, ["a", "b"])
    with pytest.raises(DegenerateScores, match="not finite"):
        check_scores("p", Constant(), {"a": 1.0, "b": float("nan")}, ["a", "b"])


def test_statistics_wanted_by_several_are_gathered_once():
    assert {FactorGradients(), MapGradient(), FactorGradients()} == {FactorGradients(), MapGradient()}
    assert GradNorm().statistics == Snip().statistics


def test_scores_do_not_depend_on_the_other_sites(backbone, batches):
    """A smaller space sees the same gradients and the same draws."""
    everything = score(adapt(backbone), loss, batches, [], proxy=Snip(), probe=probe(), seed=0)
    some = score(
        adapt(backbone, include=["q", "shortcut_attn"]), loss, batches, [], proxy=Snip(), probe=probe(), seed=0
    )
    for name, value in some.items():
        assert value == pytest.approx(everything[name], rel=1e-9)
