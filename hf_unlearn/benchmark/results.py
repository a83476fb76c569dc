"""What a grid found as JSON, a Markdown table, and beside published numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_unlearn import __version__
from hf_unlearn.benchmark.grid import Cell, Results
from hf_unlearn.benchmark.registry import Benchmark, Column, Published
from hf_unlearn.core.files import replace_file, write_json
from hf_unlearn.core.text import as_text, is_finite, spread
from hf_unlearn.evaluation.report import UnlearningReport, plain

JSON, TABLE = "results.json", "results.md"
REFERENCES = ("original", "retrained")
Line = tuple[str, str]  # method and constraint; a reference model has no constraint


def lines_of(results: Results) -> dict[Line, list[tuple[UnlearningReport, str]]]:
    """The table's lines: reports over seeds, and which model's numbers of them."""
    lines: dict[Line, list[tuple[UnlearningReport, str]]] = {("original", ""): [], ("retrained", ""): []}
    seen: set[int] = set()
    for cell, report in results.reports.items():
        lines.setdefault((cell.method, cell.constraint), []).append((report, "unlearned"))
        if cell.seed not in seen:
            seen.add(cell.seed)
            for model in REFERENCES:
                lines[model, ""].append((report, model))
    return {line: found for line, found in lines.items() if line[0] != "retrained" or _has_retrained(found)}


def _has_retrained(found: Sequence[tuple[UnlearningReport, str]]) -> bool:
    return any("retrained" in report.models for report, _ in found)


def values(found: Sequence[tuple[UnlearningReport, str]], column: Column) -> list[float]:
    """The column's finite numbers, one by seed."""
    metrics = [report.get(column.metric, column.split, model) for report, model in found]
    return [metric.value for metric in metrics if metric is not None and is_finite(metric.value)]


def seconds(found: Sequence[tuple[UnlearningReport, str]]) -> list[float]:
    """Seconds of subtracting and unlearning; a reference model has none."""
    return [
        report.timings["subtract"] + report.timings["unlearn"]
        for report, model in found
        if model == "unlearned" and "unlearn" in report.timings
    ]


def markdown(name: str, benchmark: Benchmark, results: Results, command: str) -> str:
    """The table with a line for each method and constraint, why cells failed, published numbers, and the command."""
    lines = lines_of(results)
    columns = [column for column in benchmark.columns if any(values(found, column) for found in lines.values())]
    head = ["method", "constraint", *(column.title for column in columns), "time, s", "seeds"]
    body = [
        [method, constraint, *(spread(values(found, column)) for column in columns), spread(seconds(found), 1),
         str(len(found))]
        for (method, constraint), found in lines.items()
    ]  # fmt: skip
    parts = [f"# {name}: {benchmark.about}", _about(results), table([head, *body])]
    if results.failed:
        told = dict.fromkeys((cell.name, words) for cell, words in results.failed.items())
        parts.append("Not run:\n\n" + "\n".join(f"- {cell}: {words}" for cell, words in told))
    parts += [_published(published) for published in benchmark.published]
    return "\n\n".join([*parts, f"```\n{command}\n```"]) + "\n"


def _about(results: Results) -> str:
    if not results.reports:
        return "No cell is finished."
    report = next(iter(results.reports.values()))
    seeds = sorted({cell.seed for cell in results.reports})
    return (
        f"{report.request['rows']} forget rows; seeds {', '.join(map(str, seeds))}: mean, and range in brackets. Time "
        f"is that of subtracting and unlearning. hf_unlearn {__version__}, {report.hardware}."
    )


def _published(published: Published) -> str:
    head = ["method", *published.columns]
    body = [[name, *(as_text(value) for value in row)] for name, row in published.rows.items()]
    return f"Published: {published.about}. Source: {published.source}.\n\n{table([head, *body])}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    rule = ["---"] * 2 + ["---:"] * (len(rows[0]) - 2)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def content(name: str, benchmark: Benchmark, results: Results, command: str) -> dict[str, Any]:
    """All of it for machines: every cell with all its metrics, and the published numbers."""
    return plain(
        {
            "benchmark": name,
            "command": command,
            "version": __version__,
            "cells": [_cell(cell, report) for cell, report in results.reports.items()],
            "failed": [
                {"method": cell.method, "constraint": cell.constraint, "seed": cell.seed, "reason": words}
                for cell, words in results.failed.items()
            ],
            "published": [
                {"about": p.about, "source": p.source, "columns": list(p.columns), "rows": dict(p.rows)}
                for p in benchmark.published
            ],
        }
    )


def _cell(cell: Cell, report: UnlearningReport) -> Mapping[str, Any]:
    return {
        "method": cell.method, "constraint": cell.constraint, "seed": cell.seed, "file": cell.file,
        "metrics": report.content()["metrics"], "timings": report.timings, "drift": report.drift.get("relative"),
        "steps": report.method.get("steps"), "stopped": report.method.get("stopped"), "hardware": report.hardware,
    }  # fmt: skip


def write(name: str, benchmark: Benchmark, results: Results, command: str, folder: Path) -> str:
    """Write `results.json` and `results.md`; returns the Markdown."""
    write_json(folder / JSON, content(name, benchmark, results, command))
    text = markdown(name, benchmark, results, command)
    with replace_file(folder / TABLE) as beside:
        beside.write_text(text, encoding="utf-8")
    return text


def mean(found: Sequence[float]) -> float:
    return sum(found) / len(found) if found else math.nan
