"""A finished run comes back as it was: logits, metrics, predictions; and is refused when it cannot."""

import csv
import io
import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import heterolora
from heterolora.cli import main
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from tests.jobs import run_job

pytestmark = pytest.mark.medium


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A run of task=files on a CSV made here, with text and labels under names of the user's own."""
    folder = tmp_path_factory.mktemp("mine")
    words = ["good", "bad", "fine", "awful", "nice", "poor"]
    rows = [[f"a {words[i % 6]} film, number {i}, really", "pos" if i % 2 == 0 else "neg"] for i in range(60)]
    path = write(folder / "reviews.csv", [["review", "mood"], *rows])
    run = folder / "run"
    run_job(run, "task=files", f"task.source.train={path}", "task.source.label=mood", "task.text=[review]",
            "search_space=full", "trainer.max_epochs=1", "optimizer.lr=1e-2")  # fmt: skip
    return run, path


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_t5", "tiny_albert", "tiny_deberta_v2", "tiny_neox"])
def test_the_loaded_model_gives_the_runs_own_predictions(tmp_path, model):
    summary = run_job(tmp_path / "a", f"model={model}", "trainer.max_steps=3", "optimizer.lr=3e-2")
    loaded = heterolora.load_run(tmp_path / "a")
    assert isinstance(heterolora.load(tmp_path / "a"), AdaptedModel)
    assert not loaded.model.training
    assert loaded.model.held_parameters == summary["parameters"]["held"] > 0
    kinds = {loaded.model.space[name].kind for name in loaded.model.held}
    assert "shortcut" in kinds
    recorded = pd.read_csv(tmp_path / "a" / "predictions_test.csv")
    now = loaded.predict(loaded.split("test"))
    logits = [column for column in recorded if column.startswith("logit_")]
    torch.testing.assert_close(
        torch.tensor(now[logits].to_numpy()).double(), torch.tensor(recorded[logits].to_numpy()), rtol=1e-5, atol=1e-6
    )
    assert list(now["prediction"]) == list(recorded["prediction"])
    metrics = loaded.evaluate(loaded.split("test"))
    assert metrics["accuracy"] == pytest.approx(summary["metrics"]["test"]["accuracy"])


def test_class_names_learnt_from_the_file_come_back_without_it(mine, tmp_path):
    run, path = mine
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    path.rename(path.with_suffix(".away"))
    try:
        loaded = heterolora.load_run(moved)
        assert list(loaded.task.labels) == ["neg", "pos"]
        assert set(loaded.predict(pd.DataFrame({"review": ["a good film", "a bad film"]}))["prediction"]) <= {
            "neg",
            "pos",
        }
    finally:
        path.with_suffix(".away").rename(path)


def test_predict_on_a_file_and_on_texts(mine, tmp_path, capsys):
    run, path = mine
    assert main(["predict", str(run), "--file", str(path), "--output", str(tmp_path / "out.csv")]) == 0
    out = pd.read_csv(tmp_path / "out.csv")
    assert list(out["review"]) == list(pd.read_csv(path)["review"])
    assert list(out.columns) == ["review", "mood", "prediction", "logit_neg", "logit_pos"]
    capsys.readouterr()
    texts = [out["review"][0], out["review"][1]]
    assert main(["predict", str(run), "--text", texts[0], "--text", texts[1]]) == 0
    printed = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(printed["prediction"]) == list(out["prediction"][:2])
    for column in ("logit_neg", "logit_pos"):  # padded to another length, the last digits may differ
        assert list(printed[column]) == pytest.approx(list(out[column][:2]), rel=1e-4, abs=1e-5)


def test_evaluate_on_a_split_and_on_a_file(mine, capsys):
    run, path = mine
    summary = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{summary['metrics']['test']['accuracy']:.4f}") == 2  # now, and in the run
    assert main(["evaluate", str(run), "--file", str(path), "--label", "mood"]) == 0
    table = pd.read_csv(path)
    predicted = heterolora.load_run(run).predict(table[["review"]])["prediction"]
    accuracy = (list(predicted) == table["mood"]).mean()
    assert f"{accuracy:.4f}" in capsys.readouterr().out


BAD = [
    (["predict", "RUN"], "--file and --text: give one of the two"),
    (["predict", "RUN", "--text", "a", "b"], r"this task reads 1 texts for each example: \['review'\]"),
    (["predict", "RUN", "--file", "nowhere.csv"], "--file=nowhere.csv: no such file"),
    (["predict", "NOWHERE", "--text", "a"], "run=NOWHERE: no finished run"),
    (["evaluate", "RUN", "--split", "training"], "split=training: possible: "),
    (["evaluate", "RUN", "--file", "CSV", "--label", "score"], r"columns \['score'\] are missing"),
    (["evaluate", "RUN", "--file", "OTHER", "--label", "mood"], "so-so"),
    (["sites", "model=nothing"], "overrides=model=nothing: .*model/nothing"),
    (["sites", "search_space.include=[x]"], "search_space.include=x: matches no site"),
    (["sites", "model=tiny_bert", "proxy=[a,b]"], "proxy="),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_gets_one_line_and_exit_code_1(mine, tmp_path, capsys, arguments, message):
    run, path = mine
    other = write(tmp_path / "other.csv", [["review", "mood"], ["a film", "so-so"]])
    places = {"RUN": str(run), "CSV": str(path), "OTHER": str(other)}
    assert main([places.get(word, word) for word in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert pd.Series([captured.err]).str.contains(message, regex=True)[0], captured.err
    assert not captured.out


def test_a_run_that_did_not_finish_or_was_tampered_with_is_refused(mine, tmp_path):
    run, _ = mine
    shutil.copytree(run, tmp_path / "a")
    state = load_file(tmp_path / "a" / "adapter.safetensors")
    save_file(state, tmp_path / "a" / "adapter.safetensors", {"backbone": "another"})
    with pytest.raises(SettingError, match="other backbone weights"):
        heterolora.load(tmp_path / "a")
    (tmp_path / "a" / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(SettingError, match=r"adapter\.safetensors cannot be read"):
        heterolora.load(tmp_path / "a")
    (tmp_path / "a" / "adapter.safetensors").unlink()
    with pytest.raises(
        SettingError, match=r"no finished run: \['adapter.safetensors'\] missing; its state is finished"
    ):
        heterolora.load(tmp_path / "a")


def test_sites_as_json_are_those_of_the_run(mine, capsys):
    run, _ = mine
    assert main(["sites", "model=tiny_bert", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    sites = json.loads((run / "sites.json").read_text())
    assert [{k: v for k, v in site.items() if k != "rank_1_costs"} for site in report["sites"]] == sites
    for site in report["sites"]:
        assert site["rank_1_costs"] == site["in_features"] + site["out_features"]
    assert report["budget"] == 2048
    assert [tap["tap"] for tap in report["taps"]] == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5", "tiny_gptj", "tiny_albert"])
def test_sites_are_printed(model, capsys):
    assert main(["sites", f"model={model}"]) == 0
    printed = capsys.readouterr().out
    assert "budget:" in printed
    assert "shortcut_attn" in printed
    assert ("residual_attn" in printed) == (model != "tiny_gptj")


def test_sites_of_an_unlisted_type_say_why_there_are_no_shortcuts(capsys):
    options = ["model=tiny_bert", "model.model_type=mpnet", "search_space=lora_all", "budget=params"]
    assert (
        main(["sites", *options, "model.config={hidden_size: 32, num_attention_heads: 4, num_hidden_layers: 2}"]) == 0
    )
    assert "no shortcuts: model type 'mpnet' has no layout entry" in capsys.readouterr().out


def test_a_run_is_used_where_its_data_are_not_and_evaluated_where_they_are_now(tmp_path, capsys):
    source = tmp_path / "data" / "glue" / "RTE"
    source.mkdir(parents=True)
    rows = [["index", "sentence1", "sentence2", "label"]]
    rows += [
        [str(i), f"a man walks {i}", f"somebody {i} moves", ("entailment", "not_entailment")[i % 2]] for i in range(60)
    ]
    for name in ("train.tsv", "dev.tsv"):
        source.joinpath(name).write_text("\n".join("\t".join(row) for row in rows) + "\n")
    run_job(tmp_path / "run", "task=rte", f"data.root={tmp_path}/data", "trainer.max_steps=2")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert main(["predict", str(tmp_path / "run"), "--text", "a man walks", "he moves"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert f"data.root={tmp_path}/data: no such folder" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--data-root", str(tmp_path / "elsewhere")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--data-root", "/nowhere"]) == 1
    assert "data_root=/nowhere: no such folder" in capsys.readouterr().err


def test_a_run_under_autocast_is_evaluated_under_autocast(tmp_path):
    run_job(tmp_path / "a", "trainer.precision=bf16-mixed", "trainer.max_steps=2")
    loaded = heterolora.load_run(tmp_path / "a")
    recorded = pd.read_csv(tmp_path / "a" / "predictions_test.csv")
    now = loaded.predict(loaded.split("test"))
    assert list(now["logit_positive"]) == pytest.approx(list(recorded["logit_positive"]), rel=1e-6, abs=1e-6)


def test_labels_of_a_table_may_be_names_and_must_be_there(mine):
    run, path = mine
    loaded, table = heterolora.load_run(run), pd.read_csv(path)
    named = loaded.evaluate(table.rename(columns={"mood": "label"}))
    coded = loaded.evaluate(table[["review"]].assign(label=(table["mood"] == "pos").astype(int)))
    assert named == coded
    with pytest.raises(SettingError, match=r"label=.*no column of this name"):
        loaded.evaluate(table)
    with pytest.raises(SettingError, match="device=nowhere"):
        heterolora.load(run, "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "allocation.json", "status.json"])
def test_a_damaged_file_of_a_run_is_named_in_one_line(mine, tmp_path, name):
    run, _ = mine
    shutil.copytree(run, tmp_path / "a")
    (tmp_path / "a" / name).write_text("{torn: [")
    if name == "status.json":
        (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(SettingError, match="damaged") as error:
        heterolora.load(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    for output in (tmp_path, tmp_path / "nowhere" / "x.csv"):
        assert main(["predict", "NO_RUN", "--text", "a", "--output", str(output)]) == 1
        assert f"--output={output}" in capsys.readouterr().err
