"""The cases, in the order in which they are measured and shown."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.speed import end_to_end, first_step, latency, memory, pieces, scaling, scoring, steps, where
from benchmarks.speed.bench import Bench
from benchmarks.speed.results import Found


@dataclass(frozen=True)
class Case:
    """One thing that is measured.

    Attributes:
        title: of its table.
        run: measures it.
        hours: takes so long that it is measured only when it is asked for by name.
    """

    title: str
    run: Callable[[Bench], Found]
    hours: bool = False


CASES = {
    "step_minilm": Case("Training step, MiniLM, 16 x 64 tokens", steps.encoder),
    "step_smollm2": Case("Training step, SmolLM2-135M, 8 x 64 tokens", steps.decoder),
    "pieces": Case("What makes a step fast, left out one by one, MiniLM, 16 x 64 tokens", pieces.pieces),
    "where": Case("Where the time goes: a step of the main job, MiniLM, batches of 16", where.where),
    "end_to_end": Case("Whole fine-tuning on MRPC, MiniLM, 3 epochs", end_to_end.end_to_end, hours=True),
    "first_order": Case("Search: all first-order proxies together, 16 x 64 tokens", scoring.all_first_order),
    "proxies": Case("Search: each proxy, 16 x 64 tokens", scoring.every_proxy),
    "sites": Case("Number of sites", scaling.by_sites),
    "length_and_rank": Case("Length and rank, MiniLM, 8 texts", scaling.by_length_and_rank),
    "first_step": Case("From the command to the first step", first_step.first_step),
    "memory": Case("Peak memory of training, MiniLM, 16 x 64 tokens", memory.training),
    "inference": Case("Inference, MiniLM", latency.inference),
}
