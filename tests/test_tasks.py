"""Classification: loss, metrics, predictions, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.nn import functional

from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.tasks.classification import Classification
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "conf" / "task").glob("*.yaml"))


def make_task(**changes):
    values = {"name": "made_up", "source": None, "text": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"]}
    return Classification(**(values | {"mode": "max", "max_length": 64} | changes))


def drawn(count, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(classes, (count,), generator=generator) for _ in range(2))


def counts(predictions, labels):
    """True positives, false positives and false negatives of class 1, by plain counting."""
    pairs = list(zip(predictions.tolist(), labels.tolist(), strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1))


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_accuracy_is_the_share_of_right_predictions(classes):
    predictions, labels = drawn(97, classes)
    metrics = make_task(labels=[str(code) for code in range(classes)]).make_metrics()
    metrics.update(predictions, labels)
    right = sum(p == y for p, y in zip(predictions.tolist(), labels.tolist(), strict=True))
    assert metrics.compute()["accuracy"].item() == pytest.approx(right / 97)


@pytest.mark.parametrize("seed", range(4))
def test_f1_is_that_of_class_1(seed):
    predictions, labels = drawn(61, 2, seed)
    labels[::3] = 1  # unbalanced: F1 of class 0 and macro F1 are other numbers
    metrics = make_task(metrics=["f1"]).make_metrics()
    metrics.update(predictions, labels)
    hit, wrong, missed = counts(predictions, labels)
    assert metrics.compute()["f1"].item() == pytest.approx(2 * hit / (2 * hit + wrong + missed))


def test_f1_without_a_positive_prediction_is_zero():
    metrics = make_task(metrics=["f1"]).make_metrics()
    metrics.update(torch.tensor([0, 0, 0]), torch.tensor([1, 0, 1]))
    assert metrics.compute()["f1"].item() == 0.0


def test_batches_of_other_sizes_give_the_metric_of_the_whole():
    # the mean of two batches' F1 would be (1 + 0) / 2
    metrics = make_task(metrics=["accuracy", "f1"]).make_metrics()
    metrics.update(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1]))
    metrics.update(torch.tensor([0]), torch.tensor([1]))
    found = metrics.compute()
    assert found["accuracy"].item() == pytest.approx(3 / 4)
    assert found["f1"].item() == pytest.approx(6 / 7)


def test_metrics_are_fresh_and_in_the_given_order():
    task = make_task(metrics=["f1", "accuracy"])
    used = task.make_metrics()
    used.update(torch.tensor([0]), torch.tensor([1]))
    fresh = task.make_metrics()
    fresh.update(torch.tensor([1]), torch.tensor([1]))
    assert {name: value.item() for name, value in fresh.compute().items()} == {"f1": 1.0, "accuracy": 1.0}
    assert set(fresh.keys()) == set(task.metrics)
    assert task.metrics[0] == "f1"


# -- loss and predictions ---------------------------------------------------------------------------------------------


def closed_form(logits, labels):
    """Mean cross-entropy with Python's own arithmetic."""
    rows = zip(logits.double().tolist(), labels.tolist(), strict=True)
    return sum(math.log(sum(math.exp(value) for value in row)) - row[label] for row, label in rows) / len(labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_taken_in_float32(dtype):
    logits, labels = (torch.randn(13, 3) * 3).to(dtype), torch.randint(3, (13,))
    loss = make_task(labels=["a", "b", "c"]).loss(logits, {"labels": labels})
    assert loss.dtype == torch.float32
    assert torch.equal(loss, functional.cross_entropy(logits.float(), labels))
    assert loss.item() == pytest.approx(closed_form(logits, labels), rel=1e-5)


def test_a_loss_in_half_precision_would_be_another_number():
    logits, labels = (torch.randn(13, 3) * 3).bfloat16(), torch.randint(3, (13,))
    loss = make_task(labels=["a", "b", "c"]).loss(logits, {"labels": labels})
    assert loss.item() != functional.cross_entropy(logits, labels).item()


def test_double_precision_is_kept():
    logits, labels = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    loss = make_task().loss(logits, {"labels": labels})
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(closed_form(logits, labels), rel=1e-14)


def test_the_gradient_reaches_logits_of_half_precision():
    logits, labels = torch.randn(4, 2).bfloat16().requires_grad_(), torch.tensor([0, 1, 1, 0])
    make_task().loss(logits, {"labels": labels}).backward()
    wanted = (logits.detach().float().softmax(1) - functional.one_hot(labels, 2)) / 4
    torch.testing.assert_close(logits.grad, wanted.bfloat16())


def test_the_model_sees_neither_labels_nor_rows():
    seen = {}

    def model(**inputs):
        seen.update(inputs)
        return SimpleNamespace(logits=torch.ones(1, 2))

    batch = {name: torch.zeros(1, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels", "index")}
    assert torch.equal(make_task().logits(model, batch), torch.ones(1, 2))
    assert set(seen) == {"input_ids", "attention_mask"}


def test_the_prediction_is_the_code_of_the_largest_logit():
    logits = torch.tensor([[0.1, 0.2, -5.0], [3.0, -1.0, 2.0], [-3.0, -2.0, -1.0]])
    assert make_task(labels=["a", "b", "c"]).predict(logits).tolist() == [1, 0, 2]


# -- collapse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "labels", "collapsed"),
    [
        ([1, 1, 1, 1], [0, 1, 1, 0], True),
        ([0, 0, 0, 0], [0, 1, 1, 0], True),
        ([2, 2, 2], [0, 1, 1], True),
        ([1, 1, 1, 0], [0, 1, 1, 0], False),
        ([1, 0, 1, 0], [0, 1, 0, 1], False),  # all wrong, but it does look at the examples
        ([1, 1, 1], [1, 1, 1], False),  # there is only one class
        ([1], [1], False),
    ],
)
def test_collapse_is_one_class_for_everything(predictions, labels, collapsed):
    assert make_task().collapsed(torch.tensor(predictions), torch.tensor(labels)) is collapsed


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"text": []}, "text"),
        ({"text": ["a", "b", "c"]}, "text"),
        ({"text": ["a", "a"]}, "text"),
        ({"labels": []}, "labels"),
        ({"labels": ["only"]}, "labels"),
        ({"labels": ["twice", "twice"]}, "labels"),
        ({"metrics": []}, "metrics"),
        ({"metrics": ["accuracy", "bleu"]}, "metrics"),
        ({"metrics": ["f1"], "labels": ["a", "b", "c"]}, "metrics"),
        ({"max_length": 3}, "max_length"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, setting):
    with pytest.raises(SettingError) as caught:
        make_task(**changes)
    assert caught.value.setting == setting


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_task_of_the_config_can_be_made(path):
    task = build(yaml.safe_load(path.read_text(encoding="utf-8")), "task")
    assert task.name == path.stem
    assert (task.mode, task.metrics[0]) == ("max", "accuracy")


@pytest.mark.parametrize(
    ("key", "value"), [("mode", "best"), ("max_length", 2), ("metrics", ["bleu"]), ("source", "mrpc"), ("labels", 2)]
)
def test_a_bad_value_in_the_config_is_named_in_full(key, value):
    node = yaml.safe_load((ROOT / "conf" / "task" / "mrpc.yaml").read_text(encoding="utf-8"))
    with pytest.raises(SettingError) as caught:
        build(node | {key: value}, "task")
    assert caught.value.setting == f"task.{key}"


@pytest.mark.parametrize("name", ["mrpc", "rte"])
def test_the_labels_of_the_config_are_those_of_the_files(name, data_root):
    task = build(yaml.safe_load((ROOT / "conf" / "task" / f"{name}.yaml").read_text(encoding="utf-8")), "task")
    train = task.source.read(data_root, task.text, task.labels).splits["train"]
    shares = {"mrpc": 2474 / 3668, "rte": 1241 / 2490}  # equivalent; not_entailment, as published
    assert train["label"].mean() == pytest.approx(shares[name])
