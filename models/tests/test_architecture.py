"""Imports go one way, from `research` down to `learn.data`, and never form a cycle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import MODELS

# Each layer may import only itself and the layers before it. A layer is a module, or a package with everything in it.
LAYERS = (
    "learn.allocator",
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
    "learn.features_arguments",
    "learn.run_arguments",
    "learn.study_arguments",
    "learn.cli",
    "learn.__main__",
    "research.provenance",
    "research.bootstrap",
    "research.record_files",
    "research.baselines",
    "research.retrieval",
    "research.ranking",
    "research.cvr",
    "research.report",
)
# `learn.cli` has commands that run research code, and imports that code only when such a command is called.
EXCEPTIONS = {"learn.cli": "research"}


def module_sources() -> dict[str, str]:
    """Maps the dotted name of every module of both packages to its source."""
    found = {}
    for path in sorted(path for package in ("learn", "research") for path in (MODELS / package).rglob("*.py")):
        parts = path.relative_to(MODELS).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(source: str, modules) -> set[str]:
    """Returns those of `modules` that the source imports, at the top of the file or within functions."""
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
    modules = module_sources()
    return {name: imports(source, modules) for name, source in modules.items()}


def layer(module: str) -> int | None:
    """Returns the index of the module's layer in `LAYERS`, or None if it has none."""
    for index, name in enumerate(LAYERS):
        if module == name or module.startswith(name + "."):
            return index
    return None


def test_every_module_belongs_to_a_layer(graph):
    assert {name for name in graph if layer(name) is None} == {"learn", "research"}


def test_no_module_imports_a_later_layer(graph):
    violations = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if layer(name) is not None
        and layer(other) > layer(name)
        and not (name in EXCEPTIONS and other.startswith(EXCEPTIONS[name]))
    ]
    assert not violations


def test_imports_form_no_cycle(graph):
    without_exceptions = {name: others if name not in EXCEPTIONS else set() for name, others in graph.items()}
    try:
        TopologicalSorter(without_exceptions).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_package_of_learn_is_installed_and_research_is_not():
    import tomllib

    installed = tomllib.loads((MODELS / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages_of_learn = {
        ".".join(path.parent.relative_to(MODELS).parts) for path in (MODELS / "learn").rglob("__init__.py")
    }
    assert set(installed) == packages_of_learn
