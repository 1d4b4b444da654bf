"""Which words of libraries have no place in a run's output, and why."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HINTS = (
    ".*does not have many workers.*",  # batches are ready in memory; workers would only cost
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Experiment logs directory .* exists and is not empty.*",  # it is the run's own folder
    ".*The dirpath has changed from.*",  # a resumed run writes to a folder of its own
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # all processes log the same value
    ".*`srun` command is available on your system but is not used.*",  # no matter of Lightning's
    ".*isinstance.treespec, LeafSpec.* is deprecated.*",  # Lightning's own use of torch
)
"""Warnings of libraries that a user can do nothing about."""


def quieten() -> None:
    """Hints of libraries that have no place in a run's output."""
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in HINTS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers for a while: reading and writing takes moments."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
