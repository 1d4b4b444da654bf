"""Tasks: losses, metrics, predictions, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from scipy import stats
from torch.nn import functional

from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.tasks.choice import Choice
from heterolora.tasks.classification import Classification
from heterolora.tasks.regression import Regression
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "conf" / "task").glob("*.yaml"))

PUBLISHED = {  # the metrics that GLUE and SuperGLUE report
    "boolq": ("accuracy",),
    "cb": ("accuracy", "f1_macro"),
    "cola": ("matthews",),
    "copa": ("accuracy",),
    "files": ("accuracy",),
    "files_regression": ("pearson", "spearman"),
    "imdb": ("accuracy",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rotten_tomatoes": ("accuracy",),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearman"),
    "wnli": ("accuracy",),
}


def make_task(**changes):
    values = {"name": "made_up", "source": None, "text": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"]}
    return Classification(**(values | {"mode": "max", "max_length": 64} | changes))


def make_regression(**changes):
    values = {"name": "made_up", "source": None, "text": ["text"], "metrics": ["pearson", "spearman", "mse"]}
    return Regression(**(values | {"mode": "max", "max_length": 64} | changes))


def make_choice(**changes):
    values = {"name": "made_up", "source": None, "text": ["ask"], "choices": ["one", "two"], "metrics": ["accuracy"]}
    return Choice(**(values | {"mode": "max", "max_length": 64} | changes))


def computed(task, predictions, labels, size=None):
    """The metrics as numbers, fed in batches of ``size``."""
    metrics = task.make_metrics()
    for part in zip(predictions.split(size or len(labels)), labels.split(size or len(labels)), strict=True):
        metrics.update(*part)
    return {name: value.item() for name, value in metrics.compute().items()}


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


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_matthews_and_macro_f1_are_those_of_scikit_learn(classes, seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = drawn(83, classes, seed)
    labels[::2] = predictions[::2]
    task = make_task(labels=[str(code) for code in range(classes)], metrics=["matthews", "f1_macro"])
    found = computed(task, predictions, labels, 10)
    assert found["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, predictions), abs=1e-6)
    assert found["f1_macro"] == pytest.approx(sklearn.f1_score(labels, predictions, average="macro"), abs=1e-6)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([0, 0, 0, 0, 0], [0, 1, 0, 1, 0]),  # torchmetrics: 0.18
        ([1, 1, 1, 1, 1], [0, 1, 0, 1, 0]),
        ([0, 1, 0, 1, 0], [1, 1, 1, 1, 1]),
        ([1, 1, 1], [1, 1, 1]),  # torchmetrics: 1
        ([0, 0, 0], [1, 1, 1]),
        ([0, 1, 0, 1], [1, 0, 1, 0]),
        ([0, 1, 0, 1], [0, 1, 0, 1]),
        ([0, 1, 1, 1], [0, 1, 0, 1]),
    ],
)
def test_matthews_at_its_edges_is_that_of_scikit_learn(predictions, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    found = computed(make_task(metrics=["matthews"]), torch.tensor(predictions), torch.tensor(labels))
    assert found["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, predictions), abs=1e-6)


def test_macro_f1_passes_over_a_class_that_is_nowhere():
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = [0, 1, 0, 0], [0, 1, 1, 0]
    task = make_task(labels=["a", "b", "c"], metrics=["f1_macro"])
    wanted = sklearn.f1_score(labels, predictions, average="macro")
    assert computed(task, torch.tensor(predictions), torch.tensor(labels))["f1_macro"] == pytest.approx(wanted)


# -- regression -------------------------------------------------------------------------------------------------------


def scores(count, seed=0):
    """Predictions, and labels with ties, as STS-B has them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 26, (count,), generator=generator) / 5
    return labels * 0.3 + torch.randn(count, generator=generator), labels


@pytest.mark.parametrize("size", [1, 7, 64, 501])
def test_correlations_are_those_of_scipy(size):
    predictions, labels = scores(501)
    found = computed(make_regression(), predictions, labels, size)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions, labels)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, labels)[0], abs=1e-5)
    assert found["mse"] == pytest.approx(((predictions - labels) ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([2.5] * 6, [0.0, 1, 2, 3, 4, 5]),
        ([0.0, 1, 2, 3, 4, 5], [1.0] * 6),
        ([0.1, 0.10000001, 0.1, 0.10000001, 0.1, 0.1], [0.0, 1, 2, 3, 4, 5]),  # equal but for rounding
        ([0.0] * 3, [1.0, 2.0, 3.0]),
        ([1.0], [2.0]),
    ],
)
def test_a_correlation_that_is_not_defined_is_nan_without_a_warning(predictions, labels):
    found = computed(make_regression(), torch.tensor(predictions), torch.tensor(labels), 4)
    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])
    assert math.isfinite(found["mse"])


@pytest.mark.parametrize(
    ("predictions", "labels", "collapsed"),
    [
        ([2.0, 2.0, 2.0], [0.0, 1.0, 5.0], True),
        ([2.0, 2.0001, 2.0], [0.0, 1.0, 5.0], True),
        ([2.0, 2.1, 2.0], [0.0, 1.0, 5.0], False),
        ([2.0, 2.0, 2.0], [3.0, 3.0, 3.0], False),  # there is only one
        ([2.0], [3.0], False),
    ],
)
def test_a_regression_collapses_to_one_value(predictions, labels, collapsed):
    assert make_regression().collapsed(torch.tensor(predictions), torch.tensor(labels)) is collapsed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_of_a_regression_is_the_mean_squared_error(dtype):
    logits, labels = torch.tensor([[1.0], [2.5], [-3.0]], dtype=dtype), torch.tensor([1.5, 2.5, -1.0])
    loss = make_regression().loss(logits, {"labels": labels})
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx((0.25 + 0 + 4) / 3)
    assert make_regression().predict(logits).tolist() == [1.0, 2.5, -3.0]


def test_numbers_are_written_as_they_are():
    found = {"index": torch.tensor([0, 1]), "prediction": torch.tensor([2.5, 1.25]), "logits": torch.zeros(2, 1)}
    assert make_regression().prediction_table(found).to_csv(index=False) == "index,prediction\n0,2.5\n1,1.25\n"
    table = make_regression().prediction_table(found | {"labels": torch.tensor([3.8, 5.0])})
    assert table.to_csv(index=False) == "index,label,prediction\n0,3.8,2.5\n1,5.0,1.25\n"


FAR = [(1e5, 10, 0, 0.01), (20230115, 9, 0, 0.01), (1.6e9, 1000, 0, 0.01), (2000, 1, 2000, 0.001)]


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("centre", "spread", "guess", "apart"), FAR)
def test_correlations_keep_the_digits_of_labels_far_from_zero(centre, spread, guess, apart, size):
    generator = torch.Generator().manual_seed(1)
    labels = centre + spread * (2 * torch.rand(64, generator=generator, dtype=torch.float64) - 1)
    noise = 2 * torch.rand(64, generator=generator, dtype=torch.float64) - 1
    predictions = (guess + apart * (0.6 * (labels - centre) / spread + 0.4 * noise)).float()
    found = computed(make_regression(), predictions, labels, size)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions.double(), labels)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, labels)[0], abs=1e-6)
    whole = computed(make_regression(), predictions, labels)
    assert all(found[name] == whole[name] for name in ("pearson", "spearman"))


# -- choice -----------------------------------------------------------------------------------------------------------


def test_the_inputs_of_an_example_compete():
    seen = torch.tensor([[0.5], [2.0], [3.0], [-1.0], [0.0], [0.25]])  # two inputs for each of three examples
    task, batch = make_choice(), {"input_ids": torch.zeros(6, 4), "labels": torch.tensor([1, 0, 0])}
    logits = task.logits(lambda input_ids: SimpleNamespace(logits=seen), batch)
    assert logits.tolist() == [[0.5, 2.0], [3.0, -1.0], [0.0, 0.25]]
    assert task.predict(logits).tolist() == [1, 0, 1]
    assert task.loss(logits, batch).item() == pytest.approx(closed_form(logits, batch["labels"]))


def test_a_choice_is_what_the_config_says():
    assert make_choice().inputs == (("ask", "one"), ("ask", "two"))
    assert make_choice(text=[], choices=["a", "b", "c"]).inputs == (("a",), ("b",), ("c",))
    assert (make_choice().outputs, make_choice().labels) == (1, ["one", "two"])
    assert (make_regression().outputs, make_regression().labels) == (1, None)
    assert make_task(labels=["a", "b", "c"]).outputs == 3


@pytest.mark.parametrize(("labels", "coded"), [([1, 0], True), (["two", "one"], True), (["two", "one"], False)])
def test_labels_of_a_choice_are_names_or_codes(labels, coded):
    assert make_choice().encode_labels(labels, coded, "here").tolist() == [1, 0]


@pytest.mark.parametrize("task", [make_task(labels=["one", "two"]), make_choice()])
def test_predictions_are_written_with_names(task):
    logits = torch.tensor([[0.5, 2.0], [3.0, -1.0]])
    found = {"index": torch.tensor([0, 1]), "prediction": torch.tensor([1, 0]), "logits": logits}
    wanted = {"index": [0, 1], "prediction": ["two", "one"], "logit_one": [0.5, 3.0], "logit_two": [2.0, -1.0]}
    assert task.prediction_table(found).to_dict("list") == wanted
    table = task.prediction_table(found | {"labels": torch.tensor([0, 0])})
    assert list(table) == ["index", "label", "prediction", "logit_one", "logit_two"]
    assert table["label"].tolist() == ["one", "one"]


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
        ({"labels": [1, "1.0"]}, "labels"),
        ({"labels": ["True", True]}, "labels"),
        ({"labels": [None, "a"]}, "labels"),
        ({"metrics": []}, "metrics"),
        ({"metrics": ["accuracy", "bleu"]}, "metrics"),
        ({"metrics": ["f1"], "labels": ["a", "b", "c"]}, "metrics"),
        ({"metrics": ["accuracy", "accuracy"]}, "metrics"),
        ({"mode": "min"}, "mode"),
        ({"text": ["label"]}, "text"),
        ({"max_length": 3}, "max_length"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, setting):
    with pytest.raises(SettingError) as caught:
        make_task(**changes)
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("make", "changes", "setting"),
    [
        (make_regression, {"metrics": ["accuracy"]}, "metrics"),
        (make_regression, {"metrics": ["mse", "pearson"]}, "mode"),
        (make_regression, {"mode": "min"}, "mode"),
        (make_regression, {"text": []}, "text"),
        (make_choice, {"text": ["a", "b"]}, "text"),
        (make_choice, {"text": ["one"]}, "text"),
        (make_choice, {"choices": ["one"]}, "choices"),
        (make_choice, {"choices": ["one", "one"]}, "choices"),
        (make_choice, {"metrics": ["f1"]}, "metrics"),
    ],
)
def test_settings_of_other_tasks_that_cannot_work_are_refused(make, changes, setting):
    with pytest.raises(SettingError) as caught:
        make(**changes)
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("given", "names"),
    [([0, 1], ("0", "1")), ([0.0, "1.0"], ("0", "1")), ([False, "TRUE"], ("false", "true")), (["No", "x y"],) * 2],
)
def test_names_in_the_config_are_read_as_labels_are(given, names):
    node = yaml.safe_load((ROOT / "conf" / "task" / "mrpc.yaml").read_text(encoding="utf-8"))
    task = build(node | {"labels": given}, "task")
    assert task.labels == tuple(names)
    assert task.encode_labels(given[::-1], False, "here").tolist() == [1, 0]


def test_the_smaller_error_is_the_better_one():
    assert make_regression(metrics=["mse"], mode="min").mode == "min"


def test_every_config_is_in_the_table():
    assert [path.stem for path in CONFIGS] == sorted(PUBLISHED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_task_of_the_config_can_be_made(path):
    task = build(yaml.safe_load(path.read_text(encoding="utf-8")), "task")
    assert task.name == path.stem
    assert (task.mode, tuple(task.metrics)) == ("max", PUBLISHED[path.stem])
    assert all(1 <= len(columns) <= 2 for columns in task.inputs)


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
    train = task.source.read(data_root, task.text).splits["train"]
    codes = task.encode_labels(train["label"], True, "the file")
    shares = {"mrpc": 2474 / 3668, "rte": 1241 / 2490}  # equivalent; not_entailment, as published
    assert codes.mean() == pytest.approx(shares[name])
