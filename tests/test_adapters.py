"""The map of an adapter in two parts, and what a training step does not compute."""

from collections import Counter

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from heterolora.adapters.lora import LoRA, LowRank
from heterolora.model import AdaptedModel
from heterolora.space import SearchSpace, survey
from tests.architectures import ARCHITECTURES, KINDS, make_backbone, make_batch, shown
from tests.conftest import adapt, randomise
from tests.test_model import gradients, logits, ranks_everywhere


def low_rank(out=5, rank=2, width=4, scale=0.5, dropout=0.0):
    torch.manual_seed(0)
    return LowRank(torch.randn(rank, width).double(), torch.randn(out, rank).double(), scale, dropout)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rows", [(6,), (2, 3), (1, 2, 3)], ids=str)
def test_both_derivatives_agree_with_numerical_ones(in_place, rows):
    adapter = low_rank()

    def added(value, narrow, b):
        adapter.B = torch.nn.Parameter(torch.empty(0))
        del adapter._parameters["B"]
        adapter.B = b
        return adapter.add(value * 1, narrow, in_place)  # gradcheck's own values must not be overwritten

    torch.manual_seed(1)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((*rows, 5), (*rows, 2), (5, 2))
    ]
    assert gradcheck(added, inputs)
    assert gradgradcheck(added, inputs)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_two_parts_are_the_map(in_place):
    adapter, x, value = low_rank(), torch.randn(2, 3, 4).double(), torch.randn(2, 3, 5).double()
    expected = value + 0.5 * x @ adapter.A.T @ adapter.B.T
    added = adapter.add(value, functional.linear(x, adapter.down), in_place)
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(value + adapter(x) if not in_place else added, expected)
    assert (added.data_ptr() == value.data_ptr()) == in_place


def test_an_overwritten_value_that_somebody_saved_is_found_out():
    adapter, x = low_rank(), torch.randn(3, 4).double()
    value = torch.randn(3, 5).double().requires_grad_() * 1
    saved = value.square()  # keeps value for its backward pass
    added = adapter.add(value, functional.linear(x, adapter.down), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (saved + added).sum().backward()


def test_dropout_acts_on_each_adapter_alone():
    assert low_rank(dropout=0.5).train().down is None
    assert low_rank(dropout=0.5).eval().down is not None


def everywhere(architecture, monkeypatch=None):
    model = adapt(make_backbone(architecture, dtype=torch.float64).train())
    model.enable(ranks_everywhere(model, 2), seed=0)
    if monkeypatch is not None:
        monkeypatch.setattr(LowRank, "down", None)
    return model, make_batch(model.backbone)


@pytest.mark.parametrize("architecture", shown(sorted(ARCHITECTURES), KINDS))
def test_two_parts_give_the_gradients_of_the_whole(architecture, monkeypatch):
    """Of every architecture: side by side layers, shared blocks, layers that are called twice, cross-attention."""
    parts, batch = everywhere(architecture)
    randomise(parts)
    found = gradients(parts, batch)
    monkeypatch.setattr(LowRank, "down", None)
    for name, expected in gradients(parts, batch).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", shown(sorted(ARCHITECTURES), KINDS))
def test_zero_deltas_in_two_parts_leave_the_value_bit_identical(architecture, monkeypatch):
    model, batch = everywhere(architecture)
    found = logits(model, batch)
    monkeypatch.setattr(LowRank, "down", None)
    assert torch.equal(found, logits(model, batch))


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.shapes[tuple(result.shape)] += 1
        return result


def placed(include, layers=None, architecture="bert", ranks=3):
    backbone = make_backbone(architecture).train()
    space = SearchSpace(include, [], layers, [1, 2], False, "kind").resolve(survey(backbone))
    model = AdaptedModel(backbone, space, LoRA("constant", 2.0, 0.0), ["classifier.weight", "classifier.bias"])
    model.enable({site.name: ranks for site in space.sites}, seed=0)
    randomise(model)
    return model, make_batch(backbone)


def test_q_k_and_v_share_one_product():
    model, batch = placed([{"kind": "lora", "role": ["q", "k", "v"]}], layers=[1])
    tokens = batch["input_ids"].numel()
    with Products() as products:
        logits(model, batch)
    assert products.shapes[(tokens, 9)] == 1
    assert products.shapes[(tokens, 3)] == 0
    assert not model._run.narrow  # nothing of a forward stays


def test_a_layer_that_is_called_alone_computes_its_own_part():
    model, _ = placed([{"kind": "lora", "role": ["q", "k", "v"]}], layers=[1])
    attention = model.backbone.bert.encoder.layer[1].attention.self
    x, other = torch.randn(2, 2, 3, 32, dtype=torch.float64)
    expected = [x @ layer.weight.T + layer.bias + model.adapter(f"1.{role}")(x) for role, layer in
                (("q", attention.query), ("k", attention.key), ("v", attention.value))]  # fmt: skip
    attention.query(x)
    attention.value(other)
    attention.query(other)
    for layer, value in zip((attention.query, attention.key, attention.value), expected, strict=True):
        torch.testing.assert_close(layer(x), value)


@pytest.mark.parametrize("architecture", shown(["bert", "llama", "gpt2", "gpt_neox", "distilbert", "bloom"], KINDS))
def test_below_the_lowest_active_site_nothing_is_differentiated(architecture):
    """The issue's savings: no graph for what no gradient needs, and no work for sites that are off."""
    model = adapt(make_backbone(architecture).train())
    last = max(site.layer for site in model.space.sites)
    model.enable({s.name: 2 for s in model.space.sites if s.entry == last}, seed=0)
    stack = next(iter(model.space.survey.stacks.values()))
    seen = {}
    for depth, path in enumerate(stack.blocks):
        model.backbone.get_submodule(path).register_forward_pre_hook(
            lambda module, args, depth=depth: seen.update({depth: args[0].requires_grad})
        )
    batch = make_batch(model.backbone)
    logits(model, batch)
    assert seen == dict.fromkeys(range(last + 1), False)
    model.switch_off(model.held)
    assert not any(
        hook for module in model.backbone.modules() for hook in module._forward_hooks.values() if "_Hook" in str(hook)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward derivatives use it
def test_transforms_of_torch_func_and_forward_derivatives_still_work():
    adapter, x = low_rank(), torch.randn(4, 3, 4).double()
    factors = dict(adapter.named_parameters())

    def total(given, row):
        return torch.func.functional_call(adapter, given, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(factors, x)
    for row in range(len(x)):
        expected = torch.autograd.grad(total(factors, x[row]), list(factors.values()))
        for name, slope in zip(factors, expected, strict=True):
            torch.testing.assert_close(each[name][row], slope)
    direction = torch.randn_like(x)
    found = torch.func.jvp(adapter, (x,), (direction,))[1]  # the map is linear
    torch.testing.assert_close(found, adapter(direction))
    model, batch = everywhere("llama")
    names = dict(model.adapters.named_parameters())
    slopes = torch.func.grad(
        lambda given: torch.func.functional_call(model, {f"adapters.{k}": v for k, v in given.items()}, (), {
            key: value for key, value in batch.items() if key != "labels"
        }).logits.square().sum()
    )(names)  # fmt: skip
    expected = torch.autograd.grad(logits(model, batch).square().sum(), list(names.values()))
    for name, slope in zip(names, expected, strict=True):
        torch.testing.assert_close(slopes[name], slope)


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_what_somebody_else_sees_is_not_overwritten(way):
    """Activation patching: a hook, or another forward, gives or keeps a tensor of its own."""
    model, batch = placed([{"kind": "lora", "role": ["q", "v"]}])
    query = model.backbone.bert.encoder.layer[2].attention.self.query
    shape = (*batch["input_ids"].shape, 32)
    patch = torch.randn(shape, dtype=torch.float64)
    kept = patch.clone()
    if way == "hook":
        query.register_forward_hook(lambda module, args, output: patch, prepend=True)
    else:
        query.forward = lambda x: patch
    first, second = logits(model, batch), logits(model, batch)
    assert torch.equal(patch, kept)
    assert torch.equal(first, second)


def test_nothing_stays_of_a_part_that_nobody_fetched():
    model = adapt(make_backbone("deberta_v2").train(), include=["lora"])
    model.enable(ranks_everywhere(model, 2), seed=0)
    logits(model, make_batch(model.backbone))
    assert not model._run.narrow


def test_a_shared_input_that_changed_is_read_again():
    model, _ = placed([{"kind": "lora", "role": ["q", "k", "v"]}], layers=[1])
    attention = model.backbone.bert.encoder.layer[1].attention.self
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    attention.query(x)
    x.mul_(2)
    layer = attention.value
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + model.adapter("1.v")(x))
