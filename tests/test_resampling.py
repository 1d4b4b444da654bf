"""Scores of a few sites at a time, and of resampled batches, against the same proxies on the same batches."""

import numpy as np
import pytest
import torch

from heterolora.proxies.base import leading
from heterolora.resampling import Resampling, can_be_resampled
from heterolora.scoring import score_all
from heterolora.scratch import ScratchValues
from tests.architectures import make_backbone, make_batch
from tests.conftest import adapt
from tests.test_proxies import loss, make, probe

LOCAL = ["grad_norm", "snip", "fisher", "spectral", "spectral_inputs", "spectral_both", "eva", "activation"]


@pytest.fixture
def model():
    return adapt(make_backbone("bert"))


@pytest.fixture
def batches(model):
    return [make_batch(model.backbone, seed=seed) for seed in range(5)]


def run(model, batches, names, **more):
    proxies = {name: make(name) for name in names}
    return score_all(model, loss, batches, [], proxies=proxies, probe=probe(), seed=0, **more)


@pytest.mark.parametrize("names", [[*LOCAL, "grasp", "depth"], ["spectral"], ["eva"]])
def test_sites_scored_a_few_at_a_time_have_the_scores_of_one_pass(model, batches, names):
    whole, parts = (run(model, batches, names, numbers=numbers) for numbers in (10**9, 3000))
    assert not whole.scratch
    assert parts.scratch
    for name in names:
        assert list(parts.scores[name]) == list(whole.scores[name])
        for site, value in whole.scores[name].items():
            assert parts.scores[name][site] == value, (name, site)


def test_no_more_is_looked_at_than_may_be_held(model, batches):
    largest = max(site.in_features * site.out_features for site in model.space.sites)
    held = []

    class Watched(type(make("spectral"))):
        def score(self, evidence):
            values = [part for sites in evidence.gathered.values() for parts in sites.values() for part in parts]
            held.append(sum(part.numel() for part in values))
            return super().score(evidence)

    score_all(model, loss, batches, [], proxies={"x": Watched()}, probe=probe(), seed=0, numbers=largest)
    assert len(held) > 2
    assert max(held) == largest
    assert sum(held) == sum(site.in_features * site.out_features for site in model.space.sites)


def test_resampled_scores_are_those_of_the_drawn_batches(model, batches):
    """By hand: each resample is a list of batches, scored on its own. Exact for all but what is projected."""
    names = ["grad_norm", "snip", "fisher", "activation"]
    resampling = Resampling(count=6, units=4, seed=1)
    found = run(model, batches, names, resampling=resampling, numbers=3000).resampled
    for row, counts in enumerate(resampling.weights(len(batches)).int().tolist()):
        drawn = [batch for batch, count in zip(batches, counts, strict=True) for _ in range(count)]
        expected = run(model, drawn, names).scores
        for name in names:
            values = [leading(expected[name][site.name], 4) for site in model.space.sites]
            np.testing.assert_allclose(found[name][row], values, rtol=1e-5, err_msg=name)


def test_the_first_row_counts_every_batch_once_and_the_others_as_many():
    weights = Resampling(count=50, units=1, seed=0).weights(7)
    assert weights[0].tolist() == [1.0] * 7
    assert weights.sum(1).tolist() == [7.0] * 51
    assert len({tuple(row) for row in weights.tolist()}) > 40


def test_where_nothing_is_wider_than_the_projection_it_changes_nothing(model, batches):
    names = ["spectral", "spectral_inputs", "spectral_both", "eva"]
    narrow = model.space.sites[0].in_features
    assert narrow <= 32
    found = run(model, batches, names, resampling=Resampling(2, 4, 0))
    for column, site in enumerate(model.space.sites):
        if max(site.in_features, site.out_features) <= 32:
            for name in names:
                exact = leading(found.scores[name][site.name], 4)
                assert found.resampled[name][0, column] == pytest.approx(exact, rel=1e-4), (name, site.name)


def test_projections_keep_the_size_of_a_matrix_in_expectation():
    """Independent of the model: |P^T G Q|^2 over many seeds against |G|^2."""
    from heterolora.proxies.evidence import MapGradient, Observation
    from heterolora.resampling import BatchValues
    from heterolora.sites import Port, Site

    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(50, 90, generator=generator), torch.randn(50, 70, generator=generator)
    site = Site("0.q", "lora", "q", 0, Port("a", "in"), Port("a", "out"), 90, 70)
    ratios = []
    for seed in range(150):
        with BatchValues((MapGradient(),), seed) as values:
            values.observe(site, Observation(None, x, d, None, lambda: None))
            values.end_batch()
            [(_, sums)] = values.sums(torch.ones(1, 1, dtype=torch.float64))
        ratios.append((sums[MapGradient()][0][0].square().sum() / (d.T @ x).square().sum()).item())
    assert np.mean(ratios) == pytest.approx(1, abs=3.5 * np.std(ratios) / len(ratios) ** 0.5)
    assert np.std(ratios) < 0.3


@pytest.mark.parametrize(
    ("name", "can"),
    [*((name, True) for name in LOCAL), *((n, False) for n in ("gora", "plop", "grasp", "synflow", "random", "depth"))],
)
def test_who_can_be_scored_again(name, can):
    assert can_be_resampled(make(name)) is can


def test_a_proxy_that_does_not_say_that_it_is_local_sees_all_sites_at_once(model, batches):
    class Together(type(make("spectral"))):
        local = False

        def score(self, evidence):
            assert len(evidence.sites) == len(model.space.sites)
            return super().score(evidence)

    found = score_all(
        model, loss, batches, [], proxies={"x": Together(), "y": make("spectral")}, probe=probe(), seed=0, numbers=1000
    )
    assert found.scores["x"].keys() == found.scores["y"].keys()


def test_scratch_values_come_back_as_they_were():
    with ScratchValues() as values:
        first = (torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.float64), torch.zeros(0))
        values["a"], values["b"] = first, (torch.full((3,), 7),)
        values["a"] = tuple(part + 1 for part in first)
        assert list(values) == ["a", "b"]
        for found, part in zip(values["a"], first, strict=True):
            assert torch.equal(found, part + 1)
            assert found.dtype == part.dtype
        assert torch.equal(values["b"][0], torch.full((3,), 7))
