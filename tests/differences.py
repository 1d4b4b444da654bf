"""How far the logits of PEFT are from ours on tiny models; ``python -m tests.differences`` prints the table."""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

from heterolora.export import export_peft
from heterolora.peft_in import from_peft
from tests.architectures import ARCHITECTURES, make_batch
from tests.test_export import answer, gap, lost_head, trained
from tests.test_peft_in import KINDS, TARGETS, backbone_of, theirs


def out(name: str, dtype: torch.dtype, scale: float, fold: bool, folder: Path) -> float:
    """PEFT's own check and transformers' ``load_adapter``: the larger difference."""
    model = trained(name, dtype, scaling="constant" if scale == 2 else "alpha_over_r", scale=scale)
    batch = make_batch(model.backbone)
    found = export_peft(model, folder, lambda m: answer(m, batch), fold_scale=fold)
    native = lost_head(name, dtype, model.head)
    native.load_adapter(str(folder))
    return max(found.difference / found.largest, gap(answer(native.eval(), batch), answer(model, batch)))


def back(name: str, dtype: torch.dtype, kind: str, folder: Path) -> float:
    """What PEFT made, loaded here."""
    model = theirs(name, dtype, folder, **KINDS[kind])
    ours = from_peft(backbone_of(name, dtype), folder)
    batch = make_batch(ours.backbone)
    return gap(answer(ours, batch), answer(model, batch))


def main() -> None:
    """Print one row for each case: the largest difference over the architectures."""
    warnings.simplefilter("ignore")
    sys.stdout.write("| what | float32 | float64 |\n|---|---|---|\n")
    with tempfile.TemporaryDirectory() as place:
        folders = (Path(place) / str(number) for number in range(10**6))
        for scale in (2.0, 3.0):
            for fold in (True, False):
                found = [
                    max(out(name, dtype, scale, fold, next(folders)) for name in ARCHITECTURES)
                    for dtype in (torch.float32, torch.float64)
                ]
                title = f"out, scale {'2' if scale == 2 else '3/rank'}, {'folded into B' if fold else 'in alpha'}"
                sys.stdout.write(f"| {title}, {len(ARCHITECTURES)} architectures | {found[0]:.1e} | {found[1]:.1e} |\n")
        for kind in KINDS:
            found = [
                max(back(name, dtype, kind, next(folders)) for name in TARGETS)
                for dtype in (torch.float32, torch.float64)
            ]
            sys.stdout.write(f"| in, {kind}, {len(TARGETS)} architectures | {found[0]:.1e} | {found[1]:.1e} |\n")


if __name__ == "__main__":
    main()
