"""Declared comparisons: refused where they would not be fair, and checked where they claim to be."""

import json
import logging

import lightning as L
import pandas as pd
import pytest

from heterolora.build import build
from heterolora.errors import SettingError
from heterolora.results import ROWS, RowFile
from heterolora.run import RunFailed, composer, train
from heterolora.tournament import Tournament, forecast, merged
from tests.jobs import CONF, TINY, prepare

EXPERIMENT = ("experiment=tournament_small", "trainer.accelerator=cpu")
DECLARED = {
    "name": "t",
    "methods": {"a": ["proxy=snip"], "b": ["proxy=fisher"]},
    "baseline": "a",
    "primary": "b",
    "control": None,
    "seeds": [0, 1],
    "rates": [1e-3],
    "tuning_seeds": [],
    "workers": 1,
    "tolerance": 0.01,
}


def declared(**changes) -> Tournament:
    return build({"_target_": "heterolora.tournament.Tournament", **DECLARED, **changes}, "tournament")


# -- declarations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "letters"),
        ({"name": ""}, "letters"),
        ({"methods": {"a": []}}, "at least two"),
        ({"methods": {"a": [], "b c": []}}, "letters"),
        ({"baseline": "c"}, r"possible: \['a', 'b'\]"),
        ({"primary": "c"}, "possible"),
        ({"primary": "a"}, "is the baseline"),
        ({"control": "c"}, "possible"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [0, 0]}, "each once"),
        ({"rates": []}, "at least one"),
        ({"rates": [1e-3, 2e-3]}, "tuning_seeds"),
        ({"rates": [1e-3, 2e-3], "tuning_seeds": [1, 2]}, "choose on others"),
        ({"tolerance": 0.02}, "tolerance=0.02: a share from 0 to 0.01"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"rates": [-1e-3]}, "above 0"),
        ({"rates": [float("nan")]}, "above 0"),
        ({"seeds": [-1]}, "whole numbers"),
    ],
)
def test_declarations_that_cannot_be_kept_are_refused(change, message):
    with pytest.raises(SettingError, match=message):
        declared(**change)


def test_later_overrides_replace_earlier_ones_of_their_name():
    assert merged(["a=1", "b=2", "+c=3"], ["b=4", "c=5", "d=6"]) == ["a=1", "b=4", "c=5", "d=6"]


# -- what can be refused before the first run --------------------------------------------------------------------------


def plan(methods, *overrides: str, **changes):
    tournament = declared(methods=methods, **{"baseline": "uniform", "primary": None, **changes})
    with composer() as compose:
        return forecast(tournament, compose, merged([*TINY, "budget=all_r2", "trainer.threads=1"], overrides))


UNIFORM = ["search_space=lora_all", "allocator=uniform"]


def test_what_is_held_is_known_beforehand_where_no_score_decides():
    assert plan({"uniform": UNIFORM, "snip": ["proxy=snip"]}) == {"uniform": 1664, "snip": None}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("method", "held"),
    [
        (["search_space=lora_qv", "allocator=uniform"], 1536),  # the largest equal rank leaves an eighth unspent
        ([*UNIFORM, "budget=all_r2", "budget.rank=3"], 2496),
        (["allocator=fixed", "allocator.ranks={0.q: 1}"], 64),
        # within 1 %, but more than the baseline's budget would allow it
        (["allocator=fixed", "allocator.ranks={0.q: 5, 0.up: 17}", "budget=params", "budget.value=1680"], 1680),
    ],
    ids=str,
)
def test_unequal_held_parameters_are_refused_before_anything_is_run(method, held):
    with pytest.raises(
        SettingError, match=rf"methods\.other=.*would hold {held} parameters, uniform 1664; 1648 to 1664"
    ):
        plan({"uniform": UNIFORM, "other": method})


@pytest.mark.medium
@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("trainer.max_epochs=7", "trainer.max_epochs: 2 and 7"),
        ("trainer.accumulate=2", "trainer.accumulate"),
        ("data.batch_size=4", "data.batch_size: 8 and 4"),
        ("task.max_length=32", "task.max_length"),
        ("adapter.scale=4.0", "adapter.scale: 2.0 and 4.0"),
        ("adapter.scaling=alpha_over_r", "adapter.scaling"),
        ("adapter.dropout=0.1", "adapter.dropout"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay"),
        ("optimizer.head_lr=0.5", "optimizer.head_lr"),
        ("model.dropout=0.3", "model.dropout"),
        ("model=tiny_opt", "model.model_type: bert and opt"),
        ("+callbacks.mine={_target_: heterolora.callbacks.progress.EpochLog}", "callbacks.mine"),
    ],
)
def test_methods_that_change_what_all_must_share_are_refused(method, key):
    with pytest.raises(SettingError, match=f"changes what all must share: {key}"):
        plan({"uniform": UNIFORM, "other": [*UNIFORM, method]})


def test_a_method_can_choose_neither_its_seed_nor_its_learning_rate():
    assert plan({"uniform": UNIFORM, "other": [*UNIFORM, "seed=9", "optimizer.lr=0.7"]}) == {
        "uniform": 1664,
        "other": 1664,
    }


def test_an_override_that_hydra_refuses_names_the_method():
    with pytest.raises(SettingError, match=r"tournament\.methods\.other=\['nonsense=1'\].*nonsense"):
        plan({"uniform": UNIFORM, "other": ["nonsense=1"]})


@pytest.mark.medium
def test_values_that_no_run_could_use_are_refused_before_anything_is_declared():
    with pytest.raises(SettingError, match=r"trainer\.test=False: a tournament reports on the test split"):
        plan({"uniform": UNIFORM, "other": UNIFORM}, "trainer.test=false")
    with pytest.raises(SettingError, match=r"tournament\.workers=99"):
        plan({"uniform": UNIFORM, "other": UNIFORM}, "trainer.threads=1", workers=99)
    with pytest.raises(SettingError, match=r"trainer\.threads"):
        plan({"uniform": UNIFORM, "other": UNIFORM}, "trainer.threads=null")
    with pytest.raises(SettingError, match=r"probe\.std=-1"):
        plan({"uniform": UNIFORM, "other": [*UNIFORM, "probe.std=-1"]})


@pytest.mark.medium
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("tournament*.yaml")))
def test_every_tournament_is_one_that_could_be_run(name):
    """On MiniLM, of which only the config is read."""
    with composer() as compose:
        config, _ = compose([f"experiment={name}"])
        tournament = build(config["tournament"], "tournament")
        held = forecast(tournament, compose, [f"experiment={name}"])
    assert {value for value in held.values() if value is not None} == {82_944}
    assert tournament.control is not None
    assert tournament.primary is not None


# -- a whole one -------------------------------------------------------------------------------------------------------

METHODS = (
    "~tournament.methods.random",
    "tournament.methods.spectral=['search_space=lora_all','proxy=spectral','allocator=greedy']",
)


def job(folder, *overrides: str):
    return prepare(folder, *EXPERIMENT, *METHODS, "tournament.seeds=[0,1]", *TINY, "trainer.max_epochs=1", *overrides)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Two methods, two seeds, two learning rates, and the repetition of the baseline."""
    outputs = tmp_path_factory.mktemp("outputs")
    (outputs / "log").mkdir()
    cfg = job(outputs / "log", "tournament.rates=[1e-3,0.5]", "tournament.tuning_seeds=[7]")
    train(cfg)
    return outputs / "tournaments" / "small_rotten_tomatoes"


@pytest.mark.medium
def test_the_duplicate_of_the_uniform_run_matches_it_bit_for_bit(held):
    rows = {row["key"]: row for row in RowFile(held / ROWS).rows()}
    rate = f"lr{chosen(rows)['uniform']!r}"
    for seed in (0, 1):
        first, second = (rows[f"{stage}-uniform-{rate}-s{seed}"] for stage in ("run", "control"))
        assert first["digest"] == second["digest"]
        assert first["metrics"] == second["metrics"]
        assert first["config_hash"] == second["config_hash"]
    assert rows[f"run-uniform-{rate}-s0"]["digest"] != rows[f"run-uniform-{rate}-s1"]["digest"]


def chosen(rows) -> dict[str, float]:
    """Method -> the rate with the best validation accuracy of its trials, the lowest of equals."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, row in rows.items():
        if row["stage"] == "tuning":
            rate = float(key.split("-lr")[1].removesuffix("-s7"))
            found.setdefault(row["group"], []).append((-row["metrics"]["validation"]["accuracy"], rate))
    return {method: min(trials)[1] for method, trials in found.items()}


@pytest.mark.medium
def test_rates_are_chosen_on_seeds_and_splits_that_are_not_reported(held):
    rows = {row["key"]: row for row in RowFile(held / ROWS).rows()}
    tuning = [row for row in rows.values() if row["stage"] == "tuning"]
    assert sorted((row["group"], row["seed"]) for row in tuning) == 2 * [("spectral", 7)] + 2 * [("uniform", 7)]
    assert all(row["metrics"].keys() == {"validation"} for row in tuning)
    reported = [row for row in rows.values() if row["stage"] != "tuning"]
    assert all(row["metrics"].keys() == {"validation", "test"} for row in reported)
    for row in reported:
        assert f"-lr{chosen(rows)[row['group']]!r}-" in row["key"]
        assert f"optimizer.lr={chosen(rows)[row['group']]!r}" in row["command"]


@pytest.mark.medium
def test_the_outcome_is_complete_equal_and_written_down(held):
    rows = RowFile(held / ROWS).rows()
    assert sorted(row["key"].split("-lr")[0] + row["key"][-3:] for row in rows if row["stage"] != "tuning") == [
        "control-uniform-s0",
        "control-uniform-s1",
        "run-spectral-s0",
        "run-spectral-s1",
        "run-uniform-s0",
        "run-uniform-s1",
    ]
    assert {row["parameters"]["held"] for row in rows} == {1664}
    table = pd.read_csv(held / "table.csv")
    assert list(table["group"]) == ["uniform", "spectral"]
    assert list(table["n"]) == [2, 2]
    assert table["pairs"][1] == 2
    assert "difference" in (held / "table.md").read_text()
    assert r"\toprule" in (held / "table.tex").read_text()
    assert json.loads((held / "declaration.json").read_text())["seeds"] == [0, 1]


@pytest.mark.medium
def test_the_same_command_goes_on_and_another_declaration_is_refused(held, tmp_path, caplog):
    outputs = f"outputs={held.parents[1]}"
    before = (held / ROWS).read_bytes()
    (tmp_path / "again").mkdir()
    with caplog.at_level(logging.INFO):
        train(job(tmp_path / "again", "tournament.rates=[1e-3,0.5]", "tournament.tuning_seeds=[7]", outputs))
    assert (held / ROWS).read_bytes() == before
    assert "all 6 runs are done" in caplog.text
    (tmp_path / "other").mkdir()
    with pytest.raises(RunFailed, match="declared before its first run"):
        train(job(tmp_path / "other", "tournament.rates=[1e-3]", outputs))
    (tmp_path / "steps").mkdir()
    tuned = ("tournament.rates=[1e-3,0.5]", "tournament.tuning_seeds=[7]")
    with pytest.raises(RunFailed, match=r"shared\.trainer\.max_steps: -1 and 2"):
        train(job(tmp_path / "steps", *tuned, "trainer.max_steps=2", outputs))


class Broken(L.Callback):
    """Fails at one learning rate as a full disk would, or diverges."""

    def __init__(self, error: str) -> None:
        self.error = error

    def on_train_start(self, trainer, pl_module):
        if pl_module.settings.lr == 1e-3:
            raise {"disk": OSError("no space"), "diverged": FloatingPointError("not finite")}[self.error]


@pytest.mark.slow
def test_a_rate_that_diverges_is_the_worst_and_a_trial_that_breaks_stops_the_choice(tmp_path):
    tuned = ("tournament.rates=[1e-3,2e-3]", "tournament.tuning_seeds=[7]", "tournament.control=null")
    for error in ("disk", "diverged"):
        (tmp_path / error / "log").mkdir(parents=True)
        callback = f"+callbacks.broken={{_target_: tests.test_tournament.Broken, error: {error}}}"
        cfg = job(tmp_path / error / "log", *tuned, callback)
        if error == "disk":
            with pytest.raises(RunFailed, match=r"2 of 4 trials failed.*no space.*tries them again"):
                train(cfg)
            continue
        train(cfg)
        folder = tmp_path / error / "tournaments" / "small_rotten_tomatoes"
        assert json.loads((folder / "rates.json").read_text())["rates"] == {"spectral": 0.002, "uniform": 0.002}
        assert {row["stage"] for row in RowFile(folder / ROWS).rows() if row["state"] != "finished"} == {"tuning"}


@pytest.mark.medium
def test_a_dry_run_says_what_would_be_held_and_runs_nothing(tmp_path, caplog):
    (tmp_path / "log").mkdir()
    with caplog.at_level(logging.INFO):
        train(job(tmp_path / "log", "run=dry"))
    assert "uniform: 1,664 parameters" in caplog.text
    assert not (tmp_path / "tournaments").exists()


@pytest.mark.medium
def test_resume_is_refused_for_a_tournament_goes_on_by_itself(tmp_path):
    (tmp_path / "log").mkdir()
    with pytest.raises(RunFailed, match="goes on by itself"):
        train(job(tmp_path / "log", "resume=true"))
