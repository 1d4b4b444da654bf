"""The alpha test of HeteroLoRA (arXiv 2406.14956): how much of a trained adapter the model needs."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from heterolora.adapters.base import speaks
from heterolora.errors import SettingError
from heterolora.prefix import Waypoints, no_prefix
from heterolora.proxies.base import DegenerateScores
from heterolora.proxies.evidence import Bench, Evidence, MeanLoss, Measure, Statistic

_log = logging.getLogger(__name__)

GATES = 10
"""Gates above 0: tenths."""


@dataclass(frozen=True)
class AlphaTest:
    """The smallest gate in {0, 0.1, ..., 1} on a site's delta that keeps the metric, all other sites at 1.

    The metric is the task's first one, on the scoring batches (of the training split), in evaluation mode, by forward
    passes alone; where only a loss is known, it is the mean loss. It is kept as long as it is no worse than with all
    gates at 1 by more than ``tolerance`` times its absolute value. For a positive accuracy that is the paper's
    ``base * (1 - tolerance)``, for a loss ``base * (1 + tolerance)``; for a negative correlation it is the same
    distance, downwards. The gate is found by binary search, as in the paper, after a first look at gate 0: that is
    right where a metric that a gate keeps is kept by every larger one, and otherwise one of several answers.

    Unlike the paper's code, the gate multiplies the delta alone and not the frozen layer's output with it, and no
    validation label is seen. Sites whose delta is zero, or that hold no adapter, score 0.

    Args:
        tolerance: share of the metric that may be lost.
        metric: ``task``, its first one; or ``loss``, which moves even where no prediction turns.
    """

    tolerance: float
    metric: Literal["task", "loss"]

    control = False
    needs_trained = True
    remedy = (
        "train the adapters that are tested for longer (probe.adapter_warmup_steps, probe.adapter_warmup_lr), look at "
        "more batches (probe.batches), or take a finer metric (proxy.metric=loss) or a smaller proxy.tolerance"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise SettingError("tolerance", self.tolerance, "a share from 0 up to, not including, 1")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """None: the passes are this proxy's own."""
        return ()

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One gate for each site, from 0 to 1.

        Raises:
            SettingError: if no trained adapter stands in the forward.
            DegenerateScores: if the metric is not defined.
        """
        start, bench = time.perf_counter(), evidence.bench
        standing = standing_adapters(evidence)
        tested = [name for name, adapter in standing.items() if speaks(adapter)]
        if not tested:
            raise SettingError("probe.adapter_warmup_steps", 0, "alpha_test needs trained adapters; the paper: 32")
        gated: dict[str, Any] = {name: Gated(adapter) for name, adapter in standing.items()}
        found = {site.name: 0.0 for site in evidence.sites}
        with torch.no_grad(), bench.model.swapped(gated):
            bench.model.eval()
            trial = Trial(bench, gated, self.metric)
            base = trial.base()
            _check_base(trial.measure, base, bench)
            found |= {name: gate / GATES for name, gate in self._search(trial, tested, base).items()}
        bench.notes.update(trial.record(base))
        _log.info(
            "alpha_test: %d forward passes, as much as %.1f whole ones (%d batches, %d of %d sites), in %.1f s",
            trial.passes,
            trial.whole_passes,
            len(bench.batches),
            len(tested),
            len(found),
            time.perf_counter() - start,
        )
        return found

    def keeps(self, value: float, base: float, mode: str) -> bool:
        """Whether a metric is within the tolerance of that with all gates at 1; NaN is not."""
        lost = base - value if mode == "max" else value - base
        return value == base or lost <= self.tolerance * abs(base)

    def _search(self, trial: "Trial", sites: Sequence[str], base: float) -> dict[str, int]:
        """Gates in tenths; all sites are searched side by side, so that they share what lies below them."""
        low, high = dict.fromkeys(sites, 0), dict.fromkeys(sites, GATES)  # GATES keeps the metric by definition
        asked = dict.fromkeys(sites, 0)
        while asked:
            values = trial.measured({name: gate / GATES for name, gate in asked.items()})
            for name, gate in asked.items():
                if self.keeps(values[name], base, trial.measure.mode):
                    high[name] = gate
                else:
                    low[name] = gate + 1
            asked = {name: (low[name] + high[name]) // 2 for name in sites if low[name] < high[name]}
        return high


class Gated(nn.Module):
    """``x -> gate * inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gate = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The delta; at gate 1 to the bit what the inner one gives."""
        delta: torch.Tensor = self.inner(x)
        return delta if self.gate == 1.0 else self.gate * delta


class Trial:
    """Measures a model in which one gate at a time is not 1, and counts what that takes.

    A round of gates runs each batch once as it is, noting what stands where blocks begin, and then for each site from
    its own block on: one batch's hidden states are held at a time. Where blocks cannot be skipped, every pass is whole.

    Args:
        bench: model, batches and metric; the model holds the gated adapters.
        gated: site -> its gate.
        metric: the bench's, or its loss.
    """

    def __init__(self, bench: Bench, gated: Mapping[str, Gated], metric: Literal["task", "loss"]) -> None:
        self.bench = bench
        self.gated = gated
        known = bench.measure if metric == "task" else None
        self.measure: Measure = known or MeanLoss(bench.loss)
        self.passes = 0
        self.blocks = 0
        sites = {site.name: site for site in bench.model.space.sites if site.name in gated}
        self.layers = {name: site.layer for name, site in sorted(sites.items(), key=lambda item: item[1].layer)}
        self._below = {name for name, site in sites.items() if site.lookup}  # before the first block
        self.reason = no_prefix(bench.model)
        stacks = bench.model.space.survey.stacks.values()
        self._depth = max((len(stack.blocks) for stack in stacks), default=1)
        self._points = Waypoints(bench.model)

    @property
    def whole_passes(self) -> float:
        """As many forward passes of the whole model run as many blocks."""
        return self.blocks / self._depth

    def base(self) -> float:
        """The metric with all gates at 1; a first look, too, at whether blocks can be skipped without a trace."""
        if self.reason is None and not self._skips():
            self.reason = "its blocks hand on more than the hidden state"
        if self.reason is not None:
            name = type(self.bench.model.backbone).__name__
            _log.info("alpha_test: every forward pass is whole (%s: %s)", name, self.reason)
        outputs = [self._run(batch, None) for batch in self._tracked("all gates at 1")]
        return self.measure.value(outputs, self.bench.batches)

    def measured(self, gates: Mapping[str, float]) -> dict[str, float]:
        """The metric with the gate of each of these sites alone at this value."""
        sites = [name for name in self.layers if name in gates]
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
        for batch in self._tracked(f"gates of {len(sites)} sites"):
            if self.reason is None:
                self._note(batch, {self.layers[name] for name in sites})
            for name in sites:
                gate = self.gated[name]
                gate.gate = gates[name]
                try:
                    whole = self.reason is not None or name in self._below
                    outputs[name].append(self._run(batch, None if whole else self.layers[name]))
                finally:
                    gate.gate = 1.0
        return {name: self.measure.value(found, self.bench.batches) for name, found in outputs.items()}

    def record(self, base: float) -> dict[str, Any]:
        """Plain values: the metric, and the forward passes over one batch that were run."""
        return {
            "metric": self.measure.name,
            "all gates at 1": base,
            "forward passes": self.passes,
            "as whole passes": round(self.whole_passes, 2),
        }

    def _tracked(self, description: str) -> Any:
        return self.bench.track(self.bench.batches, description, len(self.bench.batches))

    def _skips(self) -> bool:
        """Whether a start at every block that will be one gives the bits of the whole forward, on the first batch."""
        batch, blocks = self.bench.batches[0], sorted(set(self.layers.values()))
        expected = self._note(batch, blocks)
        return all(self._points.can_start(block) and torch.equal(self._run(batch, block), expected) for block in blocks)

    def _note(self, batch: Any, blocks: Any) -> torch.Tensor:
        self._count(0)
        return self._points.note(lambda: self.measure.outputs(self.bench.model, batch), blocks)

    def _run(self, batch: Any, block: int | None) -> torch.Tensor:
        """The outputs for a batch, from a block on; None: of the whole model."""
        self._count(block or 0)

        def call() -> torch.Tensor:
            return self.measure.outputs(self.bench.model, batch)

        return call() if block is None else self._points.resumed(call, block)

    def _count(self, skipped: int) -> None:
        self.passes += 1
        self.blocks += self._depth - skipped


def standing_adapters(evidence: Evidence) -> dict[str, Any]:
    """The adapters that act in the forward: the probe's where it is live, or else those that the model holds."""
    bench = evidence.bench
    if bench.live:
        return dict(evidence.adapters)
    active = {site.name: bench.model.active_adapter(site.name) for site in evidence.sites}
    return {name: adapter for name, adapter in active.items() if adapter is not None}


def _check_base(measure: Measure, base: float, bench: Bench) -> None:
    """A metric that is not defined tests nothing; one that a constant answer reaches, next to nothing."""
    if not math.isfinite(base):
        raise DegenerateScores(
            f"proxy=alpha_test: {measure.name} of the trained adapters is {base} on the scoring batches; "
            f"{AlphaTest.remedy}"
        )
    constant = measure.of_a_constant(bench.batches)
    if constant is None:
        return
    bench.notes["of a constant answer"] = constant
    if (base <= constant) if measure.mode == "max" else (base >= constant):
        _log.warning(
            "alpha_test: with the trained adapters, %s on the scoring batches is %.4f, and the same answer to every "
            "example has %.4f: the gates are noise; train for longer (probe.adapter_warmup_steps, "
            "probe.adapter_warmup_lr), or take proxy.metric=loss",
            measure.name,
            base,
            constant,
        )
