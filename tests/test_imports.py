"""The direction of imports: a module imports only from its own level or from one to its left.

Laws: every import inside the package, within functions too, points left or stays on its level; there is no cycle
among the modules; transformers is imported at module level only from `config` rightwards; `import hf_unlearn` alone
loads neither torch nor transformers; every library that is imported is declared in pyproject.toml. Imports under
`if TYPE_CHECKING:` do not count, nor do those of the package's own `__init__.py`, which only hands out names lazily.
Each law has a negative control on made-up sources.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "hf_unlearn"
ROOT = Path(__file__).resolve().parents[1]

# Left to right. A name is a module or a sub-package of hf_unlearn.
LEVELS = (
    (
        "errors",
        "sketch",
        "linalg",
        "files",
        "presets",
        "sharding",
        "placements",
        "storage",
        "adapters",
        "fingerprint",
        "predictions",
        "report",
        "losses",
        "metrics",
    ),
    (
        "layers",
        "statistics",
        "formats",
        "alternatives",
        "data",
        "original_outputs",
        "selection",
        "hub",
        "plots",
        "card",
        "publish",
    ),
    ("collector", "convergence", "collect", "constraints"),
    ("parts", "optimizer", "relearning", "band", "coverage", "ledger", "sequence"),
    (
        "config",
        "callbacks",
        "checkpoints",
        "describe",
        "trainer",
        "trainer_hub",
        "trainer_inputs",
        "trainer_resume",
        "finetune",
    ),
    ("measures",),
    ("judge",),
    ("attacks", "evaluation"),
    ("requests",),
    ("arguments", "loading", "continuation", "runs", "tracing", "estimate"),
    ("harness",),
    ("benchmarks", "demo"),
    ("launch",),
    ("cli", "__main__"),
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}
# The leftmost level has an order of its own: all that these may import from the package.
ALLOWED = {
    "errors": frozenset[str](),
    "sketch": frozenset({"errors"}),
    "linalg": frozenset({"errors", "sharding", "sketch"}),
    "files": frozenset({"errors"}),
    "presets": frozenset({"errors"}),
    "sharding": frozenset({"errors"}),
    "placements": frozenset({"errors", "sharding"}),
    "storage": frozenset({"errors", "sharding"}),
    "adapters": frozenset({"errors"}),
    "fingerprint": frozenset({"errors", "adapters", "sharding"}),
    "losses": frozenset({"errors", "linalg", "predictions", "fingerprint"}),
    "metrics": frozenset({"errors", "linalg", "predictions", "sharding"}),
}


class Import(NamedTuple):
    """One imported dotted name, the line it stands on, and whether it runs when the module is imported."""

    name: str
    line: int
    at_module_level: bool


def imports_in(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import in `source`, absolute; `from a import b` counts as `a.b`. TYPE_CHECKING blocks are left out."""
    parents = module.split(".") if is_package else module.split(".")[:-1]

    def names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        start = parents[: len(parents) - node.level + 1] if node.level else []
        base = [*start, *(node.module.split(".") if node.module else [])]
        yield from (".".join([*base, alias.name]) for alias in node.names)

    def walk(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (Import(name, node.lineno, at_module_level) for name in names(node))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            children: Iterator[ast.AST] = iter(node.orelse)
        else:
            children = ast.iter_child_nodes(node)
        inside = at_module_level and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            yield from walk(child, inside)

    return list(walk(ast.parse(source), True))


def unit_of(name: str) -> str | None:
    """`hf_unlearn.losses.npo` -> `losses`; None for what is outside the package."""
    parts = name.split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == PACKAGE else None


def is_dunder(unit: str) -> bool:
    return unit.startswith("__") and unit.endswith("__")


def units_imported(source: str, module: str, is_package: bool = False) -> dict[str, int]:
    """Modules and sub-packages of hf_unlearn that `source` imports, other than its own, each with a line."""
    found = {unit_of(entry.name): entry.line for entry in imports_in(source, module, is_package)}
    own = unit_of(module)
    return {unit: line for unit, line in found.items() if unit is not None and unit != own and not is_dunder(unit)}


def problems_in(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in `source` goes against the order, one line of text each; empty if nothing does."""
    unit = unit_of(module)
    if unit not in LEVEL_OF:
        return [f"{module}: {unit!r} is not in LEVELS of tests/test_imports.py; add it on the level it belongs to"]
    problems = []
    for other, line in units_imported(source, module, is_package).items():
        where = f"{module}, line {line}"
        if other not in LEVEL_OF:
            problems.append(
                f"{where}: imports {other or PACKAGE!r}, which is no module in LEVELS of tests/test_imports.py; "
                f"import a name from the module that defines it, or add a new module on the level it belongs to"
            )
        elif LEVEL_OF[other] > LEVEL_OF[unit]:
            problems.append(f"{where}: {unit} (level {LEVEL_OF[unit]}) imports {other} (level {LEVEL_OF[other]})")
        elif other not in ALLOWED.get(unit, LEVEL_OF):
            allowed = ", ".join(sorted(ALLOWED[unit])) or "nothing of the package"
            problems.append(f"{where}: {unit} imports {other}; it may import {allowed}")
    if LEVEL_OF[unit] < LEVEL_OF["config"]:
        problems += [
            f"{module}, line {entry.line}: imports transformers at module level; only config and right of it may"
            for entry in imports_in(source, module, is_package)
            if entry.at_module_level and entry.name.split(".")[0] == "transformers"
        ]
    return problems


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The names along one cycle of `graph` (importer -> imported), or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def canonical(requirement: str) -> str:
    """`Types_X>=1; marker` -> `types-x`."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def undeclared(names: set[str], requirements: list[str]) -> set[str]:
    """Top-level names that are of neither the standard library nor a distribution in `requirements`."""
    declared = {canonical(requirement) for requirement in requirements}
    homes = packages_distributions()
    outside = {name for name in names if name not in sys.stdlib_module_names and name != PACKAGE}
    return {name for name in outside if declared.isdisjoint(map(canonical, homes.get(name, [name])))}


def package_sources() -> dict[str, tuple[str, bool]]:
    """Dotted name -> (source, is a package's __init__) for all of hf_unlearn but its own `__init__.py`."""
    sources = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if name != PACKAGE:
            sources[name] = (path.read_text(encoding="utf-8"), is_package)
    return sources


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The package itself


def test_imports_point_left() -> None:
    sources = package_sources()
    assert sources, f"no module found under {PACKAGE}"
    problems = [
        line for name, (source, is_package) in sources.items() for line in problems_in(source, name, is_package)
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for name, (source, is_package) in package_sources().items():
        graph.setdefault(unit_of(name) or "", set()).update(units_imported(source, name, is_package))
    cycle = cycle_in(graph)
    assert not cycle, "import cycle: " + " <- ".join(cycle)


def test_imported_libraries_are_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for key in extras if key != "dev" for line in extras[key])]
    names = {
        entry.name.split(".")[0]
        for name, (source, is_package) in package_sources().items()
        for entry in imports_in(source, name, is_package)
    }
    missing = undeclared(names, requirements)
    assert not missing, f"imported, but not among the dependencies in pyproject.toml: {sorted(missing)}"


def test_checker_finds_an_undeclared_library() -> None:
    names = {"ast", PACKAGE, "yaml", "sklearn", "deepspeed", "no_such_library"}
    assert undeclared(names, ["PyYAML>=6", "scikit_learn", "deepspeed>=0.16; sys_platform == 'linux'"]) == {
        "no_such_library"
    }
    assert undeclared({"yaml", "sklearn"}, ["scikit-learn>=1.3"]) == {"yaml"}


def loaded_by(statement: str, candidates: tuple[str, ...]) -> list[str]:
    return run_python(f"import sys; {statement}; print(*[n for n in {candidates!r} if n in sys.modules])").split()


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "matplotlib", "sklearn")
    assert loaded_by(f"import {PACKAGE}", heavy) == []
    # negative control: the probe does see a library that was imported
    assert loaded_by(f"import {PACKAGE}, yaml", (*heavy, "yaml")) == ["yaml"]


def test_public_names_resolve_lazily() -> None:
    code = f"""
import {PACKAGE} as package
assert package.__all__, "no public names"
assert len(set(package.__all__)) == len(package.__all__), "a public name is listed twice"
for name in package.__all__:
    assert getattr(package, name) is not None, name
missing = set(package.__all__) - set(dir(package))
assert not missing, f"dir() leaves out {{missing}}"
try:
    package.no_such_name
except AttributeError as error:
    print("no_such_name" in str(error))
"""
    assert run_python(code) == "True"


# Negative controls: the checker on made-up sources


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg", "from hf_unlearn.trainer import UnlearningTrainer"),
        ("linalg", "from .trainer import UnlearningTrainer"),
        ("linalg", "from . import trainer"),
        ("linalg", "import hf_unlearn.trainer"),
        ("linalg", "from hf_unlearn import trainer"),
        ("linalg", "def f():\n    from .trainer import UnlearningTrainer"),
        ("linalg", "try:\n    from .trainer import UnlearningTrainer\nexcept ImportError:\n    pass"),
        ("linalg", "if TYPE_CHECKING:\n    pass\nelse:\n    from .trainer import UnlearningTrainer"),
        ("losses.npo", "from ..data import pairs"),
        ("losses.npo", "from hf_unlearn.metrics.tofu import truth_ratio"),
        ("errors", "from .linalg import leading_basis"),
        ("files", "from .report import Metric"),
        ("trainer", "from .cli import main"),
        ("trainer", "from hf_unlearn import UnlearningConfig"),
        ("trainer", "import hf_unlearn"),
        ("trainer", "from .unheard_of import name"),
        ("unheard_of", ""),
        ("statistics", "import transformers"),
        ("data", "from transformers.utils import logging"),
        ("data", "class A:\n    from transformers import Trainer"),
    ],
)
def test_checker_flags_a_wrong_import(module: str, source: str) -> None:
    assert len(problems_in(source, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer", "import transformers\nfrom .linalg import leading_basis\nfrom . import data, config"),
        ("trainer", "from hf_unlearn import __version__"),
        ("linalg", "if TYPE_CHECKING:\n    from .trainer import UnlearningTrainer"),
        ("linalg", "if typing.TYPE_CHECKING:\n    import transformers"),
        ("losses.npo", "from ..linalg import leading_basis\nfrom . import registry\nfrom .registry import register"),
        ("optimizer", "import peft\nfrom peft import LoraConfig"),
        ("data", "def f():\n    from transformers import AutoTokenizer"),
        ("cli", "from .demo import run\nimport argparse"),
    ],
)
def test_checker_lets_a_right_import_pass(module: str, source: str) -> None:
    assert problems_in(source, f"{PACKAGE}.{module}") == []


def test_checker_reads_relative_imports_of_a_package() -> None:
    source = "from . import npo\nfrom ..trainer import UnlearningTrainer"
    names = [entry.name for entry in imports_in(source, f"{PACKAGE}.losses", is_package=True)]
    assert names == ["hf_unlearn.losses.npo", "hf_unlearn.trainer.UnlearningTrainer"]
    assert len(problems_in(source, f"{PACKAGE}.losses", is_package=True)) == 1


def test_checker_finds_a_cycle() -> None:
    assert set(cycle_in({"card": {"hub"}, "hub": {"ledger"}, "ledger": {"card"}})) == {"card", "hub", "ledger"}
    assert cycle_in({"card": {"hub", "ledger"}, "hub": {"ledger"}, "ledger": set()}) == []


def test_levels_name_each_module_once() -> None:
    assert len(LEVEL_OF) == sum(len(units) for units in LEVELS)
