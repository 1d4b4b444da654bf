"""Linear layers of any make: their widths and their frozen weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def features(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer; None if the module is no linear layer.

    Read from the module, not from the config: widths differ by layer in some models. ``nx`` and ``nf`` are the names
    that ``Conv1D`` uses.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        width = tuple(getattr(module, name, None) for name in names)
        if isinstance(width[0], int) and isinstance(width[1], int):
            return width[0], width[1]
    return None


def output_is_free(module: nn.Module) -> bool:
    """Whether the layer's backward pass does not need what it gave out, so that this may be overwritten.

    Known for ``nn.Linear`` and ``Conv1D`` themselves; a layer of another make, or a parametrised one, may need it.
    """
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def shared_product(source: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """``source W^T`` for several weights ``[narrow, in]``, as one product; one part ``[..., narrow]`` for each."""
    product: torch.Tensor = _SharedProduct.apply(source, *weights)  # type: ignore[no-untyped-call]
    return torch.split(product, [len(weight) for weight in weights], dim=-1)


class _SharedProduct(torch.autograd.Function):
    """``source [W1; W2; ...]^T``; the weights are joined again for the backward pass rather than kept joined."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source, *weights)
        return functional.linear(source, torch.cat(weights))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, (source, *weights) = gradients[0], ctx.saved_tensors
        # Of plain operations, so that grasp can differentiate again.
        for_source = gradient.matmul(torch.cat(weights)) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return for_source, *(None for _ in weights)
        joined = gradient.flatten(0, -2).t().mm(source.flatten(0, -2))
        return for_source, *torch.split(joined, [len(weight) for weight in weights])


def reads(source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``source W^T`` ``[..., narrow]``, of vectors ``[..., in]`` or of ids ``[...]``, which stand for unit vectors.

    Args:
        source: numbers, or whole numbers from 0 to in - 1.
        weight: ``[narrow, in]``.
    """
    if source.is_floating_point():
        return functional.linear(source, weight)
    return functional.embedding(source, weight.T)


def outer(left: torch.Tensor, source: torch.Tensor, width: int) -> torch.Tensor:
    """``left^T source`` ``[narrow, in]`` summed over rows, of vectors ``[rows, in]`` or of ids ``[rows]``.

    Args:
        left: ``[rows, narrow]``.
        source: as for ``reads``.
        width: in.
    """
    if source.is_floating_point():
        return left.T @ source
    return left.new_zeros(width, left.shape[1]).index_add_(0, source, left).T


def sharing(model: nn.Module, path: str) -> list[str]:
    """Other modules that hold the very weight of the one at this path: to change it there would change them."""
    module = model.get_submodule(path)
    weight = getattr(module, "weight", None)
    holders = (
        name.rpartition(".")[0] for name, held in model.named_parameters(remove_duplicate=False) if held is weight
    )
    return sorted(name for name in set(holders) if model.get_submodule(name) is not module)


@torch.no_grad()
def frozen_weight(module: nn.Module) -> torch.Tensor:
    """The dense weight ``[out, in]`` of a linear layer of any make, or of an embedding, whose table is ``[in, out]``.

    ``nn.Linear`` and ``Conv1D`` hold it (the latter transposed), which one product confirms; from any other layer it is
    read off as its answer to the unit vectors, less its answer to zero, so that quantised, wrapped or scaled ones need
    no case of their own.

    Raises:
        TypeError: if the module is no linear layer.
    """
    if isinstance(module, nn.Embedding):
        return module.weight.detach().T
    width = features(module)
    if width is None:
        raise TypeError(f"{type(module).__name__} is no linear layer")
    parameter = next(module.parameters(), torch.zeros(()))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        held = weight.detach().T if hasattr(module, "nx") else weight.detach()
        signs = torch.ones(1, width[0], device=parameter.device, dtype=dtype)
        signs[:, 1::2] = -1
        if held.shape == width[::-1] and _close(module.forward(signs), signs @ held.to(dtype).T, module):
            return held
    units = torch.eye(width[0], device=parameter.device, dtype=dtype)
    answer: torch.Tensor = module.forward(units) - module.forward(torch.zeros_like(units[:1]))
    return answer.T


def _close(answer: torch.Tensor, product: torch.Tensor, module: nn.Module) -> bool:
    """Whether a layer's answer is its weight's product, and its bias, but for rounding."""
    bias = getattr(module, "bias", None)
    expected = product if bias is None else product + bias.to(product.dtype)
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return bool((answer - expected).abs().max() <= 10 * torch.finfo(expected.dtype).eps ** 0.5 * scale)


def row_signs(rows: torch.Tensor) -> torch.Tensor:
    """``[n, 1]``: what makes the largest entry of each row positive, so that a decomposition's signs are fixed."""
    return torch.gather(rows, 1, rows.abs().argmax(1, keepdim=True)).sign()
