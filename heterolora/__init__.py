"""heterolora: where low-rank fine-tuning budgets are decided."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds, and questions about configs need none
    from heterolora.library import FoundAllocation, attach, from_peft, search
    from heterolora.loading import LoadedRun
    from heterolora.model import AdaptedModel
    from heterolora.several import Several

__all__ = ["FoundAllocation", "Several", "__version__", "attach", "from_peft", "load", "load_run", "search"]

__version__ = "0.1.0"

_LATER = dict.fromkeys(["FoundAllocation", "attach", "from_peft", "search"], "library") | {"Several": "several"}


def __getattr__(name: str) -> Any:
    """What takes seconds to import is imported when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def load(folder: str | Path, device: str = "cpu") -> "AdaptedModel":
    """The adapted model of a finished run, of its export, or of what was merged, shortcuts included, for evaluation.

    Args:
        folder: of a run, its folder ``peft``, or what ``python -m heterolora merge`` wrote.
        device: where the model shall be.

    Raises:
        heterolora.errors.SettingError: if the folder holds none of these, or the backbone is another one.
    """
    from heterolora.peft_config import NOTES
    from heterolora.peft_in import load_export

    if (Path(folder).expanduser() / NOTES).is_file():
        return load_export(folder, device)
    return load_run(folder, device).model


def load_run(run: str | Path, device: str = "cpu") -> "LoadedRun":
    """A finished run with its tokenizer and its task, ready to predict and to evaluate; see ``load``."""
    from heterolora import loading

    return loading.load_run(run, device)
