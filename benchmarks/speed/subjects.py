"""Models that learn, ours: a backbone, ranks at its sites, an optimizer, and a batch to learn from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from heterolora.backbone import Backbone
from heterolora.model import AdaptedModel
from heterolora.run import compose
from heterolora.scoring import allocate
from heterolora.seeds import derive
from heterolora.space import Space, survey

SCALE = 2.0
"""Of every adapter, ours and PEFT's."""

CLASSES = 2

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Placement:
    """Where adapters go.

    Attributes:
        name: for tables.
        search_space: option of that group.
        rank: at every site; None: what greedy allocates by equal scores under ``budget``.
        budget: option of that group.
        dropout: of adapters.
    """

    name: str
    search_space: str
    rank: int | None
    budget: str = "qv_r8"
    dropout: float = 0.0


QV_R8 = Placement("q,v r=8", "lora_qv", 8)
ALL_R2 = Placement("all linears r=2", "lora_all", 2)
ALL_R8 = Placement("all linears r=8", "lora_all", 8)
FULL = Placement("full space with shortcuts, budget of q,v r=8", "full", None)
DROPOUT = Placement("q,v r=8, adapter dropout 0.1", "lora_qv", 8, dropout=0.1)


class Shelf:
    """Loaded backbones; whoever takes one gets a copy."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._loaded: dict[str, Backbone] = {}

    def backbone(self, model: str) -> Backbone:
        """A backbone of its own, with the head of the seed; backbone dropout is off."""
        if model not in self._loaded:
            self._loaded.clear()  # one at a time: cases go model by model
            parts = compose([f"model={model}", "model.dropout=0.0"])
            self._loaded[model] = parts["model"].load(CLASSES, self._seed)
        return self._loaded[model].copy(self._seed)


@dataclass
class Learner:
    """A model in training, with what belongs to each site.

    Attributes:
        name: whose it is.
        model: gives ``.logits``.
        factors: site -> (A, B).
        head: the head's parameters, by the backbone's names.
        scale_of: what a module multiplies ``B A`` with, where that can be asked.
    """

    name: str
    model: nn.Module
    factors: dict[str, tuple[nn.Parameter, nn.Parameter]]
    head: dict[str, nn.Parameter]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Everything with a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; its rate is so small that values stay what they are for as long as is measured."""
        return torch.optim.AdamW(self.trained, lr=1e-7, weight_decay=0.01)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.model(**inputs).logits
        return functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), batch["labels"])

    def backward(self, batch: Batch) -> torch.Tensor:
        """Forward and backward."""
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, batch: Batch) -> None:
        """One training step: forward, backward, AdamW, gradients cleared."""
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def stepping(self, batch: Batch) -> Callable[[], None]:
        """A training step on this batch, to be timed."""
        self.model.train()
        return lambda: self.step(batch)


def random_batch(backbone: Backbone, rows: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Ids without padding; labels of both classes."""
    generator = torch.Generator().manual_seed(derive(seed, "batch", rows, tokens))
    special = set(backbone.tokenizer.all_special_ids)
    usable = torch.tensor([code for code in range(len(backbone.tokenizer)) if code not in special])
    ids = usable[torch.randint(len(usable), (rows, tokens), generator=generator)]
    labels = torch.arange(rows) % CLASSES
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def space_of(backbone: Backbone, placement: Placement, model: str) -> tuple[Space, dict[str, int], Any]:
    """Sites, their ranks and the adapter family of a placement."""
    greedy = ["allocator=greedy", "proxy=constant"] if placement.rank is None else ["allocator=uniform"]
    parts = compose(
        [
            f"model={model}",
            f"search_space={placement.search_space}",
            f"budget={placement.budget}",
            f"adapter.dropout={placement.dropout}",
            f"adapter.scale={SCALE}",
            *greedy,
        ]
    )
    space: Space = parts["search_space"].resolve(survey(backbone.model, backbone.layout))
    if placement.rank is not None:
        return space, {site.name: placement.rank for site in space.sites}, parts["adapter"]
    equal = {site.name: 1.0 for site in space.sites}
    found = allocate(parts["allocator"], equal, parts["budget"].resolve(space), space, parts["adapter"])
    return space, {name: rank for name, rank in found.ranks.items() if rank}, parts["adapter"]


def ours(backbone: Backbone, placement: Placement, model: str, seed: int) -> Learner:
    """Our model with this placement; the backbone becomes part of it."""
    space, ranks, family = space_of(backbone, placement, model)
    adapted = AdaptedModel(backbone.model, space, family, backbone.head)
    adapted.enable(ranks, seed)
    factors = {name: (_factor(adapted, name, "A"), _factor(adapted, name, "B")) for name in ranks}
    return Learner("ours", adapted, factors, adapted.head_parameters)


def _factor(adapted: AdaptedModel, name: str, which: str) -> nn.Parameter:
    found: nn.Parameter = getattr(adapted.adapter(name), which)
    return found


def lower_bound(backbone: Backbone, placement: Placement, model: str) -> Learner:
    """What any such training must compute: no adapters, but a backward pass down to where the lowest ones would be.

    The outputs of the lowest layer's linears that would be adapted are made to require gradients; the head is trained.
    """
    space, ranks, _ = space_of(backbone, placement, model)
    sites = [site for site in space.sites if ranks.get(site.name)]
    lowest = min(site.layer for site in sites)
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in backbone.head)
    for path in _modules(site.sink for site in sites if site.layer == lowest):
        backbone.model.get_submodule(path).register_forward_hook(_require_gradient)
    head = {name: p for name, p in backbone.model.named_parameters() if name in backbone.head}
    return Learner("lower bound", backbone.model, {}, head)


def _modules(sinks: Any) -> Sequence[str]:
    return [sink.module for sink in sinks if hasattr(sink, "module")]


def _require_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_()
