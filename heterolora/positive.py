"""A backbone as a network of absolute weights, through which everything flows forward and nothing cancels (SynFlow).

Nothing is written to the backbone: inside the context, its modules compute something else. Each linear layer uses the
absolute value of its weight and no bias, each norm multiplies by its absolute frozen gain, activations are the
identity, and one token alone is sent through, so that attention is the identity too (a mean over the allowed tokens,
all alike). A gated unit, ``act(gate) * up``, becomes ``sqrt(gate * up)``: like every other part, twice the input gives
twice the output, and each of the two factors carries half of the flow.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from heterolora.errors import SettingError
from heterolora.layouts import Stack
from heterolora.linear import features, frozen_weight
from heterolora.model import AdaptedModel
from heterolora.sites import Point, Port, Site, Tap

Flow = tuple[torch.Tensor, torch.Tensor]
"""What a site reads ``[rows, in]``, and the derivative of log R by what joins its sink ``[rows, out]``."""


def flows(model: AdaptedModel, sites: Sequence[Site]) -> dict[str, list[Flow]]:
    """The flow at each site when the stream starts with ones: one pair for each call of the site, row by row.

    R is the sum of the last block's outputs. The stream grows by decades from block to block, so it is divided by its
    mean at the input of each block; every part is homogeneous of degree 1, so this changes R by known factors only,
    which leave the derivative of log R as it is. A shortcut that crosses block inputs gets their factors back.

    Raises:
        SettingError: for a backbone with several streams, or one whose taps are not known.
    """
    if len(model.space.survey.stacks) != 1 or _only_stack(model).layout is None:
        raise SettingError(
            "proxy", "synflow", f"needs a model of one known stack of blocks, {model.space.survey.model_type} is none"
        )
    if ids := [site.name for site in sites if site.lookup]:
        raise SettingError(
            "proxy", "synflow", f"starts above the embedding, so {ids[0]} has no flow; exclude role embed"
        )
    found: dict[str, list[Flow]] = {site.name: [] for site in sites}

    def keep(site: Site, source: torch.Tensor, gradient: torch.Tensor | None) -> None:
        assert gradient is not None  # told in the backward pass
        rows = source.reshape(-1, site.in_features), gradient.reshape(-1, site.out_features)
        found[site.name].append((rows[0].double(), rows[1].double()))

    with model.disabled(), _positive(model) as (divisors, outputs), model.probing(keep, list(found)) as zero:
        base = getattr(model.backbone, "base_model", model.backbone)
        base(**_one_token(model))
        torch.autograd.grad(outputs[-1].double().sum().log(), zero)
    return {
        site.name: [(source * _crossed(site, divisors), gradient) for source, gradient in found[site.name]]
        for site in sites
    }


def _only_stack(model: AdaptedModel) -> Stack:
    return next(iter(model.space.survey.stacks.values()))


def _crossed(site: Site, divisors: Sequence[float]) -> float:
    """What the source must be divided by to count in the units of the sink, inverted."""
    if not isinstance(site.source, Tap) or not isinstance(site.sink, Tap):
        return 1.0
    factor = 1.0
    for layer in range(site.source.index // 2 + 1, (site.sink.index - 1) // 2 + 1):
        factor /= divisors[layer]
    return factor


def _one_token(model: AdaptedModel) -> dict[str, torch.Tensor]:
    pad = getattr(getattr(model.backbone, "config", None), "pad_token_id", None)
    token = torch.tensor([[0 if pad else 1]], device=next(model.backbone.parameters()).device)  # any but the padding
    return {"input_ids": token, "attention_mask": torch.ones_like(token)}


@contextmanager
def _positive(model: AdaptedModel) -> Iterator[tuple[list[float], list[torch.Tensor]]]:
    """The modules of the blocks compute the positive network; gives the divisor at each block, and the outputs."""
    backbone, stack = model.backbone, _only_stack(model)
    gated = {"gate", "gate_up"} & {site.role for site in model.space.survey.lora_sites}
    downs = {_module(site.source) for site in model.space.survey.lora_sites if gated and site.role == "down"}
    divisors: list[float] = []
    outputs: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        x = torch.ones_like(x) if not divisors else x
        divisors.append(x.detach().double().mean().item())
        return (x / divisors[-1], *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as exits:
        for path in dict.fromkeys(stack.blocks):
            block = backbone.get_submodule(path)
            # Before the adapted model's own hooks at the input, so that they see the divided stream.
            exits.callback(block.register_forward_pre_hook(enter, prepend=True).remove)
            exits.callback(block.register_forward_hook(leave).remove)
            for name, module in block.named_modules():
                if f"{path}.{name}" in downs:  # the site reads what comes after the gate
                    exits.callback(module.register_forward_pre_hook(_root, prepend=True).remove)
                if (replacement := _replacement(module)) is not None:
                    exits.callback(_put_back, module, module.__dict__.get("forward"))
                    module.forward = replacement
        exits.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield divisors, outputs


def _put_back(module: nn.Module, forward: Any) -> None:
    """The forward that the module itself carried (accelerate's hooks are such), or else that of its class."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _module(point: Point) -> str:
    return point.module if isinstance(point, Port) else ""


def _root(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a product of two flows; its slope at 0 would be infinite."""
    return (args[0].clamp(min=torch.finfo(args[0].dtype).tiny).sqrt(), *args[1:])


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    """What a module computes instead; None: what it always does."""
    if features(module) is not None:
        weight = frozen_weight(module).abs()
        return lambda x: linear(x, weight.to(x.dtype))
    if any(True for _ in module.children()):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters and not dict(module.named_buffers(recurse=False)):
        return lambda x, *args, **kwargs: x  # an activation, or a dropout
    if "weight" in parameters and parameters["weight"].dim() == 1:
        gain = _gain(module, parameters["weight"])
        return lambda x: x * gain.to(x.dtype)
    return None


@torch.no_grad()
def _gain(norm: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The absolute gain of a norm: half the difference of its answers to a vector of +1 and -1, and to its negative.

    A norm of any kind maps such a vector to itself, and gains that are stored as ``weight - 1`` (gemma) need no case of
    their own. The vector is taken large, or else the norm's epsilon would show.
    """
    signs = torch.ones(len(weight) + len(weight) % 2, dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1
    signs = signs[: len(weight)]
    answer: torch.Tensor = (norm.forward(1e3 * signs) - norm.forward(-1e3 * signs)) / 2
    return answer.abs()
