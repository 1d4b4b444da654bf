"""Static allocation: once, before the first epoch."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L

from heterolora.lit import LitAdapted
from heterolora.scoring import SearchResult


class AllocateRanks(L.Callback):
    """Search and enable in ``setup("fit")``: Lightning makes the optimizer after it, so that it sees the adapters.

    A resumed run has none of this: its ranks come from the checkpoint.

    Args:
        run_search: finds the allocation, on the model where it is then.
        on_found: told about it before training starts.
    """

    def __init__(
        self, run_search: Callable[[LitAdapted], SearchResult], on_found: Callable[[SearchResult], None]
    ) -> None:
        self.run_search = run_search
        self.on_found = on_found

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Search, enable, report."""
        if stage != "fit":
            return
        assert isinstance(pl_module, LitAdapted)
        pl_module.to(trainer.strategy.root_device)
        result = self.run_search(pl_module)
        pl_module.model.enable(result.allocation.ranks, pl_module.seed)
        self.on_found(result)


@dataclass(frozen=True)
class Static:
    """Allocate once, before the first epoch; sites without rank hold no parameters and no optimizer state."""

    def callback(
        self, run_search: Callable[[LitAdapted], SearchResult], on_found: Callable[[SearchResult], None]
    ) -> AllocateRanks:
        """The Lightning callback that does it."""
        return AllocateRanks(run_search, on_found)
