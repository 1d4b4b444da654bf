"""Methods of the PEFT library in our runs: what they compute, hold and report is what PEFT's own code says."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import peft
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.crash_test import what_came_out
from heterolora.adapters.lora import LoRA
from heterolora.adapters.svd import SVD
from heterolora.backbone import Backbone
from heterolora.baselines.lit import LitBaseline
from heterolora.baselines.methods import PeftAdaLoRA, PeftEVA, PeftLoRA
from heterolora.baselines.model import PeftBaseline, quiet
from heterolora.comparison import compare
from heterolora.errors import SettingError
from heterolora.loading import load_run
from heterolora.model import AdaptedModel
from heterolora.report.summary import summary_table
from heterolora.results import find_results
from heterolora.run import RunFailed, search
from heterolora.seeds import derive
from heterolora.space import SearchSpace, survey
from tests.architectures import make_backbone, make_batch, shown
from tests.jobs import StopBefore, prepare, run_job

ADALORA = PeftAdaLoRA("budget", 1.5, 0.1, 0.3, 1, 0.85, 0.85, 0.1)
EVA = PeftEVA("budget", 2.0, 0.99, False)
METHODS = {"peft_lora": PeftLoRA(), "peft_adalora": ADALORA, "peft_eva": EVA}
LORA_ALL = ("search_space=lora_all", "budget=all_r2")
EACH = pytest.mark.parametrize("name", shown(METHODS, ["peft_lora", "peft_adalora"]))


def backbone_of(architecture="bert", dtype=torch.float32):
    model = make_backbone(architecture, dtype=dtype)
    inside = {id(p) for p in model.base_model.parameters()}
    head = tuple(name for name, p in model.named_parameters() if id(p) not in inside)
    return Backbone(model, None, head, "", None, False, ())


def space_of(backbone):
    return SearchSpace(["lora"], [], None, [1, 2], False, "kind").resolve(survey(backbone.model))


def baseline_of(method, architecture="bert", family=None, steps=40, dtype=torch.float32):
    """A model of a method's, and batches to look at; nothing is enabled."""
    backbone = backbone_of(architecture, dtype)
    family = method.family(family or LoRA("constant", 2.0, 0.0))
    model = method.model(backbone, space_of(backbone), family)
    model.steps = steps
    batches = [make_batch(backbone.model, rows=8, seed=seed) for seed in range(3)]
    return model.train(), batches


def answer(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def enabled(method, rank=2, **more):
    model, batches = baseline_of(method, **more)
    cost = model.family.cost(model.space.sites)
    budget = cost(dict.fromkeys(model.modules_of, rank))
    ranks = method.ranks(model, batches, budget)
    model.enable(ranks, 0)
    return model, batches, ranks


# -- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", shown(["bert", "gpt2", "llama", "t5"], ["bert", "gpt2"]))
@pytest.mark.parametrize("scaling", ["constant", "alpha_over_r"])
def test_peft_lora_computes_and_learns_what_our_lora_does(architecture, scaling):
    family = LoRA(scaling, 3.0, 0.0)
    dtype = torch.float32 if architecture in ("bert", "gpt2") else torch.float64
    theirs, batches, ranks = enabled(PeftLoRA(), 3, architecture=architecture, family=family, dtype=dtype)
    backbone = backbone_of(architecture, dtype)
    ours = AdaptedModel(backbone.model, space_of(backbone), family, backbone.head).train()
    ours.enable(ranks, 0)
    state = theirs.adapter_state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if name.endswith(".B"):
            value.copy_(torch.randn(value.shape, generator=generator, dtype=dtype) * 0.1)
    ours.load_adapter_state_dict(state)
    assert set(theirs.scales.values()) == {3.0 if scaling == "constant" else 1.0}
    torch.testing.assert_close(answer(theirs, batches[0]), answer(ours, batches[0]), rtol=1e-5, atol=1e-5)
    assert theirs.held_parameters == theirs.active_parameters == ours.held_parameters
    for model in (theirs, ours):
        trained = [*model.adapters.parameters(), *model.head_parameters.values()]
        assert all(p.requires_grad for p in trained)
        assert sum(p.requires_grad for p in model.parameters()) == len(trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(answer(model, batch), batch["labels"]).backward()
            optimizer.step()
    got, expected = theirs.trained_state_dict(), ours.trained_state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.medium
def test_a_whole_run_with_the_same_start_ends_where_ours_does(tmp_path, monkeypatch):
    """Data order, head, dropout, optimizer, schedule, clipping, evaluation: nothing but the modules differs."""
    settings = (*LORA_ALL, "trainer.accumulate=2", "optimizer.lr=0.01")
    ours = run_job(tmp_path / "ours", *settings, "allocator=uniform")
    plain = PeftBaseline.enable

    def enable(self, ranks, seed):
        adapters = self.fresh(ranks, seed)
        plain(self, ranks, seed)
        self.load_adapter_state_dict(
            {f"{name}.{key}": value for name, adapter in adapters.items() for key, value in adapter.trained.items()}
        )

    monkeypatch.setattr(PeftBaseline, "enable", enable)
    theirs = run_job(tmp_path / "theirs", *settings, "baseline=peft_lora")
    for key in ("parameters", "sites", "steps", "epochs", "backbone", "data"):
        assert theirs[key] == ours[key], key
    for split, metrics in ours["metrics"].items():
        assert theirs["metrics"][split] == pytest.approx(metrics, rel=1e-4)
    states = [load_file(tmp_path / name / "adapter.safetensors") for name in ("ours", "theirs")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert theirs["baseline"]["lora_alpha"] == 4  # PEFT divides by r=2


# -- all -------------------------------------------------------------------------------------------------------------


@EACH
def test_at_the_start_the_model_is_the_backbone_and_the_scale_is_the_adapters(name):
    bare = backbone_of()
    batch = make_batch(bare.model)
    model, _, _ = enabled(METHODS[name])
    with torch.no_grad():
        assert torch.equal(answer(model.eval(), batch), answer(bare.model.eval(), batch))
    assert list(model.scales.values()) == pytest.approx([2.0] * len(model.held), rel=1e-6)


@EACH
def test_the_same_seed_draws_the_same_adapters_and_nobody_elses_numbers(name):
    before = torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        model, batches = baseline_of(METHODS[name])
        ranks = METHODS[name].ranks(model, batches, model.family.cost(model.space.sites)(dict.fromkeys(model.ranks, 2)))
        model.enable(ranks, seed)
        states.append(model.adapter_state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    differ = [key for key, value in states[2].items() if not torch.equal(states[0][key], value)]
    assert bool(differ) == (name != "peft_eva")  # its A comes from the data
    assert torch.equal(torch.get_rng_state(), before)


@EACH
def test_adapters_enabled_again_replace_those_before(name):
    model, _, ranks = enabled(METHODS[name])
    names = set(model.backbone.state_dict())
    model.enable(ranks, 5)
    assert set(model.backbone.state_dict()) == names
    model.enable({}, 0)
    assert set(model.backbone.state_dict()) == set(backbone_of().model.state_dict())
    assert model.held_parameters == 0


@EACH
def test_what_needs_hooks_is_an_error(name):
    model, _, _ = enabled(METHODS[name])
    with pytest.raises(RuntimeError, match="nothing can be hooked"):
        model.switch_off(model.held[:1])


@EACH
@pytest.mark.parametrize("architecture", shown(["bert", "gpt2", "llama", "t5_gated"], []))
def test_gradient_checkpointing_changes_no_gradient(name, architecture):
    gradients = []
    for recompute in (False, True):
        model, batches = baseline_of(METHODS[name], architecture)
        if recompute:
            model.gradient_checkpointing()
        budget = model.family.cost(model.space.sites)(dict.fromkeys(model.ranks, 2))
        model.enable(METHODS[name].ranks(model, batches, budget), 0)
        torch.nn.functional.cross_entropy(answer(model, batches[0]), batches[0]["labels"]).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# -- AdaLoRA ---------------------------------------------------------------------------------------------------------


def test_the_penalty_is_what_peft_adds_to_a_loss():
    model, batches, _ = enabled(ADALORA)
    batch = batches[0]
    whole = model.peft.base_model(**batch).loss  # PeftModel itself, without a task type, goes round AdaLoraModel
    bare = torch.nn.functional.cross_entropy(answer(model, batch), batch["labels"])
    torch.testing.assert_close(model.penalty(), whole - bare)
    norms = []
    for layer in model.adapters.children():
        for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
            norms.append((gram - torch.eye(len(gram))).square().sum().sqrt())
    torch.testing.assert_close(model.penalty(), 0.1 * torch.stack(norms).mean())
    with torch.no_grad():
        for layer in model.adapters.children():
            torch.nn.init.orthogonal_(layer.A)
            torch.nn.init.orthogonal_(layer.B)
    assert model.penalty().item() < 1e-5


@pytest.mark.parametrize(("start", "rank", "init", "target"), [("budget", 6, 6, 4), ("paper", 4, 6, 4)])
def test_the_ranks_aimed_at_are_those_of_the_ratio(start, rank, init, target):
    method = PeftAdaLoRA(start, 1.5, 0.1, 0.3, 1, 0.85, 0.85, 0.1)
    model, _, ranks = enabled(method, rank)
    config = model.peft.peft_config["default"]
    assert set(ranks.values()) == {init}
    assert (config.init_r, config.target_r, config.total_step, config.tinit, config.tfinal) == (init, target, 40, 4, 12)
    assert model.peft.base_model.rankallocator.target_bgt == target * len(ranks)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("ratio", [1.1, 1.5, 2.0, 3.7])
@pytest.mark.parametrize("modules", [12, 36, 7, 49])
def test_a_target_that_is_no_whole_rank_leaves_a_whole_number_of_triplets(rank, ratio, modules):
    method = PeftAdaLoRA("budget", ratio, 0.1, 0.3, 1, 0.85, 0.85, 0.1)
    units = round(rank * modules / ratio)
    if units == rank * modules:
        pytest.skip("nothing to mask")
    assert int(method._target(rank, modules) * modules) == units


def cubic(step, total, tinit, tfinal, first, last):
    """Triplets that live at a step (SYSTEMS.md 6.3, the form of the authors' code)."""
    if step <= tinit:
        return first
    if step > total - tfinal:
        return last
    return int(last + (first - last) * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3)


ADALORA_RUN = ("baseline=peft_adalora", "search_space=lora_all", "budget=params", "budget.value=5000")


@pytest.fixture(scope="module")
def adalora(tmp_path_factory):
    """A run with accumulated batches; what PEFT was told and how many triplets lived after each step; its batches."""
    folder = tmp_path_factory.mktemp("adalora") / "run"
    told, batches = [], []
    update, step = peft.AdaLoraModel.update_and_allocate, LitBaseline.training_step

    def spy(self, global_step):
        update(self, global_step)
        values = [p for name, p in self.model.named_parameters() if "lora_E" in name]
        told.append((global_step, int(sum((value != 0).sum() for value in values))))

    def keep(self, batch, batch_idx):
        batches.append((self.trainer.current_epoch, batch_idx, batch))
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.AdaLoraModel, "update_and_allocate", spy)
        patch.setattr(LitBaseline, "training_step", keep)
        summary = run_job(
            folder, *ADALORA_RUN, "trainer.max_epochs=5", "trainer.accumulate=4", "optimizer.lr=0.02",
            "data.limit=80", "export.peft=true",
        )  # fmt: skip
    return folder, summary, told, batches


@pytest.mark.medium
def test_live_triplets_follow_the_cubic_schedule_over_the_real_optimizer_steps(adalora):
    _, summary, told, _ = adalora
    settings = summary["baseline"]
    assert summary["steps"] == settings["total_step"] == 5 * math.ceil(10 / 4)  # 80 sentences, batches of 8, 4 a step
    assert [step for step, _ in told] == list(range(1, summary["steps"] + 1))
    live, held = settings["triplets"]
    assert held == 12 * settings["init_r"]
    expected = [
        cubic(step, settings["total_step"], settings["tinit"], settings["tfinal"], held, round(held / 1.5))
        for step, _ in told
    ]
    assert [count for _, count in told[1:]] == expected[1:]  # the first step's rate is 0: E is 0 still
    assert live == expected[-1] < held


@pytest.mark.medium
def test_the_last_mask_is_the_runs_allocation(adalora):
    folder, summary, _, _ = adalora
    written = json.loads((folder / "allocation.json").read_text())
    state = load_file(folder / "adapter.safetensors")
    masks = {key.split(".", 1)[1].removesuffix(".E"): v != 0 for key, v in state.items() if key.endswith(".E")}
    live = {name: int(mask.sum()) for name, mask in masks.items()}
    assert written["ranks"] == live
    config = peft.PeftConfig.from_pretrained(str(folder / "peft"))
    assert sum(map(sum, config.rank_pattern.values())) == sum(live.values()) == summary["baseline"]["triplets"][0]
    sites = json.loads((folder / "sites.json").read_text())
    sizes = {site["name"]: site["in_features"] + site["out_features"] + 1 for site in sites}
    assert summary["parameters"]["active"] == written["spent"] == sum(rank * sizes[name] for name, rank in live.items())
    assert summary["parameters"]["held"] == sum(v.numel() for key, v in state.items() if key.startswith("adapter."))
    assert summary["parameters"]["held"] == summary["baseline"]["init_r"] * sum(sizes.values()) <= 5000
    assert summary["export"]["parameters"] == summary["parameters"]["active"]
    assert summary["export"]["folder"] == "peft"


@pytest.mark.medium
def test_the_run_is_pefts_own_loop(adalora, tmp_path):
    """Replay the run's batches by the loop of PEFT's documentation, with the loss that PEFT's model returns."""
    folder, summary, _, batches = adalora
    model, config = _started(tmp_path / "again", summary)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01)
    total, rise = config.total_step, round(0.06 * config.total_step)
    step = 0
    for at, (epoch, index, batch) in enumerate(batches):
        ends = (index + 1) % 4 == 0 or at + 1 == len(batches) or batches[at + 1][0] != epoch
        torch.manual_seed(derive(0, "dropout", epoch, index))
        loss = model.base_model(**{key: value for key, value in batch.items() if key != "index"}).loss
        (loss / 4).backward()
        if not ends:
            continue
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (step / rise if step < rise else (total - step) / (total - rise))
        optimizer.step()
        step += 1
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    state = load_file(folder / "adapter.safetensors")
    for site in json.loads((folder / "sites.json").read_text()):
        layer, name = model.get_base_model().get_submodule(site["sink"].removesuffix(".out")), site["name"]
        for key in "AEB":
            theirs = getattr(layer, f"lora_{key}")["default"]
            torch.testing.assert_close(state[f"adapter.{name}.{key}"], theirs, rtol=1e-3, atol=1e-4)


def _started(folder, summary):
    """The model as the run had it before its first step, and its config: by PEFT alone, from the same seeds."""
    cfg = prepare_parts(folder)
    backbone = cfg.model.load(2, 0)
    saved = summary["baseline"]
    found = space_of(backbone)
    config = peft.AdaLoraConfig(
        target_modules=[site.sink.module for site in found.sites],
        **{key: saved[key] for key in ("init_r", "target_r", "lora_alpha", "total_step", "tinit", "tfinal", "deltaT")},
        orth_reg_weight=saved["orth_reg_weight"],
    )
    with quiet():
        torch.manual_seed(derive(0, "baseline"))
        model = peft.get_peft_model(backbone.model, config)
    for name, parameter in backbone.model.named_parameters():
        if name in backbone.head:
            parameter.requires_grad_(True)
    return model.train(), config


def prepare_parts(folder):
    from omegaconf import OmegaConf

    from heterolora.parts import make_parts

    folder.mkdir()
    return make_parts(OmegaConf.to_container(prepare(folder), resolve=True), {})


# -- EVA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", shown(["bert", "gpt2", "llama"], ["bert"]))
def test_evas_ranks_and_components_are_what_peft_finds_by_itself(architecture):
    method = PeftEVA("paper", 2.0, 0.9, False)
    model, batches, ranks = enabled(method, 2, architecture=architecture)
    assert sum(ranks.values()) == 2 * len(model.space.sites)
    assert max(ranks.values()) <= 4
    assert len(set(ranks.values())) > 1
    for name in model.held:
        factor = model.adapter(name).get_parameter("A")
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor)), atol=1e-4, rtol=0)
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    backbone = backbone_of(architecture)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.9),
        target_modules=list(model.modules_of.values()), fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip
    with quiet():
        theirs = peft.get_peft_model(backbone.model, config)
        peft.initialize_lora_eva_weights(theirs, inputs, show_progress_bar=False)
    for name, module in model.modules_of.items():
        layer = backbone.model.get_submodule(module)
        assert hasattr(layer, "lora_A") == (ranks[name] > 0)
        if ranks[name]:
            torch.testing.assert_close(model.adapter(name).get_parameter("A"), layer.lora_A["default"].weight)
            assert layer.scaling["default"] == pytest.approx(model.scales[name])


def test_without_redistribution_every_module_keeps_its_rank():
    _, _, ranks = enabled(PeftEVA("paper", 1.0, 0.9, False), 2)
    assert set(ranks.values()) == {2}


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("rank", [2, 3])
def test_eva_within_the_budget_has_the_largest_mean_rank_that_fits(architecture, rank):
    model, batches = baseline_of(EVA, architecture)
    cost = model.family.cost(model.space.sites)
    budget = cost(dict.fromkeys(model.ranks, rank))
    found = EVA.ranks(model, batches, budget)
    mean = sum(found.values()) // len(found)
    assert cost(found) <= budget
    if mean < rank:
        larger = EVA.find(model, batches, mean + 1)
        assert cost({name: len(larger[module]) for name, module in model.modules_of.items()}) > budget


def test_eva_refuses_batches_that_would_never_do():
    model, batches = baseline_of(EVA)
    with pytest.raises(SettingError, match=r"baseline\.rho=2\.0: asks for 64 components"):
        EVA.find(model, batches, 32)


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@EACH
@pytest.mark.parametrize("space", ["lora_all", "lora_qv"])
def test_what_a_default_run_holds_is_within_its_budget(tmp_path, name, space):
    folder = tmp_path / "run"
    summary = run_job(folder, f"baseline={name}", f"search_space={space}", "budget=qv_r8", "export.peft=true")
    parameters = summary["parameters"]
    assert 0 < parameters["active"] <= parameters["held"] <= parameters["budget"]
    assert parameters["unspent"] == parameters["budget"] - parameters["active"]
    assert summary["baseline"]["beyond_budget"] == 0
    assert summary["title"] == f"rotten_tomatoes: tiny_bert, {space}, {name}, qv_r8, seed 0"
    ranks = json.loads((folder / "allocation.json").read_text())["ranks"]
    assert summary["sites"]["active"] == sum(map(bool, ranks.values()))
    assert summary["export"]["largest_difference"] <= 1e-5
    with pytest.raises(SettingError, match="its adapters are PEFT's own"):
        load_run(folder)


@pytest.mark.medium
def test_a_start_beyond_the_budget_is_marked(tmp_path):
    settings = ("search_space=lora_all", "budget=all_r2")
    summary = run_job(tmp_path / "run", "baseline=peft_adalora", "baseline.start=paper", *settings)
    parameters, beyond = summary["parameters"], summary["baseline"]["beyond_budget"]
    assert summary["baseline"]["init_r"] == 2
    assert beyond == parameters["held"] - 1664 == 2 * 12  # two singular values a module more than LoRA of rank 2
    cells = [cell for column in summary_table(summary).columns for cell in column.cells]
    assert "1,688, MORE THAN THE BUDGET" in cells
    assert parameters["budget"] == 1664
    run_job(tmp_path / "plain", "baseline=peft_lora", *settings)
    found = find_results(tmp_path).results
    assert sorted(result.beyond for result in found) == [0, 24]
    section = compare(found, split=None, metric=None, baseline=None, primary=None, allow_unequal=True)[0]
    assert any("more is held than the budget allows" in note and "(by 24)" in note for note in section.notes)


@pytest.mark.medium
@pytest.mark.parametrize("start", ["paper", "budget"])
def test_ranks_that_eva_moves_to_dear_modules_are_marked_or_lowered(tmp_path, monkeypatch, start):
    plain = PeftEVA.find

    def find(self, model, batches, rank):
        found = plain(self, model, batches, rank)
        if rank == 2:  # one unit from a module of 64 parameters a unit to one of more
            cheap, dear = model.modules_of["0.q"], model.modules_of["0.up"]
            found[cheap], found[dear] = found[cheap][:1], torch.cat([found[dear][:2], found[dear][:1]])
            found |= {name: value[:2] for name, value in found.items() if name not in (cheap, dear)}
        return found

    monkeypatch.setattr(PeftEVA, "find", find)
    settings = ("baseline=peft_eva", "baseline.rho=1", f"baseline.start={start}", *LORA_ALL)
    summary = run_job(tmp_path / "run", *settings)
    sites = {site["name"]: site for site in json.loads((tmp_path / "run" / "sites.json").read_text())}
    q, up = (sites[name]["in_features"] + sites[name]["out_features"] for name in ("0.q", "0.up"))
    held = 1664 + up - q if start == "paper" else 1664 // 2
    assert summary["parameters"]["held"] == held
    assert summary["parameters"]["budget"] == 1664
    assert summary["baseline"]["beyond_budget"] == max(0, held - 1664)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft_lora", "peft_eva"])
def test_a_run_broken_off_resumes_to_the_same_bits(tmp_path, name):
    settings = (*LORA_ALL, f"baseline={name}", "adapter.dropout=0.1", "trainer.checkpoint_every=2")
    run_job(tmp_path / "whole", *settings)
    stop = [f"+callbacks.stop.{key}={value}" for key, value in (("epoch", 1), ("batch", 1))]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *settings, f"+callbacks.stop._target_={StopBefore.__module__}.StopBefore", *stop)
    summary = run_job(tmp_path / "second", *settings, "resume=true")
    assert summary["resumed_from"] == str(tmp_path / "first")
    assert what_came_out(tmp_path / "second") == what_came_out(tmp_path / "whole")


@pytest.mark.medium
def test_adalora_refuses_to_resume(tmp_path):
    settings = (*LORA_ALL, "baseline=peft_adalora", "trainer.checkpoint_every=2")
    stop = [f"+callbacks.stop.{key}={value}" for key, value in (("epoch", 1), ("batch", 1))]
    with pytest.raises(RuntimeError, match="broken off"):
        run_job(tmp_path / "first", *settings, f"+callbacks.stop._target_={StopBefore.__module__}.StopBefore", *stop)
    with pytest.raises(RunFailed, match=r"resume=.*importance scores are in no checkpoint"):
        run_job(tmp_path / "second", *settings, "resume=true")


REFUSED = {
    "search_space=full": "search_space=.*shortcuts.*search_space=lora_all",
    "search_space=lora_everything": "search_space=0.embed: an embedding.*exclude the role embed",
    "adapter=dora": "adapter=dora: with baseline=peft_lora: lora or rslora",
    "allocation=dynamic": "allocation=dynamic: with baseline=peft_lora: static",
    "trainer.compile=true": r"trainer\.compile=True: with baseline=peft_lora: false",
    "prefix.cache=true": r"prefix\.cache=True: with baseline=peft_lora: false",
    "budget.step_time=0.7": r"budget\.step_time=0\.7: with baseline=peft_lora: null",
    "budget=fraction": "budget",
    "budget.value=3": "budget=3",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(tmp_path, override):
    more = ("budget=params",) if override == "budget.value=3" else ()
    with pytest.raises(RunFailed, match=REFUSED[override]) as caught:
        run_job(tmp_path / "run", "search_space=lora_all", "baseline=peft_lora", *more, override)
    assert "\n" not in str(caught.value)


def test_a_search_has_no_baseline(tmp_path):
    (tmp_path / "run").mkdir()
    cfg = prepare(tmp_path / "run", "baseline=peft_lora", "search_space=lora_all", config="search")
    with pytest.raises(RunFailed, match=r"baseline=.*is for train\.py"):
        search(cfg)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"tinit": 0.5, "tfinal": 0.5}, "tinit"),
        ({"tfinal": 1.0}, "tfinal"),
        ({"deltaT": 0}, "deltaT"),
        ({"beta1": 1.0}, "beta1"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
    ],
)
def test_adalora_refuses_values_of_which_nothing_can_come(change, setting):
    values = asdict(ADALORA)
    with pytest.raises(SettingError) as caught:
        PeftAdaLoRA(**(values | change))
    assert caught.value.setting == setting


def test_a_dry_run_plans_without_leaving_peft_behind(tmp_path):
    from heterolora.run import train

    (tmp_path / "run").mkdir()
    train(prepare(tmp_path / "run", *LORA_ALL, "baseline=peft_adalora", "run=dry"))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["budget"] == 1664
    assert plan["title"].endswith("tiny_bert, lora_all, peft_adalora, all_r2, seed 0")


def test_triplets_cost_what_peft_holds():
    model, _, ranks = enabled(ADALORA, 3)
    theirs = sum(p.numel() for name, p in model.backbone.named_parameters() if "lora_" in name)
    assert model.held_parameters == theirs == SVD("constant", 1.0, 0.0, 0.02).cost(model.space.sites)(ranks)


@pytest.mark.medium
def test_peft_is_imported_by_those_alone_who_use_it():
    code = "import sys, heterolora.run, heterolora.baselines.methods; print('peft' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
