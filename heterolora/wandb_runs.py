"""The W&B runs that a folder holds: which are on the server, and putting the others there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterolora.errors import SettingError
from heterolora.report.loggers import WANDB


@dataclass(frozen=True)
class WandbRun:
    """What one process wrote; a job that was queued again has several with one id.

    Attributes:
        folder: ``.../wandb/offline-run-TIME-ID``.
        id: W&B's name for the run.
        name: ours.
        group: of its sweep; None: it is in none.
        synced: whether the server has it.
    """

    folder: Path
    id: str
    name: str
    group: str | None
    synced: bool


def find_wandb_runs(folder: Path) -> list[WandbRun]:
    """All that were written offline below a folder, oldest first.

    Raises:
        SettingError: if there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise SettingError("DIR", folder, "no such folder")
    found = list(_find(folder))
    if not found:
        raise SettingError("DIR", folder, "holds no offline run of W&B: logger=wandb writes them")
    return sorted(found, key=lambda run: run.folder.name)


def _find(folder: Path) -> Iterator[WandbRun]:
    for file in sorted(folder.glob("**/offline-run-*/run-*.wandb")):
        place = file.parent.parent.parent  # RUN/wandb/offline-run-.../run-ID.wandb
        try:
            said = json.loads((place / WANDB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = {}
        name, group = said.get("name", place.name), said.get("group")
        yield WandbRun(
            file.parent, file.stem.removeprefix("run-"), name, group, file.with_suffix(".wandb.synced").exists()
        )


def sync(runs: Sequence[WandbRun]) -> None:
    """Upload what the server does not have; W&B's own program does, and says how it goes.

    Raises:
        SettingError: if it is not installed, or fails.
    """
    program = Path(sys.executable).with_name("wandb")
    command = str(program) if program.exists() else shutil.which("wandb")
    if command is None:
        raise SettingError("wandb", "sync", "needs the package wandb: pip install 'heterolora[wandb]'")
    todo = [str(run.folder) for run in runs if not run.synced]
    if todo and (code := subprocess.run([command, "sync", *todo], check=False).returncode):
        raise SettingError("wandb", "sync", f"wandb ended with code {code}; what was uploaded is not uploaded again")
