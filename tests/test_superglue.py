"""SuperGLUE: the official layouts in small, the hub's copy, and what is refused."""

import json

import datasets
import pytest
import yaml

from heterolora.build import build
from heterolora.data import sources
from heterolora.data.module import Data, read_labelled, read_texts
from heterolora.data.superglue import SuperGlue
from heterolora.errors import SettingError
from tests.conftest import ROOT

DOWNLOADS = {
    "boolq": (
        "BoolQ",
        {"question": "is it so", "passage": "It is.", "idx": 0, "label": True},
        {"question": "is it", "passage": "No.", "idx": 1, "label": False},
    ),
    "cb": (
        "CB",
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": "contradiction", "idx": 1},
    ),
    "copa": (
        "COPA",
        {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0, "idx": 0},
        {"premise": "He fell.", "choice1": "Sun.", "choice2": "Ice.", "question": "cause", "label": 1, "idx": 1},
    ),
}
CODES = {"boolq": [1, 0], "cb": [0, 1], "copa": [0, 1]}


def load_task(subset):
    return build(yaml.safe_load((ROOT / "conf" / "task" / f"{subset}.yaml").read_text(encoding="utf-8")), "task")


def write_download(root, subset):
    name, *rows = DOWNLOADS[subset]
    folder = root / "superglue" / name
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hidden = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hidden))
    return folder


def columns_of(task):
    return list(dict.fromkeys(column for columns in task.inputs for column in columns))


@pytest.mark.parametrize("subset", DOWNLOADS)
def test_an_official_download_is_read_under_its_config(tmp_path, subset):
    folder, task = write_download(tmp_path, subset), load_task(subset)
    found = task.source.read(tmp_path, columns_of(task))
    assert (set(found.splits), found.origin) == ({"train", "validation"}, str(folder))
    for table in found.splits.values():
        assert list(table) == [*columns_of(task), "label"]
        assert task.encode_labels(table["label"], found.official, "here").tolist() == CODES[subset]


@pytest.mark.parametrize("subset", DOWNLOADS)
def test_the_hubs_copy_gives_the_same_texts_and_codes(tmp_path, monkeypatch, subset):
    def copy(path, name):
        assert (path, name) == ("aps/super_glue", subset)
        rows = [{**row, "label": code} for row, code in zip(DOWNLOADS[subset][1:], CODES[subset], strict=True)]
        hidden = [{**row, "label": -1} for row in rows]
        splits = {"train": rows, "validation": rows, "test": hidden}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(given) for split, given in splits.items()})

    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", copy)
    write_download(tmp_path, subset)
    task = load_task(subset)
    local, hub = (task.source.read(root, columns_of(task)) for root in (tmp_path, None))
    assert hub.origin == f"hub aps/super_glue {subset}"
    assert set(hub.splits) == {"train", "validation"}
    for split, table in hub.splits.items():
        assert table.drop(columns="label").to_dict("list") == local.splits[split].drop(columns="label").to_dict("list")
        assert task.encode_labels(table["label"], hub.official, "here").tolist() == CODES[subset]


def test_the_question_of_copa_is_written_out(tmp_path):
    write_download(tmp_path, "copa")
    table = SuperGlue("copa").read(tmp_path, ["prompt", "choice1", "choice2"]).splits["train"]
    assert table["prompt"].tolist() == [
        "It rained. What happened as a result?",
        "He fell. What was the cause of this?",
    ]
    assert load_task("copa").inputs == (("prompt", "choice1"), ("prompt", "choice2"))


@pytest.mark.parametrize("subset", DOWNLOADS)
def test_an_official_file_can_be_evaluated_and_predicted(tmp_path, subset):
    folder, task = write_download(tmp_path, subset), load_task(subset)
    wanted = task.source.read(tmp_path, columns_of(task)).splits["validation"]
    found = read_labelled(folder / "val.jsonl", task, None, "--file")
    assert found.drop(columns="label").to_dict("list") == wanted.drop(columns="label").to_dict("list")
    assert found["label"].tolist() == CODES[subset]
    assert set(columns_of(task)) < set(read_texts(folder / "test.jsonl", task, "--file"))


def test_a_copa_file_may_have_prompts_already_and_needs_a_premise(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,choice1,choice2,label\nWhy?,a,b,choice2\n")
    assert read_labelled(tmp_path / "a.csv", load_task("copa"), None, "--file")["prompt"].tolist() == ["Why?"]
    (tmp_path / "a.csv").write_text("premise,question,choice1,choice2\n,cause,a,b\n")
    with pytest.raises(SettingError, match=r"--file=.*a\.csv: row 1 has no 'premise'"):
        read_texts(tmp_path / "a.csv", load_task("copa"), "--file")


def test_a_text_that_is_missing_is_named(tmp_path):
    path = write_download(tmp_path, "cb") / "train.jsonl"
    path.write_text(path.read_text() + '{"premise": "x", "label": "neutral"}\n')
    with pytest.raises(SettingError, match=r"task\.source=the train split of .*CB: row 3 has no 'hypothesis'"):
        Data(str(tmp_path), 4, 4, 0.1, 0, None, 1, None).splits(load_task("cb"))


def test_an_unknown_question_of_copa_is_named(tmp_path):
    path = write_download(tmp_path, "copa") / "train.jsonl"
    path.write_text(path.read_text().replace('"cause"', '"reason"'))
    with pytest.raises(SettingError, match=r"questions \['reason'\] are none of \['cause', 'effect'\]"):
        SuperGlue("copa").read(tmp_path, ["prompt"])


def test_a_column_that_is_missing_is_named(tmp_path):
    write_download(tmp_path, "cb")
    with pytest.raises(SettingError, match=r"task\.text=\['sentence'\]: columns \['sentence'\] are missing"):
        SuperGlue("cb").read(tmp_path, ["sentence"])


def test_no_folder_and_no_hub(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match=r"data\.root=.*CB/train\.jsonl does not exist"):
        SuperGlue("cb").read(tmp_path, ["premise"])
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(SettingError, match=r"task cb is not local and the hub cannot be reached; .* superglue/"):
        SuperGlue("cb").read(None, ["premise"])


def test_a_damaged_line_is_named(tmp_path):
    path = write_download(tmp_path, "cb") / "val.jsonl"
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(SettingError, match=r"data\.root=.*val\.jsonl: cannot be read \(line 3: "):
        SuperGlue("cb").read(tmp_path, ["premise"])


def test_an_unknown_subset_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"subset=wic: possible: \['boolq', 'cb', 'copa'\]"):
        SuperGlue("wic")
