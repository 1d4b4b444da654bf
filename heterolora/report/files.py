"""Files that are either whole or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heterolora.errors import SettingError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a scratch file beside ``path``, then move it there in one step."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(scratch))
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Text, whole or not at all."""
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all; NaN and infinities are refused, they are no JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: the file.
        setting: what named it, for messages.

    Raises:
        SettingError: if it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(setting, path, f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise SettingError(setting, path, "is no JSON object")
    return content


def check_new_folder(path: Path, setting: str) -> None:
    """Refuse a place where no new folder can be made.

    Args:
        path: the place; an empty folder there is as good as none.
        setting: what named it, for messages.

    Raises:
        SettingError: if something is there, or the folder above it is not.
    """
    if not path.parent.is_dir():
        raise SettingError(setting, path, "the folder that it shall be in is not there")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SettingError(setting, path, "is there already, and not empty; give a new folder")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside ``path`` to fill; moved there in one step at the end, gone after an error.

    Nothing but an empty folder may be at ``path``.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
        for file in scratch.rglob("*"):  # some writers keep what they write to themselves
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        os.chmod(scratch, 0o755)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
