"""Every experiment preset: it composes, and each of its jobs starts as it would be run."""

import itertools
import json
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from heterolora.run import train
from tests.jobs import CONF, TINY, compose_job, prepare

pytestmark = pytest.mark.medium

FILES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def jobs(name):
    """The overrides of each job of an experiment's sweep, for its first seed."""
    params = dict(compose_job(f"experiment={name}").hydra.sweeper.params or {})
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    choices = []
    for sweep in parsed:
        values = list(sweep.sweep_string_iterator()) if sweep.is_discrete_sweep() else ["0.001"]
        choices.append(
            [f"{sweep.key_or_group}={value}" for value in (values[:1] if sweep.key_or_group == "seed" else values)]
        )
    return list(itertools.product(*choices))


SWEEPS = [
    name
    for name in FILES
    if compose_job(f"experiment={name}").hydra.mode is not None and not name.startswith(("tournament", "tune"))
]
CASES = [(name, job) for name in SWEEPS for job in jobs(name)]


def test_all_are_here():
    paper = {f"paper_{task}" for task in ("mrpc", "rte", "sst2", "boolq")}
    studies = {"proxies", "budgets", "search_spaces", "static_vs_dynamic"}
    assert paper | studies | {f"{name}_minilm" for name in paper | studies} | {"ladder"} == set(SWEEPS)
    assert {"tournament", "tournament_small", "tune"} | set(SWEEPS) == set(FILES)
    assert {word.partition("=")[2] for _, job in CASES for word in job if word.startswith("method=")} == set(METHODS)


@pytest.mark.parametrize(("name", "job"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_each_job_starts(tmp_path, name, job):
    """On a tiny model of the same architecture and shipped sentences; everything but training."""
    given = compose_job(f"experiment={name}", *job)
    tiny = {"facebook/opt-350m": "tiny_opt"}.get(given.model.path, "tiny_bert")
    (tmp_path / "job").mkdir()
    small = [word for word in TINY if not word.startswith(("model=", "trainer.max_epochs"))]
    task = [] if name in ("ladder",) else ["task=rotten_tomatoes"]
    share = ["budget.value=0.2"] if name.startswith("budgets") else []  # shares of a real backbone buy nothing here
    overrides = [f"experiment={name}", *job, *small, *task, *share, f"model={tiny}", "run=dry"]
    train(prepare(tmp_path / "job", *overrides))
    plan = json.loads((tmp_path / "job" / "plan.json").read_text())
    assert plan["steps"]


@pytest.mark.parametrize("name", [name for name in SWEEPS if name.startswith("paper")])
def test_the_papers_runs_are_its_own(name):
    """Rates, lengths, seeds and budgets of shared/docs/REFERENCE.md, section 2."""
    expected = {"mrpc": (2e-4, 20), "rte": (2e-4, 20), "sst2": (1e-4, 10), "boolq": (2e-4, 20)}
    task = name.split("_")[1]
    cfg = compose_job(f"experiment={name}", "method=combined_r8")
    assert cfg.hydra.sweeper.params.seed == "0,13,42"
    assert (cfg.optimizer.schedule, cfg.optimizer.weight_decay, cfg.optimizer.warmup) == ("constant", 0.01, 0)
    assert cfg.adapter.scale == {"lora": 16, "shortcut": 4}
    assert (cfg.budget.p, cfg.budget.rank, cfg.allocation.every) == (0.25, 8, 0.2)
    if not name.endswith("minilm"):
        assert (cfg.optimizer.lr, cfg.trainer.max_epochs) == expected[task]
        assert (cfg.data.batch_size, cfg.task.max_length) == (8, 512)
        assert Path(cfg.model.path).name == "opt-350m"


def test_rte_has_a_rate_of_its_own_for_lora_alone():
    assert compose_job("experiment=paper_rte", "method=lora_r6_rte").optimizer.lr == 4e-4
