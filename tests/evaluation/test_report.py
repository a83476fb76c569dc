"""Laws of the report: it survives a file and holds JSON values only, and its tables show every number. Each law has a
negative control."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import CASES
from hf_unlearn.errors import OutputError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.report import FORMAT_VERSION, REPORT, MetricValue, UnlearningReport
from hf_unlearn.evaluation.tables import side_by_side

MODELS = ("original", "unlearned", "retrained")
SIZES = {"forget": 5, "retain": 7, "holdout": 6}


def make(case: str) -> tuple[dict[str, nn.Module], dict[str, list]]:
    model, rows = CASES[case]
    models = {kind: model(seed) for seed, kind in enumerate(MODELS)}
    return models, {name: rows(n, seed) for seed, (name, n) in enumerate(SIZES.items())}


def evaluate(models: dict[str, nn.Module], splits: dict[str, list], **options: Any) -> UnlearningReport:
    others = {kind: models[kind] for kind in ("original", "retrained") if kind in models}
    return evaluate_unlearning(models["unlearned"], splits, **(others | options))


def small_report() -> UnlearningReport:
    models, splits = make("mlp")
    report = evaluate(models, splits)
    report.request = {"rows": 5, "source": "made up"}
    report.method, report.timings = {"steps": 12, "loss": "npo"}, {"unlearn": 3.25}
    report.history = [{"step": 1, "loss": 0.5}]
    report.drift = {"relative": 0.01234, "kl": None, "by_layer": {"first": 0.01}}
    return report


def cells(table: str) -> list[list[str]]:
    header, rule, *rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert all(set(cell) == {"-"} for cell in rule) and all(len(row) == len(header) for row in rows)
    return [header, *rows]


def test_the_table_holds_every_number() -> None:
    report = small_report()
    header, *rows = cells(report.table())
    assert header == ["metric", "split", *MODELS, "n"]
    result = {(row[0], row[1]): dict(zip(header[2:], row[2:], strict=True)) for row in rows}
    for metric in report.metrics:
        row = result[metric.name, metric.split]
        assert row[metric.model] == f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
        assert row["n"] == str(metric.n)
    assert len(rows) == len({(m.name, m.split) for m in report.metrics})
    lost = replace(report, metrics=report.metrics[1:])
    gone = report.metrics[0]
    assert next(r for r in cells(lost.table()) if r[:2] == [gone.name, gone.split])[2] == "not measured"


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = small_report()
    path = report.save(tmp_path)
    assert path == tmp_path / REPORT and [p.name for p in tmp_path.iterdir()] == [REPORT]
    assert UnlearningReport.load(tmp_path) == UnlearningReport.load(path) == report
    assert UnlearningReport.load(path) != replace(report, hardware="another")


def test_nan_and_infinities_become_null_and_read_as_undefined(tmp_path: Path) -> None:
    metrics = [
        MetricValue("forget_quality", math.nan, "forget", "unlearned", 5, math.nan, math.inf),
        MetricValue("loss", 0.5, "forget", "unlearned", 5, 0.25, math.inf),
    ]
    report = UnlearningReport(metrics=metrics, history=[{"loss": math.inf, "step": 1}], drift={"kl": -math.inf})
    content = json.loads(report.save(tmp_path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert content["metrics"][0]["value"] is None and content["metrics"][0]["low"] is None
    assert content["history"] == [{"loss": None, "step": 1}] and content["drift"] == {"kl": None}
    loaded = UnlearningReport.load(tmp_path)
    assert math.isnan(loaded.metrics[0].value)
    for each in (report, loaded):
        assert cells(each.table())[1] == ["forget_quality", "forget", "undefined", "5"]
    assert cells(loaded.table())[2] == ["loss", "forget", "0.500", "5"]


def test_values_of_other_types_are_saved_as_numbers_and_text(tmp_path: Path) -> None:
    report = UnlearningReport(
        settings={"lr": np.float32(0.5), "n": torch.tensor(3), "path": tmp_path, "flag": True, "betas": (0.9, 0.5)},
        entropies={"original": [np.float64(0.25)]},
    )
    report.save(tmp_path)
    loaded = UnlearningReport.load(tmp_path)
    assert loaded.settings == {"lr": 0.5, "n": 3, "path": str(tmp_path), "flag": True, "betas": [0.9, 0.5]}
    assert loaded.entropies == {"original": [0.25]} and loaded.settings["flag"] is True


def test_a_newer_format_is_an_error_and_an_unknown_field_is_not(tmp_path: Path) -> None:
    path = small_report().save(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(OutputError, match=f"newer format than {FORMAT_VERSION}: update hf-unlearn"):
        UnlearningReport.load(tmp_path)
    path.write_text(json.dumps(content | {"weather": "fair"}))
    assert UnlearningReport.load(tmp_path) == small_report()


@pytest.mark.parametrize("text", [None, "{", ""])
def test_a_file_that_is_not_a_report_is_an_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    with pytest.raises(OutputError, match="is not an unlearning report"):
        UnlearningReport.load(tmp_path)


def test_a_metric_that_was_not_measured_is_none() -> None:
    report = small_report()
    assert report.get("rouge", "forget") is None and report.get("loss", "elsewhere") is None
    assert report.get("loss", "forget") in report.metrics


def test_side_by_side_has_a_line_for_each_report_and_for_both_other_models() -> None:
    one, two = small_report(), small_report()
    two.metrics = [replace(m, value=m.value / 2) for m in two.metrics]
    two.drift, two.method = {}, {"steps": 7}
    header, *rows = cells_of_side_by_side(side_by_side({"npo": one, "pgu": two}, "accuracy"))
    assert header == ["model", *SIZES, "membership AUC", "drift", "steps", "unlearning s"]
    assert [row[0] for row in rows] == ["original", "npo", "pgu", "retrained"]
    for row, report, kind in zip(
        rows, (one, one, two, one), ("original", "unlearned", "unlearned", "retrained"), strict=True
    ):
        expected = [report.get("accuracy", split, kind).value for split in SIZES]  # type: ignore[union-attr]
        assert row[1:4] == [f"{value:.4f}" for value in expected]
        assert row[4] == f"{report.get('membership_auc', 'forget', kind).value:.3f}"  # type: ignore[union-attr]
    assert rows[1][5:] == ["0.0123", "12", "3.2"] and rows[2][5:] == ["-", "7", "3.2"]
    assert rows[1][1:5] != rows[2][1:5]


def cells_of_side_by_side(table: str) -> list[list[str]]:
    header, _, *rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return [header, *rows]


def test_side_by_side_without_a_retrained_model_or_attack_has_no_number_for_them() -> None:
    report = small_report()
    report.metrics = [m for m in report.metrics if m.model != "retrained" and m.name != "membership_auc"]
    _, *rows = cells_of_side_by_side(side_by_side({"npo": report}, "loss"))
    assert [row[0] for row in rows] == ["original", "npo"] and rows[0][4] == "-"
