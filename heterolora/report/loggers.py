"""Where curves, tables and pictures go while a run goes on, besides the files of its folder."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from heterolora.errors import SettingError
from heterolora.history import Decision
from heterolora.proxies.base import total
from heterolora.report.files import read_json, write_json

WANDB = "wandb.json"
"""File of a run's folder: what W&B calls the run."""


class RunLogger(Protocol):
    """One way to log; a run opens it once and always closes it."""

    def open(self, folder: Path, config: Mapping[str, Any], earlier: Path | None) -> Logger | bool:
        """What Lightning's trainer is given, for a run in this folder; ``earlier``: that of the run it goes on with."""

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """Scores and ranks of all sites, and the picture."""

    def log_decision(self, decision: Decision) -> None:
        """Ranks of all sites from a step on, and the scores that led to them."""

    def log_history(self, history: Sequence[Decision], picture: Path) -> None:
        """All decisions of a dynamic run, and the picture of them."""

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Finish, with the final numbers; None: the run failed. Called again after that, it does nothing."""


class Csv:
    """``metrics.csv`` in the run's folder; scores, ranks and the picture are files there anyway."""

    def open(self, folder: Path, config: Mapping[str, Any], earlier: Path | None) -> Logger:
        """Lightning's CSV logger."""
        return CSVLogger(folder, name="", version="")

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """Nothing more than the files."""

    def log_decision(self, decision: Decision) -> None:
        """Nothing more than ``history.jsonl``."""

    def log_history(self, history: Sequence[Decision], picture: Path) -> None:
        """Nothing more than the files."""

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Lightning has written everything."""


class Silent:
    """No logger."""

    def open(self, folder: Path, config: Mapping[str, Any], earlier: Path | None) -> bool:
        """None."""
        return False

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """Nothing."""

    def log_decision(self, decision: Decision) -> None:
        """Nothing."""

    def log_history(self, history: Sequence[Decision], picture: Path) -> None:
        """Nothing."""

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Nothing."""


@dataclass
class TensorBoard:
    """A TensorBoard event file in ``tensorboard/`` of the run's folder: ``tensorboard --logdir outputs``.

    Curves, the sites' scores and ranks as a table, the picture, the config, and the final metrics. A resumed run has
    the curves from there on; the earlier ones stay in the folder of the earlier run.
    """

    def __post_init__(self) -> None:
        self._logger: TensorBoardLogger | None = None

    def open(self, folder: Path, config: Mapping[str, Any], earlier: Path | None) -> Logger:
        """The event file."""
        if importlib.util.find_spec("tensorboard") is None:
            raise SettingError(
                "logger", "tensorboard", "needs the package tensorboard: pip install 'heterolora[tensorboard]'"
            )
        self._logger = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
        rows = [["setting", "value"], *_flat(config)]
        self._logger.experiment.add_text("config", _markdown(rows))
        return self._logger

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """A table in Markdown and an image."""
        assert self._logger is not None
        self._logger.experiment.add_text("allocation/sites", _markdown([columns, *rows]))
        self._add_image("allocation/picture", picture)

    def log_decision(self, decision: Decision) -> None:
        """A curve for each site's rank, and for its score."""
        assert self._logger is not None
        self._logger.log_metrics(_curves(decision), decision.step)

    def log_history(self, history: Sequence[Decision], picture: Path) -> None:
        """An image."""
        self._add_image("allocation/history", picture)

    def _add_image(self, name: str, picture: Path) -> None:
        assert self._logger is not None
        self._logger.experiment.add_image(name, imread(picture)[..., :3], dataformats="HWC")

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Write what is left, and the final metrics."""
        if self._logger is None:
            return
        logger, self._logger = self._logger, None
        for name, value in (summary or {}).items():
            logger.experiment.add_scalar(f"final/{name}", value)
        logger.finalize("success" if summary is not None else "failed")


def _curves(decision: Decision) -> dict[str, float]:
    """``rank/SITE`` and ``score/SITE`` at one moment; a score for each unit of rank is summed."""
    ranks = {f"rank/{name}": float(rank) for name, rank in decision.ranks.items()}
    return ranks | {f"score/{name}": total(score) for name, score in decision.scores.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``node.key`` and a plain value, for every value of a nested config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


@dataclass
class Wandb:
    """Weights & Biases; offline where there is no account (``python -m heterolora wandb sync DIR``, later).

    What W&B calls the run is in ``wandb.json`` of the run's folder before anything is trained, and follows from that
    folder and the config: a job that is queued again, or gone on with elsewhere, goes on with its run there, too.

    Args:
        project: the project.
        entity: team or user; null: the account's own.
        group: runs that belong together; null: the sweep's name, in a sweep.
        mode: ``online`` or ``offline``; null: online if a key is known, else offline.
    """

    project: str
    entity: str | None
    group: str | None
    mode: str | None

    def __post_init__(self) -> None:
        if self.mode not in (None, "online", "offline"):
            raise SettingError("mode", self.mode, "online, offline or null")
        self._logger: WandbLogger | None = None

    def open(self, folder: Path, config: Mapping[str, Any], earlier: Path | None) -> Logger:
        """One W&B run; its files are in the run's folder."""
        try:
            import wandb
        except ImportError as error:
            raise SettingError("logger", "wandb", "needs the package wandb: pip install 'heterolora[wandb]'") from error
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        folder.joinpath("wandb").mkdir(exist_ok=True)
        group = self.group or (config.get("sweep") or {}).get("name")
        settings: dict[str, Any] = {
            "id": _identity(folder, config, earlier),
            "project": self.project,
            "entity": self.entity,
            "group": group,
            "name": folder.name,
            "mode": mode,
        }
        write_json(folder / WANDB, settings)
        run = wandb.init(
            **settings,
            config=dict(config),
            dir=str(folder),
            resume="allow",
            reinit="finish_previous",
        )
        self._logger = WandbLogger(experiment=run)
        return self._logger

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """A table and an image."""
        assert self._logger is not None
        self._logger.log_table("allocation/sites", columns=list(columns), data=[list(row) for row in rows])
        self._logger.log_image("allocation/picture", images=[str(picture)])

    def log_decision(self, decision: Decision) -> None:
        """A curve for each site's rank, and for its score."""
        assert self._logger is not None
        self._logger.log_metrics(_curves(decision), decision.step)

    def log_history(self, history: Sequence[Decision], picture: Path) -> None:
        """A table of what every site had at every decision, and an image."""
        assert self._logger is not None
        rows = [
            [decision.step, name, rank, total(decision.scores[name]) if name in decision.scores else None]
            for decision in history
            for name, rank in decision.ranks.items()
        ]
        self._logger.log_table("allocation/decisions", columns=["step", "site", "rank", "score"], data=rows)
        self._logger.log_image("allocation/history", images=[str(picture)])

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Finish the run, so that the next one of the same process starts its own."""
        if self._logger is None:
            return
        self._logger = None
        import wandb

        if summary is not None and wandb.run is not None:
            wandb.run.summary.update(dict(summary))
        wandb.finish(exit_code=int(summary is None))


def _identity(folder: Path, config: Mapping[str, Any], earlier: Path | None) -> str:
    """The earlier run's, or what follows from folder and config."""
    if earlier is not None and (earlier / WANDB).exists():
        return str(read_json(earlier / WANDB, "resume")["id"])
    relevant = {key: value for key, value in config.items() if key not in ("resume", "sweep")}
    text = json.dumps([str(folder.absolute()), relevant], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
