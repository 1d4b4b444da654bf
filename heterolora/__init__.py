"""heterolora: where low-rank fine-tuning budgets are decided."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds, and questions about configs need none
    from heterolora.loading import LoadedRun
    from heterolora.model import AdaptedModel

__version__ = "0.1.0"


def load(run: str | Path, device: str = "cpu") -> "AdaptedModel":
    """The adapted model of a finished run, shortcuts included, in evaluation mode.

    Args:
        run: the run's folder.
        device: where the model shall be.

    Raises:
        heterolora.errors.SettingError: if the folder holds no finished run, or the backbone is another one.
    """
    return load_run(run, device).model


def load_run(run: str | Path, device: str = "cpu") -> "LoadedRun":
    """A finished run with its tokenizer and its task, ready to predict and to evaluate; see ``load``."""
    from heterolora import loading

    return loading.load_run(run, device)
