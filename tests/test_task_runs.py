"""Whole jobs on tiny models for every kind of task: what they write, and that it agrees."""

import json

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from scipy import stats

from heterolora.build import build
from heterolora.run import RunFailed
from tests.jobs import CONF, compose_job, run_job, write_copa

pytestmark = pytest.mark.medium

SPLITS = ("validation", "test")


@pytest.mark.parametrize("path", sorted((CONF / "task").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_task_can_be_chosen(path):
    config = OmegaConf.to_container(compose_job(f"task={path.stem}").task, resolve=True)
    assert build(config, "task").name == path.stem


def write_csv(path, labels, texts=None):
    texts = texts or [f"text {'x' * (row % 11)} {row}" for row in range(len(labels))]
    pd.DataFrame({"title": texts, "stars": labels}).to_csv(path, index=False)
    return path


def files_job(folder, train, *overrides, task="files"):
    source = [f"task.source.train={train}", "task.source.label=stars", "task.text=[title]"]
    return run_job(folder, f"task={task}", *source, *overrides)


def test_a_regression(tmp_path, capsys):
    train = write_csv(tmp_path / "a.csv", [row % 9 / 2 for row in range(100)])
    summary = files_job(tmp_path / "a", train, "task.metrics=[spearman,pearson,mse]", task="files_regression")
    assert "validation spearman" in capsys.readouterr().out
    assert summary["data"]["labels"] is None
    assert "a random 10% of the training set" in summary["data"]["note"]
    assert summary["parameters"]["head"] == 33  # one output: 32 weights and a bias
    for split in SPLITS:
        table = pd.read_csv(tmp_path / "a" / f"predictions_{split}.csv")
        assert list(table) == ["index", "label", "prediction"]
        assert list(table["index"]) == list(range(10))
        found = summary["metrics"][split]
        assert list(found) == ["spearman", "pearson", "mse", "loss"]
        assert found["pearson"] == pytest.approx(stats.pearsonr(table["prediction"], table["label"])[0], abs=1e-3)
        assert found["spearman"] == pytest.approx(stats.spearmanr(table["prediction"], table["label"])[0], abs=1e-3)
        assert found["mse"] == pytest.approx(((table["prediction"] - table["label"]) ** 2).mean(), rel=1e-5)
        assert found["loss"] == pytest.approx(found["mse"], rel=1e-5)
    node = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["task"]
    assert "labels" not in node


def test_labels_are_written_as_they_stand_in_the_file(tmp_path):
    days = [20230115 + row % 19 - 9 for row in range(100)]
    summary = files_job(tmp_path / "a", write_csv(tmp_path / "a.csv", days), task="files_regression")
    for split in SPLITS:
        table = pd.read_csv(tmp_path / "a" / f"predictions_{split}.csv")
        assert set(table["label"]) <= set(days)
        wanted = stats.pearsonr(table["prediction"].astype("float32"), table["label"])[0]
        assert summary["metrics"][split]["pearson"] == pytest.approx(wanted, abs=1e-3)


def test_a_correlation_that_is_not_defined_is_null_and_the_run_goes_on(tmp_path, capsys):
    train = write_csv(tmp_path / "a.csv", [row % 9 / 2 for row in range(100)], ["always the same"] * 100)
    summary = files_job(tmp_path / "a", train, task="files_regression")
    assert summary["collapsed"] == dict.fromkeys(SPLITS, True)
    for split in SPLITS:
        assert (summary["metrics"][split]["pearson"], summary["metrics"][split]["spearman"]) == (None, None)
        assert summary["metrics"][split]["loss"] > 0
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "finished"
    printed = capsys.readouterr().out
    assert "test pearson" in printed
    assert "not defined" in printed
    assert "every example gets (nearly) the same prediction" in printed


def test_a_regression_that_diverges_is_no_result(tmp_path):
    train = write_csv(tmp_path / "a.csv", [row % 9 / 2 for row in range(100)])
    huge = ["optimizer.lr=1e20", "optimizer.head_lr=1e-3", "optimizer.warmup=0", "optimizer.clip=null"]
    with pytest.raises(RunFailed, match=r"is not finite after training; lower optimizer\.lr"):
        files_job(tmp_path / "a", train, *huge, "trainer.max_steps=1", task="files_regression")
    assert not (tmp_path / "a" / "summary.json").exists()


def test_a_choice(tmp_path):
    write_copa(tmp_path / "sets")
    summary = run_job(tmp_path / "a", "task=copa", f"data.root={tmp_path}/sets", "task.max_length=64")
    assert summary["data"]["sizes"] == {"train": 48, "validation": 8, "test": 20}
    assert summary["data"]["labels"] == ["choice1", "choice2"]
    assert summary["parameters"]["head"] == 33
    for split in SPLITS:
        table = pd.read_csv(tmp_path / "a" / f"predictions_{split}.csv")
        assert list(table) == ["index", "label", "prediction", "logit_choice1", "logit_choice2"]
        logits = torch.tensor(table[["logit_choice1", "logit_choice2"]].to_numpy())
        chosen = [f"choice{code + 1}" for code in logits.argmax(1).tolist()]
        assert chosen == list(table["prediction"])
        codes = torch.tensor([int(name[-1]) - 1 for name in table["label"]])
        loss = torch.nn.functional.cross_entropy(logits, codes).item()
        assert summary["metrics"][split]["loss"] == pytest.approx(loss, rel=1e-4)
        accuracy = (table["label"] == table["prediction"]).mean()
        assert summary["metrics"][split]["accuracy"] == pytest.approx(accuracy)


def test_files_whose_classes_are_found_can_be_reloaded_without_them(tmp_path):
    train = write_csv(tmp_path / "a.csv", [row % 3 + 1 for row in range(90)])
    test = write_csv(tmp_path / "b.csv", ["3.0", "1.0", "2.0", "1.0"])
    summary = files_job(tmp_path / "a", train, f"task.source.test={test}", "task.metrics=[f1_macro,accuracy,matthews]")
    assert summary["data"]["labels"] == ["1", "2", "3"]
    assert summary["data"]["origin"] == f"train {train}, test {test}"
    assert summary["data"]["note"].startswith("given test set; validation = ")
    table = pd.read_csv(tmp_path / "a" / "predictions_test.csv")
    assert list(table["label"]) == [3, 1, 2, 1]
    assert list(table)[3:] == ["logit_1", "logit_2", "logit_3"]
    train.unlink()
    test.unlink()
    task = build(yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["task"], "task")
    assert (list(task.labels), task.outputs) == (["1", "2", "3"], 3)
    assert set(summary["metrics"]["test"]) == {"f1_macro", "accuracy", "matthews", "loss"}


def test_every_test_split_is_reported(tmp_path, capsys):
    folder = tmp_path / "sets" / "glue" / "MNLI"
    folder.mkdir(parents=True)
    names = ("entailment", "neutral", "contradiction")
    for file, count in (("train", 90), ("dev_matched", 12), ("dev_mismatched", 15)):
        rows = [f"{row}\tpremise {row}\t{'x' * (row % 7)} {row}\t{names[row % 3]}" for row in range(count)]
        (folder / f"{file}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tgold_label", *rows]) + "\n")
    summary = run_job(tmp_path / "a", "task=mnli", f"data.root={tmp_path}/sets")
    assert list(summary["metrics"]) == list(summary["collapsed"]) == ["validation", "test", "test_mismatched"]
    assert summary["data"]["sizes"] == {"train": 48, "validation": 9, "test": 12, "test_mismatched": 15}
    steps = pd.read_csv(tmp_path / "a" / "metrics.csv")
    for split, count in (("test", 12), ("test_mismatched", 15)):
        table = pd.read_csv(tmp_path / "a" / f"predictions_{split}.csv")
        assert list(table["label"]) == [names[row % 3] for row in range(count)]
        accuracy = (table["label"] == table["prediction"]).mean()
        assert summary["metrics"][split]["accuracy"] == pytest.approx(accuracy)
        assert steps[f"{split}/accuracy"].dropna().tolist() == [pytest.approx(accuracy)]
        assert f"{split}/loss" in steps
    assert "test_mismatched accuracy" in capsys.readouterr().out


BAD = [
    (["task=files"], r"task\.source\.train=None: give a file"),
    (["task=files", "task.source.train=nowhere.csv"], r"task\.source\.train=nowhere\.csv: no such file"),
    (["task=files", "task.text=[text,text]"], r"task\.text=\['text', 'text'\]: one text column, or two different"),
    (["task=stsb", "task.mode=min"], r"task\.mode=min: max, for that is the better pearson"),
    (["task=boolq", "data.root=null"], r"data\.root=None: task boolq is not local .* superglue/"),
    (["task=cola", "task.metrics=[pearson]"], r"task\.metrics=\['pearson'\]: possible: \['accuracy'"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda value: str(value))
def test_bad_input_gets_one_line_and_leaves_only_the_status(tmp_path, overrides, message):
    with pytest.raises(RunFailed, match=message) as error:
        run_job(tmp_path / "a", *overrides)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["status.json"]
