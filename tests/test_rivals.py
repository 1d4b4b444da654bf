"""Allocators, initialisations and schedules of rival systems: the oracles of SYSTEMS.md, and PEFT where it has them."""

import json
import math
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heterolora.adapters.lora import LoRA, LowRank
from heterolora.adapters.svd import SVD, Triplets
from heterolora.allocators.redistribute import Redistribute
from heterolora.allocators.shares import Shares
from heterolora.callbacks.adalora import AdaLoRA, MaskTriplets, irregularity, masks
from heterolora.callbacks.alora import _Gated, ablation, pruned_and_regrown
from heterolora.callbacks.lor2c import concentration, mergeable, shape_of_features
from heterolora.callbacks.para import decompose
from heterolora.cost import AdditiveCost
from heterolora.errors import SettingError
from heterolora.history import HISTORY, read_history
from heterolora.inits.eva import EvaInit
from heterolora.inits.gora import GoraInit
from heterolora.loading import load_run
from heterolora.model import AdaptedModel
from heterolora.processes import ALONE as ONE_PROCESS
from heterolora.proxies.eva import Eva
from heterolora.run import RunFailed, train
from heterolora.space import SearchSpace, survey
from tests.architectures import make_backbone, make_batch
from tests.conftest import randomise
from tests.jobs import prepare, run_job
from tests.surroundings import ALONE
from tests.test_allocators import Problem
from tests.test_family_oracles import site_of
from tests.test_model import logits
from tests.test_resume import break_off, stop, what_came_out

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def problem(gains, budget, price=1):
    return Problem(gains, AdditiveCost(dict.fromkeys(gains, price)), dict.fromkeys(gains, "lora"), budget)


# -- EVA (7.7) --------------------------------------------------------------------------------------------------------


def test_eva_redistributes_as_in_the_worked_example():
    """7.7.1: r = 2, rho = 2, R = 6."""
    ratios = {"1": [0.5, 0.3, 0.1, 0.05], "2": [0.4, 0.05, 0.03, 0.01], "3": [0.2, 0.15, 0.08, 0.02]}
    assert problem(ratios, 6).solve(Redistribute(2.0, 0)).ranks == {"1": 3, "2": 1, "3": 2}


@PROPERTY
@given(data=st.data())
def test_eva_spends_all_units_within_rho_times_the_uniform_rank(data):
    """7.7.2, for sites of one width."""
    count, rank = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    rho = data.draw(st.sampled_from([1.0, 1.5, 2.0]))
    values = st.lists(st.floats(0, 1), min_size=12, max_size=12).map(lambda found: sorted(found, reverse=True))
    gains = {str(n): data.draw(values) for n in range(count)}
    ranks = problem(gains, 7 * rank * count, 7).solve(Redistribute(rho, 0)).ranks
    assert sum(ranks.values()) == rank * count
    assert max(ranks.values()) <= round(rho * rank)
    if rho == 1.0:
        assert set(ranks.values()) == {rank}


def tokens(count=40, width=9, mean=3.0):
    torch.manual_seed(2)
    return (torch.randn(count, width).double() @ torch.randn(width, width).double()) + mean


def moments(x):
    return x.T @ x, x.sum(0), x.new_tensor([len(x)])


@pytest.mark.parametrize("center", [True, False])
def test_eva_takes_the_principal_components(center):
    """7.7.3 and 7.7.4, against an exact decomposition of the data."""
    x, site = tokens(), site_of("0.q", 9, 5)
    adapter = LoRA("constant", 2.0, 0.0).build(site, 4, 0, ALONE).double()
    EvaInit(center, whiten=False).fill(site, adapter, [moments(x)])
    data = x - x.mean(0) if center else x
    _, singular, vh = torch.linalg.svd(data, full_matrices=False)
    torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(4).double())
    torch.testing.assert_close((adapter.A * vh[:4]).sum(1).abs(), torch.ones(4).double())
    assert not adapter.B.any()
    assert (adapter.A.gather(1, adapter.A.abs().argmax(1, keepdim=True)) > 0).all()
    EvaInit(center, whiten=True).fill(site, adapter, [moments(x)])
    torch.testing.assert_close(adapter.A.norm(dim=1), singular[:4].rsqrt())


def test_eva_ratios_do_not_depend_on_the_inputs_scale():
    """7.7.6, which fails for the printed score."""
    for factor in (1.0, 10.0):
        found = Eva(center=True)._ratios(*moments(factor * tokens()))
        expected = torch.linalg.svdvals(tokens() - tokens().mean(0)).square()
        assert found == pytest.approx((expected / expected.sum()).tolist(), rel=1e-9)


def test_eva_refuses_more_units_than_there_are_components():
    x, site = tokens(count=3), site_of("0.q", 9, 5)
    adapter = LoRA("constant", 2.0, 0.0).build(site, 4, 0, ALONE).double()
    with pytest.raises(SettingError, match="reads fewer than 4 components"):
        EvaInit(center=True, whiten=False).fill(site, adapter, [moments(x)])


def test_eva_gives_pefts_ranks_and_components():
    """PEFT's own incremental procedure on one batch, where it is exact; ties of layers that read the same are split."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    backbone, batch = make_backbone("bert", dtype=torch.float32), make_batch(make_backbone("bert", dtype=torch.float32))
    batch = {key: value for key, value in batch.items() if key != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    targets = ["query", "key", "value", "attention.output.dense"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights="eva",
                        eva_config=EvaConfig(rho=2.0, tau=0.99, use_label_mask=False))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(make_backbone("bert", dtype=torch.float32), config)
        initialize_lora_eva_weights(theirs, [batch] * 3, show_progress_bar=False)
    layers = {key: m for key, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A") and m.lora_A}
    space = SearchSpace([{"kind": "lora", "role": ["q", "k", "v", "o"]}], [], None, [], False, "kind")
    model = AdaptedModel(backbone, space.resolve(survey(backbone)), LoRA("constant", 2.0, 0.0))
    from heterolora.proxies.evidence import Bench, InputMoments, gather
    from heterolora.scoring import untracked

    bench = Bench(model, [batch], lambda m, b: logits(m, b).sum(), False, "mean", untracked)
    found = gather(bench, model.probes(1, 0.02, 0), [InputMoments()])[InputMoments()]
    gains = {name: Eva(center=True)._ratios(*values) for name, values in found.items()}
    units = AdditiveCost(dict.fromkeys(gains, 64))
    ranks = Redistribute(2.0, 0).allocate(gains, units, 64 * 2 * len(gains), dict.fromkeys(gains, "x")).ranks
    assert sum(ranks.values()) == 2 * len(gains) == sum(m.r["default"] for m in layers.values())
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, values in gains.items():
        groups.setdefault(tuple(round(value, 5) for value in values), []).append(name)
    assert len(groups) < len(gains)  # q, k and v read the same
    for names in groups.values():
        module = {name: layers.get(model.site(name).sink.module) for name in names}
        assert sorted(ranks[n] for n in names) == sorted(m.r["default"] if m else 0 for m in module.values())
        for name, layer in module.items():
            if layer is None:
                continue
            adapter = model.fresh({name: layer.r["default"]}, 0)[name]
            with torch.no_grad():
                EvaInit(center=True, whiten=False).fill(model.site(name), adapter, [found[name]])
            cosines = (adapter.A * layer.lora_A["default"].weight).sum(1).abs()
            assert (cosines > 0.98).all()


# -- GoRA (8.6) -------------------------------------------------------------------------------------------------------


def gradient_and_adapter(rank=4, gamma=0.05, scale=2.0):
    torch.manual_seed(3)
    site = site_of("0.q", 9, 6)
    gradient = torch.randn(6, 9).double()
    adapter = LoRA("constant", scale, 0.0).build(site, rank, 0, ALONE).double()
    GoraInit(gamma).fill(site, adapter, [(gradient,)])
    return gradient, adapter


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_gora_steps_down_within_the_row_space(scale):
    """8.6.1, whatever the scale."""
    gradient, adapter = gradient_and_adapter(scale=scale)
    projector = torch.linalg.pinv(adapter.A) @ adapter.A
    size = 0.05 * math.sqrt(9 / 4)
    delta = adapter.delta_weight()
    torch.testing.assert_close(delta, -size * gradient @ projector)
    assert (delta * gradient).sum() < 0
    rest = gradient + delta / size
    torch.testing.assert_close(rest @ adapter.A.T, torch.zeros(6, 4).double(), atol=1e-10, rtol=0)


def test_gora_without_a_step_is_lora():
    """8.6.3."""
    assert not gradient_and_adapter(gamma=0.0)[1].B.any()


def test_gora_lowers_the_loss_of_its_batch_by_what_the_first_order_says():
    """8.6.5, on one layer."""
    torch.manual_seed(4)
    layer, x, target = nn.Linear(9, 6).double(), torch.randn(50, 9).double(), torch.randn(50, 6).double()
    (layer(x) - target).square().mean().backward()
    gradient, gamma = layer.weight.grad, 1e-4
    site = site_of("0.q", 9, 6)
    adapter = LoRA("constant", 2.0, 0.0).build(site, 4, 0, ALONE).double()
    GoraInit(gamma).fill(site, adapter, [(gradient,)])
    with torch.no_grad():
        drop = (layer(x) - target).square().mean() - (layer(x) + adapter(x) - target).square().mean()
    projector = torch.linalg.pinv(adapter.A) @ adapter.A
    expected = gamma * math.sqrt(9 / 4) * (gradient @ projector).square().sum()
    assert drop.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(("most", "expected"), [(4.0, [4, 4, 8, 16]), (1.5, [4, 4, 8, 12])])
def test_gora_gives_the_worked_ranks(most, expected):
    """8.6.2: shares (1, 1, 2, 4) / 8 at r = 8, and what the largest rank cuts off is lost."""
    gains = {str(n): [value] * 64 for n, value in enumerate((1.0, 1.0, 2.0, 4.0))}
    for phi, rounding in (("root", "nearest"), ("identity", "down")):
        found = problem(gains, 8 * 4 * 10, 10).solve(Shares(phi, rounding, 0.5, most))
        assert list(found.ranks.values()) == expected


@PROPERTY
@given(data=st.data())
def test_gora_keeps_to_its_bounds_and_to_the_budget(data):
    """8.6.2 and 8.6.4."""
    count = data.draw(st.integers(1, 6))
    values = [data.draw(st.floats(0.01, 1)) for _ in range(count)]
    units = {str(n): data.draw(st.integers(2, 30)) for n in range(count)}
    gains = {str(n): [value] * 40 for n, value in enumerate(values)}
    budget = data.draw(st.integers(sum(units.values()), 12 * sum(units.values())))
    asked = Problem(gains, AdditiveCost(units), dict.fromkeys(gains, "lora"), budget)
    everywhere = budget / sum(units.values())
    for phi, rounding in (("root", "nearest"), ("identity", "down")):
        ranks = asked.solve(Shares(phi, rounding, 0.5, 4.0)).ranks
        assert sum(rank * units[name] for name, rank in ranks.items()) <= budget
        assert all(math.floor(everywhere / 2) <= rank <= max(1, math.floor(4 * everywhere)) for rank in ranks.values())
    alike = problem({name: [1.0] * 40 for name in gains}, 5 * 7 * count, 7)
    assert set(alike.solve(Shares("root", "nearest", 0.5, 4.0)).ranks.values()) == {5}


def test_gora_rounds_down_as_the_authors_do():
    """``round(b a) // phi``: 8.7 rounds to 9, which three units of 3 are; its quotient alone rounds down to 2."""
    gains = {"0": [8.7] * 9, "1": [3.3] * 9}  # b = budget where phi is a unit's price, so b a = 8.7 and 3.3
    assert problem(gains, 12, 3).solve(Shares("identity", "down", 0.0, 4.0)).ranks == {"0": 3, "1": 1}


# -- AdaLoRA (6.9) ----------------------------------------------------------------------------------------------------


def adalora(**changes):
    values = {"ratio": 1.5, "start": "budget", "warmup": 0.1, "final": 0.3, "every": 1, "beta1": 0.85, "beta2": 0.85}
    return AdaLoRA(**{**values, "orthogonal": 0.1, **changes})


def test_adalora_has_the_authors_cubic_schedule():
    """6.9.2: b0 = 144, bT = 96, ti = 10, tf = 20, T = 110."""
    live = [adalora().units(step, 144, 96, 10, 90) for step in range(1, 111)]
    assert (live[9], live[49], live[89]) == (144, 102, 96)
    assert all(after <= before for before, after in pairwise(live))
    assert set(live[89:]) == {96}


def test_adalora_cuts_what_grew_back_since_the_last_mask():
    """With ``every`` above 1, in training that ends before the final phase."""
    site = site_of("0.q", 9, 6)
    triplets = SVD("constant", 1.0, 0.0, 0.02).build(site, 3, 0, ALONE)
    with torch.no_grad():
        triplets.E.copy_(torch.tensor([1.0, 0.5, 2.0]))
    kept = {}
    model = SimpleNamespace(held=["0.q"], held_parameters=48, adapter=lambda name: triplets, install=kept.update)
    callback = MaskTriplets(adalora(every=10), None, None, None, False)
    callback.masked = {"0.q": torch.tensor([False, True, False])}
    callback.finish(SimpleNamespace(model=model, most_held=0, penalty=None))
    assert kept["0.q"].E.flatten().tolist() == [1.0, 2.0]
    assert triplets.E.flatten().tolist() == [1.0, 0.0, 2.0]  # so what is cut off did nothing


def test_adalora_masks_ties_together_and_nothing_where_nothing_is_due():
    """6.9.3 and the guard of 6.8."""
    scores = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 2.0, 3.0])}
    assert sum(int((~mask).sum()) for mask in masks(scores, 5 - 4).values()) == 2
    assert not any(mask.any() for mask in masks(scores, 0).values())


def test_adalora_smooths_as_the_recurrence_says():
    """6.9.4: a constant importance c gives ``c (1 - beta^t)``."""
    callback = MaskTriplets(adalora(beta1=0.8, beta2=0.6), None, None, None, False)
    site = site_of("0.q", 3, 2)
    adapter = SVD("constant", 2.0, 0.0, std=0.02).probe(site, 2, 1.0, 0, ALONE).double()
    for parameter in adapter.parameters():
        parameter.grad = 0.5 / parameter.detach()
    deviation = 0.0
    for step in range(1, 6):
        callback._update({"0.q": adapter})
        smooth = 0.5 * (1 - 0.8**step)
        deviation = 0.6 * deviation + 0.4 * (0.5 - smooth)
        for key in "AEB":
            found = callback.sensitivity[f"0.q.{key}"], callback.deviation[f"0.q.{key}"]
            torch.testing.assert_close(found[0], torch.full_like(found[0], smooth))
            torch.testing.assert_close(found[1], torch.full_like(found[1], deviation))


def test_adalora_regulariser_is_0_for_orthonormal_factors():
    """6.9.5, and its value by hand."""
    q, p = torch.linalg.qr(torch.randn(7, 3).double()).Q.T, torch.linalg.qr(torch.randn(5, 3).double()).Q
    adapter = Triplets(q, torch.zeros(3).double(), p, 1.0, 0.0)
    assert irregularity({"x": adapter}).item() == pytest.approx(0, abs=1e-12)
    double = Triplets(2 * q, torch.zeros(3).double(), p, 1.0, 0.0)
    assert irregularity({"x": double}).item() == pytest.approx(3 * math.sqrt(3) / 2)


class _Lit:
    """What the callback needs of a module."""

    def __init__(self, model):
        self.model, self.most_held, self.penalty = model, 0, None

    def note(self, values, step):
        pass


def one_step(whole, inputs, labels, penalty, rate=0.5):
    """Logits, and a step of all that has a gradient but the head."""
    for parameter in whole.parameters():
        parameter.grad = None
    out = whole(**inputs).logits
    (nn.functional.cross_entropy(out, labels) + 0.1 * penalty()).backward()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return out.detach()


def in_pefts_hands(config):
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(make_backbone("bert", dtype=torch.float64), config)
    layers = {key: layer for key, layer in theirs.get_base_model().named_modules() if hasattr(layer, "lora_E")}

    def penalty():
        factors = [getattr(layer, f"lora_{key}")["default"] for layer in layers.values() for key in "AB"]
        products = [f @ f.T if len(f) < len(f.T) else f.T @ f for f in factors]
        return torch.stack([(p - torch.eye(len(p)).double()).norm() for p in products]).mean()

    return theirs, layers, penalty


def test_adalora_is_pefts():
    """The same factors, steps and schedule in PEFT's hands: the same masks at every step, and the same logits."""
    from peft import AdaLoraConfig

    total, first, last = 12, 3, 9
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=first, tfinal=total - last, deltaT=1, total_step=total,
                           lora_alpha=8, target_modules=["query", "value", "intermediate.dense"],
                           lora_dropout=0.0)  # fmt: skip
    theirs, layers, penalty = in_pefts_hands(config)
    backbone, batch = make_backbone("bert", dtype=torch.float64), make_batch(make_backbone("bert", dtype=torch.float64))
    space = SearchSpace([{"kind": "lora", "role": ["q", "v", "up"]}], [], None, [], False, "kind")
    model = AdaptedModel(backbone, space.resolve(survey(backbone)), SVD("constant", 8 / (4 + 1e-5), 0.0, std=0.02))
    model.enable(dict.fromkeys(model.ranks, 4), seed=0)
    pairs = {name: (layers[model.site(name).sink.module], model.adapter(name)) for name in model.held}
    with torch.no_grad():
        for layer, adapter in pairs.values():
            adapter.A.copy_(layer.lora_A["default"])
            adapter.B.copy_(layer.lora_B["default"])
    callback = MaskTriplets(adalora(ratio=2.0, warmup=first, final=total - last), None, None, lambda d: None, False)
    callback.total, callback.first, callback.last = total, first, last
    callback.begin, callback.end = 4 * len(pairs), 2 * len(pairs)
    lit, labels = _Lit(model), batch["labels"]
    triplets = callback._triplets(lit)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    masked = set()
    for step in range(1, total + 1):
        expected = one_step(theirs, inputs, labels, penalty)
        found = one_step(model, inputs, labels, lambda: irregularity(triplets))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        theirs.base_model.update_and_allocate(step)
        callback.after_step(lit, step)
        for layer, adapter in pairs.values():
            torch.testing.assert_close(adapter.E, layer.lora_E["default"].flatten(), rtol=1e-5, atol=1e-8)
        masked.add(tuple(int((adapter.E == 0).sum()) for _, adapter in pairs.values()))
    assert len(masked) > 2
    expected = logits(model, batch)
    callback.finish(lit)
    torch.testing.assert_close(logits(model, batch), expected)  # sliced is masked
    pattern = theirs.peft_config["default"].rank_pattern
    live = {
        name: sum(sum(mask) for key, mask in pattern.items() if model.site(name).sink.module in key) for name in pairs
    }
    assert {name: rank for name, rank in model.ranks.items() if rank} == {n: r for n, r in live.items() if r}
    assert lit.most_held == 4 * sum(model.site(n).in_features + model.site(n).out_features + 1 for n in pairs)


# -- ALoRA (1.9) ------------------------------------------------------------------------------------------------------


def test_alora_gives_and_takes_as_in_the_worked_example():
    """1.9.5: n = 8 over three modules with scores 3 > 2 > 1; with no module left whole, the sum drops."""
    scores = {"a": [3.0, 3.0], "b": [2.0, 2.0], "c": [1.0, 1.0], "d": [0.0] * 9}
    cost, caps = AdditiveCost(dict.fromkeys(scores, 5)), dict.fromkeys(scores, 99)
    kept, ranks = pruned_and_regrown(scores, 8, cost, 10**6, caps)
    assert ranks == {"a": 5, "b": 5, "c": 4, "d": 1}
    assert sum(ranks.values()) == 15
    assert kept["d"] == [8]
    _, ranks = pruned_and_regrown({"a": [1.0, 2.0], "b": [1.0, 2.0]}, 2, cost, 10**6, caps)
    assert ranks == {"a": 1, "b": 1}


def test_alora_never_holds_more_than_the_budget():
    scores = {"narrow": [0.1] * 6, "wide": [1.0] * 2}
    cost, caps = AdditiveCost({"narrow": 2, "wide": 5}), {"narrow": 99, "wide": 99}
    kept, ranks = pruned_and_regrown(scores, 6, cost, 22, caps)
    assert (ranks, kept["narrow"]) == ({"narrow": 0, "wide": 4}, [])
    assert cost(ranks) <= 22
    assert pruned_and_regrown(scores, 99, cost, 22, caps)[1]["wide"] >= 1  # one unit at least stays


class _Whole:
    """A module with a model and a loss, and no more."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch

    def scalar_loss(self, model, batch):
        return nn.functional.cross_entropy(logits(model, batch), batch["labels"])


def small(rank=3):
    backbone = make_backbone("bert", dtype=torch.float64)
    space = SearchSpace([{"kind": "lora", "role": ["q", "up"]}], [], [0, 1], [], False, "kind")
    model = AdaptedModel(backbone, space.resolve(survey(backbone)), LoRA("constant", 2.0, 0.0))
    model.enable(dict.fromkeys(model.ranks, rank), seed=0)
    randomise(model)
    return model.train(), make_batch(backbone)


def test_alora_ablates_one_unit_at_a_time():
    """1.9.1 and 1.9.2, against models whose factors were cut by hand; a unit with B = 0 scores the same as any such."""
    model, batch = small()
    lit = _Whole(model, batch)
    with torch.no_grad():
        model.adapter("0.q").B[:, 1] = 0
        model.adapter("1.up").B[:, 2] = 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = ablation(lit, [batch], ONE_PROCESS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    model.eval()

    def loss_with(keep):
        cut = {}
        for name in model.held:
            adapter = model.adapter(name)
            mask = torch.tensor([float((name, unit) in keep) for unit in range(3)]).double()
            cut[name] = LowRank(adapter.A.detach(), adapter.B.detach() * mask, 2.0, 0.0)
        with model.swapped(cut), torch.no_grad():
            return lit.scalar_loss(model, batch).item()

    every = {(name, unit) for name in model.held for unit in range(3)}
    for name, unit in every:
        expected = loss_with(every - {(name, unit)}) - loss_with({(name, unit)})
        assert scores[name][unit] == pytest.approx(expected, rel=1e-9)
    silent = loss_with(every) - loss_with(set())  # IS = S(base) up to the constant S(M)
    assert scores["0.q"][1] == pytest.approx(silent, rel=1e-9)
    assert scores["0.q"][1] == scores["1.up"][2]


def test_alora_importance_is_twice_the_value_where_the_metric_is_linear():
    """1.9.3: ``S = c + sum g v`` gives ``-S(M without i) + S(M with i alone) = 2 v_i + const``."""
    model, batch = small()

    class Linear(_Whole):
        def scalar_loss(self, model, batch):
            return -sum((model.adapter(n).gates * values[n]).sum() for n in model.held) - 5.0

    torch.manual_seed(0)
    values = {name: torch.randn(3).double() for name in model.held}
    found = ablation(Linear(model, batch), [batch], ONE_PROCESS)
    whole = sum(value.sum() for value in values.values())
    for name, scores in found.items():
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64) + whole, 2 * values[name])


def test_alora_a_gated_adapter_is_the_adapter():
    model, _ = small()
    adapter = model.adapter("0.up")
    x = torch.randn(4, 32).double()
    torch.testing.assert_close(_Gated(adapter)(x), adapter(x))


# -- PARA and LoR2C (10.8) --------------------------------------------------------------------------------------------


def test_para_decomposes_without_changing_the_map():
    adapter = LoRA("constant", -2.0, 0.0).probe(site_of("0.q", 9, 6), 4, 1.0, 0, ALONE).double()
    before = adapter.delta_weight()
    values = decompose(adapter)
    torch.testing.assert_close(adapter.delta_weight(), before)
    singular = torch.linalg.svdvals(before)[:4]
    assert values == pytest.approx(singular.tolist(), rel=1e-9)
    torch.testing.assert_close(adapter.A @ adapter.A.T, torch.diag(singular / 2))
    torch.testing.assert_close(adapter.B.T @ adapter.B, torch.diag(singular / 2))


def test_lor2c_shape_of_the_feature_space():
    """10.8.5, and 0 before anything has moved."""
    assert concentration(torch.tensor([4.0, 2.0, 1.0, 1.0]), 2) == pytest.approx(0.25)
    adapter = LoRA("constant", 2.0, 0.0).build(site_of("0.q", 9, 6), 4, 0, ALONE)
    assert shape_of_features(adapter) == 0.0


def test_lor2c_pairs_are_adjacent_and_have_a_site_that_spans_both():
    backbone = make_backbone("bert")
    space = SearchSpace(["shortcut_attn"], [], None, [2, 4, 6], False, "label").resolve(survey(backbone))
    held = ["0.shortcut_attn", "1.shortcut_attn", "2.shortcut_attn"]
    pairs = mergeable(space, held)
    assert [(first, second) for first, second, _ in pairs] == [(held[0], held[1]), (held[1], held[2])]
    for first, second, whole in pairs:
        assert (space[whole].source, space[whole].sink) == (space[first].source, space[second].sink)
        assert space[whole].span == 4
    longer = next(whole for *_, whole in pairs)
    assert [pair[2] for pair in mergeable(space, [longer, held[2]])] == [
        site.name for site in space.sites if site.span == 6
    ]
    assert not mergeable(space, [held[0], held[2]])


# -- whole runs -------------------------------------------------------------------------------------------------------

TRAINED = ("trainer.checkpoint_every=1", "optimizer.lr=3e-2", "optimizer.warmup=0", "search_space=lora_all")
PRESETS = {
    "eva": ("allocator=eva", "budget.rank=2"),
    "gora": ("allocator=gora", "budget.rank=2"),
    "plop": ("allocator=plop",),
    "alora": ("allocator=alora", "budget=all_r2", "allocation.every=0.5", "allocation.events=1"),
    "adalora": ("allocator=adalora", "budget=all_r2"),
    "adalora_paper": ("allocator=adalora", "budget=all_r2", "allocation.start=paper"),
    "para": ("allocator=para", "budget=all_r2", "allocation.at=0.3"),
    "lor2c": ("allocator=lor2c", "search_space=lor2c", "search_space.spans=[2,4]", "allocation.until=0.6"),
    "lor2c_inject": (
        "allocator=lor2c", "search_space=lor2c", "search_space.spans=[2,4]", "allocation.merges=0",
        "allocation.until=0.6", "allocation.score=mean",
    ),
}  # fmt: skip
CHANGING = [name for name in PRESETS if name not in ("eva", "gora", "plop")]


@pytest.mark.medium
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_within_its_budget_and_loads_again(tmp_path, preset):
    summary = run_job(tmp_path / "a", *TRAINED, *PRESETS[preset])
    parameters, run = summary["parameters"], load_run(tmp_path / "a")
    assert (parameters["held"] <= parameters["budget"]) == (preset != "adalora_paper")
    assert parameters["active"] <= parameters["held"]
    assert parameters["unspent"] == parameters["budget"] - parameters["active"] >= 0
    assert run.model.held_parameters == parameters["active"]
    found = run.predict(run.split("test"))
    written = (tmp_path / "a" / "predictions_test.csv").read_text().splitlines()
    assert len(found) == len(written) - 1
    if preset in CHANGING:
        decisions = read_history(tmp_path / "a" / HISTORY)
        cost = run.model.family.cost(run.model.space.sites)
        assert len({tuple(decision.ranks.items()) for decision in decisions}) > 1
        assert all(cost(decision.ranks) <= parameters["held"] for decision in decisions)
        assert decisions[-1].ranks == json.loads((tmp_path / "a" / "allocation.json").read_text())["ranks"]
        assert (tmp_path / "a" / "history.png").stat().st_size > 1000


@pytest.mark.medium
@pytest.mark.parametrize(
    ("preset", "place"), [*((name, (0, 3)) for name in PRESETS), *((name, (1, 2)) for name in CHANGING)], ids=str
)
def test_a_preset_broken_off_resumes_to_the_same_bits(tmp_path, preset, place):
    chosen = [*TRAINED, *PRESETS[preset]]
    run_job(tmp_path / "whole", *chosen)
    break_off(tmp_path / "first", *chosen, *stop(*place))
    run_job(tmp_path / "second", *chosen, "resume=true")
    assert what_came_out(tmp_path / "whole") == what_came_out(tmp_path / "second")


@pytest.mark.medium
def test_lor2c_moves_what_was_learned_to_the_merged_shortcut(tmp_path):
    """10.8.5: what comes is trained on, from where its kept member was; the count falls by one adapter."""
    run_job(tmp_path / "a", *TRAINED, *PRESETS["lor2c"], "allocation.injections=0")
    first, last = read_history(tmp_path / "a" / HISTORY)
    assert sum(map(bool, first.ranks.values())) - sum(map(bool, last.ranks.values())) == 1
    (merged,) = [name for name, rank in last.ranks.items() if rank and not first.ranks[name]]
    assert merged.endswith("_s4")
    assert "become" in last.reason
    assert float(last.reason.split("jump ")[1]) < 1.0
    adapter = load_run(tmp_path / "a").model.adapter(merged)
    assert adapter.B.any()


REFUSED = [
    (["allocation=adalora"], r"adapter=LoRA: allocation=adalora masks singular values: adapter=svd"),
    (["allocator=adalora", "allocation.warmup=0.6", "allocation.final=0.6"], "leave no step"),
    (["allocator=adalora", "allocation.ratio=0.5"], r"allocation\.ratio=0\.5"),
    (
        ["allocation=alora", "adapter=tied_lora"],
        r"adapter=TiedLoRA: allocation=alora changes ranks in training, which it cannot",
    ),
    (
        ["allocation=alora", "adapter=lora_xs", "adapter.scaling=constant", "search_space=lora_all"],
        "moves single units",
    ),
    (
        ["allocation=alora", "adapter=dora", "search_space=lora_all"],
        "adapter=DoRA: allocation=alora moves single units",
    ),
    (["baseline=peft_lora", "init=eva", "search_space=lora_all"], "init=eva: with baseline=peft_lora: none"),
    (["allocation=alora", "adapter=rslora"], r"adapter\.scaling=alpha_over_sqrt_r"),
    (["allocation=para", "adapter=svd"], r"adapter=SVD: allocation=para writes"),
    (["allocation=dynamic", "adapter=vera"], r"allocation=dynamic: VeRA cannot be switched"),
    (["allocation=dynamic", "adapter=prolora"], r"allocation=dynamic: .*PRoLoRA depend on the rank"),
    (["init=eva", "adapter=prolora"], r"init=EvaInit: fills LoRA's A and B, not those of PRoLoRA"),
    (["init=gora", "allocation=dynamic"], r"init=gora: fills the first adapters alone"),
    (["init=gora", "init.gamma=-1"], r"init\.gamma=-1"),
    (["allocation=lor2c"], r"search_space\.spans=2: merged shortcuts are longer"),
    (["allocation=lor2c", "allocation.merges=0", "allocation.injections=0"], "no event at all"),
    (["allocator=uniform", "allocator.groups=[x]"], r"allocator\.groups=\['x'\]: no such groups"),
    (["allocator=redistribute", "allocator.rho=0.5"], r"allocator\.rho=0\.5"),
    (["allocator=redistribute", "adapter=tied_lora"], "needs a price for each site"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(each) for each, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(tmp_path, overrides, message):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunFailed, match=message) as caught:
        train(prepare(tmp_path / "a", *overrides))
    assert "\n" not in str(caught.value)
