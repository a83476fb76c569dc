"""The results of a grid as JSON, as a Markdown table, and next to published numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_unlearn import __version__
from hf_unlearn.benchmark.cell import Cell
from hf_unlearn.benchmark.grid import Results
from hf_unlearn.benchmark.registry import Benchmark, Column, Published
from hf_unlearn.core.files import replace_file, write_json
from hf_unlearn.core.text import as_text, is_finite, spread
from hf_unlearn.evaluation.report import UnlearningReport, plain

JSON, TABLE = "results.json", "results.md"
REFERENCES = ("original", "retrained")
Line = tuple[str, str]
"""Method and constraint of a line of the table; a reference model has no constraint."""

LineReports = Sequence[tuple[UnlearningReport, str]]
"""The reports behind a line, one per seed, each with the model whose numbers count."""


def lines_of(results: Results) -> dict[Line, LineReports]:
    """Return the lines of the table, reference models first."""
    references: dict[Line, list[tuple[UnlearningReport, str]]] = {(model, ""): [] for model in REFERENCES}
    lines: dict[Line, list[tuple[UnlearningReport, str]]] = {}
    seeds: set[int] = set()
    for cell, report in results.reports.items():
        lines.setdefault((cell.method, cell.constraint), []).append((report, "unlearned"))
        if cell.seed not in seeds:
            seeds.add(cell.seed)
            for model in REFERENCES:
                references[model, ""].append((report, model))
    if not any("retrained" in report.models for report, _ in references["retrained", ""]):
        del references["retrained", ""]
    return {**references, **lines}


def values(reports: LineReports, column: Column) -> list[float]:
    """Return the finite numbers of a column, one per seed."""
    metrics = [report.get(column.metric, column.split, model) for report, model in reports]
    return [metric.value for metric in metrics if metric is not None and is_finite(metric.value)]


def seconds(reports: LineReports) -> list[float]:
    """Return the seconds of subtracting and unlearning, one per seed; none for a reference model."""
    return [
        report.timings["subtract"] + report.timings["unlearn"]
        for report, model in reports
        if model == "unlearned" and "unlearn" in report.timings
    ]


def mean(numbers: Sequence[float]) -> float:
    """Return the mean; NaN of no numbers."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def markdown(name: str, benchmark: Benchmark, results: Results, command: str) -> str:
    """Return the table with a line per method and constraint, why cells failed, published numbers, and the command.

    Args:
        name: Name of the benchmark.
        benchmark: Its columns and published numbers. Columns without any number are left out.
        results: What `run_grid` returned.
        command: The command that repeats it.
    """
    lines = lines_of(results)
    columns = [column for column in benchmark.columns if any(values(reports, column) for reports in lines.values())]
    head = ["method", "constraint", *(column.title for column in columns), "time, s", "seeds"]
    body = [
        [
            method,
            constraint,
            *(spread(values(reports, column)) for column in columns),
            spread(seconds(reports), 1),
            str(len(reports)),
        ]
        for (method, constraint), reports in lines.items()
    ]
    others = changed_data(benchmark, results)
    paragraphs = [f"# {name}: {others or benchmark.about}", _provenance(results), table([head, *body])]
    if results.failed:
        reasons = dict.fromkeys(f"- {cell.name}: {reason}" for cell, reason in results.failed.items())
        paragraphs.append("Not run:\n\n" + "\n".join(reasons))
    if others is not None and benchmark.published:
        paragraphs.append("The published numbers are of other rows or another model than those of this table.")
    paragraphs += [_published(published) for published in benchmark.published]
    return "\n\n".join([*paragraphs, f"```\n{command}\n```"]) + "\n"


def changed_data(benchmark: Benchmark, results: Results) -> str | None:
    """Return the data set, its splits and the model in words if the grid was run on others than the benchmark's.

    Args:
        benchmark: Its defaults name the data set, the splits and the model.
        results: What `run_grid` returned.

    Returns:
        None if they are those of the benchmark, or if there is no cell.
    """
    cell = next(iter([*results.reports, *results.failed]), None)
    names = ("dataset_name", "train", "forget", "model_name_or_path")
    if cell is None or all(getattr(cell.args, name) == benchmark.defaults.get(name, "") for name in names):
        return None
    dataset, train, forget, model = (str(getattr(cell.args, name)) for name in names)
    rows = f"{forget} of {train}" if forget and train else forget or train
    return f"{_last(dataset)} ({rows}), {_last(model)}"


def _last(name: str) -> str:
    """Return a Hub id as it is, and of a local folder the last part of its path."""
    return Path(name).resolve().name if Path(name).exists() else name


def _provenance(results: Results) -> str:
    if not results.reports:
        return "No cell is finished."
    report = next(iter(results.reports.values()))
    seeds = sorted({cell.seed for cell in results.reports})
    return (
        f"{report.request['rows']} forget rows; seeds {', '.join(map(str, seeds))}: mean, with the range in brackets. "
        f"The time is that of subtracting and unlearning. hf_unlearn {__version__}, {report.hardware}."
    )


def _published(published: Published) -> str:
    head = ["method", *published.columns]
    body = [[name, *(as_text(value) for value in row)] for name, row in published.rows.items()]
    return f"Published: {published.about}. Source: {published.source}.\n\n{table([head, *body])}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head, and all but two columns are numbers.

    >>> print(table([["method", "constraint", "accuracy"], ["npo", "none", "0.5"]]))
    | method | constraint | accuracy |
    | --- | --- | ---: |
    | npo | none | 0.5 |
    """
    rule = ["---"] * 2 + ["---:"] * (len(rows[0]) - 2)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def content(name: str, benchmark: Benchmark, results: Results, command: str) -> dict[str, Any]:
    """Return everything as JSON: each cell with all its metrics, and the published numbers."""
    return plain(
        {
            "benchmark": name,
            "command": command,
            "version": __version__,
            "cells": [_cell_content(cell, report) for cell, report in results.reports.items()],
            "failed": [
                {"method": cell.method, "constraint": cell.constraint, "seed": cell.seed, "reason": reason}
                for cell, reason in results.failed.items()
            ],
            "published": [
                {"about": p.about, "source": p.source, "columns": list(p.columns), "rows": dict(p.rows)}
                for p in benchmark.published
            ],
        }
    )


def _cell_content(cell: Cell, report: UnlearningReport) -> Mapping[str, object]:
    return {
        "method": cell.method,
        "constraint": cell.constraint,
        "seed": cell.seed,
        "file": cell.file,
        "metrics": report.content()["metrics"],
        "timings": report.timings,
        "drift": report.drift.get("relative"),
        "steps": report.method.get("steps"),
        "stopped": report.method.get("stopped"),
        "hardware": report.hardware,
    }


def write(name: str, benchmark: Benchmark, results: Results, command: str, folder: Path) -> str:
    """Write `results.json` and `results.md` to `folder`; return the Markdown."""
    write_json(folder / JSON, content(name, benchmark, results, command))
    text = markdown(name, benchmark, results, command)
    with replace_file(folder / TABLE) as partial:
        partial.write_text(text, encoding="utf-8")
    return text
