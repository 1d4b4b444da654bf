"""Loading backbones: pretrained ones from a package, a folder or the hub, and tiny random ones for tests."""

import copy
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.hub import hub_reachable
from heterolora.layouts import Layout
from heterolora.quiet import no_bars
from heterolora.seeds import derive

Dtype: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]

_PACKAGE = "package:"

_RELATIVE = ("t5", "bloom")
"""Types whose attention sees distances alone, which their configs do not say."""


@dataclass(frozen=True)
class Skeleton:
    """A backbone without weights, enough to find sites and to count what they cost.

    Attributes:
        model: the model on torch's meta device.
        layout: where its blocks and taps are, if the user said so.
    """

    model: nn.Module
    layout: Layout | None


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone.

    Attributes:
        model: a transformers model with a classification head, nothing frozen yet.
        tokenizer: its tokenizer, with a padding token.
        head: names of the parameters that are trained with the task: all outside ``base_model``, and those that the
            checkpoint did not hold.
        fingerprint: SHA-256 of the pretrained parameters (the head is not part of it).
        layout: where its blocks and taps are, if the user said so.
        gradient_checkpointing: whether activations shall be recomputed.
        drawn: names of those parameters of the head that were drawn from the seed.
    """

    model: nn.Module
    tokenizer: Any
    head: tuple[str, ...]
    fingerprint: str
    layout: Layout | None
    gradient_checkpointing: bool
    drawn: tuple[str, ...]

    @property
    def positions(self) -> int | None:
        """Tokens that fit into the model; None: no limit, since it sees distances alone."""
        return _positions(self.model)

    def copy(self, seed: int) -> "Backbone":
        """What loading it again with another seed would give; the two share no parameter."""
        model = copy.deepcopy(self.model)
        _draw(model, self.drawn, seed)
        return replace(self, model=model)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained backbone.

    Args:
        path: hub id, local folder, or ``package:NAME/FOLDER`` for weights inside an installed Python package.
        gguf_file: name of the GGUF file in that folder; null: safetensors.
        dtype: dtype of the frozen weights.
        dropout: probability for every dropout of the backbone; null: its own.
        layout: entry of the layout table, as a mapping, for an architecture that is not listed; null: look it up.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    path: str
    gguf_file: str | None
    dtype: Dtype
    dropout: float | None
    layout: Mapping[str, Any] | None
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        _check_dropout(self.dropout)

    def load(self, num_labels: int, seed: int) -> Backbone:
        """Load weights and tokenizer; the new head is drawn from ``(seed, parameter name)``.

        Raises:
            SettingError: if there is nothing to load at ``path``.
        """
        location, options = self._location(), self._options()
        with self._reading():
            config = self._config(location, options, num_labels)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                location,
                config=config,
                dtype=getattr(torch, self.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other classes is made anew, see below
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
        size = model.get_input_embeddings().num_embeddings
        # Added tokens may have no embedding, such as gemma3's for images in its text model: no text holds them.
        if len(set(tokenizer.all_special_ids)) >= len(tokenizer) or tokenizer.vocab_size > size:
            raise SettingError(
                "model.path",
                self.path,
                f"holds no tokenizer for its {size} embeddings, only one of {len(tokenizer)} tokens",
            )
        if (tokenizer.pad_token_id or 0) >= size:
            raise SettingError(
                "model.path", self.path, f"its {size} embeddings have none for the padding token {tokenizer.pad_token}"
            )
        other = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
        inside = {name for name, _ in model.named_parameters()} - set(outside_base(model))
        if wrong := sorted(other & inside):
            raise SettingError("model.path", self.path, f"weights do not fit the config: {wrong[:3]}")
        # A pooler that pretraining did not have is part of the head; anything else that lacks makes another backbone.
        if lost := sorted(name for name in set(info["missing_keys"]) & inside if "pooler" not in name):
            raise SettingError("model.path", self.path, f"weights are missing: {lost[:3]} ({len(lost)} in all)")
        return _finish(self, model, tokenizer, frozenset(info["missing_keys"]) | other, seed)

    def skeleton(self, num_labels: int) -> Skeleton:
        """The same model without weights, of which none is read.

        Raises:
            SettingError: if there is no config at ``path``.
        """
        location, options = self._location(), self._options()
        with self._reading():
            config = self._config(location, options, num_labels)
        return _skeleton(self, config)

    def _config(self, location: str, options: Mapping[str, Any], num_labels: int) -> Any:
        config = AutoConfig.from_pretrained(location, num_labels=num_labels, **options)
        _set_dropout(config, self.dropout)
        return config

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"local_files_only": not hub_reachable()}
        if self.gguf_file is not None:
            if importlib.util.find_spec("gguf") is None:
                raise SettingError(
                    "model.gguf_file", self.gguf_file, "needs the package gguf: pip install 'heterolora[smollm2]'"
                )
            options["gguf_file"] = self.gguf_file
        return options

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever cannot be read is refused in one line."""
        try:
            with _quiet():
                yield
        except (OSError, ValueError, ImportError, SafetensorError) as error:  # some tokenizers need further packages
            hub = "" if hub_reachable() else "; the hub cannot be reached from here"
            reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
            raise SettingError(
                "model.path",
                self.path,
                f"cannot be loaded ({reason}){hub}; give a hub id, a folder or package:NAME/FOLDER",
            ) from error

    def _location(self) -> str:
        if not self.path.startswith(_PACKAGE):
            return os.path.expanduser(self.path)
        package, _, inner = self.path.removeprefix(_PACKAGE).partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise SettingError("model.path", self.path, f"the package {package} is not installed")
        folder = Path(spec.submodule_search_locations[0]) / inner
        if not folder.is_dir():
            raise SettingError("model.path", self.path, f"the package has no folder {inner}")
        return str(folder)


@dataclass(frozen=True)
class Tiny:
    """A random backbone of a few thousand parameters and a byte tokenizer: needs no download, learns nothing useful.

    Args:
        model_type: transformers' name of the architecture.
        config: its config values; the vocabulary is the tokenizer's.
        dtype: dtype of the frozen weights.
        dropout: probability for every dropout of the backbone; null: its own.
        layout: see ``Pretrained``.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    model_type: str
    config: Mapping[str, Any]
    dtype: Dtype
    dropout: float | None
    layout: Mapping[str, Any] | None
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        _check_dropout(self.dropout)
        if own := sorted(
            {"num_labels", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"} & set(self.config)
        ):
            raise SettingError("config", own, "these follow from the task and the tokenizer")

    def load(self, num_labels: int, seed: int) -> Backbone:
        """Make the model; its weights are always the same, only the head is drawn from ``seed``."""
        tokenizer = byte_tokenizer(types=True)
        config = self._config(num_labels, tokenizer)
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(config).eval()  # as pretrained ones come
        return _finish(self, _cast(model, getattr(torch, self.dtype)), tokenizer, frozenset(outside_base(model)), seed)

    def skeleton(self, num_labels: int) -> Skeleton:
        """The same model without weights."""
        return _skeleton(self, self._config(num_labels, byte_tokenizer()))

    def _config(self, num_labels: int, tokenizer: Any) -> Any:
        ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
        ids |= {"eos_token_id": tokenizer.sep_token_id, "vocab_size": len(tokenizer)}
        try:
            config = AutoConfig.for_model(self.model_type, **self.config, num_labels=num_labels, **ids)
        except ValueError as error:
            raise SettingError("model.model_type", self.model_type, str(error).splitlines()[0][:120]) from error
        _set_dropout(config, self.dropout)
        return config


def _skeleton(settings: Pretrained | Tiny, config: Any) -> Skeleton:
    with torch.device("meta"), _quiet():
        model = AutoModelForSequenceClassification.from_config(config)
    return Skeleton(model, _user_layout(settings))


def _user_layout(settings: Pretrained | Tiny) -> Layout | None:
    if settings.layout is None:
        return None
    layout: Layout = build({"_target_": "heterolora.layouts.Layout", **settings.layout}, "model.layout")
    return layout


def _positions(model: Any) -> int | None:
    config = model.config
    relative = getattr(config, "alibi", False) or not getattr(config, "position_biased_input", True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if relative or config.model_type in _RELATIVE or limit is None:
        return None
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)  # roberta's kind counts positions from behind it
    return limit if padding is None else limit - padding - 1


def outside_base(model: Any) -> list[str]:
    """Names of the parameters that are not the base model's: the task's head."""
    inside = {id(p) for p in model.base_model.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in inside]


def _finish(settings: Pretrained | Tiny, model: Any, tokenizer: Any, fresh: frozenset[str], seed: int) -> Backbone:
    trained = fresh.union(outside_base(model))
    head = [name for name, _ in model.named_parameters() if name in trained]
    drawn = tuple(name for name, parameter in model.named_parameters() if name in fresh and parameter.dim() > 1)
    _prepare_tokenizer(tokenizer, model.config)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is not this one
    if model.config.is_encoder_decoder:
        _prepare_encoder_decoder(model.config, tokenizer)
    _head_in_float32(model, head)
    _draw(model, drawn, seed)
    return Backbone(
        model,
        tokenizer,
        tuple(head),
        fingerprint(model, head),
        _user_layout(settings),
        settings.gradient_checkpointing,
        drawn,
    )


def _draw(model: Any, names: Sequence[str], seed: int) -> None:
    """Fill parameters from ``(seed, name)``."""
    std: float = getattr(model.config, "initializer_range", getattr(model.config, "init_std", 0.02))
    for name in names:
        generator = torch.Generator().manual_seed(derive(seed, "head", name))
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


def _prepare_tokenizer(tokenizer: Any, config: Any) -> None:
    """Batches that every architecture reads as it should."""
    tokenizer.padding_side = "right"  # on the left, padding would shift the positions of some decoders' tokens
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer)
    # gpt2 and gptj would add the embeddings of words 0 and 1, others know one type or none.
    if getattr(config, "type_vocab_size", 0) < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]


def _padding_token(tokenizer: Any) -> str:
    """A special token that no text becomes or ends with: decoders pool before the last tokens that are padding."""
    last = tokenizer("a")["input_ids"][-1]
    for token in (tokenizer.eos_token, tokenizer.bos_token, *tokenizer.all_special_tokens):
        # Where the unknown token is the end token too, nothing is unknown (gpt2).
        unknown = token == tokenizer.unk_token and token not in (tokenizer.eos_token, tokenizer.bos_token)
        if token is not None and not unknown and tokenizer.convert_tokens_to_ids(token) != last:
            return str(token)
    raise SettingError("model", type(tokenizer).__name__, "this tokenizer has no token that could pad")


def _prepare_encoder_decoder(config: Any, tokenizer: Any) -> None:
    """The decoder reads the input again, from a start token on, and is pooled at the last end token."""
    for key, token in (("decoder_start_token_id", config.pad_token_id), ("eos_token_id", tokenizer.eos_token_id)):
        if getattr(config, key, None) is None:
            setattr(config, key, token)
    if config.eos_token_id not in tokenizer("a")["input_ids"]:
        raise SettingError(
            "model", config.model_type, f"its tokenizer must end every text with token {config.eos_token_id}"
        )


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype, but for what transformers itself keeps in float32 when it loads one."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept += tuple(model._keep_in_fp32_modules or ())
    model.to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in kept:
                module.float()
    return model


def _head_in_float32(model: nn.Module, head: Sequence[str]) -> None:
    """What is trained is held in float32 at least; on a half-precision backbone its modules cast their inputs."""
    for name in head:
        module = model.get_submodule(name.rpartition(".")[0])
        if next(module.parameters(recurse=False)).dtype in (torch.bfloat16, torch.float16):
            module.float()
            module.register_forward_pre_hook(_cast_to_float32)


def _cast_to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in args)


def fingerprint(model: nn.Module, without: list[str]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters but these."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in without:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_dropout(dropout: float | None) -> None:
    if dropout is not None and not 0 <= dropout < 1:
        raise SettingError("model.dropout", dropout, "a probability from 0 up to, not including, 1, or null")


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, dropout)


def byte_tokenizer(types: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, ``[CLS] a [SEP] b [SEP]``, 512 positions; with the sentence's number as type, if asked."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in special[1:]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, but for that of GGUF files, and no report of the missing head, which is expected."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)
