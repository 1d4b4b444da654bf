"""The same models as PEFT makes them, and the proof that they are the same."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.speed.results import WrongResultError
from benchmarks.speed.subjects import SCALE, Batch, Learner, Placement
from heterolora.backbone import Backbone
from heterolora.model import AdaptedModel
from heterolora.peft_config import module_of

PEFT = "PEFT"

LOSS_TOLERANCE = 1e-5
"""Relative; float32 has 6e-8 a number."""

GRADIENT_TOLERANCE = 1e-5
"""Of the norm of the difference, as a share of the norm, in float64; some backbones' norms compute in float32."""


def peft(backbone: Backbone, placement: Placement, sites: AdaptedModel) -> Learner:
    """PEFT's LoRA at the very modules where ours has one, with the same ranks, scale, dropout and head.

    Args:
        backbone: becomes part of it.
        placement: rank and dropout.
        sites: our model, which says where.
    """
    assert placement.rank is not None
    modules = {name: path for name in sites.held if (path := module_of(sites.space[name])) is not None}
    transposed = hasattr(backbone.model.get_submodule(next(iter(modules.values()))), "nx")
    config = LoraConfig(
        r=placement.rank,
        lora_alpha=int(SCALE * placement.rank),
        lora_dropout=placement.dropout,
        target_modules=list(modules.values()),
        modules_to_save=sorted({name.rpartition(".")[0] for name in backbone.head}),
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's own use of transformers
        made: Any = get_peft_model(backbone.model, config)
    found = dict(made.base_model.model.named_modules())
    factors = {name: _factors(found[path]) for name, path in modules.items()}
    saved = {name: _saved(found, name) for name in backbone.head}
    return Learner(PEFT, made, factors, saved)


def _factors(module: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def _saved(found: dict[str, Any], name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    parameter: nn.Parameter = getattr(found[path].modules_to_save["default"], leaf)
    return parameter


def check_same_parameters(one: Learner, other: Learner) -> None:
    """Refuse two learners that train different numbers of parameters.

    Raises:
        WrongResultError: then.
    """
    counts = [sum(p.numel() for p in learner.trained) for learner in (one, other)]
    if counts[0] != counts[1]:
        raise WrongResultError(f"{one.name} trains {counts[0]:,} parameters, {other.name} {counts[1]:,}")


def check_same_start(one: Learner, other: Learner, batch: Batch) -> str:
    """Both compute one loss before the first step.

    Raises:
        WrongResultError: if not.
    """
    with _evaluating(one), _evaluating(other), torch.no_grad():
        return _check_loss(one, other, one.loss(batch), other.loss(batch), "at step 0")


def check_equal(one: Learner, other: Learner, batch: Batch) -> list[str]:
    """Both compute one loss at step 0, and with the same factors, which are not 0, the same loss and gradients.

    The second comparison is in float64: in a deep model, gradients of the lowest layers differ by a thousandth in
    float32 between two orders of the same sums. Factors are put back afterwards: the other's are then a copy of the
    one's.

    Args:
        one: ours.
        other: the peer's, at the same sites.
        batch: what they look at.

    Returns:
        What was found, in words.

    Raises:
        WrongResultError: if anything differs by more than rounding allows.
    """
    check_same_parameters(one, other)
    if one.factors.keys() != other.factors.keys() or one.head.keys() != other.head.keys():
        raise WrongResultError(f"{one.name} and {other.name} adapt different places")
    start = check_same_start(one, other, batch)
    before = {name: b.detach().clone() for name, (_, b) in one.factors.items()}
    _fill(one, torch.Generator().manual_seed(0))
    _copy(one, other)
    with _evaluating(one), _evaluating(other), _in_double(one), _in_double(other):
        found = _check_loss(one, other, one.backward(batch), other.backward(batch), "with the same factors")
        furthest = _check_gradients(one, other)
    with torch.no_grad():
        for name, value in before.items():
            one.factors[name][1].copy_(value)
    _copy(one, other)
    return [start, f"{found}; gradients differ by at most {furthest:.1e} of their norm"]


@contextmanager
def _in_double(learner: Learner) -> Iterator[None]:
    """In float64 for a while; float32 values come back to the bit, gradients do not."""
    learner.model.double()
    try:
        yield
    finally:
        learner.model.zero_grad(set_to_none=True)
        learner.model.float()


def check_drops(learner: Learner, batch: Batch) -> str:
    """The learner's dropout does something: with factors that are not 0, two draws give two losses.

    Raises:
        WrongResultError: if not.
    """
    before = {name: b.detach().clone() for name, (_, b) in learner.factors.items()}
    _fill(learner, torch.Generator().manual_seed(0))
    learner.model.train()
    with torch.no_grad():
        losses = [learner.loss(batch).item() for _ in range(2)]
        for name, value in before.items():
            learner.factors[name][1].copy_(value)
    if losses[0] == losses[1]:
        raise WrongResultError(f"{learner.name} shall drop features and does not")
    return f"{learner.name} drops features"


def _check_loss(one: Learner, other: Learner, a: torch.Tensor, b: torch.Tensor, when: str) -> str:
    difference = abs(a.item() - b.item())
    if not difference <= LOSS_TOLERANCE * abs(b.item()):
        raise WrongResultError(f"the loss {when} is {a.item()} ({one.name}) and {b.item()} ({other.name})")
    return f"losses of {one.name} and {other.name} {when} differ by {difference:.1e}"


def _check_gradients(one: Learner, other: Learner) -> float:
    pairs = {f"{name}.{which}": (one.factors[name][i], other.factors[name][i])
             for name in one.factors for i, which in enumerate("AB")}  # fmt: skip
    pairs |= {name: (one.head[name], other.head[name]) for name in one.head}
    furthest = 0.0
    for name, (ours, theirs) in pairs.items():
        if ours.grad is None or theirs.grad is None:
            raise WrongResultError(f"{name} has no gradient")
        norm = theirs.grad.norm().item()
        far = (ours.grad - theirs.grad).norm().item() / max(norm, 1e-12)
        if not (norm > 0 and far <= GRADIENT_TOLERANCE):
            raise WrongResultError(f"gradients of {name} differ by {far:.1e} of their norm {norm:.1e}")
        furthest = max(furthest, far)
    for learner in (one, other):
        learner.model.zero_grad()
    return furthest


def _fill(learner: Learner, generator: torch.Generator) -> None:
    """Give every B values, for at B = 0 nothing that A does is seen."""
    with torch.no_grad():
        for _, b in learner.factors.values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.02)


def _copy(source: Learner, target: Learner) -> None:
    with torch.no_grad():
        for name, factors in source.factors.items():
            for theirs, ours in zip(target.factors[name], factors, strict=True):
                theirs.copy_(ours)


@contextmanager
def _evaluating(learner: Learner) -> Iterator[None]:
    """Without dropout, which draws for each its own."""
    training = learner.model.training
    learner.model.eval()
    try:
        yield
    finally:
        learner.model.train(training)
