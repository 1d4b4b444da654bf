"""What happens around a multirun: its folder, and at its end the table of its runs. Hydra loads this before any job."""

import atexit
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


class OwnFolder(Callback):
    """A sweep's folder is its own: nothing is run where another sweep was, unless it is to be gone on with."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit, with one line: Hydra takes everything else for a callback's own trouble."""
        name, folder = str(config.sweep.name), Path(config.hydra.sweep.dir)
        if not _NAME.fullmatch(name) or not name.strip("."):
            raise SystemExit(f"sweep.name={name}: letters, digits and ._- alone, at most 100")
        if config.sweep.resume is not True and any(path.is_dir() for path in folder.glob("*")):
            raise SystemExit(
                f"sweep.name={name}: {folder} exists; sweep.resume=true goes on with it, or give another name"
            )
        if config.sweep.resume is True and not folder.exists():
            _log.info("sweep.resume=true: there is no %s yet; starting anew", folder)


class ShowTable(Callback):
    """Shows and writes the table when a multirun ends, also when some of its jobs failed."""

    def __init__(self) -> None:
        self._show: Callable[[], None] | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra tells nobody about the end of a multirun of which a job failed, so the process's end has to do."""
        if config.table is None or config.tournament is not None or config.run == "dry":
            return  # tournaments have tables of their own, and dry runs have nothing to show
        import heterolora.tables  # noqa: F401  what it needs cannot be imported while the process ends

        self._show = partial(show, Path(config.hydra.sweep.dir), OmegaConf.to_container(config.table, resolve=True))
        atexit.register(self._show)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show it now."""
        if self._show is not None:
            atexit.unregister(self._show)
            self._show()


def show(folder: Path, node: Any) -> None:
    """The table of a sweep's folder; what makes it impossible is one line, since the runs themselves are done."""
    from heterolora.build import build  # not before: what only prints help or a config must not wait for torch
    from heterolora.errors import SettingError
    from heterolora.tables import table_of

    try:
        table = table_of(folder, build(node, "table"))
    except SettingError as error:
        _log.warning("no table: %s (python -m heterolora table %s)", error, folder)
        return
    table.show()
    table.write(folder)
    if table.missing:
        _log.warning("%s", table.missing)
    _log.info("table.csv, table.md and table.tex are in %s", folder)
