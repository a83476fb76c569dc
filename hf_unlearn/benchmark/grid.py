"""Grids of methods, constraints and seeds, cell by cell; a finished cell is a file, and is never run again.

A cell's file is named by its method, constraint, seed and a hash of every setting that it was run with: other settings
make other cells next to it. What it was run on (weights and forget rows) is recorded and compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_unlearn.benchmark.cell import Cell
from hf_unlearn.benchmark.cell_run import CellFailure, groups_of, run_group, split_names
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.core.files import check_folder, write_json
from hf_unlearn.core.processes import gather, is_main, wait_for_all
from hf_unlearn.core.text import ShortRepr, one_line
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.deletion.checks import check_run
from hf_unlearn.errors import OutputError, SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.losses import LOSSES
from hf_unlearn.trainer.config import UnlearningConfig

CELLS_FOLDER = "cells"
"""Folder of the cells' files, inside the output folder."""


@dataclass(frozen=True, repr=False)
class Results(ShortRepr):
    """The results of a grid.

    Attributes:
        reports: Reports of the finished cells.
        failed: Why the other cells have none, in one line each; they are tried again at the next call.
    """

    reports: Mapping[Cell, UnlearningReport]
    failed: Mapping[Cell, str]


def grid_cells(args: BenchmarkArguments, config: UnlearningConfig) -> list[Cell]:
    """Return the cells of a grid, seed by seed.

    Any loss and constraint that is registered can be named.

    Raises:
        SettingsError: An unknown method, constraint or setting, or a malformed seed.
    """
    methods = split_names(args.methods, "methods")
    constraints = split_names(args.constraints or "all", "constraints")
    constraints = list(CONSTRAINTS) if constraints == ["all"] else constraints
    if config.push_to_hub:
        raise SettingsError("a benchmark does not publish models; make the one that you want with run, and push it")
    changes = _cell_settings(args, methods, constraints)
    cells = []
    for seed in _seeds(args.seeds):
        seed_args = replace(args, fine_tune_seed=args.fine_tune_seed + seed)
        for method in methods:
            for constraint in constraints:
                cell_config = _cell_config(config, method, constraint, seed, changes)
                cells.append(Cell(method, constraint, seed, seed_args, cell_config))
    return cells


def _cell_config(
    config: UnlearningConfig, method: str, constraint: str, seed: int, changes: Mapping[str, Mapping[str, Any]]
) -> UnlearningConfig:
    """Return the settings of a cell.

    Settings of the configured loss and constraint are kept only in cells with that loss and that constraint.
    """
    settings: dict[str, Any] = {
        "loss": method,
        "constraint": constraint,
        "seed": config.seed + seed,
        "disable_tqdm": True,
    }
    if method != config.loss:
        settings["loss_settings"] = None
    if constraint != config.constraint:
        settings["constraint_settings"] = settings["layer_constraints"] = None
    for name in (method, constraint, f"{method}/{constraint}"):  # the longer name wins
        settings |= changes.get(name, {})
    try:
        return config.but(**settings)
    except TypeError as error:
        raise SettingsError(f"cell_settings of {method}/{constraint}: {one_line(error)}") from error


def _cell_settings(
    args: BenchmarkArguments, methods: Sequence[str], constraints: Sequence[str]
) -> Mapping[str, Mapping[str, Any]]:
    """Return `args.cell_settings` as a mapping, after checking its names."""
    settings = args.cell_settings or {}
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except ValueError as error:
            raise SettingsError(f"cell_settings must be JSON of the form {{...}}: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise SettingsError('cell_settings must be of the form {"npo": {"learning_rate": 1e-3}}')
    pairs = {f"{method}/{constraint}" for method in methods for constraint in constraints}
    if unknown := sorted(set(settings) - {*LOSSES, *CONSTRAINTS, *methods, *pairs}):
        raise SettingsError(f"cell_settings name no method, constraint or METHOD/CONSTRAINT: {', '.join(unknown)}")
    return settings


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in split_names(str(text), "seeds")]
    except ValueError:
        raise SettingsError(f"seeds must be whole numbers with commas, such as 0,1,2; got {text!r}") from None


def run_grid(args: BenchmarkArguments, config: UnlearningConfig, folder: Path) -> Results:
    """Run the cells that are not finished yet, and read the others; a cell that fails does not end the grid.

    Args:
        args: Methods, constraints, seeds, models, rows, metrics and attacks.
        config: Hyper-parameters that all cells share.
        folder: Output folder, which keeps the finished cells.

    Raises:
        SettingsError: As `grid_cells`.
        OutputError: `folder` has other files, a damaged cell, or cells of other weights or rows.
    """
    grid = grid_cells(args, config)
    check_folder(folder, "--output_dir", "the output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CELLS_FOLDER).is_dir():
        raise OutputError(f"{folder} is not empty and has no results of a benchmark; choose another --output_dir")
    cells_folder = folder / CELLS_FOLDER
    wait_for_all()
    if is_main():
        cells_folder.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    _check_unfinished(grid, cells_folder)
    reports: dict[Cell, UnlearningReport] = {}
    failed: dict[Cell, str] = {}
    with tqdm(total=len(grid), unit="cell", disable=config.disable_tqdm or not is_main()) as bar:
        for group in groups_of(grid):
            finished = [cell for cell in group if gather((cells_folder / cell.file).is_file())[0]]
            reports |= {cell: UnlearningReport.load(cells_folder / cell.file) for cell in finished}
            bar.update(len(finished))
            for cell, result in run_group(group, [cell for cell in group if cell not in finished], cells_folder):
                bar.set_description(cell.name)
                bar.update()
                if isinstance(result, CellFailure):
                    failed[cell] = result.reason
                    continue
                path = cells_folder / cell.file
                if is_main():
                    write_json(path, result.content())
                wait_for_all()
                reports[cell] = UnlearningReport.load(path)
    _require_same_origin(reports)
    return Results({cell: reports[cell] for cell in grid if cell in reports}, failed)


def _check_unfinished(grid: Sequence[Cell], cells_folder: Path) -> None:
    """Check the models, rows and names of the cells that are to run; one cell alone is checked when it runs."""
    unfinished = [cell for cell in grid if gather(not (cells_folder / cell.file).is_file())[0]]
    for group in groups_of(unfinished):
        check_run(replace(group[0].args, constraints=None), group[0].config)


def _require_same_origin(reports: Mapping[Cell, UnlearningReport]) -> None:
    """Raise `OutputError` if cells of one seed were run on different weights or rows: the table would mix them."""
    first_of_seed: dict[int, tuple[Cell, tuple[str | None, str | None]]] = {}
    for cell, report in reports.items():
        origin = (report.request.get("weights"), report.request.get("forget_rows"))
        first, first_origin = first_of_seed.setdefault(cell.seed, (cell, origin))
        if first_origin != origin:
            raise OutputError(
                f"the cells ({first.name}) and ({cell.name}) were run on different weights or forget rows; choose "
                f"another --output_dir, or remove the older of {first.file} and {cell.file}"
            )
