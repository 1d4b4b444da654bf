"""Numbers made by the paper's own code, reproduced in float64 (see shared/docs/ORACLES.md for the files' format).

Every case folder in HETEROLORA_ORACLES (or shared/oracles beside the project) is taken; its config says what it is.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from heterolora.adapters.lora import LoRA
from heterolora.allocators.base import GainRule
from heterolora.allocators.top import Top
from heterolora.budget import Fraction
from heterolora.model import AdaptedModel
from heterolora.proxies.evidence import Bench, Evidence, FactorGradients, gather
from heterolora.proxies.grad_norm import GradNorm
from heterolora.proxies.snip import Snip
from heterolora.scoring import untracked
from heterolora.space import SearchSpace, survey

FOLDER = Path(os.environ.get("HETEROLORA_ORACLES") or Path(__file__).parents[2] / "shared" / "oracles")
CASES = sorted(path.parent for path in FOLDER.glob("*/expected_f64.safetensors"))
VARIANTS = {"no2ln": False, "gated": True}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

ROLES = {
    "residual_1": "residual_attn",
    "residual_2": "residual_ffn",
    "shortcut_sa": "shortcut_attn",
    "shortcut_ffn": "shortcut_ffn",
    **{"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "o_proj": "o"},
    **{"fc1": "up", "fc2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
}


def test_the_folder_that_was_named_holds_cases():
    if "HETEROLORA_ORACLES" in os.environ or FOLDER.is_dir():
        assert CASES, f"no case in {FOLDER}"
    else:
        pytest.skip(f"no oracles at {FOLDER}; set HETEROLORA_ORACLES")


@dataclass
class Case:
    folder: Path
    meta: dict
    expected: dict
    gradients: dict
    batches: list
    first: dict

    def site(self, name: str) -> str:
        layer, _, role = name.partition(".")
        return f"{layer}.{ROLES[role]}"

    def model(self, renorm: bool, state: str) -> AdaptedModel:
        """All sites hold the file's factors; B = 0 in state init."""
        config = transformers.AutoConfig.from_pretrained(self.folder)
        config._attn_implementation = "sdpa"  # the eager path casts its softmax to float32
        torch.manual_seed(0)
        backbone = getattr(transformers, config.architectures[0])(config).double()
        backbone.load_state_dict(load_file(self.folder / "base.safetensors"), strict=not config.tie_word_embeddings)
        backbone.tie_weights()
        space = SearchSpace(["lora", "shortcut"], [], None, [1, 2], renorm, "kind").resolve(survey(backbone))
        scale = {"lora": self.meta["meta"]["lora_scaling"], "shortcut": self.meta["meta"]["shortcut_scaling"]}
        model = AdaptedModel(backbone, space, LoRA("constant", scale, 0.0)).eval()
        factors = load_file(self.folder / "adapters.safetensors")
        ranks = {self.site(key[:-2]): len(value) for key, value in factors.items() if key.endswith(".A")}
        assert ranks.keys() == model.ranks.keys()
        model.enable(ranks, seed=0)
        zero = state == "init"
        model.load_adapter_state_dict(
            {
                self.site(key[:-2]) + key[-2:]: value.double() * (0.0 if zero and key.endswith(".B") else 1.0)
                for key, value in factors.items()
            }
        )
        return model


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request) -> Case:
    folder = request.param
    flat = load_file(folder / "batches.safetensors")
    numbers = sorted({int(key.split(".")[0]) for key in flat})
    batches = [{key.split(".")[1]: flat[key] for key in flat if key.startswith(f"{number}.")} for number in numbers]
    return Case(
        folder,
        json.loads((folder / "expected_f64.json").read_text()),
        load_file(folder / "expected_f64.safetensors"),
        load_file(folder / "grads_f64.safetensors"),
        batches,
        load_file(folder / "batch.safetensors"),
    )


def loss(model, batch):
    """Cross-entropy in the logits' own precision: transformers casts a causal model's logits to float32 for it."""
    logits, labels = model(**{key: value for key, value in batch.items() if key != "labels"}).logits, batch["labels"]
    if logits.dim() == 3:  # a causal model predicts the next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("state", ["rand", "init"])
def test_logits_and_losses_of_all_conditions(case, state, variant):
    model = case.model(VARIANTS[variant], state)
    checked = 0
    for condition, names in case.meta["conditions"].items():
        key = f"{state}/{variant}/{condition}"
        if f"{key}/logits" not in case.expected:
            continue
        on = {case.site(name) for name in names}
        model.switch_off(model.ranks.keys() - on)
        with torch.no_grad():
            logits, value = model(**case.first).logits, loss(model, case.first)
        torch.testing.assert_close(logits, case.expected[f"{key}/logits"].double(), **TOLERANCE)
        if key in case.meta["loss"]:
            assert value.item() == pytest.approx(case.meta["loss"][key], rel=1e-9)
        checked += 1
    assert checked >= 8


def test_the_plain_model_and_its_hidden_states(case):
    model = case.model(False, "rand")
    model.switch_off(model.ranks)
    with torch.no_grad():
        torch.testing.assert_close(model(**case.first).logits, case.expected["plain/logits"].double(), **TOLERANCE)
    for condition, off in (("all_off", list(model.ranks)), ("all_on", [])):
        model.switch_off(off)
        with torch.no_grad():
            states = model(**case.first, output_hidden_states=True).hidden_states
        for index in range(len(states) - 1):  # the last one is normed in most decoders, and no tap
            key = f"rand/no2ln/{condition}/hidden_{index}"
            torch.testing.assert_close(states[index], case.expected[key].double(), **TOLERANCE)


@pytest.mark.parametrize("state", ["rand", "init"])
def test_gradients_of_all_factors(case, state):
    """By autograd through the live adapters, and by the shared pass from source values and sink gradients alone."""
    model = case.model(False, state)
    adapters = {name: model.adapter(name) for name in model.ranks}
    gathered = gather(bench(model, case), adapters, [FactorGradients()])[FactorGradients()]
    for batch in case.batches:
        loss(model, batch).backward()
    checked = 0
    for key, expected in case.gradients.items():
        parts = key.split("/")
        if parts[:2] != ["no2ln", state] or len(parts) != 3:
            continue
        name, factor = case.site(parts[2][:-2]), parts[2][-1]
        actual = getattr(model.adapter(name), factor).grad
        torch.testing.assert_close(actual, expected.double(), **TOLERANCE)
        torch.testing.assert_close(gathered[name]["AB".index(factor)], expected.double(), **TOLERANCE)
        checked += 1
    assert checked == 2 * len(model.ranks)


def bench(model, case) -> Bench:
    return Bench(model, case.batches, loss, True, "sum", untracked)


def scores(case, state, proxy):
    """As ``probe.live=true probe.reduction=sum`` scores, with the file's factors as the probe's."""
    model = case.model(False, state)
    adapters = {name: model.adapter(name) for name in model.ranks}
    gathered = gather(bench(model, case), adapters, proxy.statistics)
    evidence = Evidence(model.space.sites, adapters, gathered, model.space.families, bench(model, case), seed=0)
    return proxy.score(evidence), model.space


@pytest.mark.parametrize("state", ["rand", "init"])
@pytest.mark.parametrize("proxy", [GradNorm(), Snip()], ids=["grad_norm", "snip"])
def test_scores(case, state, proxy):
    name = "grad_norm" if isinstance(proxy, GradNorm) else "snip"
    found, _ = scores(case, state, proxy)
    meta = case.meta
    expected = dict(meta["scores"][f"no2ln/{state}"].get(name) or {})
    expected |= meta["scores_extension_not_in_reference"].get(f"no2ln/{state}", {}).get(name, {})
    assert {case.site(key) for key in expected} == found.keys()
    for key, value in expected.items():
        assert found[case.site(key)] == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mode", ["combined", "separate"])
@pytest.mark.parametrize("state", ["rand", "init"])
@pytest.mark.parametrize("proxy", [GradNorm(), Snip()], ids=["grad_norm", "snip"])
def test_selections_at_a_quarter(case, state, proxy, mode):
    name = "grad_norm" if isinstance(proxy, GradNorm) else "snip"
    expected = case.meta["selection_0.25"][f"no2ln/{state}"][f"{name}/{'separated' if mode == 'separate' else mode}"]
    found, space = scores(case, state, proxy)
    gains = GainRule("flat", 4, "none").gains(found, space.sites, space.groups)
    cost = LoRA("constant", 1.0, 0.0).cost(space.sites)
    allocation = Top(mode, 4, "none", 0).allocate(gains, cost, Fraction(0.25, 4, None).resolve(space), space.groups)
    assert len(allocation.active) == expected["count"]
    if expected["enabled"] is not None:  # None: all scores are zero, and the paper's code draws
        assert allocation.active.keys() == {case.site(key) for key in expected["enabled"]}


def test_the_search_itself_gives_these_scores_when_it_probes_live_and_sums(case, monkeypatch):
    """The settings of the config (``probe.live``, ``probe.reduction``) reach the pass."""
    from heterolora.scoring import Probe, score

    expected, _ = scores(case, "rand", GradNorm())
    model = case.model(False, "rand")
    given = {name: model.adapter(name) for name in model.ranks}
    monkeypatch.setattr(LoRA, "probe", lambda self, site, rank, std, seed, around: given[site.name])
    probe = Probe("random", True, 0.1, 4, 3, "sum", 0, 1e-3, 0, 1e-3)
    found = score(model, loss, case.batches, [], proxy=GradNorm(), probe=probe, seed=0)
    assert found == pytest.approx(expected, rel=1e-12)


def test_top_takes_the_papers_number_of_sites_of_each_kind(case):
    model = case.model(False, "rand")
    counts = Fraction(0.25, 4, None).resolve(model.space).counts
    sizes = {kind: sum(site.kind == kind for site in model.space.sites) for kind in ("lora", "shortcut")}
    assert counts == {"lora": int(0.25 * sizes["lora"]), "shortcut": round(0.25 * sizes["shortcut"])}
