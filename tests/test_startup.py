"""What stands between a command and its first answer: what is imported, and how long that takes."""

import re
import subprocess
import sys
from resource import RUSAGE_CHILDREN, getrusage

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "lightning", "transformers", "datasets", "pandas", "numpy", "scipy", "matplotlib", "plotly", "peft"}
"""Takes a tenth of a second or more."""

LIGHT = {
    "the library": ["-c", "import heterolora"],
    "train": ["train.py", "--help"],
    "search": ["search.py", "--help"],
    "train, config": ["train.py", "--cfg", "job"],
    "commands": ["-m", "heterolora", "--help"],
    "a command": ["-m", "heterolora", "sites", "--help"],
}


def imported(arguments: list[str]) -> set[str]:
    """Top-level modules that a command imports, as the interpreter itself lists them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))


@pytest.mark.medium
@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT.keys())
def test_a_question_about_commands_and_settings_imports_nothing_heavy(arguments):
    found = imported(arguments)
    assert "heterolora" in found or "hydra" in found
    assert not found & HEAVY


@pytest.mark.medium
@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT.keys())
def test_a_question_about_commands_and_settings_is_answered_in_two_seconds(arguments):
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
    after = getrusage(RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 4  # 0.9 s at most on an idle machine; a busy one, whose clock is slower, is allowed more


@pytest.mark.slow
def test_a_run_imports_what_only_its_end_needs_at_its_end(tmp_path):
    """PEFT takes half a second, plotly and sklearn serve reports alone; a dry run ends before all of that."""
    arguments = ["train.py", "model=tiny_bert", "data.limit=40", "data.cache_dir=null", "run=dry"]
    found = imported([*arguments, "allocator=uniform", "logger=none", f"hydra.run.dir={tmp_path / 'run'}"])
    assert "torch" in found
    assert not found & {"peft", "plotly", "sklearn", "wandb", "tensorboard"}
