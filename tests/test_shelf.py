"""What runs of one process share: nothing that a run could change."""

import pytest
import torch
from safetensors.torch import load_file

from heterolora.parts import make_parts
from heterolora.quiet import quieten
from heterolora.run import composer
from heterolora.shelf import Shelf
from heterolora.training import run_training
from tests.jobs import TINY

pytestmark = pytest.mark.medium


def config(*overrides: str):
    with composer() as compose:
        return compose([*TINY, *overrides])


@pytest.mark.parametrize("overrides", [(), ("model=tiny_llama", "model.dtype=bfloat16"), ("model=tiny_t5",)], ids=str)
def test_a_kept_backbone_is_what_loading_it_again_gives(overrides):
    shelf, loads = Shelf(keep=True), []
    for seed in (0, 1, 0):
        given, choices = config(*overrides, f"seed={seed}")
        parts = make_parts(given, choices)
        kept, fresh = shelf.backbone(parts, given, 3), parts.model.load(3, seed)
        assert kept.head == fresh.head
        assert kept.fingerprint == fresh.fingerprint
        found, wanted = dict(kept.model.named_parameters()), dict(fresh.model.named_parameters())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        with torch.no_grad():
            for parameter in kept.model.parameters():
                parameter.zero_()  # whatever a run does to it
        loads.append(kept.model)
    assert len({id(model) for model in loads}) == 3


def test_another_model_task_or_number_of_outputs_is_loaded_anew():
    shelf = Shelf(keep=True)
    given, choices = config()
    parts = make_parts(given, choices)
    assert shelf.backbone(parts, given, 2).model.config.num_labels == 2
    assert shelf.backbone(parts, given, 3).model.config.num_labels == 3
    other, choices = config("model=tiny_opt")
    assert shelf.backbone(make_parts(other, choices), other, 2).model.config.model_type == "opt"
    material = shelf.material(parts, given)
    assert shelf.material(parts, given) is material
    fewer, choices = config("data.limit=16")
    assert len(shelf.material(make_parts(fewer, choices), fewer).splits.tables["train"]) == 16


def test_runs_on_a_shared_shelf_have_the_bits_of_runs_alone(tmp_path):
    """Each run leaves hooks, adapters, gradients and a trained head behind; the next one must see none of it."""
    quieten()
    shelf = Shelf(keep=True)
    order = [
        ("seed=0",),
        ("seed=1", "proxy=snip"),
        ("seed=0", "search_space=lora_qv", "allocator=uniform"),
        ("seed=0",),
    ]
    digests = []
    for number, overrides in enumerate(order):
        given, choices = config("trainer.threads=1", *overrides)
        states = []
        for name, used in (("shared", shelf), ("alone", None)):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            run_training(make_parts(given, choices), given, folder, None, used)
            states.append(load_file(folder / "adapter.safetensors"))
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        digests.append(states[0])
    assert all(torch.equal(digests[0][key], digests[3][key]) for key in digests[0])
    assert len(shelf._kept["tokens"]) == 1
