"""Laws of the registered metrics: each reads no more than it declares and is undefined or absent where it must be, and
aggregates equal a computation by hand. Columns are made up; no model runs."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from helpers import reference_metrics as reference
from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.content import ContentScores
from hf_unlearn.evaluation.measurements import MEASUREMENTS
from hf_unlearn.evaluation.metrics.base import EACH_SPLIT, TEACHER, MeasuredColumns
from hf_unlearn.evaluation.metrics.registry import (
    METRICS,
    SUITES,
    choose_metrics,
    estimate_metrics,
    wanted_measurements,
)
from hf_unlearn.evaluation.row_scores import RowScores

SIZES = {
    "forget": 6,
    "retain": 8,
    "holdout": 7,
    "real_authors_perturbed": 5,
    "world_facts": 4,
    "forget_verbmem": 3,
    "forget_knowmem": 3,
    "retain_knowmem": 3,
}
ROW = {ALTERNATIVES: {"wrong": [1]}, "labels": [-100, 5, 6], "content_mask": [0, 1, 0]}
ROWS: dict[str, Any] = {name: [ROW] * n for name, n in SIZES.items()}
MODELS = ("unlearned", "retrained", TEACHER)


def made_up(measurement: str, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    scores = {field.name: rng.uniform(0.05, 0.95, n) for field in fields(RowScores)}
    return {
        "rows": scores,
        "classes": scores | {"probabilities": rng.dirichlet(np.ones(4), n)},
        "alternatives": {
            "paraphrase_loss": rng.exponential(1, n),
            "wrong_loss": rng.exponential(1, 2 * n),
            "wrong_count": np.full(n, 2),
        },
        "answers": {"rouge_l_recall_200": rng.uniform(0.1, 1, n)},
        "continuations": {"rouge_l_fmeasure_128": rng.uniform(0.1, 1, n)},
        "short_answers": {"rouge_l_fmeasure_32": rng.uniform(0.1, 1, n)},
        "gradients": {"gradient_norm": rng.exponential(1, n)},
        "content": {field.name: rng.uniform(0.1, 1, n) for field in fields(ContentScores)},
        "greedy": {"reveals": rng.integers(0, 2, n).astype(float)},
        "texts": {"compressed": rng.integers(20, 90, n).astype(float)},
    }[measurement]


def columns_of(names: list[str], models: tuple[str, ...] = MODELS, rows: Any = ROWS) -> MeasuredColumns:
    """Columns of exactly the measurements that these metrics declare."""
    rng, wanted = np.random.default_rng(0), wanted_measurements(names, rows)
    columns: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for model in models:
        columns[model] = {split: {} for split in rows}
        for split, measurements in wanted.items():
            for measurement in sorted(measurements):
                columns[model][split].update(made_up(measurement, len(rows[split]), rng))
    return MeasuredColumns(columns)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_reads_no_more_than_it_declares_and_is_undefined_without_the_model_it_compares_with(name: str) -> None:
    estimates = list(estimate_metrics([name], columns_of([name]), ROWS, "unlearned"))
    assert estimates and all(metric == name and split in ROWS for metric, split, _ in estimates)
    assert all(math.isfinite(estimate.value) and estimate.n > 0 for *_, estimate in estimates)
    assert len(estimates) == (len(ROWS) if EACH_SPLIT in METRICS[name].needs else 1)
    alone = list(estimate_metrics([name], columns_of([name], ("unlearned", TEACHER)), ROWS, "unlearned"))
    for *_, estimate in alone:
        assert math.isnan(estimate.value) == METRICS[name].against_retrained
    of_retrained = list(estimate_metrics([name], columns_of([name]), ROWS, "retrained"))
    assert (not of_retrained) == METRICS[name].against_retrained


def test_every_measurement_is_needed_by_a_metric_and_every_suite_names_metrics() -> None:
    declared = {measurement for metric in METRICS.values() for needs in metric.needs.values() for measurement in needs}
    assert declared == set(MEASUREMENTS)
    assert {name for suite in SUITES.values() for name in suite} <= set(METRICS)
    assert choose_metrics(["tofu", "rouge_l"], ROWS) == list(SUITES["tofu"])
    assert choose_metrics("attacks", ROWS) == list(SUITES["attacks"])
    with pytest.raises(SettingsError, match="unknown metric 'nonsense'"):
        choose_metrics(["nonsense"], ROWS)


def test_a_split_of_another_name_is_not_used_instead() -> None:
    assert choose_metrics(None, {"forget": ROWS["forget"]}) == [n for n in SUITES["default"] if n != "membership_auc"]
    with pytest.raises(DataError, match="'priv_leak' needs a split test or holdout; the splits are forget, held"):
        choose_metrics(["priv_leak"], {"forget": ROWS["forget"], "held": ROWS["holdout"]})


def test_the_aggregate_is_made_of_its_parts_by_hand() -> None:
    names = ["aggregate", "model_utility"]
    measured = columns_of(names)
    value = {name: estimate.value for name, _, estimate in estimate_metrics(names, measured, ROWS, "unlearned")}
    forget = measured.columns["unlearned"]["forget"]
    paraphrase = np.exp(-forget["paraphrase_loss"])
    wrong = np.exp(-forget["wrong_loss"].reshape(-1, 2).mean(axis=1))
    memorisation = reference.harmonic(
        [
            1 - forget["extraction_strength"].mean(),
            1 - forget["accuracy"].mean(),
            1 - paraphrase.mean(),
            1 - (paraphrase / (paraphrase + wrong)).mean(),
        ]
    )
    private = []
    for score in (
        lambda c: c["loss"],
        lambda c: c["loss"] / c["compressed"],
        lambda c: c["min_k"],
        lambda c: c["min_k_plus_plus"],
    ):
        mine, other = (
            reference.auc(*(-score(measured.columns[kind][split]) for split in ("forget", "holdout")))
            for kind in ("unlearned", "retrained")
        )
        private.append(max(0.0, 1 - abs(mine - other) / other))
    privacy = reference.harmonic(private)
    expected = reference.harmonic([memorisation, privacy, value["model_utility"]])
    assert value["aggregate"] == pytest.approx(expected) and 0 < expected < 1
    assert expected != pytest.approx(np.mean([memorisation, privacy, value["model_utility"]]), rel=1e-3)


def test_average_gap_is_the_mean_of_the_four_gaps_that_the_report_shows() -> None:
    names = ["average_gap", "unlearning_accuracy", "accuracy", "membership_efficacy"]
    measured = columns_of(names)
    for columns in measured.columns.values():
        for split in columns.values():
            split["accuracy"] = (split["accuracy"] > 0.6).astype(float)
    shown = {
        kind: {(name, split): e.value for name, split, e in estimate_metrics(names, measured, ROWS, kind)}
        for kind in ("unlearned", "retrained")
    }
    keys = [("unlearning_accuracy", "forget"), ("accuracy", "retain"), ("accuracy", "holdout")]
    keys.append(("membership_efficacy", "forget"))
    gaps = [abs(shown["unlearned"][key] - shown["retrained"][key]) for key in keys]
    assert shown["unlearned"]["average_gap", "forget"] == pytest.approx(np.mean(gaps)) and max(gaps) > 0
