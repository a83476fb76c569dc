"""The public surface: the names of the root and of each room, listed here so that a change of them is a decision.

Laws: the lists are complete and every name resolves; public names have a docstring with an example that runs; recipes
and documents import from the root, and where it lacks a name from a room, never from a module inside one.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_unlearn
from helpers.paths import ROOT

SNAPSHOT = Path(__file__).with_name("public_names.json")
NAMES: dict[str, list[str]] = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
ROOMS = sorted(p.parent.name for p in (ROOT / "hf_unlearn").glob("*/__init__.pyi"))


def names_of(package: str) -> list[str]:
    return sorted(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", ["hf_unlearn", *(f"hf_unlearn.{room}" for room in ROOMS)])
def test_the_public_names_are_those_of_the_snapshot(package: str) -> None:
    assert names_of(package) == NAMES.get(package), "if this change is meant, run tests/repo/snapshot_names.py"


@pytest.mark.parametrize("package", ["hf_unlearn", *(f"hf_unlearn.{room}" for room in ROOMS)])
def test_every_public_name_resolves(package: str) -> None:
    module = importlib.import_module(package)
    for name in names_of(package):
        assert getattr(module, name) is not None, name


def documented() -> list[str]:
    """The names of the root that are functions or classes, but for errors."""
    values = {name: getattr(hf_unlearn, name) for name in hf_unlearn.__all__}
    return [n for n, v in values.items() if callable(v) and not (inspect.isclass(v) and issubclass(v, Exception))]


@pytest.mark.parametrize("name", documented())
def test_public_functions_and_classes_have_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(hf_unlearn, name)) or ""), f"{name} has no example"


MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in (ROOT / "hf_unlearn").rglob("*.py")
    if ">>> " in p.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0 and result.attempted > 0


# Recipes and documents


def imported_modules(source: str) -> Iterator[str]:
    """The modules of the package that a program imports from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_unlearn":
            yield node.module or ""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hf_unlearn")


def programs() -> dict[str, str]:
    """Recipes, and the Python blocks of documents, by where they are."""
    found = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in (ROOT / "recipes").rglob("*.py")}
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    for path in documents:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S), 1):
            found[f"{path.relative_to(ROOT)}, block {number}"] = block
    return found


def test_recipes_and_documents_import_from_the_root_or_a_room() -> None:
    inner = [
        f"{where}: {module}"
        for where, source in programs().items()
        for module in imported_modules(source)
        if module.count(".") > 1 or (module.count(".") == 1 and not where.startswith("recipes/experiments"))
    ]
    assert inner == [], "\n" + "\n".join(inner)
    # negative control: the search does see an inner module
    assert list(imported_modules("from hf_unlearn.trainer.config import x\nimport hf_unlearn")) == [
        "hf_unlearn.trainer.config",
        "hf_unlearn",
    ]
