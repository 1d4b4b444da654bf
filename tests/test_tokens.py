"""Tokens: what is encoded, what stands between two sentences, and a cache that is never wrong."""

import json
import os
import shutil
import threading
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from heterolora.backbone import byte_tokenizer
from heterolora.data import tokens
from heterolora.data.tokens import input_length, pair_separator, tokenise, tokenise_table
from heterolora.errors import SettingError

CLS, SEP = 1, 2  # of the byte tokenizer
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(special=("</s>",), single="$A", pair="$A $B:1", **options):
    """A byte tokenizer that puts the named tokens around its inputs."""
    vocabulary = {token: index for index, token in enumerate([*special, *BYTES])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def one_text(texts=("a first text", "b", "third"), labels=(0, 1, 1)):
    table = pd.DataFrame({"text": list(texts), "label": list(labels)})
    return {"train": table, "test": table.iloc[:1]}


def a_pair(first="first", second="second"):
    return {"train": pd.DataFrame({"a": [first], "b": [second], "label": [1]})}


def decoded(tokenizer, examples):
    return [tokenizer.decode(ids) for example in examples for ids in example["input_ids"]]


@pytest.fixture
def encoded_batches(monkeypatch):
    """Lists of texts that any tokenizer was asked to encode (single probes of its style do not count)."""
    seen = []
    original = PreTrainedTokenizerFast.__call__

    def spy(self, *args, **kwargs):
        if isinstance(args[0], list):
            seen.append(args[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", spy)
    return seen


# -- examples ---------------------------------------------------------------------------------------------------------


def test_an_example_is_ids_mask_label_and_row():
    examples = tokenise(one_text(), byte_tokenizer(), [["text"]], 64, None)
    ids = [CLS, *(3 + BYTES.index(letter) for letter in "third"), SEP]
    found = {key: value for key, value in examples["train"][2].items() if key != "token_type_ids"}
    assert found == {"input_ids": [ids], "attention_mask": [[1] * 7], "labels": 1, "index": 2}
    assert [len(examples[split]) for split in ("train", "test")] == [3, 1]
    assert examples["test"][0] == examples["train"][0]


def test_a_long_text_is_cut_and_still_ends_right():
    example = tokenise(one_text(["x" * 50], [0]), byte_tokenizer(), [["text"]], 10, None)["train"][0]
    (ids,) = example["input_ids"]
    assert len(ids) == 10
    assert (ids[0], ids[-1]) == (CLS, SEP)


def test_the_longer_sentence_of_a_pair_is_cut_first():
    tokenizer = byte_tokenizer()
    examples = tokenise(a_pair("x" * 40, "short"), tokenizer, [["a", "b"]], 20, None)["train"]
    assert decoded(tokenizer, examples) == ["[CLS]" + "x" * 12 + "[SEP]short[SEP]"]


def test_padding_and_length_stored_with_the_tokenizer_are_not_used():
    # sentence-transformers checkpoints (MiniLM among them) store a fixed length of 128
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=32)
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert tokenise(one_text(), tokenizer, [["text"]], 64, None) == tokenise(
        one_text(), byte_tokenizer(), [["text"]], 64, None
    )


# -- between two sentences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "pair"),
    [
        (("[CLS]", "[SEP]"), "[CLS] $A [SEP] $B:1 [SEP]"),  # BERT
        (("<s>", "</s>"), "<s> $A </s> </s> $B:1 </s>"),  # RoBERTa
        (("</s>",), "$A </s> $B:1 </s>"),  # T5
        (("<s>",), "<s> $A <s> $B:1"),  # begins each sentence anew
    ],
)
def test_a_tokenizer_that_marks_the_border_gets_no_separator(special, pair):
    tokenizer = make_tokenizer(special, pair=pair, additional_special_tokens=list(special))
    assert pair_separator(tokenizer) == []
    assert pair_separator(byte_tokenizer()) == []


@pytest.mark.parametrize(
    ("special", "pair"),
    [
        (("</s>",), "$A $B:1"),  # GPT-2
        (("<s>", "</s>"), "<s> $A $B:1"),  # Llama
        (("<s>", "</s>"), "$A $B:1 </s>"),
        (("<s>", "</s>"), "<s> $A $B:1 </s>"),
        (("[g]", "<s>", "</s>"), "[g] <s> $A $B:1"),  # two marks, neither between (ChatGLM)
        (("<s>", "</s>"), "$A $B:1 </s> <s>"),
    ],
)
def test_a_tokenizer_that_joins_pairs_gets_its_end_token(special, pair):
    tokenizer = make_tokenizer(special, pair=pair, eos_token="</s>", additional_special_tokens=list(special))
    assert pair_separator(tokenizer) == [tokenizer.eos_token_id]


def test_a_separator_token_goes_before_the_end_token():
    tokenizer = make_tokenizer(("<sep>", "</s>"), eos_token="</s>", sep_token="<sep>")
    assert pair_separator(tokenizer) == [tokenizer.sep_token_id]


def test_without_any_special_token_a_line_break_separates():
    tokenizer = make_tokenizer(special=())
    assert tokenizer.decode(pair_separator(tokenizer)) == "\n"


def test_the_separator_stands_between_as_one_token():
    tokenizer = make_tokenizer(("<s>", "</s>"), single="<s> $A", pair="<s> $A $B:1", eos_token="</s>", bos_token="<s>")
    (ids,) = tokenise(a_pair("xy", "z"), tokenizer, [["a", "b"]], 64, None)["train"][0]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "x", "y", "</s>", "z"]


def test_the_second_sentence_outlives_a_long_first_one():
    # as with two inputs: the longer one is cut, the separator and the other sentence stay
    tokenizer = make_tokenizer(eos_token="</s>")
    examples = tokenise(a_pair("x" * 40, "short"), tokenizer, [["a", "b"]], 20, None)["train"]
    assert decoded(tokenizer, examples) == ["x" * 14 + "</s>short"]


def test_a_single_text_gets_no_separator():
    tokenizer = make_tokenizer(eos_token="</s>")
    assert decoded(tokenizer, tokenise(one_text(), tokenizer, [["text"]], 64, None)["train"])[1] == "b"


MARKS_NO_PAIRS = [("$A", "$A $B:1"), ("<s> $A", "<s> $A $B:1"), ("<s> $A </s>", "<s> $A $B:1 </s>")]


@pytest.mark.parametrize(("single", "pair"), MARKS_NO_PAIRS)
@pytest.mark.parametrize("first", ["xy", "", "x" * 40])
@pytest.mark.parametrize("second", ["z", ""])
def test_the_separator_has_its_place_beside_an_empty_sentence(single, pair, first, second):
    tokenizer = make_tokenizer(("<s>", "</s>", "<sep>"), single, pair, sep_token="<sep>", bos_token="<s>")
    (found,) = tokenise(a_pair(first, second), tokenizer, [["a", "b"]], 20, None)["train"]
    start, _, end = pair.partition("$A $B:1")
    room = 20 - 1 - len((start + end).split()) - len(second)
    text = "".join([start, first[:room], "<sep>", second, end]).replace(" ", "")
    assert decoded(tokenizer, [found]) == [text]
    assert found["attention_mask"] == [[1] * len(found["input_ids"][0])]


def test_a_row_without_a_token_is_refused():
    with pytest.raises(SettingError, match=r"task\.text=\['text'\]: row 2 is empty, and this tokenizer adds no token"):
        tokenise(one_text(["a", ""], [0, 1]), make_tokenizer(), [["text"]], 20, None)


# -- marks inside a text ----------------------------------------------------------------------------------------------


def test_marks_inside_a_text_are_letters():
    text = "a [SEP] b[PAD]"
    ids = tokenise(one_text([text], [0]), byte_tokenizer(), [["text"]], 64, None)["train"][0]["input_ids"][0]
    assert ids == [CLS, *(3 + BYTES.index("Ġ" if letter == " " else letter) for letter in text), SEP]


def unigram():
    """As T5's: its marks are among the pieces of text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "▁abc<>/s")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("mark", ["</s>", "<pad>"])
@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
def test_a_mark_that_no_option_keeps_apart_is_refused_with_its_row(mark, columns):
    table = pd.DataFrame({"a": ["a ?", "c b"], "b": ["c", "a"], "label": [0, 1]})
    tokenise_table(table, unigram(), [columns], 20)  # what it does not know is no mark
    table.loc[1, "a"] = f"b {mark}"
    with pytest.raises(SettingError, match=rf"row 2 holds '{mark}', which this model takes for a mark"):
        tokenise_table(table, unigram(), [columns], 20)


# -- several inputs an example ----------------------------------------------------------------------------------------


def choices():
    columns = {"ask": ["why", "how"], "one": ["x" * 40, "a"], "two": ["b", "cc"], "label": [1, 0]}
    return {"train": pd.DataFrame(columns)}


CHOICES = [["ask", "one"], ["ask", "two"]]


def test_each_alternative_is_encoded_as_if_it_were_alone():
    examples = tokenise(choices(), byte_tokenizer(), CHOICES, 20, None)["train"]
    for place, columns in enumerate(CHOICES):
        alone = tokenise(choices(), byte_tokenizer(), [columns], 20, None)["train"]
        for example, single in zip(examples, alone, strict=True):
            assert [example[key][place] for key in ("input_ids", "attention_mask")] == [
                single[key][0] for key in ("input_ids", "attention_mask")
            ]
    assert [(example["labels"], example["index"]) for example in examples] == [(1, 0), (0, 1)]
    assert [input_length(example) for example in examples] == [20, 8]


def test_separators_go_into_every_alternative():
    tokenizer = make_tokenizer(("<s>", "</s>"), single="<s> $A", pair="<s> $A $B:1", eos_token="</s>", bos_token="<s>")
    examples = tokenise(choices(), tokenizer, CHOICES, 20, None)["train"]
    assert decoded(tokenizer, examples[1:]) == ["<s>how</s>a", "<s>how</s>cc"]


def test_alternatives_come_back_from_the_cache(tmp_path, encoded_batches):
    first = tokenise(choices(), byte_tokenizer(), CHOICES, 20, tmp_path)
    assert len(encoded_batches) == 2
    assert tokenise(choices(), byte_tokenizer(), CHOICES, 20, tmp_path) == first
    assert len(encoded_batches) == 2
    other = [CHOICES[1], CHOICES[0]]
    assert tokenise(choices(), byte_tokenizer(), other, 20, tmp_path) != first


def test_labels_that_are_numbers_come_back_from_the_cache(tmp_path):
    tables = one_text(labels=(0.1, 3.75, 1 / 3))
    first = tokenise(tables, byte_tokenizer(), [["text"]], 20, tmp_path)
    assert [example["labels"] for example in first["train"]] == [0.1, 3.75, 1 / 3]
    assert tokenise(tables, byte_tokenizer(), [["text"]], 20, tmp_path) == first


def test_a_table_is_encoded_as_a_split_is_and_may_lack_labels():
    table = one_text()["train"]
    wanted = tokenise(one_text(), byte_tokenizer(), [["text"]], 20, None)["train"]
    assert tokenise_table(table, byte_tokenizer(), [["text"]], 20) == wanted
    without = tokenise_table(table.drop(columns="label"), byte_tokenizer(), [["text"]], 20)
    assert without == [{key: value for key, value in row.items() if key != "labels"} for row in wanted]


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_hit_gives_the_same_examples_and_encodes_nothing(tmp_path, encoded_batches):
    first = tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path / "new" / "cache")
    assert len(encoded_batches) == 2
    assert tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path / "new" / "cache") == first
    assert len(encoded_batches) == 2


def test_a_hit_with_pairs(tmp_path, encoded_batches):
    first = tokenise(a_pair(), byte_tokenizer(), [["a", "b"]], 64, tmp_path)
    assert len(encoded_batches) == 1
    assert tokenise(a_pair(), byte_tokenizer(), [["a", "b"]], 64, tmp_path) == first
    assert len(encoded_batches) == 1


def test_a_tokenizer_that_was_used_before_still_hits(tmp_path, encoded_batches):
    # a call leaves its truncation in the tokenizer's state
    tokenizer = byte_tokenizer()
    first = tokenise(one_text(), tokenizer, [["text"]], 64, tmp_path)
    tokenizer("anything", truncation=True, max_length=5)
    assert tokenise(one_text(), tokenizer, [["text"]], 64, tmp_path) == first
    assert len(encoded_batches) == 2


def test_no_cache_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenise(one_text(), byte_tokenizer(), [["text"]], 64, None)
    assert list(tmp_path.iterdir()) == []


def lower_case():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    return tokenizer


def cut_at_the_left():
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = "left"
    return tokenizer


def with_token_types():
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


BASE = {"tables": one_text(["First Text", "b"], [0, 1]), "tokenizer": byte_tokenizer, "max_length": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 6},
        {"tables": one_text(["first Text", "b"], [0, 1])},
        {"tables": one_text(["First Text", "b"], [1, 1])},
        {"tables": one_text(["b", "First Text"], [1, 0])},
        {"tables": {"train": BASE["tables"]["test"], "test": BASE["tables"]["train"]}},
        {"tables": {"train": BASE["tables"]["train"], "validation": BASE["tables"]["test"]}},
        {"tables": {"train": BASE["tables"]["train"]}},
        {"tokenizer": lower_case},
        {"tokenizer": make_tokenizer},
        {"tokenizer": cut_at_the_left},
        {"tokenizer": with_token_types},
    ],
    ids=[
        "max_length",
        "text",
        "label",
        "order",
        "splits swapped",
        "a split renamed",
        "a split less",
        "normaliser",
        "special tokens",
        "truncation side",
        "inputs",
    ],
)
def test_whatever_changes_the_cache_gives_what_no_cache_gives(tmp_path, change):
    def examples(settings, cache):
        return tokenise(settings["tables"], settings["tokenizer"](), [["text"]], settings["max_length"], cache)

    base = examples(BASE, tmp_path)
    wanted = examples(BASE | change, None)
    assert wanted != base
    assert examples(BASE | change, tmp_path) == wanted


def test_the_order_of_the_columns_counts(tmp_path):
    first = tokenise(a_pair(), byte_tokenizer(), [["a", "b"]], 64, tmp_path)
    second = tokenise(a_pair(), byte_tokenizer(), [["b", "a"]], 64, tmp_path)
    assert first != second
    assert second == tokenise(a_pair(), byte_tokenizer(), [["b", "a"]], 64, None)


# -- a cache that something happened to -------------------------------------------------------------------------------

MANY = one_text([f"text {row}" for row in range(2500)], [row % 2 for row in range(2500)])  # three record batches


def cached_folder(cache):
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return folder


def cut_between_batches(folder):
    """Keep the first batch of rows: still a readable file."""
    (path,) = (folder / "train").glob("*.arrow")
    content = path.read_bytes()
    source = pyarrow.BufferReader(content)
    pyarrow.ipc.open_stream(source).read_next_batch()
    path.write_bytes(content[: source.tell()])


def cut_inside_a_batch(folder):
    (path,) = (folder / "train").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-2000])


def cut_to_nothing(folder):
    (path,) = (folder / "train").glob("*.arrow")
    path.write_bytes(b"")


def without_the_index(folder):
    (folder / "dataset_dict.json").unlink()


def without_a_split(folder):
    """Consistent in itself, but not what was asked for."""
    shutil.rmtree(folder / "test")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [cut_between_batches, cut_inside_a_batch, cut_to_nothing, without_the_index, without_a_split, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_never_gives_wrong_examples(tmp_path, damage):
    right = tokenise(MANY, byte_tokenizer(), [["text"]], 64, tmp_path)
    damage(cached_folder(tmp_path))
    try:
        found = tokenise(MANY, byte_tokenizer(), [["text"]], 64, tmp_path)
    except (OSError, ValueError):  # refusing is no wrong answer; pyarrow's errors are these two
        return
    assert found == right


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_anew(tmp_path, damage):
    right = tokenise(MANY, byte_tokenizer(), [["text"]], 64, tmp_path)
    damage(cached_folder(tmp_path))
    assert tokenise(MANY, byte_tokenizer(), [["text"]], 64, tmp_path) == right


def save_half(self, path):
    Path(path).mkdir()
    (Path(path) / "dataset_dict.json").write_text('{"splits": ["tr')
    raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetDict, "save_to_disk", save_half)
        with pytest.raises(KeyboardInterrupt):
            tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path) == tokenise(
        one_text(), byte_tokenizer(), [["text"]], 64, None
    )


def test_an_interrupted_writer_leaves_the_progress_bars_alone(tmp_path, monkeypatch):
    datasets.enable_progress_bars()
    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", save_half)
    with pytest.raises(KeyboardInterrupt):
        tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path)
    disabled = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    assert not disabled


def test_the_rest_of_a_killed_writer_is_not_read(tmp_path):
    torn = tmp_path / ".writing-killed" / "tokens"
    torn.mkdir(parents=True)
    (torn / "dataset_dict.json").write_text("{")
    examples = tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path)
    assert examples == tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path)
    assert examples == tokenise(one_text(), byte_tokenizer(), [["text"]], 64, None)


def test_a_faster_writer_wins(tmp_path, monkeypatch):
    """Another process finishes the same folder after this one looked and before it moves its own there."""
    rename = os.rename

    def late(scratch, folder):
        shutil.copytree(scratch, folder)
        rename(scratch, folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", late)
        examples = tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path)
    assert examples == tokenise(one_text(), byte_tokenizer(), [["text"]], 64, None)
    assert [path.name for path in tmp_path.iterdir()] == [cached_folder(tmp_path).name]
    assert tokenise(one_text(), byte_tokenizer(), [["text"]], 64, tmp_path) == examples


def test_writers_at_the_same_moment(tmp_path, monkeypatch):
    barrier, rename, found = threading.Barrier(4, timeout=30), os.rename, []

    def together(scratch, folder):
        barrier.wait()  # all have written, none has moved
        rename(scratch, folder)

    monkeypatch.setattr(tokens.os, "rename", together)

    def write():
        found.append(tokenise(MANY, byte_tokenizer(), [["text"]], 64, tmp_path))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = tokenise(MANY, byte_tokenizer(), [["text"]], 64, None)
    assert [examples == wanted for examples in found] == [True] * 4
    assert len(list(tmp_path.iterdir())) == 1
    assert tokenise(MANY, byte_tokenizer(), [["text"]], 64, tmp_path) == wanted
