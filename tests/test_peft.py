"""Plain LoRA is what PEFT's is: same logits, same gradients, same steps."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.architectures import make_batch
from tests.conftest import adapt, randomise

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated"),  # PEFT's use of transformers
]


def paired(backbone, rank=2):
    """Our model and PEFT's on copies of one backbone, with the same factors at every linear layer of the blocks."""
    theirs_base = copy.deepcopy(backbone)
    ours = adapt(backbone, include=["lora"], scale=2.0)
    ours.enable(dict.fromkeys(ours.ranks, rank), seed=0)
    randomise(ours)
    targets = sorted({site.source.module for site in ours.space.sites})
    transposed = hasattr(backbone.get_submodule(targets[0]), "nx")  # Conv1D
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets, fan_in_fan_out=transposed
    )
    theirs = get_peft_model(theirs_base, config)
    modules = dict(theirs.base_model.model.named_modules())
    pairs = [(ours.adapter(site.name), modules[site.source.module]) for site in ours.space.sites]
    with torch.no_grad():
        for adapter, module in pairs:
            module.lora_A["default"].weight.copy_(adapter.A)
            module.lora_B["default"].weight.copy_(adapter.B)
    return ours, theirs, pairs


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_parameters_held_are_pefts(backbone):
    ours, theirs, _ = paired(backbone)
    assert ours.held_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_logits_and_three_steps_of_adamw(backbone):
    ours, theirs, pairs = paired(backbone)
    batch = make_batch(backbone)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=1e-10, atol=1e-12)
    optimizers = [
        torch.optim.AdamW(ours.adapters.parameters(), lr=1e-2),
        torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2),
    ]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"]).backward()
            optimizer.step()
    for adapter, module in pairs:
        torch.testing.assert_close(adapter.A, module.lora_A["default"].weight, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(adapter.B, module.lora_B["default"].weight, rtol=1e-7, atol=1e-9)
