"""An adapted model whose adapters are modules of the PEFT library, inside the backbone."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from heterolora.adapters.base import AdapterFamily
from heterolora.backbone import Backbone
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.peft_config import module_of
from heterolora.seeds import derive
from heterolora.space import Space

ADAPTER = "default"
"""PEFT's name of its one adapter."""


class Injects(Protocol):
    """The part of a method that a model needs."""

    def inject(self, model: "PeftBaseline", ranks: Mapping[str, int]) -> Any:
        """PEFT's model, its modules put into the backbone.

        Args:
            model: whose backbone.
            ranks: site name -> rank, all above 0.
        """


class PeftLayer(nn.Module):
    """The trained tensors of PEFT's module at one site; the module itself computes.

    Args:
        tensors: PEFT's own: ``A`` ``[rank, in]``, ``B`` ``[out, rank]`` and, of AdaLoRA, ``E`` ``[rank, 1]``.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset()
    shared: ClassVar[None] = None

    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, tensor)

    @property
    def rank(self) -> int:
        """Units of rank held."""
        return len(self.get_parameter("A"))


class PeftBaseline(AdaptedModel):
    """What is trained and reported as an ``AdaptedModel`` is, and computed by PEFT.

    Sites are names here: PEFT replaces the linear layers of the backbone, and its modules hold the parameters. So
    nothing is hooked, and what needs hooks (probes, dynamic allocation) is refused before it comes to that.

    Args:
        backbone: its model is changed in place, by ``enable``.
        space: the candidates, LoRA sites alone.
        family: says what ranks cost, and the scale.
        method: puts PEFT's modules into the backbone.

    Raises:
        SettingError: if the space has shortcuts, or embeddings.
    """

    def __init__(self, backbone: Backbone, space: Space, family: AdapterFamily, method: Injects) -> None:
        super().__init__(backbone.model, space, family, backbone.head)
        if shortcuts := [site.name for site in space.sites if module_of(site) is None]:
            raise SettingError(
                "search_space",
                f"{len(shortcuts)} shortcuts ({shortcuts[0]}, ...)",
                "PEFT has adapters at linear layers alone: search_space=lora_all, lora_attention or lora_qv",
            )
        if tables := [site.name for site in space.sites if site.lookup]:
            raise SettingError(
                "search_space",
                tables[0],
                "an embedding; the originals are compared on linear layers: exclude the role embed",
            )
        self.method = method
        self.steps = 0
        """Optimizer steps of the whole training."""
        self.allowed: int | None = None
        """Parameters of the budget."""
        self.components: dict[str, torch.Tensor] | None = None
        """Of EVA: path of a module -> its first A, found before the modules are there."""
        self._peft: list[Any] = []  # in a list, for its parameters are the backbone's, and no others

    @property
    def peft(self) -> Any:
        """PEFT's model around the backbone.

        Raises:
            RuntimeError: if no adapter is enabled.
        """
        if not self._peft:
            raise RuntimeError("no adapter is enabled")
        return self._peft[0]

    @property
    def modules_of(self) -> dict[str, str]:
        """Site name -> path of the linear layer."""
        return {site.name: module for site in self.space.sites if (module := module_of(site)) is not None}

    def layer(self, name: str) -> Any:
        """PEFT's module at a site."""
        return self.backbone.get_submodule(self.modules_of[name])

    def enable(self, ranks: Mapping[str, int], seed: int) -> None:
        """Let PEFT put fresh adapters of these ranks into the backbone, drawn from the seed; earlier ones are gone."""
        if self._peft:
            self._peft.pop().unload()
        self.adapters.clear()
        wanted = {name: rank for name, rank in ranks.items() if rank}
        if wanted:
            device = next(self.backbone.parameters()).device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet():
                torch.manual_seed(derive(seed, "baseline"))
                self._peft = [self.method.inject(self, wanted)]
            for name in self._sites:
                if name in wanted:
                    self.adapters[name.replace(".", "/")] = PeftLayer(_tensors(self.layer(name)))
        for name, parameter in self.backbone.named_parameters():
            if name in self.head:
                parameter.requires_grad_(True)
        self.train(self.training)

    @property
    def scales(self) -> dict[str, float]:
        """Site name -> the factor of the product of its factors, as PEFT's module has it."""
        return {name: _scale(self.layer(name)) for name in self.held}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The backbone's own function for a while."""
        with self.peft.disable_adapter():
            yield

    def _rehook(self) -> None:
        raise RuntimeError("adapters of PEFT are modules of the backbone: nothing can be hooked or switched here")

    def penalty(self) -> torch.Tensor | None:
        """What PEFT adds to the loss of every batch; None: nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Told after each optimizer step, while the gradients are still there.

        Args:
            step: optimizer steps so far, this one among them.
        """


@contextmanager
def quiet() -> Iterator[None]:
    """Without words of PEFT that a user can do nothing about."""
    with warnings.catch_warnings():
        # its own use of transformers
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        # a hint about memory, at the size of adapters
        warnings.filterwarnings("ignore", message="lora with eva initialization used with", category=UserWarning)
        # of modules of which AdaLoRA left nothing
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape", category=UserWarning)
        # of AdaLoRA's own masks, which its loader takes for LoRA's ranks first, and reads rightly after that
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did", category=RuntimeWarning)
        yield


def _tensors(layer: Any) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters of one module, by our names."""
    if hasattr(layer, "lora_E"):
        return {key: getattr(layer, f"lora_{key}")[ADAPTER] for key in ("A", "E", "B")}
    return {key: getattr(layer, f"lora_{key}")[ADAPTER].weight for key in ("A", "B")}


def _scale(layer: Any) -> float:
    scaling = float(layer.scaling[ADAPTER])
    if hasattr(layer, "lora_E"):
        return scaling / (float(layer.ranknum[ADAPTER]) + 1e-5)
    return scaling
