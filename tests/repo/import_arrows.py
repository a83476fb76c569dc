"""Count the import arrows between the rooms of a package, and fail where one points up.

    python tests/repo/import_arrows.py [PACKAGE_FOLDER]

A room is a module or a folder at the top of the package. An arrow leads from a room to another one that it imports,
within functions too; imports under `if TYPE_CHECKING:` do not count. A room's floor is the length of the longest chain
of arrows below it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOMS: Mapping[str, str] = {
    "errors": "every error that is raised on purpose",
    "core": "files, processes, sharding, storage, Hub client, registries, settings, text, provenance",
    "models": "tasks, forward passes, modes, layers, adapters, trainable parameters, fingerprints, loading",
    "data": "row formats, encoding, checks, batches, pairs, row identity, filters, splits",
    "losses": "forget losses, one file a family",
    "statistics": "retain statistics: collecting, eigen-decompositions, sketches",
    "constraints": "one file a constraint, and the constrained optimizer step",
    "evaluation": "the report, metrics, attacks",
    "publishing": "model card, plots, the folder that is pushed",
    "trainer": "UnlearningConfig, presets, UnlearningTrainer, stopping rules, checkpoints, Hub hooks",
    "deletion": "a deletion request from names to a finished folder, series of requests, ledger",
    "estimate": "memory and time of a request, from a configuration",
    "benchmark": "grids of methods, constraints and seeds",
    "demo": "the demonstrations",
    "cli": "one module a command",
    "__main__": "`python -m hf_unlearn`",
}
"""The rooms of hf_unlearn from the bottom up: a room imports only from rooms above it in this table."""


class Import(NamedTuple):
    """One imported dotted name, its line, and whether it runs when the module is imported."""

    name: str
    line: int
    at_module_level: bool


def imports_in(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import in `source`, as absolute names; `from a import b` counts as `a.b`."""
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


def sources_of(folder: Path) -> dict[str, tuple[str, bool]]:
    """Dotted name -> (source, whether it is a package's `__init__`) of all modules but the package's own `__init__`."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if name != folder.name:
            sources[name] = (path.read_text(encoding="utf-8"), is_package)
    return sources


def room_of(name: str, package: str = "hf_unlearn") -> str | None:
    """`hf_unlearn.losses.npo` -> `losses`; None for what is outside the package."""
    parts = name.split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == package else None


def rooms_imported(source: str, module: str, is_package: bool = False) -> dict[str, int]:
    """Other rooms that `source` imports, each with a line; names of the package itself (`__version__`) do not count."""
    package, own = module.split(".")[0], room_of(module, module.split(".")[0])
    seen = {room_of(entry.name, package): entry.line for entry in imports_in(source, module, is_package)}
    return {r: line for r, line in seen.items() if r is not None and r != own and not (r.startswith("__") and r != own)}


def arrows_of(folder: Path) -> dict[str, set[str]]:
    """Room -> the rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for name, (source, is_package) in sources_of(folder).items():
        imported = rooms_imported(source, name, is_package)
        graph.setdefault(room_of(name, folder.name) or "", set()).update(imported)
    return graph


def floors_of(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Length of the longest chain below each room; raises `graphlib.CycleError` where arrows form a circle."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floors[room] = 1 + max((floors[other] for other in graph.get(room, ())), default=-1)
    return floors


def upward_arrows(graph: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with a graph, one line each: unknown rooms, and arrows to a room that is not further down."""
    place = {room: index for index, room in enumerate(ROOMS)}
    problems = [f"{room} is not in ROOMS of tests/repo/import_arrows.py" for room in graph if room not in place]
    for room, others in graph.items():
        for other in others:
            if room in place and place.get(other, -1) >= place[room]:
                problems.append(f"{room} imports {other}, which is not below it")
    return problems


def main(folder: Path) -> int:
    graph = arrows_of(folder)
    try:
        floors = floors_of(graph)
    except CycleError as error:
        print("import cycle: " + " <- ".join(error.args[1]))
        return 1
    for room in sorted(graph, key=lambda room: (-floors[room], room)):
        print(f"{floors[room]:>3}  {room:<12} {ROOMS.get(room, ''):<100} -> {', '.join(sorted(graph[room])) or '-'}")
    count = sum(len(others) for others in graph.values())
    print(f"{len(graph)} rooms on {max(floors.values()) + 1} floors, {count} arrows")
    problems = upward_arrows(graph) if folder.name == "hf_unlearn" and "errors" in graph and "core" in graph else []
    print("\n".join(problems) or "none points up") if "core" in graph else None
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "hf_unlearn"))
