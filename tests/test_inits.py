"""Initialisation by spectra of the gradient, against scipy and closed forms."""

import math

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import nn

from heterolora.adapters.lora import LoRA
from heterolora.errors import SettingError
from heterolora.inits.spectral import SpectralInit
from heterolora.run import RunFailed, train
from tests.jobs import prepare, run_job
from tests.surroundings import ALONE
from tests.test_family_oracles import site_of

IN, OUT, RANK = 9, 6, 3
SIZES = pytest.mark.parametrize("size", ["norm", "response"])
WHITEN = pytest.mark.parametrize("whiten", [False, True])


def linear_problem(tokens=60):
    """Inputs with a mean and unequal variances, targets, and G of half the squared error at the zero map."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, IN, generator=generator).double() @ torch.randn(IN, IN, generator=generator).double() + 2
    y = torch.randn(tokens, OUT, generator=generator).double()
    return x, y, -y.T @ x


def filled(init, gradient, x, rank=RANK):
    adapter = LoRA("constant", 2.0, 0.0).build(site_of("0.q", IN, OUT), rank, 0, ALONE).double()
    moments = (x.T @ x, x.sum(0), x.new_tensor([len(x)]))
    values = [(gradient,), moments][: len(init.statistics)]
    init.fill(site_of("0.q", IN, OUT), adapter, values)
    return adapter


@SIZES
def test_the_rows_are_the_first_right_singular_vectors(size):
    x, _, gradient = linear_problem()
    adapter = filled(SpectralInit(False, 0.01, size), gradient, x)
    expected = torch.from_numpy(scipy.linalg.svd(gradient.numpy())[2][:RANK])
    directions = nn.functional.normalize(adapter.A.detach())
    torch.testing.assert_close((directions * expected).sum(1).abs(), torch.ones(RANK).double())
    assert (adapter.A.gather(1, adapter.A.abs().argmax(1, keepdim=True)) > 0).all(), "signs are fixed"
    assert not adapter.B.any(), "the model is the backbone at step 0"


def test_whitened_rows_read_all_that_the_best_update_of_their_rank_needs():
    """Least squares on what A reads leaves no more error than reduced-rank regression, whose optimum is known."""
    x, y, gradient = linear_problem()
    adapter = filled(SpectralInit(True, 1e-12, "norm"), gradient, x)
    read = (x @ adapter.A.detach().T).numpy()
    best = scipy.linalg.lstsq(read, y.numpy())[0]
    left = ((y.numpy() - read @ best) ** 2).sum()
    fitted = x.numpy() @ scipy.linalg.lstsq(x.numpy(), y.numpy())[0]
    reduced = ((y.numpy() - fitted) ** 2).sum() + (scipy.linalg.svdvals(fitted)[RANK:] ** 2).sum()
    assert left == pytest.approx(reduced, rel=1e-8)
    plain = (x @ filled(SpectralInit(False, 1e-12, "norm"), gradient, x).A.detach().T).numpy()
    assert ((y.numpy() - plain @ scipy.linalg.lstsq(plain, y.numpy())[0]) ** 2).sum() > 1.001 * reduced


@WHITEN
def test_sizes_are_those_of_loras_own_rows(whiten):
    """Over many draws: the norm of a row, or the mean square of its products with the inputs."""
    x, _, gradient = linear_problem()
    own = LoRA("constant", 2.0, 0.0).build(site_of("0.q", IN, OUT), 4000, 0, ALONE).double().A.detach()
    norms = filled(SpectralInit(whiten, 0.01, "norm"), gradient, x).A.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, own.square().sum(1).mean().sqrt()), rtol=0.02, atol=0)
    responses = (x @ filled(SpectralInit(whiten, 0.01, "response"), gradient, x).A.T).square().mean(0)
    expected = torch.full_like(responses, (x @ own.T).square().mean())
    torch.testing.assert_close(responses, expected, rtol=0.05, atol=0)


def test_no_other_rows_of_that_size_give_b_a_larger_gradient():
    x, _, gradient = linear_problem()
    norm = 1 / math.sqrt(3)

    def squared_gradient(rows):
        return (gradient @ rows.T).square().sum().item()

    best = squared_gradient(filled(SpectralInit(False, 0.01, "norm"), gradient, x).A.detach())
    assert best == pytest.approx((scipy.linalg.svdvals(gradient.numpy())[:RANK] ** 2).sum() * norm**2)
    for seed in range(20):
        other = torch.randn(IN, RANK, generator=torch.Generator().manual_seed(seed)).double()
        assert squared_gradient(norm * torch.linalg.qr(other).Q.T) < best


def test_a_gradient_of_lower_rank_is_refused():
    x, _, gradient = linear_problem()
    with pytest.raises(SettingError, match=r"the gradient at 0\.q has rank 1, its adapter 3; more probe\.batches"):
        filled(SpectralInit(False, 0.01, "norm"), torch.outer(gradient[:, 0], gradient[0]), x)


@pytest.mark.medium
@pytest.mark.parametrize("init", ["spectral", "spectral_inputs"])
def test_a_run_is_the_same_twice_bit_for_bit(tmp_path, init):
    found = []
    for name in ("a", "b"):
        summary = run_job(tmp_path / name, f"init={init}", "trainer.max_steps=3")
        found.append((summary["metrics"], load_file(tmp_path / name / "adapter.safetensors")))
    (first, one), (second, two) = found
    assert first == second
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init=spectral", "init.damping=0"], r"init\.damping=0"),
        (["init=spectral", "init.size=large"], r"init\.size"),
        (["init=spectral", "adapter=prolora"], "fills LoRA's A and B"),
        (["init=spectral", "search_space=lora_embeddings"], "init"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, overrides, message):
    with pytest.raises(RunFailed, match=message) as caught:
        train(prepare(tmp_path, *overrides))
    assert "\n" not in str(caught.value)
