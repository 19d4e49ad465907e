"""Imports run one way, from the packages of `research` down to `learn.data`, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import MODELS

# Each may import those before it. A name covers the module or package and all that is in it.
ORDER = (
    "learn.atomic_file",
    "learn.padding",
    "learn.progress",
    "learn.toml_config",
    "learn.data",
    "learn.content",
    "learn.models",
    "learn.evaluation",
    "learn.training",
    "learn.serving",
    "learn.run_settings",
    "learn.training_run",
    "learn.cli",
    "learn.__main__",
    "research.bootstrap",
    "research.record_files",
    "research.baselines",
    "research.retrieval",
    "research.ranking",
    "research.report",
)
# The command line has commands for research, and imports it only when one of them is called.
EXCEPTIONS = {"learn.cli": "research"}


def module_names() -> dict[str, str]:
    """Dotted name -> source of every module of both packages."""
    found = {}
    for path in sorted(path for package in ("learn", "research") for path in (MODELS / package).rglob("*.py")):
        parts = path.relative_to(MODELS).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(source: str, modules) -> set[str]:
    """The modules that a source imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in whole]
        else:
            continue
        found |= {name for name in names if name in modules}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = module_names()
    return {name: imports(source, modules) for name, source in modules.items()}


def place(module: str) -> int | None:
    """Where the module stands in `ORDER`."""
    for index, name in enumerate(ORDER):
        if module == name or module.startswith(name + "."):
            return index
    return None


def test_every_module_has_a_place(graph):
    assert {name for name in graph if place(name) is None} == {"learn", "research"}


def test_packages_import_only_those_before_them(graph):
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if place(name) is not None
        and place(other) > place(name)
        and not other.startswith(EXCEPTIONS.get(name, other + " is no exception"))
    ]
    assert not wrong


def test_no_two_modules_import_each_other(graph):
    cut = {name: others if name not in EXCEPTIONS else set() for name, others in graph.items()}
    try:
        TopologicalSorter(cut).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_the_product_is_installed_and_research_is_not():
    import tomllib

    installed = tomllib.loads((MODELS / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(MODELS).parts) for path in (MODELS / "learn").rglob("__init__.py")}
    assert set(installed) == there
