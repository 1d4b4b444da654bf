"""PEFT's file format: which patterns are written, and how PEFT's own rules are read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from heterolora.errors import SettingError
from heterolora.peft_config import adapter_config, read_config
from heterolora.peft_files import Factors, peft_tensors, read_adapter
from heterolora.sites import Port, Site, Tap


def lora(layer, role="q", width=8):
    module = f"model.layers.{layer}.self_attn.{role}_proj"
    return Site(f"{layer}.{role}", "lora", role, layer, Port(module, "in"), Port(module, "out"), width, width)


SHORTCUT = Site("0.residual_attn", "shortcut", "residual_attn", 0, Tap(0), Tap(1), 8, 8)
SITES = [*(lora(layer) for layer in (0, 1, 2, 11)), SHORTCUT]


def config_of(ranks, scale=2.0, sites=SITES, fold_scale=True, **changes):
    scales = {site.name: scale / ranks.get(site.name, 1) if changes.pop("over_r", False) else scale for site in sites}
    given = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "base_model": None, "fan_in_fan_out": False}
    return adapter_config(sites, ranks, scales, fold_scale=fold_scale, dropout=0.0, **(given | changes))


def test_sites_without_rank_and_shortcuts_are_not_in_the_config():
    found = config_of({"0.q": 2, "1.q": 0, "11.q": 2, "0.residual_attn": 4})
    assert found["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"]
    assert (found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (2, 2, {}, {})


def test_folded_alpha_is_the_rank_everywhere():
    found = config_of({"0.q": 2, "1.q": 5, "11.q": 3}, scale=0.3)
    assert found["r"] == found["lora_alpha"] == 5
    keys = [rf"^model\.layers\.{layer}\.self_attn\.q_proj" for layer in (0, 11)]
    assert found["rank_pattern"] == found["alpha_pattern"] == dict(zip(keys, (2, 3), strict=True))


@pytest.mark.parametrize("scale", [2.0, 0.5, 0.3, 16 / 7, 1e-3, -1.5])
def test_unfolded_quotients_are_the_scale_but_for_one_unit_in_the_last_place(scale):
    ranks = {"0.q": 3, "1.q": 7, "2.q": 1, "11.q": 5}
    found = config_of(ranks, scale=scale, fold_scale=False)
    for name, rank in ranks.items():
        pattern = rf"^model\.layers\.{name[:-2]}\.self_attn\.q_proj"
        assert found["rank_pattern"].get(pattern, found["r"]) == rank
        assert found["alpha_pattern"].get(pattern, found["lora_alpha"]) / rank == pytest.approx(scale, rel=2.3e-16)
    assert config_of(ranks, scale=2.0, fold_scale=False)["lora_alpha"] == 14


def test_no_pattern_matches_another_module(tmp_path):
    ranks = {"0.q": 4, "1.q": 2, "2.q": 3, "11.q": 5}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config_of(ranks, scale=0.7, fold_scale=False)))
    read = read_config(path, "path")
    for name, rank in ranks.items():
        module = f"model.layers.{name[:-2]}.self_attn.q_proj"
        assert read.rank_of(module) == rank
        assert read.scale_of(module) == pytest.approx(0.7, rel=1e-15)
        assert read.rank_of(f"tower.{module}") == read.rank_of(f"{module}_norm") == 5  # the config's r
    assert read.among([f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 3, 11)]) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
    ]


def test_equal_allocations_give_equal_files_whatever_the_order():
    ranks = {"0.q": 4, "1.q": 2, "11.q": 5}
    backwards = config_of(dict(reversed(ranks.items())), sites=SITES[::-1], scale=0.7, fold_scale=False)
    assert json.dumps(backwards) == json.dumps(config_of(ranks, scale=0.7, fold_scale=False))


def test_an_allocation_of_shortcuts_alone_is_refused():
    with pytest.raises(SettingError, match=r"export\.peft=True: .*no LoRA site has rank"):
        config_of({"0.residual_attn": 4})


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def read(tmp_path, **changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | changes))
    return read_config(path, "path")


def test_the_first_pattern_in_the_files_order_wins(tmp_path):
    """Both orders were tried with PEFT 0.21: `re.match` up to the end of the path, from its start or after a dot."""
    patterns = {"query": 5, r"layer\.1\..*query": 7}
    assert read(tmp_path, rank_pattern=patterns).rank_of("bert.layer.1.self.query") == 5
    turned = dict(reversed(patterns.items()))
    assert read(tmp_path, rank_pattern=turned).rank_of("bert.layer.1.self.query") == 7
    assert read(tmp_path, rank_pattern=turned).rank_of("bert.layer.2.self.query") == 5
    assert read(tmp_path, rank_pattern={"uery": 5}).rank_of("bert.self.query") == 4
    assert read(tmp_path, rank_pattern={"a|query": 5}).rank_of("bert.self.query") == 5


def test_scales(tmp_path):
    assert read(tmp_path).scale_of("x.q_proj") == 2.0
    assert read(tmp_path, use_rslora=True).scale_of("x.q_proj") == 4.0
    assert read(tmp_path, alpha_pattern={"q_proj": 2.0}).scale_of("x.q_proj") == 0.5
    assert read(tmp_path, peft_type="ADALORA", init_r=12, lora_alpha=24).scale_of("x.q") == pytest.approx(2, rel=1e-6)


def test_adaloras_ranks_are_the_units_that_are_left(tmp_path):
    pattern = {"model.a.q_proj.lora_E": [True, False, True], "model.b.q_proj.lora_E.default": [False, False, False]}
    found = read(tmp_path, peft_type="ADALORA", init_r=3, rank_pattern=pattern)
    assert (found.rank_of("model.a.q_proj"), found.rank_of("model.b.q_proj"), found.rank_of("c")) == (2, 0, 3)


BAD = [
    ({"peft_type": "LOKR"}, "an adapter of type LOKR; only LORA and ADALORA"),
    ({"use_dora": True}, "asks for what a plain LoRA is not: use_dora=True"),
    ({"bias": "all"}, "trains biases"),
    ({"init_lora_weights": "pissa"}, "changes the frozen weights"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"something_of_next_year": 1}, "something_of_next_year=1"),
    ({"rank_pattern": {"(": 2}}, "is damaged"),
    ({"r": "many"}, "is damaged"),
    ({"r": None}, "is damaged"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:30])
def test_what_a_lora_of_ours_cannot_do_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(SettingError, match=message) as error:
        read(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_no_config_at_all(tmp_path):
    with pytest.raises(SettingError, match="cannot be read"):
        read_config(tmp_path / "nowhere.json", "path")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SettingError, match=r"no adapter_config\.json of PEFT"):
        read_config(tmp_path / "x.json", "path")


A, B = torch.arange(8.0).reshape(4, 2), torch.arange(12.0).reshape(3, 4)


def folder_of(tmp_path, tensors, **changes):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_tensors_written_are_read_back(tmp_path):
    head = {"score.weight": torch.ones(2, 3)}
    for fold, expected in ((False, B), (True, B * 2)):
        found = read_adapter(folder_of(tmp_path, peft_tensors({"m.q_proj": Factors(A, B, 2.0)}, head, fold)), "folder")
        assert torch.equal(found.modules["m.q_proj"].A, A)
        assert torch.equal(found.modules["m.q_proj"].B, expected)
        assert found.modules["m.q_proj"].scale == 2.0
        assert torch.equal(found.saved["score.weight"], head["score.weight"])


FACTORS = {"base_model.model.m.q_proj.lora_A.weight": A, "base_model.model.m.q_proj.lora_B.weight": B}

DAMAGED = [
    ({"m.q_proj.lora_A.weight": A}, {}, "names of PEFT begin with base_model.model."),
    ({"base_model.model.m.q_proj.lora_A.weight": A}, {}, r"has factors \['A'\]"),
    ({"base_model.model.m.lora_embedding_A": A}, {}, r"has factors \['A'\]"),
    ({"base_model.model.m.lora_embedding_E": A}, {}, "no factor of a linear layer's LoRA, or of an embedding's"),
    ({"base_model.model.m.lora_magnitude_vector.weight": A}, {}, "no factor of a linear layer's LoRA"),
    (FACTORS, {"r": 3}, "has rank 3 in adapter_config.json, but factors"),
]


@pytest.mark.parametrize(("tensors", "changes", "message"), DAMAGED)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, tensors, changes, message):
    with pytest.raises(SettingError, match=message):
        read_adapter(folder_of(tmp_path, tensors, **changes), "folder")


def test_missing_and_torn_weights(tmp_path):
    folder_of(tmp_path, FACTORS)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(SettingError, match="cannot be read"):
        read_adapter(tmp_path, "folder")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(SettingError, match="pickles are not read"):
        read_adapter(tmp_path, "folder")
