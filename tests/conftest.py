"""Fixtures shared by all tests: tiny backbones, spaces and batches of each architecture."""

import os
from pathlib import Path

import pytest
import torch

from heterolora.adapters.lora import LoRA
from heterolora.model import AdaptedModel
from heterolora.space import SearchSpace, survey
from tests.architectures import ARCHITECTURES, KINDS, make_backbone, make_batch, shown

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder that holds glue/MRPC and the like: HETEROLORA_DATA, or shared/data beside the project."""
    path = Path(os.environ.get("HETEROLORA_DATA") or SHARED / "data")
    if not (path / "glue" / "MRPC" / "train.tsv").is_file():
        pytest.skip(f"no GLUE files under {path}; set HETEROLORA_DATA")
    return path


@pytest.fixture(params=shown(sorted(ARCHITECTURES), KINDS))
def architecture(request) -> str:
    """Every architecture of the layout table, by name."""
    return request.param


@pytest.fixture
def backbone(architecture):
    """A tiny random float64 model of the architecture, in evaluation mode."""
    return make_backbone(architecture)


@pytest.fixture
def batch(backbone):
    """Padded inputs and labels for it."""
    return make_batch(backbone)


@pytest.fixture
def adapted(backbone):
    """The model with every LoRA and shortcut site of spans 1 to 4, none enabled."""
    return adapt(backbone)


def adapt(backbone, include=("lora", "shortcut"), spans=(1, 2, 3, 4), renorm=False, scale=2.0) -> AdaptedModel:
    """An adapted model, in the backbone's own mode."""
    space = SearchSpace(list(include), [], None, list(spans), renorm, "kind").resolve(survey(backbone))
    inside = {id(p) for p in backbone.base_model.parameters()}
    head = [name for name, p in backbone.named_parameters() if id(p) not in inside]
    model = AdaptedModel(backbone, space, LoRA("constant", scale, 0.0), head)
    return model.train(backbone.training)


def randomise(model: AdaptedModel, seed: int = 0, std: float = 0.2) -> None:
    """Fill every held factor with noise, so that deltas are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std)


def some_sites(model: AdaptedModel) -> tuple[str, str, str]:
    """Two LoRA sites and a shortcut of span 2, whatever this architecture calls them."""
    lora = [site.name for site in model.space.sites if site.kind == "lora"]
    return lora[0], lora[1], next(site.name for site in model.space.sites if site.span == 2)
