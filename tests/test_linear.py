"""Linear layers of any make: their widths and their weights."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from heterolora.linear import features, frozen_weight
from heterolora.space import survey
from tests.architectures import make_backbone

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 7.0]], dtype=torch.float64)  # [out, in]
BIAS = torch.tensor([10.0, -20.0], dtype=torch.float64)


def linear(bias=True) -> nn.Linear:
    module = nn.Linear(3, 2, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(WEIGHT)
        if bias:
            module.bias.copy_(BIAS)
    return module


def conv1d() -> Conv1D:
    module = Conv1D(2, 3).double()
    with torch.no_grad():
        module.weight.copy_(WEIGHT.T)
        module.bias.copy_(BIAS)
    return module


class Wrapped(nn.Module):
    """A linear layer in all but class, whose weight is another module's."""

    in_features, out_features = 3, 2

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Packed(nn.Module):
    """A quantised layer: whole numbers and a scale of each row, under the name of a weight."""

    in_features, out_features = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", (2 * WEIGHT).to(torch.int8))
        self.scale = nn.Parameter(torch.full((2, 1), 0.5, dtype=torch.float64), requires_grad=False)
        self.bias = nn.Parameter(BIAS.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T + self.bias


MAKES = {
    "linear": linear,
    "without_bias": lambda: linear(bias=False),
    "conv1d": conv1d,
    "wrapped": lambda: Wrapped(linear()),
    "wrapped_twice": lambda: Wrapped(Wrapped(conv1d())),
    "packed": Packed,
}
MAKE = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@MAKE
def test_widths_are_read_from_linear_layers_of_any_make(make):
    assert features(make()) == (3, 2)


@pytest.mark.parametrize("module", [nn.LayerNorm(5), nn.EmbeddingBag(5, 7), nn.Bilinear(2, 3, 4)], ids=repr)
def test_other_modules_have_no_widths_and_no_weight(module):
    assert features(module) is None
    with pytest.raises(TypeError, match=f"{type(module).__name__} is no linear layer"):
        frozen_weight(module)


def test_an_embedding_is_no_linear_layer_but_has_the_weight_of_one_that_reads_unit_vectors():
    table = nn.Embedding(5, 7)
    assert features(table) is None
    assert torch.equal(frozen_weight(table), table.weight.T)


@MAKE
def test_the_weight_is_out_by_in_whoever_holds_it(make):
    """Exactly: unit vectors and whole multiples of a half round nowhere."""
    weight = frozen_weight(make())
    assert weight.dtype == torch.float64
    assert torch.equal(weight, WEIGHT)
    assert not weight.requires_grad


@MAKE
def test_the_weight_is_that_of_the_layers_answer(make):
    module = make()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = module(x) - module(torch.zeros(1, 3, dtype=torch.float64))
    torch.testing.assert_close(x @ frozen_weight(module).T, expected, rtol=1e-12, atol=1e-12)


def test_reading_a_weight_leaves_no_trace():
    """Hooks do not see the questions, and nothing has a gradient afterwards."""
    module, seen = Wrapped(linear()), []
    module.register_forward_hook(lambda *call: seen.append(call))
    frozen_weight(module)
    assert not seen
    assert all(p.grad is None for p in module.parameters())


def test_a_layer_without_parameters_is_asked_in_float32():
    class Doubling(nn.Module):
        in_features = out_features = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    weight = frozen_weight(Doubling())
    assert (weight.dtype, weight.tolist()) == (torch.float32, [[2.0, 0.0], [0.0, 2.0]])


def test_every_site_of_every_architecture_has_a_weight_of_its_widths(architecture):
    model = make_backbone(architecture)
    for site in survey(model).lora_sites:
        weight = frozen_weight(model.get_submodule(site.source.module))
        assert weight.shape == (site.out_features, site.in_features)


def test_a_layer_that_does_more_than_its_weight_says_is_read_off():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    layer = Scaled(4, 6).double()
    torch.testing.assert_close(frozen_weight(layer), layer.weight.detach() * 3)
