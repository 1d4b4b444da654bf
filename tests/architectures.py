"""Tiny random models, one entry for each variant of the layout table; a new layout joins the contract by one entry."""

import pytest
import torch
import transformers

_SIZE = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61, "pad_token_id": 1}
_SIZE |= {"bos_token_id": 2, "eos_token_id": 2, "num_labels": 3, "max_position_embeddings": 40}

_WIDE = {"intermediate_size": 48}
_GROUPED = _WIDE | {"num_key_value_heads": 2, "head_dim": 12}  # heads * head_dim is not the hidden size
_T5 = {"d_model": 32, "d_kv": 12, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_ff": 48}
_T5 |= {"decoder_start_token_id": 1, "relative_attention_num_buckets": 8}

ARCHITECTURES = {
    "bert": {"model_type": "bert", **_WIDE},
    "roberta": {"model_type": "roberta", **_WIDE},
    "electra": {"model_type": "electra", **_WIDE, "embedding_size": 24},
    "deberta_v2": {
        "model_type": "deberta-v2", **_WIDE, "relative_attention": True, "position_buckets": 6,
        "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
    },
    "distilbert": {"model_type": "distilbert", "dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 48},
    "albert": {"model_type": "albert", **_WIDE, "embedding_size": 24},
    "albert_groups": {
        "model_type": "albert", **_WIDE, "embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2,
        "inner_group_num": 2,
    },
    "opt_pre": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "opt_post": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "llama": {"model_type": "llama", **_GROUPED},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **_WIDE, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **_GROUPED},
    "gemma": {"model_type": "gemma", **_GROUPED},
    "gemma2": {"model_type": "gemma2", **_GROUPED, "sliding_window": 5},
    "gemma3_text": {"model_type": "gemma3_text", **_GROUPED, "sliding_window": 5},
    "olmo2": {"model_type": "olmo2", **_WIDE, "num_key_value_heads": 2},
    "phi": {"model_type": "phi", **_WIDE},
    "phi3": {"model_type": "phi3", **_WIDE, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "n_inner": 48},
    "gptj": {"model_type": "gptj", "n_inner": 48, "rotary_dim": 4},
    "gpt_neox": {"model_type": "gpt_neox", **_WIDE, "use_parallel_residual": True},
    "gpt_neox_sequential": {"model_type": "gpt_neox", **_WIDE, "use_parallel_residual": False},
    "bloom": {"model_type": "bloom"},
    "bloom_normed": {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
    "falcon": {"model_type": "falcon", "parallel_attn": True, "multi_query": True, "alibi": False},
    "falcon_new": {
        "model_type": "falcon", "parallel_attn": True, "new_decoder_architecture": True, "num_kv_heads": 2,
        "alibi": False,
    },
    "falcon_sequential": {"model_type": "falcon", "parallel_attn": False, "multi_query": False, "alibi": True},
    "t5": {"model_type": "t5", **_T5, "feed_forward_proj": "relu"},
    "t5_gated": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip

KINDS = ("bert", "opt_pre", "llama", "gpt2", "gemma2", "gpt_neox", "bloom", "deberta_v2", "albert_groups", "t5_gated")
"""One of each kind of block, for what need not be shown for all of them."""


def shown(names, quick):
    """Test parameters of which only ``quick`` are part of the quick tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.medium) for name in names]


ENCODERS = {"bert", "roberta", "electra", "deberta_v2", "distilbert", "albert", "albert_groups"}
"""Types that generate no text."""

SINGLE = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3",
    "t5",
    "t5_gated",
    "gptj",
    "bloom",
    "bloom_normed",
}
"""Types that compute norms, or attention, in float32 whatever the model's dtype is."""


def make_config(name: str, dropout: float = 0.0):
    """The tiny config, every dropout at one probability."""
    options = dict(ARCHITECTURES[name])
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **(_SIZE | options))
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, dropout)
    return config


def make_backbone(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64, auto=None):
    """A model with random weights everywhere, norms and biases included, so that no error cancels."""
    auto = auto or transformers.AutoModelForSequenceClassification
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = auto.from_config(make_config(name, dropout)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15
            parameter.add_(noise.to(dtype))
    return model.eval()


def make_batch(model, rows: int = 4, length: int = 9, seed: int = 3) -> dict[str, torch.Tensor]:
    """Right-padded ids, masks and labels; every row ends with one end-of-sentence token, as T5 wants it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, length - row :] = model.config.pad_token_id
        ids[row, length - row - 1] = model.config.eos_token_id
        mask[row, length - row :] = 0
    labels = torch.randint(0, model.config.num_labels, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
