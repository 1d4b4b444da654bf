"""Loading backbones: pretrained ones from a package, a folder or the hub, and tiny random ones for tests."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from heterolora.seeds import derive

Dtype: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]

_PACKAGE = "package:"


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
    """

    model: nn.Module
    tokenizer: Any
    head: tuple[str, ...]
    fingerprint: str
    layout: Layout | None
    gradient_checkpointing: bool


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
        location = self._location()
        options: dict[str, Any] = {"local_files_only": not hub_reachable()}
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        with _quiet():
            try:
                config = AutoConfig.from_pretrained(location, num_labels=num_labels, **options)
                _set_dropout(config, self.dropout)
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    location,
                    config=config,
                    dtype=getattr(torch, self.dtype),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # a head for other classes is made anew, see below
                    **options,
                )
                tokenizer = AutoTokenizer.from_pretrained(location, **options)
            except (OSError, ValueError, SafetensorError) as error:
                hub = "" if hub_reachable() else "; the hub cannot be reached from here"
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise SettingError(
                    "model.path",
                    self.path,
                    f"cannot be loaded ({reason}){hub}; give a hub id, a folder or package:NAME/FOLDER",
                ) from error
        size = model.get_input_embeddings().num_embeddings
        if not len(set(tokenizer.all_special_ids)) < len(tokenizer) <= size:
            raise SettingError(
                "model.path",
                self.path,
                f"holds no tokenizer for its {size} embeddings, only one of {len(tokenizer)} tokens",
            )
        other = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
        inside = {name for name, _ in model.named_parameters()} - set(_outside(model))
        if wrong := sorted(other & inside):
            raise SettingError("model.path", self.path, f"weights do not fit the config: {wrong[:3]}")
        # A pooler that pretraining did not have is part of the head; anything else that lacks makes another backbone.
        if lost := sorted(name for name in set(info["missing_keys"]) & inside if "pooler" not in name):
            raise SettingError("model.path", self.path, f"weights are missing: {lost[:3]} ({len(lost)} in all)")
        return _finish(self, model, tokenizer, frozenset(info["missing_keys"]) | other, seed)

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
        tokenizer = byte_tokenizer()
        ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
        ids |= {"eos_token_id": tokenizer.sep_token_id, "vocab_size": len(tokenizer)}
        try:
            config = AutoConfig.for_model(self.model_type, **self.config, num_labels=num_labels, **ids)
        except ValueError as error:
            raise SettingError("model.model_type", self.model_type, str(error).splitlines()[0][:120]) from error
        _set_dropout(config, self.dropout)
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(config).to(getattr(torch, self.dtype))
        return _finish(self, model, tokenizer, frozenset(_outside(model)), seed)


def _outside(model: Any) -> list[str]:
    """Names of the parameters that are not the base model's: the task's head."""
    inside = {id(p) for p in model.base_model.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in inside]


def _finish(settings: Pretrained | Tiny, model: Any, tokenizer: Any, fresh: frozenset[str], seed: int) -> Backbone:
    trained = fresh.union(_outside(model))
    head = [name for name, _ in model.named_parameters() if name in trained]
    std: float = getattr(model.config, "initializer_range", getattr(model.config, "init_std", 0.02))
    for name, parameter in model.named_parameters():
        if name in fresh and parameter.dim() > 1:
            generator = torch.Generator().manual_seed(derive(seed, "head", name))
            drawn = torch.empty(parameter.shape).normal_(0, std, generator=generator)
            with torch.no_grad():
                parameter.copy_(drawn)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise SettingError("model", type(tokenizer).__name__, "this tokenizer has no token that could pad")
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is not this one
    _head_in_float32(model, head)
    layout = None
    if settings.layout is not None:
        layout = build({"_target_": "heterolora.layouts.Layout", **settings.layout}, "model.layout")
    return Backbone(model, tokenizer, tuple(head), fingerprint(model, head), layout, settings.gradient_checkpointing)


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ``[CLS] a [SEP] b [SEP]``, 512 positions."""
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
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=512
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of the missing head, which is expected."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
