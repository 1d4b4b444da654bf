"""Who may import what (DESIGN.md section 8), read from the source, so that new files are covered too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "heterolora"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Modules that a file imports; names under ``if TYPE_CHECKING`` do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    nodes = ast.walk(tree) if inside_functions else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def closure(start: Path) -> set[str]:
    """Everything that importing a file brings in, by files of ours."""
    known = {module_name(path): path for path in FILES}
    seen, todo, found = set(), [start], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path, inside_functions=False):
            found.add(name)
            if name in known:
                todo.append(known[name])
    return found


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_files_were_found():
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_run_and_its_callback_import_hydra(path):
    if module_name(path) not in ("heterolora.run", "heterolora.multirun"):
        configs = {"omegaconf"} if module_name(path) == "heterolora.names" else set()  # what a config may say
        assert not top(imports(path)) & {"hydra", "omegaconf"} - configs


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_backbone_and_data_import_transformers_and_datasets(path):
    name = module_name(path)
    if not name.startswith(("heterolora.backbone", "heterolora.data.")):
        assert not top(imports(path, inside_functions=False)) & {"transformers", "datasets", "tokenizers"}


@pytest.mark.parametrize("name", ["sites", "allocation", "errors", "seeds", "cost"])
def test_values_import_nothing_of_ours(name):
    assert "heterolora" not in top(imports(PACKAGE / f"{name}.py"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "allocators").glob("*.py")), ids=module_name)
def test_allocators_import_no_torch_not_even_through_others(path):
    heavy = {"torch", "lightning", "transformers"}
    if path.stem != "knapsack":  # its tables are arrays
        heavy |= {"numpy"}
    assert not top(closure(path)) & heavy


@pytest.mark.parametrize("path", sorted((PACKAGE / "proxies").glob("*.py")), ids=module_name)
def test_proxies_know_no_lightning_no_hydra_and_no_allocator(path):
    found = closure(path)
    assert not top(found) & {"lightning", "hydra", "omegaconf", "transformers"}
    assert not {name for name in found if name.startswith("heterolora.allocators")}


@pytest.mark.parametrize(
    "path", [p for f in ("proxies", "allocators") for p in sorted((PACKAGE / f).glob("*.py"))], ids=module_name
)
def test_proxies_and_allocators_never_ask_which_kind_a_site_is(path):
    """One idea carries the architecture: a LoRA is a shortcut whose source and sink are the same layer."""
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not attributes & {"kind", "role", "span"}


def test_no_cycles():
    known = {module_name(path): path for path in FILES}
    graph = {name: imports(path, inside_functions=False) & known.keys() - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, " -> ".join((*chain[chain.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*chain, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("entry", ["train", "search"])
def test_the_entry_point_imports_nothing_heavy_before_the_config_is_read(entry):
    code = f"import sys, {entry}; print(sorted({{'torch', 'lightning', 'transformers', 'pandas'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
