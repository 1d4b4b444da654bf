"""Batches: their padding, their order, and that nothing drawn before changes them."""

from itertools import chain, islice
from types import SimpleNamespace

import lightning as L
import pandas as pd
import pytest
import torch

from heterolora.backbone import Tiny, byte_tokenizer
from heterolora.data.files import read_columns
from heterolora.data.module import Data, TextData, encode
from heterolora.data.sampler import SimilarLength
from heterolora.data.sources import Glue, MovieReviews
from heterolora.data.splits import Splits
from heterolora.data.tokens import tokenise_table
from heterolora.errors import SettingError
from heterolora.lit import LitAdapted, Optimizer, in_file_order
from heterolora.quiet import HINTS
from heterolora.tasks.base import text_columns
from heterolora.tasks.choice import Choice
from heterolora.tasks.classification import Classification
from tests.conftest import adapt

hushed = pytest.mark.filterwarnings(*(f"ignore:{hint}" for hint in HINTS))  # what a run silences, too

SIZES = {"train": 100, "validation": 30, "test": 50}


def words(row):
    """Texts of 1 to 60 letters, in no order of length."""
    return "x" * (1 + (row * 37) % 60)


def made_up_splits(sizes=SIZES):
    tables = {
        name: pd.DataFrame({"text": [words(row) for row in range(size)], "label": [row % 3 % 2 for row in range(size)]})
        for name, size in sizes.items()
    }
    return Splits(tables, "made up")


def settings(**changes):
    values = {"root": None, "batch_size": 8, "eval_batch_size": 7, "validation_share": 0.1, "split_seed": 0}
    return Data(**(values | {"limit": None, "pad_to_multiple_of": 1, "cache_dir": None} | changes))


def make_task(**changes):
    values = {"name": "made_up", "source": None, "text": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"]}
    return Classification(**(values | {"mode": "max", "max_length": 64} | changes))


def make_data(seed=0, splits=None, **changes):
    return TextData(splits or made_up_splits(), make_task(), byte_tokenizer(), None, settings(**changes), seed)


def rows(batches):
    return [batch["index"].tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def lengths(data, split, indices):
    return [len(data.examples[split][index]["input_ids"][0]) for index in indices]


def equal_batches(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -4])
def test_batches_of_less_than_one_example_are_refused(name, value):
    with pytest.raises(SettingError) as caught:
        settings(**{name: value})
    assert (caught.value.setting, caught.value.given) == (name, value)


def test_a_root_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SettingError, match="no such folder"):
        settings(root=str(tmp_path / "nowhere")).splits(make_task())


def test_splits_are_read_below_the_root(tmp_path, monkeypatch):
    folder = tmp_path / "sets" / "glue" / "RTE"
    folder.mkdir(parents=True)
    for name, count in (("train.tsv", 40), ("dev.tsv", 10)):
        lines = [f"{row}\tfirst {row}\tsecond\t{row % 2}\n" for row in range(count)]
        (folder / name).write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    task = make_task(source=Glue("rte"), text=["sentence1", "sentence2"], labels=["entailment", "not_entailment"])
    monkeypatch.setenv("HOME", str(tmp_path))
    splits, origin, _ = settings(root="~/sets", limit=20).splits(task)
    assert {name: len(table) for name, table in splits.tables.items()} == {"train": 20, "validation": 4, "test": 10}
    assert origin == str(folder)


def test_the_runs_seed_does_not_change_the_sentences():
    task = make_task(source=MovieReviews("rotten_tomatoes"), max_length=16)
    chosen = settings(limit=50)
    first, second = (TextData(chosen.splits(task)[0], task, byte_tokenizer(), None, chosen, seed) for seed in (0, 1))
    assert first.examples == second.examples


def test_a_tokenizer_with_a_lower_limit_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 32
    with pytest.raises(SettingError, match="this model's limit is 32") as caught:
        TextData(made_up_splits(), make_task(max_length=33), tokenizer, None, settings(), 0)
    assert caught.value.setting == "task.max_length"
    TextData(made_up_splits(), make_task(max_length=32), tokenizer, None, settings(), 0)


def test_the_cache_folder_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_data(cache_dir="~/tokens")
    assert len(list((tmp_path / "tokens").iterdir())) == 1


# -- training ---------------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_their_own_longest():
    data = make_data()
    widths = []
    for batch in data.train_dataloader():
        own = lengths(data, "train", batch["index"].tolist())
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(own), max(own))
        assert batch["attention_mask"].sum(1).tolist() == own
        assert (batch["input_ids"][batch["attention_mask"] == 0] == byte_tokenizer().pad_token_id).all()
        widths.append(max(own))
    assert len(set(widths)) > 3  # not all to the longest of the split


def test_an_epoch_holds_every_row_with_its_own_label():
    data = make_data()
    batches = list(data.train_dataloader())
    assert sorted(flat(rows(batches))) == list(range(100))
    assert [len(batch["labels"]) for batch in batches] == [8] * 12 + [4]
    labels = made_up_splits().tables["train"]["label"]
    for batch in batches:
        assert batch["labels"].tolist() == [labels[index] for index in batch["index"].tolist()]


def test_the_training_order_depends_on_the_seed():
    assert rows(make_data(0).train_dataloader()) == rows(make_data(0).train_dataloader())
    assert rows(make_data(0).train_dataloader()) != rows(make_data(1).train_dataloader())


class Recorder(L.LightningModule):
    """Writes down the rows that Lightning gives it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["index"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **options)


@hushed
def test_lightning_sets_the_samplers_epoch():
    data, recorder = make_data(), Recorder()
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(recorder, train_dataloaders=data.train_dataloader())
    sampler = data.train_dataloader().batch_sampler.sampler
    assert isinstance(sampler, SimilarLength)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert flat(batch for seen, batch in recorder.seen if seen == epoch) == list(sampler)


# -- scoring ----------------------------------------------------------------------------------------------------------


def test_scoring_batches_come_with_the_rows_they_hold():
    data = make_data()
    batches, held = data.scoring_batches(5)
    assert held == rows(batches)
    assert [len(row) for row in held] == [8] * 5
    assert len(set(flat(held))) == 40
    for batch, row in zip(batches, held, strict=True):
        assert batch["input_ids"].shape[1] == max(lengths(data, "train", row))


def test_scoring_has_an_order_of_its_own():
    data = make_data()
    orders = [rows(data.train_dataloader()), data.scoring_batches(13)[1], rows(islice(data.warmup_batches(), 13))]
    assert all(sorted(flat(order)) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_scoring_batches_do_not_depend_on_what_was_drawn_before():
    data = make_data()
    first = data.scoring_batches(6)
    torch.manual_seed(1234)
    list(data.train_dataloader())
    list(islice(data.warmup_batches(), 20))
    data.train_dataloader().batch_sampler.sampler.set_epoch(7)
    second = data.scoring_batches(6)
    assert first[1] == second[1] == make_data().scoring_batches(6)[1]
    assert equal_batches(first[0], second[0])


def test_fewer_scoring_batches_are_the_first_of_more():
    data = make_data()
    assert data.scoring_batches(3)[1] == data.scoring_batches(9)[1][:3]


def test_scoring_draws_nothing_from_the_global_generator():
    data = make_data()
    before = torch.get_rng_state()
    data.scoring_batches(5)
    list(islice(data.warmup_batches(), 20))
    assert torch.equal(torch.get_rng_state(), before)


def test_scoring_batches_depend_on_the_seed():
    assert make_data(0).scoring_batches(5)[1] != make_data(1).scoring_batches(5)[1]


def test_more_scoring_batches_than_there_are_is_an_error():
    data = make_data()
    assert len(data.scoring_batches(13)[0]) == 13
    with pytest.raises(SettingError, match="the training split has 13 batches of 8") as caught:
        data.scoring_batches(14)
    assert (caught.value.setting, caught.value.given) == ("probe.batches", 14)


def test_warmup_goes_on_for_ever_in_new_orders():
    batches = rows(islice(make_data().warmup_batches(), 26))
    epochs = [flat(batches[:13]), flat(batches[13:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100))] * 2
    assert epochs[0] != epochs[1]


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_goes_by_length_and_the_index_restores_the_file(split):
    data = make_data()
    batches = list(data.val_dataloader() if split == "validation" else data.test_dataloader()["test"])
    order = flat(rows(batches))
    assert [len(batch["labels"]) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    assert lengths(data, split, order) == sorted(lengths(data, split, range(SIZES[split])))
    assert order != list(range(SIZES[split]))
    labels = torch.cat([batch["labels"] for batch in batches])
    restored = labels[torch.tensor(order).argsort()]
    assert restored.tolist() == made_up_splits().tables[split]["label"].tolist()


def test_evaluation_pads_less_than_file_order():
    data = make_data()
    used = sum(batch["input_ids"].numel() for batch in data.test_dataloader()["test"])
    order = range(SIZES["test"])
    in_file_order = [lengths(data, "test", order[at : at + 7]) for at in range(0, len(order), 7)]
    assert used < 0.75 * sum(max(batch) * len(batch) for batch in in_file_order)


def test_every_test_split_has_a_loader():
    tables = made_up_splits(SIZES | {"test_hard": 9}).tables
    data = make_data(splits=Splits(tables, "made up"))
    loaders = data.test_dataloader()
    assert list(loaders) == ["test", "test_hard"]
    assert sorted(flat(rows(loaders["test_hard"]))) == list(range(9))


# -- other tasks ------------------------------------------------------------------------------------------------------

CHOICE = Choice("made_up", None, ["ask"], ["one", "two"], ["accuracy"], "max", 80)


def choice_data():
    def table(size):
        columns = {"ask": [words(row) for row in range(size)], "one": ["a"] * size, "two": ["bcd"] * size}
        return pd.DataFrame(columns | {"label": [row % 2 for row in range(size)]})

    splits = Splits({name: table(size) for name, size in SIZES.items()}, "made up")
    return TextData(splits, CHOICE, byte_tokenizer(), None, settings(), 0)


def test_a_batch_holds_the_alternatives_of_an_example_side_by_side():
    data = choice_data()
    for batch in data.train_dataloader():
        assert len(batch["input_ids"]) == len(batch["attention_mask"]) == 2 * len(batch["labels"])
        texts = byte_tokenizer().batch_decode(batch["input_ids"], skip_special_tokens=True)
        wanted = [words(row) + choice for row in batch["index"].tolist() for choice in ("a", "bcd")]
        assert texts == wanted
        assert batch["labels"].tolist() == [row % 2 for row in batch["index"].tolist()]
        longest = max(len(ids) for row in batch["index"].tolist() for ids in data.examples["train"][row]["input_ids"])
        assert batch["input_ids"].shape[1] == longest


def test_labels_that_are_numbers_keep_their_digits():
    splits = made_up_splits()
    tables = {name: table.assign(label=table.index / 7) for name, table in splits.tables.items()}
    batch = next(iter(make_data(splits=Splits(tables, "made up")).train_dataloader()))
    assert batch["labels"].tolist() == [row / 7 for row in batch["index"].tolist()]


# -- one table --------------------------------------------------------------------------------------------------------


def test_a_table_of_its_own_gives_the_batches_of_a_split():
    data, table = make_data(), made_up_splits().tables["test"]
    assert equal_batches(
        list(encode(table, make_task(), byte_tokenizer(), None, 7)), list(data.test_dataloader()["test"])
    )
    without = list(encode(table.drop(columns="label"), make_task(), byte_tokenizer(), None, 7))
    labelled = [
        {key: value for key, value in batch.items() if key != "labels"} for batch in data.test_dataloader()["test"]
    ]
    assert equal_batches(without, labelled)


def test_an_empty_text_is_a_text_as_in_training():
    table = pd.DataFrame({"text": ["x", ""]})
    (batch,) = encode(table, make_task(), byte_tokenizer(), None, 7)
    assert batch["attention_mask"].sum(1).tolist() == [2, 3]


def test_new_texts_of_a_choice():
    table = pd.DataFrame({"ask": ["why", "how"], "one": ["a", "b"], "two": ["c", "d"]})
    (batch,) = encode(table, CHOICE, byte_tokenizer(), None, 7)
    assert len(batch["input_ids"]) == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"other": ["x"]}, r"task\.text=\['text'\]: columns \['text'\] are missing, there are \['other'\]"),
        ({"text": []}, "has no rows"),
        ({"text": ["x", None]}, "row 2 has no 'text'"),
        ({"text": ["x", float("nan")]}, "row 2 has no 'text'"),
        ({"text": ["x", 3]}, r"column 'text' is no text: row 2 has 3 \(int\)"),
        ({"text": ["x", "\ud800"]}, r"column 'text' of row 2 has half a character"),
    ],
)
def test_a_table_without_texts_is_refused(table, message):
    with pytest.raises(SettingError, match=message):
        encode(pd.DataFrame(table, dtype=object), make_task(), byte_tokenizer(), None, 7)
    with pytest.raises(SettingError, match="this model's limit is 32"):
        encode(pd.DataFrame({"text": ["x"]}), make_task(), byte_tokenizer(), 32, 7)


def make_lit():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = Tiny("bert", sizes, "float32", None, None, False).load(2, 0).model
    return LitAdapted(adapt(backbone.eval()), make_task(), Optimizer(1e-3, 1e-3, 0.0, 0.0, "linear", None), 0, "")


def alone(model, example):
    """Logits of one example without any padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(example["input_ids"])).logits[0]


@hushed
def test_predictions_are_in_file_order():
    data, lit = make_data(), make_lit()
    quiet_trainer().test(lit, data.test_dataloader(), verbose=False)
    found = lit.predictions("test")
    assert found["index"].tolist() == list(range(50))
    assert found["labels"].tolist() == made_up_splits().tables["test"]["label"].tolist()
    wanted = torch.stack([alone(lit.model.eval(), example) for example in data.examples["test"]])
    assert torch.unique(wanted, dim=0).shape[0] == 50  # so that no row could stand for another
    torch.testing.assert_close(found["logits"], wanted)
    assert torch.equal(found["prediction"], found["logits"].argmax(1))


@hushed
def test_every_test_split_is_evaluated_by_itself():
    tables = made_up_splits(SIZES | {"test_hard": 9}).tables
    data, lit, trainer = make_data(splits=Splits(tables, "made up")), make_lit(), quiet_trainer()
    (first, second) = trainer.test(lit, data, verbose=False)
    logged = first | second
    assert logged.keys() == {f"{split}/{name}" for split in ("test", "test_hard") for name in ("accuracy", "loss")}
    for split, size in (("test", 50), ("test_hard", 9)):
        found = lit.predictions(split)
        assert found["labels"].tolist() == tables[split]["label"].tolist()
        assert len(found["labels"]) == size
        assert logged[f"{split}/accuracy"] == pytest.approx(
            (found["prediction"] == found["labels"]).float().mean().item()
        )
        loss = torch.nn.functional.cross_entropy(found["logits"], found["labels"]).item()
        assert logged[f"{split}/loss"] == pytest.approx(loss, rel=1e-5)


def test_from_new_texts_to_names(tmp_path):
    """What a command that predicts does."""
    (tmp_path / "new.csv").write_text("text\nx\nlonger than the first\nxy\n")
    lit, task = make_lit(), make_task()
    table = read_columns(tmp_path / "new.csv", text_columns(task.inputs), None, "input")
    parts = []
    for batch in encode(table, task, byte_tokenizer(), None, 2):
        with torch.no_grad():
            logits = task.logits(lit.model.eval(), batch)
        parts.append({"index": batch["index"], "prediction": task.predict(logits), "logits": logits})
    found = task.prediction_table(in_file_order(parts))
    assert list(found) == ["index", "prediction", "logit_no", "logit_yes"]
    assert found["index"].tolist() == [0, 1, 2]
    wanted = [alone(lit.model.eval(), example) for example in tokenise_table(table, byte_tokenizer(), task.inputs, 64)]
    torch.testing.assert_close(torch.tensor(found[["logit_no", "logit_yes"]].to_numpy()), torch.stack(wanted))


@hushed
def test_a_single_loader_is_the_test_split():
    lit = make_lit()
    table = made_up_splits().tables["validation"]
    quiet_trainer().test(lit, encode(table, make_task(), byte_tokenizer(), None, 7), verbose=False)
    assert lit.predictions("test")["labels"].tolist() == table["label"].tolist()


@hushed
def test_a_second_evaluation_replaces_the_first():
    data, lit, trainer = make_data(), make_lit(), quiet_trainer()
    for _ in range(2):
        (metrics,) = trainer.test(lit, data.test_dataloader(), verbose=False)
    found = lit.predictions("test")
    assert len(found["labels"]) == 50
    accuracy = (found["prediction"] == found["labels"]).float().mean().item()
    assert metrics["test/accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(found["logits"], found["labels"]).item()
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-5)  # the short last batch counts by its size


def test_the_order_of_predictions_is_no_accident():
    # batches that arrive backwards end in file order all the same
    kept = {"index": torch.tensor([3, 1]), "labels": torch.tensor([30, 10])}
    more = {"index": torch.tensor([2, 0]), "labels": torch.tensor([20, 0])}
    merged = LitAdapted.predictions(SimpleNamespace(outputs={"test": [kept, more]}), "test")
    assert merged["labels"].tolist() == [0, 10, 20, 30]


def test_inputs_longer_than_the_model_has_positions_for_are_an_error():
    with pytest.raises(SettingError, match=r"task\.max_length=32: this model's limit is 16 tokens"):
        TextData(made_up_splits(), make_task(max_length=32), byte_tokenizer(), 16, settings(), 0)
