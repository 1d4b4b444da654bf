"""Tiny random models, one entry for each variant of the layout table; a new layout joins the contract by one entry."""

import torch
import transformers

_SIZE = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61, "pad_token_id": 1}
_SIZE |= {"bos_token_id": 2, "eos_token_id": 2, "num_labels": 3, "max_position_embeddings": 40}

ARCHITECTURES = {
    "bert": {"model_type": "bert", "intermediate_size": 48},
    "opt_pre": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "opt_post": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "llama": {"model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 12},
}


def make_backbone(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
    """A model with random weights everywhere, norms and biases included, so that no error cancels."""
    options = dict(ARCHITECTURES[name])
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **_SIZE, **options)
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, dropout)
    config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.AutoModelForSequenceClassification.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15
            parameter.add_(noise.to(dtype))
    return model.eval()


def make_batch(model, rows: int = 4, length: int = 9, seed: int = 3) -> dict[str, torch.Tensor]:
    """Right-padded ids, masks and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, length - row :] = model.config.pad_token_id
        mask[row, length - row :] = 0
    labels = torch.randint(0, model.config.num_labels, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
