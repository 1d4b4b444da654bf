"""The search leaves no trace, and refuses early."""

import json

import pytest
import torch

from heterolora.allocators.fixed import Fixed
from heterolora.allocators.greedy import Greedy
from heterolora.allocators.top import Top
from heterolora.allocators.uniform import Uniform
from heterolora.budget import Fraction, Params, UniformRank
from heterolora.errors import SettingError
from heterolora.proxies.grad_norm import GradNorm
from heterolora.proxies.spectral import Spectral
from heterolora.scoring import search
from tests.architectures import make_backbone, make_batch
from tests.conftest import adapt, randomise, some_sites
from tests.test_proxies import loss, probe

GREEDY = Greedy(0, 8, "harmonic", "none", None, exact=False, seed=0)


def run(model, allocator=GREEDY, budget=None, proxy=None, batches=None, **changes):
    batches = [make_batch(model.backbone, seed=seed) for seed in (3, 4)] if batches is None else batches
    return search(
        model,
        loss,
        batches,
        batches,
        proxy=proxy or Spectral(),
        allocator=allocator,
        budget=budget or Params(3000, None),
        probe=probe(**changes),
        seed=0,
    )


def test_it_leaves_no_trace(adapted):
    first, second, _ = some_sites(adapted)
    adapted.enable({first: 2, second: 3}, seed=0)
    randomise(adapted)
    adapted.switch_off([second])
    adapted.train()
    adapted.backbone.base_model.eval()  # an unusual mixture of modes must survive too
    head = [p for n, p in adapted.backbone.named_parameters() if n in adapted.head]
    head[0].grad = torch.full_like(head[0], 3.0)
    optimizer = torch.optim.AdamW(head)
    state = {key: value.clone() for key, value in adapted.state_dict().items()}
    modes = [module.training for module in adapted.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.modules())
    random = torch.get_rng_state()
    run(adapted, head_warmup_steps=4)
    run(adapted, head_warmup_steps=4, live=True)
    after = adapted.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert [module.training for module in adapted.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(head[0].grad, torch.full_like(head[0], 3.0))
    assert all(p.grad is None for p in adapted.adapters.parameters())
    assert not optimizer.state
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.modules()) == hooks
    assert adapted.ranks[first] == 2
    assert adapted.active_parameters < adapted.held_parameters


def test_it_leaves_no_trace_after_an_error(adapted):
    adapted.train()
    head = {n: p.clone() for n, p in adapted.backbone.named_parameters() if n in adapted.head}
    calls = []

    def broken(model, batch):
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError
        return loss(model, batch)

    batches = [make_batch(adapted.backbone, seed=seed) for seed in (3, 4)]
    with pytest.raises(ZeroDivisionError):
        search(
            adapted, broken, batches, batches, proxy=GradNorm(), allocator=GREEDY, budget=Params(3000, None),
            probe=probe(head_warmup_steps=4), seed=0,
        )  # fmt: skip
    assert all(torch.equal(dict(adapted.backbone.named_parameters())[n], p) for n, p in head.items())
    assert adapted.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapted.modules())


def test_dropout_is_off_while_scoring(architecture):
    quiet, noisy = (adapt(make_backbone(architecture, dropout=p).train()) for p in (0.0, 0.5))
    assert run(quiet).scores == run(noisy).scores


def test_the_allocation_keeps_to_the_budget_and_enables_nothing(adapted):
    result = run(adapted)
    assert adapted.held_parameters == 0
    adapted.enable(result.allocation.ranks, seed=0)
    assert adapted.held_parameters == result.allocation.spent <= 3000


def test_allocators_that_look_at_no_scores_cost_no_pass(adapted):
    result = run(adapted, allocator=Uniform(None), budget=UniformRank(4, None, None), batches=[])
    assert result.scores is None
    assert len(set(result.allocation.ranks.values())) == 1


def test_what_cannot_go_together_is_refused_before_scoring(adapted):
    with pytest.raises(SettingError, match="allocator=greedy"):
        run(adapted, budget=Fraction(0.25, 2, None), batches=[])
    with pytest.raises(SettingError, match="cheapest site costs"):
        run(adapted, budget=Params(3, None), batches=[])


def test_fraction_and_top(adapted):
    result = run(adapted, allocator=Top("combined", 2, "none", 0), budget=Fraction(0.25, 2, None))
    assert set(result.allocation.active.values()) == {2}
    assert result.allocation.budget is None


def test_fixed_repeats_an_allocation(adapted, tmp_path):
    found = run(adapted).allocation
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(found.as_dict()))
    again = run(adapted, allocator=Fixed(str(path), None), batches=[]).allocation
    assert again.ranks == found.ranks
    assert again.spent == found.spent


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("std", 0.0),
        ("rank", 0),
        ("batches", 0),
        ("head_warmup_steps", -1),
        ("head_warmup_lr", 0.0),
        ("adapter_warmup_steps", -1),
        ("adapter_warmup_lr", 0.0),
    ],
)
def test_probe_refuses_impossible_values(name, value):
    with pytest.raises(SettingError, match=name):
        probe(**{name: value})


def test_limits_that_cannot_be_kept_are_refused_before_scoring(adapted):
    with pytest.raises(SettingError, match=r"allocator\.limits\.nobody"):
        run(
            adapted,
            allocator=Greedy(0, 8, "harmonic", "none", {"nobody": {"max_rank": 1}}, exact=False, seed=0),
            batches=[],
        )
    with pytest.raises(SettingError, match=r"min_rank=4: costs"):
        run(adapted, allocator=Greedy(4, 8, "harmonic", "none", None, exact=False, seed=0), batches=[])
