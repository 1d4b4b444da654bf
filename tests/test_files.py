"""A user's own files: every kind is read alike, and whatever is wrong is named in one line."""

import json

import pandas as pd
import pytest

from heterolora.backbone import byte_tokenizer
from heterolora.data.files import Files, read_columns
from heterolora.data.module import Data, TextData, read_labelled, read_texts
from heterolora.errors import SettingError
from heterolora.tasks.classification import Classification
from heterolora.tasks.regression import Regression

ROWS = [
    ('He said, "no".', "bad"),
    ("two\nlines", "good"),
    ("NA", "good"),
    ("größer\u2028weiter", "bad"),
]
TABLE = pd.DataFrame(ROWS, columns=["review", "verdict"]).assign(other=range(4))


def write(path, table=TABLE):
    """The table in the form that the suffix names."""
    writers = {
        ".csv": lambda: table.to_csv(path, index=False),
        ".tsv": lambda: path.write_text(
            "\n".join("\t".join(map(str, row)) for row in [list(table.columns), *table.itertuples(index=False)]) + "\n"
        ),
        ".jsonl": lambda: path.write_text(
            "".join(json.dumps(row) + "\n" for row in table.astype(object).to_dict("records"))
        ),
        ".json": lambda: path.write_text(json.dumps(table.astype(object).to_dict("records"))),
        ".parquet": lambda: table.to_parquet(path),
    }
    writers[path.suffix.lower()]()
    return path


KINDS = [".csv", ".tsv", ".jsonl", ".json", ".parquet"]


def refused(path, text=("review",), label="verdict"):
    with pytest.raises(SettingError) as caught:
        read_columns(path, list(text), label, "task.source.train")
    assert caught.value.setting == "task.source.train"
    assert caught.value.given == path
    assert "\n" not in str(caught.value)
    return caught.value.possible


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*KINDS, ".CSV"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, suffix):
    table = TABLE if suffix != ".tsv" else TABLE.drop(index=1)  # a line break cannot stand in one
    found = read_columns(write(tmp_path / f"train{suffix}", table), ["review"], "verdict", "here")
    assert list(found.itertuples(index=False, name=None)) == [tuple(row) for row in table.iloc[:, :2].to_numpy()]
    assert list(found.index) == list(range(len(table)))


def test_a_lone_quote_in_a_tsv_is_a_letter(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('review\tverdict\n"opens\tbad\ncloses"\tgood\n')
    assert read_columns(path, ["review"], "verdict", "here")["review"].tolist() == ['"opens', 'closes"']


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(TABLE.to_csv(index=False).encode("utf-8-sig"))
    assert len(read_columns(path, ["review"], "verdict", "here")) == 4


def test_columns_come_in_the_order_they_are_asked_for(tmp_path):
    found = read_columns(write(tmp_path / "a.csv"), ["verdict", "review"], None, "here")
    assert list(found) == ["verdict", "review"]


# -- refused ----------------------------------------------------------------------------------------------------------


def test_no_training_file():
    with pytest.raises(SettingError, match=r"task\.source\.train=None: give a file .*'\.csv'.*'\.parquet'"):
        Files(None, None, None, "label").read(None, ["text"])


def test_the_label_is_no_text():
    with pytest.raises(SettingError, match=r"task\.source\.label=text: is one of the text columns \['text'\]"):
        Files("a.csv", None, None, "text").read(None, ["text"])


def test_a_file_that_is_not_there(tmp_path):
    assert refused(tmp_path / "train.csv") == "no such file"


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "train.csv").mkdir()
    assert refused(tmp_path / "train.csv") == "no such file"


@pytest.mark.parametrize("name", ["train.xlsx", "train", "train.csv.gz"])
def test_an_unknown_kind_lists_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("x")
    possible = "unknown kind of file; possible: ['.csv', '.json', '.jsonl', '.parquet', '.tsv']"
    assert refused(tmp_path / name) == possible


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"review,verdict\na,b,c\n", "Expected 2 fields in line 2, saw 3"),
        ("a.csv", b'review,verdict\n"a,b\n', "EOF inside string"),
        ("a.csv", "review,verdict\né,b\n".encode("latin-1"), "utf-8"),
        ("a.csv", b"", "No columns"),
        ("a.tsv", b"review\tverdict\na\tb\tc\n", "Expected 2 fields in line 2, saw 3"),
        ("a.jsonl", b'{"review": "a"}\n{"review": \n', "line 2: "),
        ("a.jsonl", b'["a", "b"]\n', "records with named values"),
        ("a.json", b'{"review": ["a"]}', "records with named values"),
        ("a.json", b"[1, 2]", "records with named values"),
        ("a.json", b"", "Expecting value"),
        ("a.parquet", b"nothing of the kind", "arquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert message.startswith("cannot be read (")
    assert reason in message


@pytest.mark.parametrize("suffix", KINDS)
def test_a_file_without_rows(tmp_path, suffix):
    assert refused(write(tmp_path / f"a{suffix}", TABLE.iloc[:0])) == "has no rows"


@pytest.mark.parametrize("suffix", KINDS)
def test_columns_that_are_not_there_are_named(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", TABLE.drop(index=1))
    has = "the file has ['review', 'verdict', 'other']"
    assert refused(path, ["text", "review"]) == f"columns ['text'] are missing, {has}"
    assert refused(path, label="label") == f"columns ['label'] are missing, {has}"


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "a.csv").write_text("review,review,verdict\na,b,c\n")
    assert refused(tmp_path / "a.csv") == "has several columns named 'review'"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["review", "verdict"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_row_without_a_text_or_label_is_named(tmp_path, suffix, column, value):
    table = TABLE.drop(index=1).astype(object).reset_index(drop=True)
    table.loc[1, column] = "" if suffix == ".tsv" else value
    assert refused(write(tmp_path / f"a{suffix}", table)) == f"row 2 has no {column!r}"


def test_a_record_that_lacks_a_key_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"review": "a", "verdict": "b"}\n{"review": "c"}\n')
    assert refused(tmp_path / "a.jsonl") == "row 2 has no 'verdict'"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_numbers_are_no_text(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", TABLE.assign(review=[1, 2, 3, 4]))
    assert refused(path) == "column 'review' is no text: row 1 has 1 (int)"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_empty_line_is_a_row_without_a_text_but_at_the_end(tmp_path, name, end):
    one, two = tmp_path / f"one_{name}", tmp_path / f"two_{name}"
    mark = "," if name == "a.csv" else "\t"
    one.write_bytes(end.join(["review", "first", "   ", "third", "", ""]).encode())
    assert read_columns(one, ["review"], None, "here")["review"].tolist() == ["first", "   ", "third"]
    one.write_bytes(end.join(["review", "first", "", "third"]).encode())
    assert refused(one, label=None) == "row 2 has no 'review'"
    two.write_bytes(end.join([f"review{mark}verdict", f"a{mark}b", f"c{mark}d", "", "", ""]).encode())
    assert read_columns(two, ["review"], "verdict", "here").to_numpy().tolist() == [["a", "b"], ["c", "d"]]
    two.write_bytes(end.join([f"review{mark}verdict", f"a{mark}b", "", f"c{mark}d"]).encode())
    assert refused(two) == "row 2 has no 'review'"
    two.write_bytes(end.join([f"review{mark}verdict", f"a{mark}b", mark, ""]).encode())
    assert refused(two) == "row 2 has no 'review'"


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_lone_carriage_return_is_a_letter(tmp_path, name, mark, end):
    (tmp_path / name).write_bytes(end.join([f"review{mark}verdict", f"a\rb{mark}c", f"d{mark}e"]).encode())
    found = read_columns(tmp_path / name, ["review"], "verdict", "here")
    assert found.to_numpy().tolist() == [["a\rb", "c"], ["d", "e"]]


def test_line_ends_inside_quotes_stay_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'review,verdict\r\n"a\r\n\r\nb\r",c\r\nd,"e"\r\n')
    found = read_columns(tmp_path / "a.csv", ["review"], "verdict", "here")
    assert found.to_numpy().tolist() == [["a\r\n\r\nb\r", "c"], ["d", "e"]]


def test_an_empty_line_between_records_is_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"review": "a"}\n\n{"review": "b"}\n')
    assert refused(tmp_path / "a.jsonl").startswith("cannot be read (line 2: ")
    (tmp_path / "a.jsonl").write_bytes(b'{"review": "a"}\r\n{"review": "b"}\r\n\r\n')
    assert len(read_columns(tmp_path / "a.jsonl", ["review"], None, "here")) == 2


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_record_nested_without_end_cannot_be_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text("[" * 100_000 + "]" * 100_000)
    assert refused(tmp_path / f"a{suffix}").startswith("cannot be read (")


def test_half_a_character_is_refused_with_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"review": "gr\\u00f6\\ud83d\\ude00"}\n{"review": "x\\ud800"}\n')
    message = "column 'review' of row 2 has half a character (a lone surrogate): 'x\\ud800'"
    assert refused(tmp_path / "a.jsonl", label=None) == message


# -- as a task --------------------------------------------------------------------------------------------------------


def settings(**changes):
    values = {"root": None, "batch_size": 4, "eval_batch_size": 4, "validation_share": 0.1, "split_seed": 0}
    return Data(**(values | {"limit": None, "pad_to_multiple_of": 1, "cache_dir": None} | changes))


def make_task(*paths, label="label", labels=None, **changes):
    given = [path and str(path) for path in (*paths, None, None)][:3]
    values = {"name": "files", "source": Files(*given, label), "text": ["text"], "labels": labels}
    return Classification(**(values | {"metrics": ["accuracy"], "mode": "max", "max_length": 32} | changes))


def labelled(path, labels):
    table = pd.DataFrame({"text": [f"text {row}" for row in range(len(labels))], "label": labels}, dtype=object)
    return write(path, table)


def test_names_of_classes_come_from_the_training_file(tmp_path):
    train = labelled(tmp_path / "a.csv", ["no", "yes", "maybe"] * 10)
    task = make_task(train)
    with pytest.raises(SettingError, match=r"task\.labels=None: not known before the training set is read"):
        _ = task.outputs
    splits, origin, completed = settings().splits(task)
    assert completed.labels == ("maybe", "no", "yes")
    assert (completed.outputs, task.labels) == (3, None)
    assert {name: len(table) for name, table in splits.tables.items()} == {"train": 24, "validation": 3, "test": 3}
    assert origin == f"train {train}"
    for table in splits.tables.values():
        names = {text: ["no", "yes", "maybe"][int(text.split()[1]) % 3] for text in table["text"]}
        assert [completed.labels[code] for code in table["label"]] == list(names.values())


def test_the_same_number_in_other_forms_is_the_same_class(tmp_path):
    train = labelled(tmp_path / "a.csv", ["1", "2.0"] * 5)
    validation = labelled(tmp_path / "b.jsonl", [1, 2.0, "1.0", "2"])
    test = write(tmp_path / "c.parquet", pd.DataFrame({"text": ["a", "b"], "label": [1.0, 2.0]}))
    splits, _, task = settings().splits(make_task(train, validation, test))
    assert task.labels == ("1", "2")
    assert splits.tables["validation"]["label"].tolist() == [0, 1, 0, 1]
    assert splits.tables["test"]["label"].tolist() == [0, 1]
    assert splits.note.startswith("given splits")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_training_does_not_have_is_an_error(tmp_path, split):
    files = {name: labelled(tmp_path / f"{name}.csv", ["a", "b"] * 5) for name in ("train", "validation", "test")}
    labelled(files[split], ["a", "c"])
    message = rf"task\.labels=\['a', 'b'\]: the {split} split of .* has other labels: \['c'\] \(first in row 2\)"
    with pytest.raises(SettingError, match=message):
        settings().splits(make_task(*files.values()))


def test_a_number_is_no_code_in_a_users_file(tmp_path):
    train, test = labelled(tmp_path / "a.csv", ["no", "yes"] * 5), labelled(tmp_path / "b.csv", ["0", "yes"])
    with pytest.raises(SettingError, match=r"has other labels: \['0'\]"):
        settings().splits(make_task(train, None, test))


def test_a_label_that_the_config_does_not_name_is_an_error(tmp_path):
    train = labelled(tmp_path / "a.csv", ["a", "b", "c"] * 5)
    with pytest.raises(SettingError, match=r"the train split of .* has other labels: \['c'\] \(first in row 3\)"):
        settings().splits(make_task(train, labels=["a", "b"]))


def test_a_class_without_an_example_in_training_is_told(tmp_path, caplog):
    train = labelled(tmp_path / "a.csv", ["a", "b"] * 10)
    _, _, task = settings().splits(make_task(train, labels=["a", "b", "c"]))
    assert task.outputs == 3
    assert "the training split has no example of ['c']" in caplog.text


def test_a_class_with_one_example_works(tmp_path):
    train = labelled(tmp_path / "a.csv", ["a", "b"] * 10 + ["c"])
    splits, _, task = settings().splits(make_task(train))
    assert task.labels == ("a", "b", "c")
    assert sum((table["label"] == 2).sum() for table in splits.tables.values()) == 1


def test_a_single_class_is_an_error(tmp_path):
    with pytest.raises(SettingError, match=r"task\.labels=None: .* has a single class, 'a'"):
        settings().splits(make_task(labelled(tmp_path / "a.csv", ["a"] * 9)))


def test_metrics_that_do_not_fit_the_classes_found_are_an_error(tmp_path):
    train = labelled(tmp_path / "a.csv", ["a", "b", "c"] * 9)
    with pytest.raises(SettingError, match=r"task\.metrics=\['f1'\]: f1 is for two classes, not \['a', 'b', 'c'\]"):
        settings().splits(make_task(train, metrics=["f1"]))


def test_numbers_for_a_regression(tmp_path):
    train = labelled(tmp_path / "a.csv", [f"{row / 8}" for row in range(40)])
    task = Regression("files", Files(str(train), None, None, "label"), ["text"], ["pearson"], "max", 32)
    splits, _, _ = settings().splits(task)
    assert {name: len(table) for name, table in splits.tables.items()} == {"train": 32, "validation": 4, "test": 4}
    for table in splits.tables.values():
        assert table["label"].tolist() == [int(text.split()[1]) / 8 for text in table["text"]]
    batch = next(iter(TextData(splits, task, byte_tokenizer(), None, settings(), 0).val_dataloader()))
    assert batch["labels"].tolist() == [splits.tables["validation"]["label"][row] for row in batch["index"].tolist()]
    labelled(train, ["1", "2", "high"])
    with pytest.raises(SettingError, match=r"the train split of .*: label 'high' in row 3 is no finite number"):
        settings().splits(task)


@pytest.mark.parametrize("labels", [[[1], [2]] * 9, [[1, 2], [3]] * 9, [{"a": 1}] * 18])
def test_labels_that_are_lists_are_refused_with_their_row(tmp_path, labels):
    train = labelled(tmp_path / "a.parquet", labels)
    with pytest.raises(SettingError, match=r"the train split of .*: label of row 1: .* is neither text nor a number"):
        settings().splits(make_task(train))
    with pytest.raises(SettingError, match=r"label .* in row 1 is no finite number"):
        settings().splits(Regression("r", Files(str(train), None, None, "label"), ["text"], ["mse"], "min", 32))


def test_labels_of_single_precision_have_their_own_digits(tmp_path):
    table = pd.DataFrame({"text": [f"text {row}" for row in range(20)], "label": pd.Series([0.1, 2] * 10, dtype="f4")})
    assert settings().splits(make_task(write(tmp_path / "a.parquet", table)))[2].labels == ("0.1", "2")


def test_one_file_for_two_splits_is_refused(tmp_path, monkeypatch):
    train = labelled(tmp_path / "a.csv", ["a", "b"] * 10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.csv").symlink_to(train)
    for other in (train, "./a.csv", "link.csv"):
        with pytest.raises(SettingError, match=r"task\.source\.test=.*\.csv: is the train file too") as caught:
            settings().splits(make_task(train, None, other))
        assert "\n" not in str(caught.value)


def test_texts_of_training_that_come_back_are_told(tmp_path, caplog):
    train, test = labelled(tmp_path / "a.csv", ["a", "b"] * 10), labelled(tmp_path / "b.csv", ["b", "a", "a"])
    splits, _, _ = (
        settings().splits(make_task(train, test, test.rename(tmp_path / "c.csv") and None))
        if False
        else settings().splits(make_task(train, None, test))
    )
    seen = sum(text in set(splits.tables["train"]["text"]) for text in splits.tables["test"]["text"])
    assert seen
    assert splits.note.endswith(f"; texts that training has, too: {seen} in test")
    assert f"texts that training has, too: {seen} in test" in caplog.text


def test_flags_are_one_class_in_any_file(tmp_path):
    train = labelled(tmp_path / "a.csv", ["True", "False"] * 10)
    test = write(tmp_path / "b.jsonl", pd.DataFrame({"text": ["x", "y", "z"], "label": [True, "FALSE", False]}))
    splits, _, task = settings().splits(make_task(train, None, test))
    assert task.labels == ("false", "true")
    assert splits.tables["test"]["label"].tolist() == [1, 0, 0]


def test_a_file_to_evaluate_has_the_users_label_column(tmp_path):
    path = write(tmp_path / "new.csv", TABLE)
    task = make_task("gone.csv", label="verdict", text=["review"], labels=["good", "bad"])
    found = read_labelled(path, task, None, "--file")
    assert list(found) == ["review", "label"]
    assert found["label"].tolist() == [1, 0, 0, 1]
    pd.testing.assert_frame_equal(read_labelled(path, task, "verdict", "--file"), found)
    assert list(read_texts(path, task, "--file")) == ["review", "verdict", "other"]
    with pytest.raises(SettingError, match=r"has other labels: \['0', '1', '2'\]"):
        read_labelled(path, task, "other", "--file")  # no codes in a user's own files
    with pytest.raises(SettingError, match=r"--file=.*: 'review' is a text column, and no label"):
        read_labelled(path, task, "review", "--file")
    with pytest.raises(SettingError, match=r"--file=.*: columns \['mood'\] are missing"):
        read_labelled(path, task, "mood", "--file")


def test_too_few_rows_to_split_is_an_error(tmp_path):
    with pytest.raises(SettingError, match=r"the splits \['validation', 'test'\] are empty"):
        settings().splits(make_task(labelled(tmp_path / "a.csv", ["a", "b"])))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    labelled(tmp_path / "a.csv", ["a", "b"] * 10)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings().splits(make_task("~/a.csv"))[1] == f"train {tmp_path}/a.csv"
