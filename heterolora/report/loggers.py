"""Where curves, tables and pictures go while a run goes on, besides the files of its folder."""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from heterolora.errors import SettingError


class RunLogger(Protocol):
    """One way to log; a run opens it once and always closes it."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> Logger | bool:
        """What Lightning's trainer is given."""

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """Scores and ranks of all sites, and the picture."""

    def log_picture(self, name: str, picture: Path) -> None:
        """Another picture, a file of the run's folder."""

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Finish, with the final numbers; None: the run failed. Called again after that, it does nothing."""


class Csv:
    """``metrics.csv`` in the run's folder; scores, ranks and the picture are files there anyway."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> Logger:
        """Lightning's CSV logger."""
        return CSVLogger(folder, name="", version="")

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """Nothing more than the files."""

    def log_picture(self, name: str, picture: Path) -> None:
        """Nothing more than the file."""

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Lightning has written everything."""


class Silent:
    """No logger."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> bool:
        """None."""
        return False

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """Nothing."""

    def log_picture(self, name: str, picture: Path) -> None:
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

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> Logger:
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
        self.log_picture("allocation/picture", picture)

    def log_picture(self, name: str, picture: Path) -> None:
        """An image."""
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
    """Weights & Biases; offline where there is no account.

    Args:
        project: the project.
        entity: team or user; null: the account's own.
        group: runs that belong together; null: none.
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

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> Logger:
        """One W&B run; its files are in the run's folder."""
        try:
            import wandb
        except ImportError as error:
            raise SettingError("logger", "wandb", "needs the package wandb: pip install 'heterolora[wandb]'") from error
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        folder.joinpath("wandb").mkdir(exist_ok=True)
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=name,
            config=dict(config),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
        )
        self._logger = WandbLogger(experiment=run)
        return self._logger

    def log_allocation(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path) -> None:
        """A table and an image."""
        assert self._logger is not None
        self._logger.log_table("allocation/sites", columns=list(columns), data=[list(row) for row in rows])
        self.log_picture("allocation/picture", picture)

    def log_picture(self, name: str, picture: Path) -> None:
        """An image."""
        assert self._logger is not None
        self._logger.log_image(name, images=[str(picture)])

    def close(self, summary: Mapping[str, float] | None) -> None:
        """Finish the run, so that the next one of the same process starts its own."""
        if self._logger is None:
            return
        self._logger = None
        import wandb

        if summary is not None and wandb.run is not None:
            wandb.run.summary.update(dict(summary))
        wandb.finish(exit_code=int(summary is None))
