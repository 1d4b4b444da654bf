"""What an adapted model costs when it is used: merged, with LoRA, with shortcuts, beside the plain backbone."""

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import heterolora
from benchmarks.speed.bench import Bench
from benchmarks.speed.pairs import alternate, calls_for
from benchmarks.speed.peers import PEFT, check_same_start, peft
from benchmarks.speed.process import python
from benchmarks.speed.results import Found, Row, WrongResultError, compared
from benchmarks.speed.subjects import ALL_R8, FULL, Batch, Learner, ours, random_batch
from heterolora.model import AdaptedModel

_log = logging.getLogger(__name__)

PLAIN = "backbone"

_LEAST_SECONDS = 0.2
"""Of one repetition, so that a clock's grain and a scheduler's slice are small."""


def inference(bench: Bench) -> Found:
    """Forward passes of one and of sixteen texts of 64 tokens."""
    model = bench.encoder
    plain = bench.shelf.backbone(model)
    shortcuts = ours(bench.shelf.backbone(model), FULL, model, bench.seed)
    adapted = ours(bench.shelf.backbone(model), ALL_R8, model, bench.seed)
    assert isinstance(adapted.model, AdaptedModel)
    theirs = peft(bench.shelf.backbone(model), ALL_R8, adapted.model)
    with TemporaryDirectory() as folder:
        merged, check = _merged(bench, Path(folder))
    models = {
        PLAIN: plain.model,
        "merged": merged,
        "all linears r=8, not merged": adapted.model,
        FULL.name: shortcuts.model,
        PEFT: theirs.model,
    }
    rows, checks = [], [check]
    for size in (bench.size(1, 64), bench.size(16, 64)):
        batch = random_batch(plain, *size, bench.seed)
        backbone = Learner(PLAIN, plain.model, {}, {})
        checks += [check_same_start(learner, backbone, batch) for learner in (shortcuts, adapted, theirs)]
        rows += _rows(models, batch, bench.repeats)
    return Found(rows, checks, {"model": model})


def _rows(models: dict[str, nn.Module], batch: Batch, repeats: int) -> list[Row]:
    things = {name: _forward(model.eval(), batch) for name, model in models.items()}
    seconds = alternate(things, repeats, calls=calls_for(things[PLAIN], _LEAST_SECONDS)).seconds
    of = f"{len(batch['input_ids'])} x {batch['input_ids'].shape[1]} tokens"
    rows = []
    for name in models:
        if name != PLAIN:
            title = f"PEFT, {ALL_R8.name}, not merged" if name == PEFT else name
            rows.append(compared(f"{title}, {of}", seconds[name], seconds[PLAIN], PLAIN))
            _log.info("  %s: %.3f", rows[-1].what, rows[-1].estimate)
    return rows


def _forward(model: Any, batch: Batch) -> Callable[[], object]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    def forward() -> object:
        with torch.inference_mode():
            return model(**inputs).logits

    return forward


def _merged(bench: Bench, folder: Path) -> tuple[nn.Module, str]:
    """A run of one step and what ``merge`` makes of it: other values than the backbone's, the same as the run's."""
    run, out = folder / "run", folder / "merged"
    given = ["task=rotten_tomatoes", "data.limit=64", "data.cache_dir=null", f"model={bench.encoder}"]
    given += [
        "allocator=uniform",
        "search_space=lora_all",
        "budget=all_r2",
        "trainer.max_steps=1",
        "trainer.test=false",
    ]
    given += ["export.peft=false", f"seed={bench.seed}", "logger=none", f"hydra.run.dir={run}"]
    python(["train.py", *given], bench.threads)
    python(["-m", "heterolora", "merge", str(run), str(out)], bench.threads)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(out, local_files_only=True).eval()
    trained = heterolora.load(run)
    batch = random_batch(bench.shelf.backbone(bench.encoder), *bench.size(4, 32), bench.seed)
    with torch.no_grad():
        got, expected = (_forward(model, batch)() for model in (merged, trained))
        with trained.disabled():
            before = _forward(trained, batch)()
    assert isinstance(got, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert isinstance(before, torch.Tensor)
    far, moved = (got - expected).abs().max().item(), (expected - before).abs().max().item()
    if not far <= 1e-4 * max(1.0, expected.abs().max().item()) or far >= moved:
        raise WrongResultError(f"merged logits are {far:.1e} from the run's, which are {moved:.1e} from the backbone's")
    return merged, f"merged logits are {far:.1e} from the run's, which training has moved by {moved:.1e}"
