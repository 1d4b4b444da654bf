"""Peak memory of one thing in this process: ``python -m benchmarks.speed.peak '{"what": "train", ...}'``.

Prints MiB above the loaded model. The environment makes malloc give memory back at once (``memory.THRIFTY``).
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.speed import subjects
from benchmarks.speed.peers import PEFT, peft
from benchmarks.speed.subjects import CLASSES, Batch, Learner, Placement, Shelf
from heterolora.backbone import Backbone
from heterolora.build import build
from heterolora.model import AdaptedModel
from heterolora.report.memory import now_mib, peak_mib, reset_peak
from heterolora.scoring import Probe, score_all
from heterolora.shipped import option

STEPS = 3


def measure(given: Mapping[str, Any]) -> float:
    """MiB above the loaded model.

    Args:
        given: ``what`` (``train`` or ``score``), ``model``, ``placement`` (its fields), ``rows``, ``tokens``, ``seed``,
            ``threads``, and ``who`` (``ours`` or ``PEFT``) or ``proxies``.
    """
    torch.set_num_threads(given["threads"])
    _import_what_comes_late()
    placement = Placement(**given["placement"])
    shelf = Shelf(given["seed"])
    backbone, other = shelf.backbone(given["model"]), None
    if given["what"] == "train" and given["who"] == PEFT:  # PEFT is told by ours where to put adapters
        other = subjects.ours(shelf.backbone(given["model"]), placement, given["model"], given["seed"]).model
    batches = [
        subjects.random_batch(backbone, given["rows"], given["tokens"], given["seed"] + number)
        for number in range(STEPS)
    ]
    before = now_mib()
    if before is None:
        raise SystemExit("this system does not say how much memory a process holds")
    reset_peak()
    if given["what"] == "train":
        _train(_learner(backbone, other, placement, given), batches)
    else:
        _score(backbone, placement, given, batches)
    return peak_mib() - before


def _learner(
    backbone: Backbone, other: torch.nn.Module | None, placement: Placement, given: Mapping[str, Any]
) -> Learner:
    if other is None:
        return subjects.ours(backbone, placement, given["model"], given["seed"])
    assert isinstance(other, AdaptedModel)
    return peft(backbone, placement, other)


def _train(learner: Learner, batches: list[dict[str, torch.Tensor]]) -> None:
    learner.model.train()
    for batch in batches:
        learner.step(batch)


def _score(
    backbone: Backbone, placement: Placement, given: Mapping[str, Any], batches: list[dict[str, torch.Tensor]]
) -> None:
    space, _, family = subjects.space_of(backbone, placement, given["model"])
    model = AdaptedModel(backbone.model, space, family, backbone.head)
    proxies = {name: build(option("proxy", name), "proxy") for name in given["proxies"]}
    score_all(model, plain_loss, batches, [], proxies=proxies, probe=probe(len(batches)), seed=given["seed"])


def plain_loss(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """The loss that learners have, of a model that is scored."""
    return Learner("ours", model, {}, {}).loss(batch)


def probe(batches: int) -> Probe:
    """The default look at the model, without warming up the head."""
    return Probe("random", False, 0.02, 1, batches, "mean", 0, 1e-3, 0, 1e-3)


def _import_what_comes_late() -> None:
    """torch imports its compiler with the first optimizer: nobody's step shall pay for that."""
    layer = torch.nn.Linear(CLASSES, CLASSES)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, CLASSES)).sum().backward()
    optimizer.step()
    with torch.compiler.set_stance("force_eager"):
        pass


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"mib": measure(json.loads(sys.argv[1]))}) + "\n")
