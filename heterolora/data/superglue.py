"""Tasks of SuperGLUE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from heterolora.data.sources import FileTable, Labelled, read_hub, select
from heterolora.data.tables import check_texts, read_table
from heterolora.errors import SettingError

_FOLDERS = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA"}
_FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}
_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


@dataclass(frozen=True)
class SuperGlue:
    """A task of SuperGLUE (Wang et al. 2019, arXiv 1905.00537): official files in a folder, or the hub's copy.

    The folder is ``ROOT/superglue/BoolQ``, ``.../CB`` or ``.../COPA`` with ``train.jsonl`` and ``val.jsonl``; a test
    file without labels counts as hidden. COPA gets a column ``prompt``: the premise, then the question that an example
    asks about it, written out.

    Args:
        subset: name of the task: ``boolq``, ``cb`` or ``copa``.
    """

    subset: str

    def __post_init__(self) -> None:
        if self.subset not in _FOLDERS:
            raise SettingError("subset", self.subset, f"possible: {sorted(_FOLDERS)}")

    def read(self, root: Path | None, text: Sequence[str]) -> Labelled:
        """Read the folder if there is a root, the hub otherwise."""
        if root is None:
            origin = f"hub aps/super_glue {self.subset}"
            tables = read_hub("aps/super_glue", self.subset, "superglue")
        else:
            folder = root / "superglue" / _FOLDERS[self.subset]
            origin = str(folder)
            if not (folder / _FILES["train"]).is_file():
                raise SettingError("data.root", root, f"{folder}/{_FILES['train']} does not exist")
            paths = {split: folder / name for split, name in _FILES.items() if (folder / name).is_file()}
            tables = {split: read_table(path, "data.root") for split, path in paths.items()}
        if self.subset == "copa":
            tables = {split: _with_prompt(table, "task.source", origin) for split, table in tables.items()}
        labelled = {split: table for split, table in tables.items() if "label" in table}
        return Labelled({split: select(table, text, origin) for split, table in labelled.items()}, origin)

    def read_file(self, path: Path, setting: str) -> FileTable:
        """COPA's prompt is made where the file has none."""
        table = read_table(path, setting)
        if self.subset == "copa" and "prompt" not in table:
            table = _with_prompt(table, setting, path)
        return FileTable(table, "label", official=True)


def _with_prompt(table: pd.DataFrame, setting: str, place: object) -> pd.DataFrame:
    check_texts(table, ["premise", "question"], setting, place)
    if unknown := sorted(set(table["question"]) - _QUESTIONS.keys()):
        raise SettingError(setting, place, f"questions {unknown[:3]} are none of {sorted(_QUESTIONS)}")
    pairs = zip(table["premise"], table["question"], strict=True)
    return table.assign(prompt=[f"{premise} {_QUESTIONS[question]}" for premise, question in pairs])
