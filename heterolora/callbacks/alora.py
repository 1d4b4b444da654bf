"""ALoRA's schedule (Liu, Lyn, Zhu, Tian, Graham, NAACL 2024, arXiv 2403.16187): prune and regrow units of rank."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from torch import nn
from torch.nn.functional import linear

from heterolora.adapters.base import AdapterFamily, plain_factors
from heterolora.allocation import Allocation
from heterolora.allocators.base import Allocator
from heterolora.callbacks.allocate import Decided, Found, Look, Search, same_budget
from heterolora.callbacks.events import Events, check_any_units, check_switching
from heterolora.cost import Cost
from heterolora.errors import SettingError
from heterolora.linear import reads
from heterolora.lit import LitAdapted
from heterolora.prefix import evaluating
from heterolora.processes import Processes
from heterolora.proxies.evidence import Batch
from heterolora.scoring import Probe
from heterolora.seeds import derive
from heterolora.switching import Heritage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ALoRA:
    """Train, score every unit of rank by ablation, take the worst away, give as many to sites that lost none; again.

    A unit's importance is ``S(M) - S(M without it) + S(M with it alone)``, S the negative loss (AB-LoRA). The batches
    are of the training split, so that what is reported on validation was never looked at; a unit costs two forwards.
    New units are drawn as LoRA draws them, B = 0, with no moments in the optimizer; others keep theirs. The paper's
    budget is in ranks: here what is held also stays within the budget of parameters.

    Args:
        warmup_epochs: K1, epochs before the first event; at least a step.
        every: K2, steps between events (a whole number), or a share of an epoch up to 1.
        events: N_A, how many at most.
        prune: n_A, units that each event takes away; null: as many as sites hold rank.
        batches: of the training split, on which S is measured; the paper: 32 examples.
    """

    warmup_epochs: float
    every: int | float
    events: int
    prune: int | None
    batches: int

    scored_by: ClassVar[str] = "ab_lora"
    starting_budget = same_budget

    def __post_init__(self) -> None:
        if not self.warmup_epochs >= 0:
            raise SettingError("allocation.warmup_epochs", self.warmup_epochs, "a number of at least 0")
        if not (self.every >= 1 if isinstance(self.every, int) else 0 < self.every <= 1):
            raise SettingError(
                "allocation.every", self.every, "a whole number of steps, or a share of an epoch up to 1.0"
            )
        for name in ("events", "prune", "batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingError(f"allocation.{name}", getattr(self, name), "a whole number of at least 1")

    def check(self, allocator: Allocator, probe: Probe, adapter: AdapterFamily, compiled: bool, timed: bool) -> None:
        """As ``AllocationTime`` has it.

        Raises:
            SettingError: naming the setting.
        """
        check_switching("alora", adapter, compiled)
        check_any_units("alora", adapter)

    def callback(
        self,
        run_search: Search,
        on_found: Found,
        on_decision: Decided,
        look: Look,
        allocator: Allocator,
        resumed: bool,
    ) -> L.Callback:
        """The Lightning callback that does it."""
        return PruneAndRegrow(self, run_search, on_found, on_decision, look, resumed)


class PruneAndRegrow(Events):
    """The events of ``ALoRA``.

    Args:
        settings: when and how much.
        run_search: finds the first allocation.
        on_found: told about it before training starts.
        on_decision: told about every decision.
        look: gives batches of the training split.
        resumed: the run goes on from a checkpoint.
    """

    def __init__(
        self, settings: ALoRA, run_search: Search, on_found: Found, on_decision: Decided, look: Look, resumed: bool
    ) -> None:
        super().__init__(
            run_search, on_found, on_decision, resumed, every=settings.every, start=1, stop=1.0, off="reset"
        )
        self.settings = settings
        self.look = look
        self.budget = 0

    def begin(self, lit: LitAdapted, allocation: Allocation) -> None:
        """What may be held from now on."""
        self.budget = allocation.spent if allocation.budget is None else allocation.budget

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """When events begin."""
        steps = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        self.start = max(1, round(self.settings.warmup_epochs * steps))
        super().on_train_start(trainer, pl_module)

    def is_due(self, step: int, in_epoch: int) -> bool:
        """As the timing says, but for no more events than wanted."""
        return self.searches <= self.settings.events and super().is_due(step, in_epoch)

    def happen(self, trainer: L.Trainer, lit: LitAdapted, batch: Mapping[str, torch.Tensor], step: int) -> None:
        """Score, prune, regrow."""
        live = {name: rank for name, rank in lit.model.ranks.items() if rank}
        batches = self.look(lit, self.settings.batches)
        scores = lit.processes.agreed(lambda: ablation(lit, batches, lit.processes), FloatingPointError)
        cost = lit.model.family.cost(lit.model.space.sites)
        caps = {name: min(lit.model.site(name).in_features, lit.model.site(name).out_features) for name in live}
        kept, ranks = pruned_and_regrown(scores, self.settings.prune or len(live), cost, self.budget, caps)
        inherits = {name: Heritage(name, units) for name, units in kept.items() if units and len(units) < live[name]}
        units = {name: sorted(scores.get(name, [0.0]), reverse=True) for name in lit.model.ranks}
        seed = derive(lit.seed, "grown", step)
        after = dict.fromkeys(lit.model.ranks, 0) | ranks
        self.change(trainer, lit, batch, step, after, units, inherits, seed)

    def state_dict(self) -> dict[str, Any]:
        """Also what may be held."""
        return super().state_dict() | {"budget": self.budget}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        super().load_state_dict(state_dict)
        self.budget = state_dict["budget"]


class _Gated(nn.Module):
    """An adapter whose units of rank can be switched off one by one."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.down, self.up = plain_factors(adapter)
        self.rank, self.scale = adapter.rank, adapter.scale
        self.gates = torch.ones(len(self.down)).to(self.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source = x.to(self.down.dtype) if x.is_floating_point() else x
        return linear(reads(source, self.down) * (self.gates * self.scale), self.up)


@torch.no_grad()
def ablation(lit: LitAdapted, batches: Sequence[Batch], processes: Processes) -> dict[str, list[float]]:
    """``-S(M without r) + S(M with r alone)`` for each unit of each site that holds rank (IS up to a constant).

    In evaluation mode, on the same batches for every toggle; the model is as before afterwards.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    model = lit.model
    gated = {name: _Gated(model.adapter(name)) for name in model.held}

    def score() -> float:
        value = -sum(lit.scalar_loss(model, batch).item() for batch in batches) / len(batches)
        if not abs(value) < float("inf"):
            raise FloatingPointError(f"the loss of an ablated model is {-value}; lower optimizer.lr")
        return value

    found: dict[str, list[float]] = {name: [] for name in gated}
    with evaluating(model), model.swapped(gated):
        for name, adapter in gated.items():
            for unit in range(adapter.rank):
                adapter.gates[unit] = 0
                without = score()
                adapter.gates[unit] = 1
                for other in gated.values():
                    other.gates.zero_()
                adapter.gates[unit] = 1
                found[name].append(score() - without)
                for other in gated.values():
                    other.gates.fill_(1)
    return found


def pruned_and_regrown(
    scores: Mapping[str, Sequence[float]], count: int, cost: Cost, budget: int, caps: Mapping[str, int]
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """One round of ALoRA's Algorithm 1.

    Args:
        scores: site -> importance of each of its units; sites in their order.
        count: units to take away; one at least stays.
        cost: what ranks hold.
        budget: parameters that may be held.
        caps: site -> largest rank.

    Returns:
        Site -> its units that stay, in order; and site -> rank afterwards. As many units are given to the sites that
        lost none as were taken, as evenly as may be, those of higher mean importance first, as far as budget and caps
        allow; to no one if every site lost some.
    """
    listed = [
        (value, place, unit, name)
        for place, (name, values) in enumerate(scores.items())
        for unit, value in enumerate(values)
    ]
    gone = {(name, unit) for _, _, unit, name in sorted(listed)[: min(count, len(listed) - 1)]}
    kept = {name: [u for u in range(len(values)) if (name, u) not in gone] for name, values in scores.items()}
    ranks = {name: len(units) for name, units in kept.items()}
    whole = [name for name, values in scores.items() if ranks[name] == len(values)]
    whole.sort(key=lambda name: -sum(scores[name]) / len(scores[name]))
    left = len(gone)
    while left:
        granted = 0
        for name in whole:
            if left > granted and ranks[name] < caps[name] and cost(ranks) + cost.marginal(ranks, name) <= budget:
                ranks[name] += 1
                granted += 1
        if not granted:
            break
        left -= granted
    return kept, ranks
