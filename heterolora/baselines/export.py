"""``RUN/peft`` of a baseline: what PEFT itself saves, and the head, which it did not train; checked by loading it."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from heterolora.baselines.model import ADAPTER, PeftBaseline, quiet
from heterolora.errors import SettingError
from heterolora.export import ExportError, Logits, agreement, head_modules
from heterolora.peft_config import WEIGHTS
from heterolora.peft_files import PREFIX
from heterolora.report.files import check_new_folder, whole_folder

_log = logging.getLogger(__name__)


def hand_over(model: PeftBaseline, run: Path, logits: Logits) -> dict[str, Any]:
    """Write ``RUN/peft``; an export that fails is said, and is no failure of the run.

    Returns:
        Plain values for ``summary.json``.
    """
    folder = run / "peft"
    try:
        check_new_folder(folder, "folder")
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with whole_folder(folder) as scratch, torch.no_grad(), quiet():
                parameters = _save(model, scratch)
                difference, largest = _compare(model, scratch, logits)
        finally:
            for module, mode in modes.items():
                module.training = mode
    except (ExportError, SettingError, OSError) as error:
        _log.error("nothing was exported: %s", error)
        return {"folder": None, "error": str(error)}
    return {
        "folder": folder.name,
        "modules": sum(map(bool, model.ranks.values())),
        "parameters": parameters,
        "not_in_peft": 0,
        "largest_difference": difference,
        "largest_logit": largest,
    }


def _save(model: PeftBaseline, folder: Path) -> int:
    """PEFT's config and tensors, which leave masked triplets out, and the head; parameters of the adapters."""
    from peft import get_peft_model_state_dict

    adapters: dict[str, torch.Tensor] = get_peft_model_state_dict(model.peft, save_embedding_layers=False)
    saved = head_modules(model.backbone, model.head)
    config = copy.copy(model.peft.peft_config[ADAPTER])
    config.inference_mode, config.modules_to_save = True, saved or None
    config.task_type = "SEQ_CLS" if saved else None
    config.base_model_name_or_path = getattr(model.backbone.config, "_name_or_path", None) or None
    config.save_pretrained(str(folder))
    head = {f"{PREFIX}{name}": value for name, value in model.head_state_dict().items()}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in (adapters | head).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return sum(value.numel() for value in adapters.values())


def _compare(model: PeftBaseline, folder: Path, logits: Logits) -> tuple[float, float]:
    """Largest difference between the logits of what PEFT loads and those of the run, and the largest logit.

    Raises:
        ExportError: if PEFT cannot load it, or answers otherwise.
    """
    from peft import PeftModel

    expected = logits(model)
    try:
        loaded: Any = PeftModel.from_pretrained(
            _bare_copy(model), str(folder), torch_device=str(next(model.backbone.parameters()).device)
        )
        got = logits(loaded.eval())
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ExportError(f"PEFT cannot use it ({type(error).__name__}: {' '.join(str(error).split())})") from error
    return agreement(got, expected, next(model.backbone.parameters()).dtype, "PEFT")


def _bare_copy(model: PeftBaseline) -> Any:
    """The backbone as a user has it: frozen weights shared, no adapters, and a head of NaN that must be overwritten."""
    trained = {id(value) for value in (*model.adapters.parameters(), *model.head_parameters.values())}
    frozen = [value for value in model.backbone.parameters() if id(value) not in trained]
    copied = copy.deepcopy(model.peft, {id(value): value for value in (*frozen, *model.backbone.buffers())})
    bare: nn.Module = copied.unload()
    for name, parameter in bare.named_parameters():
        if name in model.head:
            parameter.fill_(math.nan)
    return bare
