"""alpha_test against brute force over all gates, and that neither skipping blocks nor warming up leaves a trace."""

import logging
import math

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import heterolora
from heterolora.adapters.lora import LoRA
from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.prefix import Waypoints
from heterolora.proxies.alpha_test import AlphaTest, Gated, Trial
from heterolora.proxies.base import DegenerateScores
from heterolora.proxies.evidence import Bench, MeanLoss
from heterolora.proxies.grad_norm import GradNorm
from heterolora.proxies.snip import Snip
from heterolora.scoring import score, score_all, untracked
from heterolora.shipped import option
from heterolora.tasks.measure import FirstMetric
from heterolora.warmup import warm_up_adapters
from tests.architectures import ARCHITECTURES, KINDS, make_backbone, make_batch, shown
from tests.conftest import adapt, randomise
from tests.surroundings import ALONE
from tests.test_model import logits
from tests.test_prefix import SEVERAL
from tests.test_proxies import loss, probe

SKIPPING = sorted(set(ARCHITECTURES) - SEVERAL)
BATCHES = 4
GATES = [k / 10 for k in range(11)]
TRAINING = {"head_warmup_steps": 2, "adapter_warmup_steps": 4, "adapter_warmup_lr": 5e-2}


class Accuracy:
    """The share of right answers, computed without torchmetrics."""

    name, mode = "accuracy", "max"

    def __init__(self, constant=None):
        self.constant = constant

    def outputs(self, model, batch):
        return logits(model, batch)

    def value(self, outputs, batches):
        right = [out.argmax(-1) == batch["labels"] for out, batch in zip(outputs, batches, strict=True)]
        return sum(row.sum().item() for row in right) / sum(len(row) for row in right)

    def of_a_constant(self, batches):
        return self.constant


class Told(Accuracy):
    """Whatever a list says, one value after the other."""

    def __init__(self, values, mode="max", constant=None):
        super().__init__(constant)
        self.values, self.mode = iter(values), mode

    def value(self, outputs, batches):
        return next(self.values)


def trained(architecture, include=("lora", "shortcut"), std=0.2, dtype=torch.float64):
    """A model that holds random adapters of rank 2 at every site, and batches whose labels it answers right."""
    spans = (1,) if architecture in SEVERAL else (1, 2)  # these have many sites, and no block of theirs is skipped
    model = adapt(make_backbone(architecture, dtype=dtype), include, spans=spans)
    model.enable({site.name: 2 for site in model.space.sites}, seed=0)
    randomise(model, std=std)
    batches = [make_batch(model.backbone, seed=seed) for seed in range(3, 3 + BATCHES)]
    with torch.no_grad():
        for batch in batches:
            batch["labels"] = logits(model, batch).argmax(-1)
    return model, batches


def scores(model, batches, tolerance=0.01, measure=None, **changes):
    proxy = AlphaTest(tolerance, "task")
    return score(model, loss, batches, batches, proxy=proxy, probe=probe(**changes), seed=3, measure=measure)


def by_hand(model, batches, value):
    """Every second site -> the metric under each of the 11 gates: its B is multiplied, and the whole model runs."""
    found = {}
    for name in model.held[::2]:
        found[name], factor = [], model.adapter(name).B
        given = factor.detach().clone()
        for gate in GATES:
            with torch.no_grad():
                factor.copy_(gate * given)
                found[name].append(value(model, batches))
    return found


def accuracy(model, batches):
    return Accuracy().value([logits(model, batch) for batch in batches], batches)


def mean_loss(model, batches):
    return sum(loss(model, batch).item() for batch in batches) / len(batches)


def smallest(kept):
    """The smallest gate from which on all are kept; None where that is not what binary search must find."""
    first = kept.index(True)
    return GATES[first] if all(kept[first:]) else None


@pytest.mark.parametrize("architecture", shown(KINDS, ("llama",)))
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_it_is_the_smallest_of_all_gates_where_the_metric_is_monotone(architecture, tolerance):
    model, batches = trained(architecture, std=0.3)
    expected = {
        name: smallest([value >= (1 - tolerance) * values[-1] for value in values])
        for name, values in by_hand(model, batches, accuracy).items()
    }
    found = scores(model, batches, tolerance, Accuracy())
    monotone = [name for name, gate in expected.items() if gate is not None]
    assert len(monotone) > len(expected) / 2
    assert len({expected[name] for name in monotone}) > 2
    assert {name: found[name] for name in monotone} == {name: expected[name] for name in monotone}


@pytest.mark.parametrize("architecture", shown(KINDS, ("bert",)))
def test_without_a_metric_the_loss_may_rise_by_the_tolerance(architecture):
    model, batches = trained(architecture)
    for batch in batches:  # a loss that each delta changes a little, one way or the other
        batch["labels"] = (batch["labels"] + torch.arange(4)) % 3
    expected = {}
    for name, values in by_hand(model, batches, mean_loss).items():
        assert all(abs(value / values[-1] - 1.01) > 1e-9 for value in values)
        expected[name] = smallest([value <= 1.01 * values[-1] for value in values])
    found = scores(model, batches)
    monotone = [name for name, gate in expected.items() if gate is not None]
    assert len({expected[name] for name in monotone}) > 1
    assert {name: found[name] for name in monotone} == {name: expected[name] for name in monotone}
    loss_alone = {"proxy": AlphaTest(0.01, "loss"), "probe": probe(), "seed": 3, "measure": Accuracy()}
    assert score(model, loss, batches, batches, **loss_alone) == found


def test_a_gate_of_1_is_the_full_metric_and_the_frozen_layer_is_not_gated():
    model, batches = trained("bert")
    gated = {name: Gated(model.adapter(name)) for name in model.held}
    with torch.no_grad():
        expected = [logits(model, batch) for batch in batches]
        with model.swapped(gated):
            assert all(torch.equal(logits(model, b), e) for b, e in zip(batches, expected, strict=True))
            for gate in gated.values():
                gate.gate = 0.0
            off = logits(model, batches[0])
        with model.disabled():
            assert torch.equal(off, logits(model, batches[0]))


def test_what_does_nothing_scores_0_and_what_turns_predictions_scores_high():
    model = adapt(make_backbone("bert"), ["lora"], spans=(1,))
    names = [site.name for site in model.space.sites]
    model.enable(dict.fromkeys(names, 1), seed=0)
    randomise(model, std=1e-9)
    silent, planted = names[3], names[-2]
    with torch.no_grad():
        model.adapter(silent).B.zero_()
        model.adapter(planted).A.normal_(0, 30.0, generator=torch.Generator().manual_seed(1))
        model.adapter(planted).B.normal_(0, 1.0, generator=torch.Generator().manual_seed(2))
    batches = [make_batch(model.backbone, rows=8, seed=seed) for seed in (3, 4)]
    with torch.no_grad():
        for batch in batches:
            batch["labels"] = logits(model, batch).argmax(-1)
        with model.disabled():
            assert accuracy(model, batches) < 0.9  # without the planted one, predictions turn
    found = scores(model, batches, measure=Accuracy())
    assert found[planted] > 0
    assert all(value == 0 for name, value in found.items() if name != planted)


def test_sites_that_hold_nothing_or_are_off_score_0():
    model, batches = trained("bert", ["shortcut"], std=0.3)
    first, second, *_ = reversed(model.held)
    kept = [name for name in model.held if name not in (first, second)]
    expected = scores(model, batches)
    state = model.adapter_state_dict()
    model.enable(dict.fromkeys([*kept, second], 2), seed=0)
    model.load_adapter_state_dict({k: v for k, v in state.items() if k.rpartition(".")[0] != first})
    model.switch_off([second])
    found = scores(model, batches)
    assert found.keys() == expected.keys()
    assert found[first] == found[second] == 0


# -- what a start above the first blocks gives ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", shown(SKIPPING, KINDS))
def test_a_start_at_any_block_gives_the_bits_of_the_whole_forward_whatever_changes_above(architecture):
    model = adapt(make_backbone(architecture))  # spans up to 4: deltas that join above what they read
    model.enable({site.name: 2 for site in model.space.sites}, seed=0)
    randomise(model)
    gated = {name: Gated(model.adapter(name)) for name in model.held}
    batch, points = make_batch(model.backbone), Waypoints(model)
    with torch.no_grad(), model.swapped(gated):
        whole = logits(model, batch)
        assert torch.equal(points.note(lambda: logits(model, batch), range(3)), whole)
        assert all(map(points.can_start, range(3)))
        changed = 0
        for site in model.space.sites:
            gated[site.name].gate = 0.3
            found = points.resumed(lambda: logits(model, batch), site.layer)
            expected = logits(model, batch)
            assert torch.equal(found, expected), site.name
            changed += not torch.equal(expected, whole)
            gated[site.name].gate = 1.0
        assert changed > len(gated) / 2
        assert torch.equal(points.resumed(lambda: logits(model, batch), 1), whole)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model._paused


def test_blocks_below_the_start_do_not_run():
    model, (batch, *_) = trained("llama")
    ran, points = [], Waypoints(model)
    for number, block in enumerate(model.backbone.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        points.note(lambda: logits(model, batch), [0, 1, 2])
        ran.clear()
        points.resumed(lambda: logits(model, batch), 2)
        assert ran == [2]
        points.resumed(lambda: logits(model, batch), 0)
    assert ran == [2, 0, 1, 2]


def test_a_forward_that_fails_leaves_blocks_and_hooks_as_they_were():
    model, (batch, *_) = trained("bert")
    points = Waypoints(model)
    with torch.no_grad():
        expected = points.note(lambda: logits(model, batch), [1])
        with pytest.raises(ZeroDivisionError):
            points.resumed(lambda: (logits(model, batch), 1 / 0), 1)
        with pytest.raises(ZeroDivisionError):
            points.note(lambda: 1 / 0, [1])
        assert torch.equal(logits(model, batch), expected)


def gated_trial(model, batches, measure=None):
    gated = {name: Gated(model.adapter(name)) for name in model.held}
    return gated, Trial(Bench(model, batches, loss, False, "mean", untracked, measure), gated, "task")


@pytest.mark.parametrize("architecture", shown(KINDS, ("bert", "t5_gated")))
def test_skipping_changes_no_metric_and_saves_what_is_said(architecture):
    model, batches = trained(architecture)
    gated, trial = gated_trial(model, batches)
    with torch.no_grad(), model.swapped(gated):
        base = trial.base()
        assert (trial.reason is None) == (architecture not in SEVERAL)
        assert trial.whole_passes == trial.blocks / (3 if trial.reason is None else trial._depth)
        spent, passes = trial.whole_passes, trial.passes
        found = trial.measured(dict.fromkeys(gated, 0.5))
        spent, passes = trial.whole_passes - spent, trial.passes - passes
        trial.reason = "the test says so"
        assert trial.measured(dict.fromkeys(gated, 0.5)) == found
        assert base == MeanLoss(loss).value([loss(model, batch) for batch in batches], batches)
    if architecture in SEVERAL:
        assert passes == BATCHES * len(gated) == pytest.approx(spent)
    else:  # three blocks: a site of block b needs the last 3 - b of them, and one pass notes
        layers = [site.layer for site in model.space.sites]
        assert passes == BATCHES * (len(gated) + 1)
        assert spent == pytest.approx(BATCHES * (1 + sum((3 - layer) / 3 for layer in layers)))


def test_blocks_that_hand_on_more_than_a_hidden_state_run_whole(caplog):
    model, batches = trained("bert")
    beside = []  # what the first block gives to the last one past the second
    layers = model.backbone.bert.encoder.layer
    layers[0].intermediate.register_forward_hook(lambda module, args, output: beside.append(output.std()))
    layers[2].register_forward_hook(lambda module, args, output: output * (beside.pop() if beside else 1.0))
    gated, trial = gated_trial(model, batches)
    with torch.no_grad(), model.swapped(gated), caplog.at_level(logging.INFO):
        assert trial.base() == MeanLoss(loss).value([loss(model, batch) for batch in batches], batches)
        assert "hand on more than the hidden state" in caplog.text
        blocks = trial.blocks
        trial.measured(dict.fromkeys(gated, 0.5))
        assert trial.blocks - blocks == BATCHES * len(gated) * len(layers)


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", range(11))
def test_binary_search_finds_every_threshold_in_five_looks_and_0_in_one(threshold):
    asked = []

    class Stub:
        measure = Told([])

        def measured(self, gates):
            asked.append(gates["x"])
            return {"x": 1.0 if round(gates["x"] * 10) >= threshold else 0.5}

    assert AlphaTest(0.01, "task")._search(Stub(), ["x"], 1.0) == {"x": threshold}
    assert asked[0] == 0.0
    assert len(asked) <= (1 if threshold == 0 else 5)
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("mode", "base", "kept", "lost"),
    [
        ("max", 0.8, 0.793, 0.791),  # as the paper: 0.8 * 0.99
        ("min", 2.0, 2.019, 2.021),  # as the paper: 2 * 1.01
        ("max", -0.5, -0.504, -0.506),  # a negative correlation: the same distance downwards
        ("max", 0.0, 0.0, -1e-6),
        ("min", 0.0, -1.0, 1e-6),
        ("max", 0.8, 0.9, math.nan),
    ],
)
def test_the_tolerance_is_relative_to_the_metrics_size(mode, base, kept, lost):
    proxy = AlphaTest(0.01, "task")
    assert proxy.keeps(base, base, mode)
    assert proxy.keeps(kept, base, mode)
    assert not proxy.keeps(lost, base, mode)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, math.nan])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(SettingError, match="tolerance="):
        AlphaTest(tolerance, "task")


def test_a_metric_that_is_not_defined_is_refused_and_one_like_chance_is_told(caplog):
    model, batches = trained("bert", ["shortcut"], std=0.3)
    with pytest.raises(DegenerateScores, match=r"accuracy of the trained adapters is nan.*probe\.adapter_warmup_steps"):
        scores(model, batches, measure=Told([math.nan]))
    assert scores(model, batches, measure=Accuracy(constant=0.99))  # all are right, as labels were made
    assert "noise" not in caplog.text
    scores(model, batches, measure=Accuracy(constant=1.0))
    assert "accuracy on the scoring batches is 1.0000, and the same answer to every example has 1.0000" in caplog.text


def test_gates_that_are_all_equal_are_refused_with_what_would_help():
    model, batches = trained("bert", std=1e-9)
    with pytest.raises(DegenerateScores, match=r"every score is 0.*probe\.adapter_warmup_steps.*proxy\.tolerance"):
        scores(model, batches, measure=Accuracy())


# -- trained adapters -------------------------------------------------------------------------------------------------


def test_without_trained_adapters_it_is_refused_before_anything_is_computed():
    model = adapt(make_backbone("bert"))
    with pytest.raises(SettingError, match=r"probe\.adapter_warmup_steps=0: proxy=alphatest needs trained adapters"):
        scores(model, [])
    model.enable({site.name: 1 for site in model.space.sites}, seed=0)  # B = 0: as good as none
    with pytest.raises(SettingError, match=r"probe\.adapter_warmup_steps=0"):
        scores(model, [], live=True)


def test_the_warm_up_leaves_no_trace_and_repeats_to_the_bit():
    model, batches = trained("bert")
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = scores(model, batches, **TRAINING)
    assert torch.equal(torch.get_rng_state(), random)
    torch.rand(5)
    assert scores(model, batches, **TRAINING) == first
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    model.enable({}, seed=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.backbone.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def warmed(steps, lr=1e-2, head_lr=1e-2, seed=0):
    model = adapt(make_backbone("bert"), ["lora"], spans=(1,))
    batches = [make_batch(model.backbone, rows=8, seed=seed) for seed in (3, 4)]
    adapters = {s.name: LoRA("constant", 2.0, 0.5).build(s, 2, seed, ALONE).double() for s in model.space.sites}
    head = {name: p.detach().clone() for name, p in model.head_parameters.items()}
    before = {name: adapter.A.detach().clone() for name, adapter in adapters.items()}
    with model.swapped(adapters):
        starts = sum(loss(model, batch).item() for batch in batches)
        gradients = dict(
            zip(adapters, torch.autograd.grad(loss(model, batches[0]), [a.B for a in adapters.values()]), strict=True)
        )
    stream = iter(batches * 50)
    warm_up_adapters(model, loss, stream, adapters, steps, lr, head_lr, untracked)
    with torch.no_grad(), model.swapped(adapters):
        ends = sum(loss(model, batch).item() for batch in batches)
    return model, adapters, head, before, gradients, starts, ends


def test_the_first_step_is_adamws():
    """Adam's first step is the rate times the gradient's sign; at B = 0 there is no gradient for A."""
    model, adapters, head, before, gradients, _, _ = warmed(1, lr=1e-3, head_lr=1e-2)
    for name, adapter in adapters.items():
        g = gradients[name]
        torch.testing.assert_close(adapter.B.detach(), -1e-3 * g / (g.abs() + 1e-8), rtol=1e-9, atol=1e-12)
        assert torch.equal(adapter.A, before[name])
        assert adapter.A.grad is None
        assert adapter.B.grad is None
    moved = [(p - head[name]).abs().max().item() for name, p in model.head_parameters.items()]
    assert max(moved) == pytest.approx(1e-2, rel=1e-3)
    assert model.held == []


def test_it_trains_head_and_adapters_together_in_evaluation_mode():
    *_, starts, ends = warmed(40)
    assert ends < 0.5 * starts
    first, second = warmed(5), warmed(5)  # the adapters' dropout would draw
    assert all(torch.equal(first[1][name].B, adapter.B) for name, adapter in second[1].items())
    assert first[-1] == second[-1]


def test_a_warm_up_that_diverges_or_has_no_batches_is_refused():
    model, batches = trained("bert")
    broken = [dict(batch) for batch in batches]

    def nan(m, batch):
        return loss(m, batch) * math.nan

    with pytest.raises(FloatingPointError, match=r"adapter warm-up step 1 is nan; lower probe\.adapter_warmup_lr"):
        score(
            model, nan, broken, broken, proxy=AlphaTest(0.01, "task"), probe=probe(adapter_warmup_steps=2), seed=0
        )  # fmt: skip
    with pytest.raises(SettingError, match=r"probe\.adapter_warmup_steps=2: there are no batches"):
        score(model, loss, batches, [], proxy=AlphaTest(0.01, "task"), probe=probe(adapter_warmup_steps=2), seed=0)


def both(model, batches, **changes):
    proxies = {"snip": Snip(), "alpha_test": AlphaTest(0.01, "task"), "grad_norm": GradNorm()}
    return score_all(model, loss, batches, batches, proxies=proxies, probe=probe(**TRAINING | changes), seed=3)


def test_beside_others_each_scores_as_alone():
    """The others look at the pretrained function; the warm-up comes after them."""
    model = adapt(make_backbone("bert"), ["shortcut"])
    batches = [make_batch(model.backbone, rows=8, seed=seed) for seed in (3, 4, 5)]
    found = both(model, batches)
    assert list(found.scores) == ["snip", "alpha_test", "grad_norm"]
    assert found.scores["alpha_test"] == scores(model, batches, **TRAINING)
    settings = {"seed": 3, "proxy": GradNorm()}
    assert found.scores["grad_norm"] == score(
        model, loss, batches, batches, probe=probe(head_warmup_steps=2), **settings
    )
    record = found.notes["alpha_test"]
    assert record["metric"] == "loss"
    assert record["forward passes"] > record["as whole passes"] > len(batches)
    assert found.notes.keys() == {"alpha_test"}


def test_live_probes_are_the_trained_adapters_for_all():
    """SNIP is zero at B = 0; grad_norm is that of the trained factors, by autograd."""
    model = adapt(make_backbone("bert"))
    batches = [make_batch(model.backbone, rows=8, seed=seed) for seed in (3, 4, 5)]
    found = both(model, batches, live=True, init="lora", head_warmup_steps=0)
    assert all(value > 0 for value in found.scores["snip"].values())
    adapters = {s.name: model.family.build(s, 1, 3, ALONE).double() for s in model.space.sites}
    warm_up_adapters(model, loss, iter(batches * 2), adapters, 4, 5e-2, 1e-3, untracked)
    with model.swapped(adapters):
        value = sum(loss(model, batch) for batch in batches) / len(batches)
        parameters = [p for a in adapters.values() for p in (a.A, a.B)]
        slopes = iter(torch.autograd.grad(value, parameters))
    for name in adapters:
        assert found.scores["grad_norm"][name] == pytest.approx((next(slopes).norm() + next(slopes).norm()).item())


def test_steps_that_nobody_asks_for_are_told(caplog):
    model = adapt(make_backbone("bert"))
    batches = [make_batch(model.backbone, seed=seed) for seed in (3, 4)]
    settings = {"proxy": GradNorm(), "seed": 3}
    plain = score(model, loss, batches, batches, probe=probe(), **settings)
    assert not caplog.text
    assert score(model, loss, batches, batches, probe=probe(adapter_warmup_steps=4), **settings) == plain
    assert "probe.adapter_warmup_steps=4: plays no part" in caplog.text


# -- a task's metric --------------------------------------------------------------------------------------------------


def task(name, **changes):
    return build(option("task", name) | changes, "task")


def labelled(labels, sizes=(5, 7)):
    return [{"labels": part} for part in torch.split(torch.tensor(labels), sizes)]


LABELS = [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("metric", "ours"), [("accuracy", accuracy_score), ("f1", f1_score), ("matthews", matthews_corrcoef)]
)
def test_the_first_metric_is_scikit_learns_over_all_batches(metric, ours):
    measure = FirstMetric(task("mrpc", metrics=[metric]))
    batches = labelled(LABELS)
    given = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    value = measure.value(list(given.split((5, 7))), batches)
    assert value == pytest.approx(ours(LABELS, given.argmax(-1)), rel=1e-6)
    constants = [ours(LABELS, [code] * 12) for code in (0, 1)]
    assert measure.of_a_constant(batches) == pytest.approx(max(constants), rel=1e-6)
    assert (measure.name, measure.mode) == (metric, "max")


@pytest.mark.parametrize(("metric", "mode", "constant"), [("mse", "min", 1.25), ("pearson", "max", 0.0)])
def test_a_constant_answer_to_numbers_is_their_mean(metric, mode, constant):
    measure = FirstMetric(task("stsb", metrics=[metric], mode=mode))
    batches = labelled([1.0, 2.0, 3.0, 4.0], (2, 2))
    assert measure.of_a_constant(batches) == pytest.approx(constant)  # the variance; not defined, so 0


# -- from outside -----------------------------------------------------------------------------------------------------


def test_the_library_goes_by_the_loss_and_takes_a_model_with_trained_adapters():
    model, batches = trained("bert", ["shortcut"])
    given = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    labels = {id(batch["input_ids"]): batch["labels"] for batch in batches}

    def loss_fn(backbone, batch):
        return torch.nn.functional.cross_entropy(backbone(**batch).logits, labels[id(batch["input_ids"])])

    settings = {"proxy": AlphaTest(0.01, "task"), "probe": probe(), "budget": 300}
    found = heterolora.search(model, given, loss_fn, **settings)
    assert found.scores == scores(model, batches[:2])
    plain = make_backbone("bert")
    with pytest.raises(SettingError, match=r"probe\.adapter_warmup_steps=0: proxy=alphatest"):
        heterolora.search(plain, given, loss_fn, **settings)
    taken = []
    endless = (taken.append(1) or given[len(taken) % BATCHES] for _ in range(100))
    heterolora.search(plain, endless, loss_fn, "shortcuts", **settings | {"probe": probe(**TRAINING)})
    assert len(taken) == 2 + 2 + 4  # scored, for the head, for the adapters
