"""The direction of imports: a room imports only rooms below it (`import_arrows.ROOMS`), and no modules form a cycle.

Laws: every import inside the package, within functions too, leads down; there is no cycle among the modules; the
numeric rooms import no library for plots, cards, data sets or scores; `import hf_unlearn` alone loads neither torch nor
transformers, and `import hf_unlearn.trainer` neither matplotlib nor jinja2; every imported library is declared in
pyproject.toml. Imports under `if TYPE_CHECKING:` do not count. Each law has a negative control on made-up sources.
"""

from __future__ import annotations

import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT

PACKAGE = "hf_unlearn"
NUMERIC = ("errors", "core", "models", "data", "losses", "statistics", "constraints")
"""Rooms that compute: their libraries are torch, numpy, scipy, transformers and what reads and moves tensors."""
NOT_NUMERIC = ("matplotlib", "jinja2", "evaluate", "datasets", "sklearn", "rouge_score", "rich")


def _load(name: str, path: Path) -> Any:
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


arrows = _load("import_arrows", Path(__file__).with_name("import_arrows.py"))


def problems_in(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in `source` goes against the order of rooms, one line of text each; empty if nothing does."""
    room, place = arrows.room_of(module), list(arrows.ROOMS).index
    if room not in arrows.ROOMS:
        return [f"{module}: {room!r} is not in ROOMS of tests/repo/import_arrows.py"]
    problems = []
    for other, line in arrows.rooms_imported(source, module, is_package).items():
        if other not in arrows.ROOMS:
            problems.append(f"{module}, line {line}: imports {other or PACKAGE!r}, which is not a room")
        elif place(other) > place(room):
            problems.append(f"{module}, line {line}: {room} imports {other}, which is above it")
    if room in NUMERIC:
        problems += [
            f"{module}, line {entry.line}: imports {entry.name}; numeric rooms do not"
            for entry in arrows.imports_in(source, module, is_package)
            if entry.at_module_level and entry.name.split(".")[0] in NOT_NUMERIC
        ]
    return problems


def module_graph(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports; a name of a module counts as that module."""
    graph: dict[str, set[str]] = {}
    for name, (source, is_package) in sources.items():
        imported = set()
        for entry in arrows.imports_in(source, name, is_package):
            parent = entry.name.rpartition(".")[0]
            imported |= {other for other in (entry.name, parent) if other in sources and other != name}
        graph[name] = imported
    return graph


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


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The package itself


def test_imports_lead_down() -> None:
    sources = arrows.sources_of(ROOT / PACKAGE)
    assert sources, f"no module found under {PACKAGE}"
    problems = [
        line for name, (source, is_package) in sources.items() for line in problems_in(source, name, is_package)
    ]
    assert not problems, "\n" + "\n".join(problems)
    assert arrows.upward_arrows(arrows.arrows_of(ROOT / PACKAGE)) == []


def test_no_import_cycle() -> None:
    sources = arrows.sources_of(ROOT / PACKAGE)
    facades = {name for name, (_, is_package) in sources.items() if is_package}  # they only hand out names
    graph = {name: others - facades for name, others in module_graph(sources).items() if name not in facades}
    cycle = cycle_in(graph)
    assert not cycle, "import cycle: " + " <- ".join(cycle)


def test_the_script_counts_arrows_and_fails_on_one_that_points_up(tmp_path: Path) -> None:
    script = [sys.executable, str(Path(__file__).with_name("import_arrows.py"))]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "none points up" in done.stdout
    package = tmp_path / PACKAGE
    for room in ("core", "trainer"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("")
    (package / "core" / "files.py").write_text("from hf_unlearn.trainer import config")
    done = subprocess.run([*script, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "core imports trainer" in done.stdout


def test_imported_libraries_are_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for key in extras if key != "dev" for line in extras[key])]
    names = {
        entry.name.split(".")[0]
        for name, (source, is_package) in arrows.sources_of(ROOT / PACKAGE).items()
        for entry in arrows.imports_in(source, name, is_package)
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


def test_the_trainer_loads_no_library_for_plots_and_cards() -> None:
    heavy = ("matplotlib", "jinja2", "evaluate", "rouge_score")
    own = set(loaded_by(f"import {PACKAGE}.trainer; {PACKAGE}.trainer.UnlearningTrainer", heavy))
    assert own == set(loaded_by("from transformers import Trainer", heavy)) <= {"jinja2"}  # for chat templates
    # negative control: publishing does load them
    assert "matplotlib" in loaded_by(f"import {PACKAGE}.publishing.plots", heavy)


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
        ("statistics.eigen", "from hf_unlearn.trainer import UnlearningTrainer"),
        ("statistics.eigen", "from ..trainer import UnlearningTrainer"),
        ("statistics.eigen", "from .. import trainer"),
        ("statistics.eigen", "import hf_unlearn.trainer"),
        ("statistics.eigen", "from hf_unlearn import trainer"),
        ("statistics.eigen", "def f():\n    from ..trainer import UnlearningTrainer"),
        ("statistics.eigen", "try:\n    from ..trainer import UnlearningTrainer\nexcept ImportError:\n    pass"),
        ("statistics.eigen", "if TYPE_CHECKING:\n    pass\nelse:\n    from ..trainer import UnlearningTrainer"),
        ("losses.npo", "from ..constraints import base"),
        ("losses.npo", "from hf_unlearn.evaluation.metrics.language import truth_ratio"),
        ("errors", "from .core import files"),
        ("core.files", "from ..evaluation.report import MetricValue"),
        ("trainer.trainer", "from ..cli import main"),
        ("trainer.trainer", "from hf_unlearn import UnlearningConfig"),
        ("trainer.trainer", "import hf_unlearn"),
        ("trainer.trainer", "from ..unheard_of import name"),
        ("unheard_of", ""),
        ("constraints.base", "import matplotlib"),
        ("data.formats", "class A:\n    from datasets import Dataset"),
    ],
)
def test_checker_flags_a_wrong_import(module: str, source: str) -> None:
    assert len(problems_in(source, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.trainer", "import transformers\nfrom ..statistics.eigen import leading_basis\nfrom . import config"),
        ("trainer.trainer", "from hf_unlearn import __version__"),
        ("statistics.eigen", "if TYPE_CHECKING:\n    from ..trainer import UnlearningTrainer"),
        ("statistics.eigen", "if typing.TYPE_CHECKING:\n    import matplotlib"),
        ("losses.npo", "from ..models.tasks import Task\nfrom . import base\nfrom .base import register_loss"),
        ("data.splits", "def f():\n    from datasets import load_dataset"),
        ("cli.demo", "from .run import main\nfrom ..demo import digits\nimport argparse"),
    ],
)
def test_checker_lets_a_right_import_pass(module: str, source: str) -> None:
    assert problems_in(source, f"{PACKAGE}.{module}") == []


def test_checker_reads_relative_imports_of_a_package() -> None:
    source = "from . import npo\nfrom ..trainer import UnlearningTrainer"
    names = [entry.name for entry in arrows.imports_in(source, f"{PACKAGE}.losses", is_package=True)]
    assert names == ["hf_unlearn.losses.npo", "hf_unlearn.trainer.UnlearningTrainer"]
    assert len(problems_in(source, f"{PACKAGE}.losses", is_package=True)) == 1


def test_checker_finds_a_cycle() -> None:
    assert set(cycle_in({"card": {"hub"}, "hub": {"ledger"}, "ledger": {"card"}})) == {"card", "hub", "ledger"}
    assert cycle_in({"card": {"hub", "ledger"}, "hub": {"ledger"}, "ledger": set()}) == []
