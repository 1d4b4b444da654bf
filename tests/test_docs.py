"""The tables of the documentation name everything that there is."""

import re
from pathlib import Path

import pytest

from heterolora.layouts import LAYOUTS
from tests.conftest import ROOT


def cells(document: str) -> set[str]:
    """Everything in backquotes in the first column of a document's tables."""
    rows = [line for line in (ROOT / "docs" / document).read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def options(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_every_architecture_and_its_tiny_twin_is_in_the_table():
    assert cells("architectures.md") >= LAYOUTS.keys()
    text = (ROOT / "docs" / "architectures.md").read_text()
    assert {name for name in options("model") if name.startswith("tiny_")} <= set(re.findall(r"`(tiny_\w+)`", text))


def test_every_proxy_is_in_the_table():
    assert cells("proxies.md") >= options("proxy")


def test_every_task_is_in_the_table():
    assert cells("tasks.md") >= options("task")


@pytest.mark.parametrize(
    "group",
    [
        "model",
        "task",
        "search_space",
        "adapter",
        "proxy",
        "allocator",
        "baseline",
        "budget",
        "logger",
        "experiment",
        "method",
        "hydra/launcher",
    ],
)
def test_the_readme_names_every_option(group):
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{group}` |"))
    named = set(re.findall(r"`(\w+)`", row))
    missing = {name for name in options(group) - named if not name.startswith("tiny_")}
    assert not missing


@pytest.mark.parametrize(
    "path", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda path: path.name
)
def test_links_and_named_tests_exist(path: Path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_[a-z0-9]+_\w+)`", text):
        assert f"def {name}(" in tests, name
