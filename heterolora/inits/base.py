"""What an initialisation is, and the pass that gathers what it needs."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from heterolora.adapters.lora import LoRA, LowRank
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.processes import ALONE, Processes
from heterolora.proxies.evidence import Batch, Bench, Loss, Statistic, Track, Values, check_ids, gather
from heterolora.scoring import Probe, needs_head, untouched
from heterolora.sites import Site
from heterolora.warmup import warm_up_head

_log = logging.getLogger(__name__)


class Initialisation(Protocol):
    """Fills fresh LoRA adapters from statistics of a few batches.

    Attributes:
        keeps_function: whether the adapted model is the backbone afterwards.
    """

    keeps_function: bool

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What must be gathered at the sites."""

    def fill(self, site: Site, adapter: LowRank, values: Sequence[Values]) -> None:
        """Write the adapter's factors.

        Args:
            site: where it is.
            adapter: fresh.
            values: of each statistic, at this site.

        Raises:
            SettingError: if the statistics do not say what to write.
        """


def initialise(
    model: AdaptedModel,
    loss: Loss,
    batches: Sequence[Batch],
    warmup: Iterable[Batch],
    init: Initialisation,
    probe: Probe,
    track: Track,
    processes: Processes = ALONE,
) -> None:
    """Fill all adapters that a model holds; everything else is as before.

    Args:
        model: with fresh adapters, whose deltas are zero.
        loss: scalar loss of the model on a batch.
        batches: what is looked at, on the model's device.
        warmup: batches for the head's warm-up, where gradients are needed.
        init: what to fill them with.
        probe: how long the head is warmed up, and how batches are summed.
        track: shows progress.
        processes: all that do so, each with the same model and batches.

    Raises:
        SettingError: if the adapters are no LoRA, or a site reads ids and the initialisation needs vectors.
    """
    check_lora(model.family, init)
    check_ids("init", type(init).__name__, init.statistics, map(model.site, model.held))
    adapters: dict[str, Any] = {name: model.adapter(name) for name in model.held}
    bench = Bench(model, batches, loss, live=False, reduction="mean", track=track, processes=processes)
    with untouched(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        if needs_head(init.statistics):
            warm_up_head(model, loss, iter(warmup), probe.head_warmup_steps, probe.head_warmup_lr, track)
        found = gather(bench, adapters, init.statistics)
    with torch.no_grad():
        for name, adapter in adapters.items():
            init.fill(model.site(name), adapter, [found[statistic][name] for statistic in init.statistics])
    if not init.keeps_function:
        _log.warning("by its initialisation, the adapted model is not the backbone at step 0")


def check_lora(family: object, init: Initialisation) -> None:
    """Refuse adapters that have other factors.

    Raises:
        SettingError: naming the family.
    """
    if not isinstance(family, LoRA):
        raise SettingError(
            "init", type(init).__name__, f"fills LoRA's A and B, not those of {type(family).__name__}: adapter=lora"
        )
