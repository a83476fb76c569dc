"""A metric, a measurement and an attack that are defined outside the package, in this file, go through evaluation,
training, audit and report without any edit in the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import text_rows, tiny_llama, tiny_mlp, vector_rows
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation import (
    ATTACKS,
    MEASUREMENTS,
    METRICS,
    Estimate,
    NotRun,
    Outcome,
    Subject,
    UnlearningMetric,
    UnlearningReport,
    audit,
    bootstrap_mean,
    evaluate_unlearning,
    register_attack,
    register_measurement,
    register_metric,
    score_rows,
    training_metrics,
)
from hf_unlearn.evaluation.measurements import Columns, MeasurementTools
from hf_unlearn.evaluation.metrics.base import NUMBER
from hf_unlearn.models.modes import restored
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

SPLITS = {"forget": text_rows(5), "holdout": text_rows(6, 1)}


@pytest.fixture
def metrics_from_outside() -> Iterator[None]:
    @register_measurement("label_counts")
    def label_counts(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
        return {"label_count": np.array([sum(label != -100 for label in row["labels"]) for row in rows], float)}

    @register_metric("total_loss", scale=1.0)
    @register_metric("total_loss_in_bits", scale=1 / np.log(2))
    class TotalLoss(UnlearningMetric):
        """Mean over rows of the summed loss of the labels."""

        inputs = {"loss": NUMBER, "label_count": NUMBER}
        needs = {"*": ("rows", "label_counts")}
        scale: float

        @staticmethod
        def estimate(loss: Any, label_count: Any, scale: float = 1.0, seed: int = 0) -> Estimate:
            return bootstrap_mean(scale * np.asarray(loss) * np.asarray(label_count), seed)

        @classmethod
        def from_columns(cls, measured: Any, model: str, split: str) -> Estimate:
            columns = measured.of(model, split)
            return cls.estimate(columns["loss"], columns["label_count"], cls.scale, measured.seed)

    @register_metric("loss_gap")
    class LossGap(UnlearningMetric):
        """Mean difference of the loss to the retrained model's; `from_columns` is the default one."""

        inputs = {"loss": NUMBER, "retrained_loss": NUMBER}
        needs = {"forget": ("rows",)}
        against_retrained = True

        @staticmethod
        def estimate(loss: Any, retrained_loss: Any, seed: int = 0) -> Estimate:
            return bootstrap_mean(np.asarray(loss) - np.asarray(retrained_loss), seed)

    yield
    for name in ("total_loss", "total_loss_in_bits", "loss_gap"):
        METRICS.remove(name)
    MEASUREMENTS.remove("label_counts")


@pytest.fixture
def attack_from_outside() -> Iterator[str]:
    @register_attack("shrinking")
    def shrinking(subject: Subject) -> Iterator[Outcome]:
        if subject.score_name == "accuracy":
            raise NotRun("it is an attack on texts")
        with restored(subject.model), torch.no_grad():
            for weight in subject.model.parameters():
                weight.mul_(0.5)
            score_N = subject.score(subject.rows["forget"])
        yield Outcome("shrunken_probability", "forget", bootstrap_mean(score_N, subject.settings.seed))

    yield "shrinking"
    ATTACKS.remove("shrinking")


def total_losses(model: nn.Module, rows: list[dict[str, Any]]) -> np.ndarray:
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    return score_rows(model, rows, PaddingCollator()).loss * counts


def test_a_metric_and_its_measurement_are_evaluated_for_every_split_and_model(
    metrics_from_outside: None, tmp_path: Path
) -> None:
    names = ["total_loss", "total_loss_in_bits", "loss_gap", "loss"]
    models = {"unlearned": tiny_llama(), "retrained": tiny_llama(1)}
    for _ in range(2):  # measured, then read from the cache
        report = evaluate_unlearning(
            models["unlearned"], SPLITS, retrained=models["retrained"], metrics=names, cache_dir=tmp_path
        )
        for split, rows in SPLITS.items():
            for model in models:
                number, in_bits = (report.get(name, split, model) for name in names[:2])
                assert number is not None and in_bits is not None and number.n == len(rows)
                assert number.value == pytest.approx(total_losses(models[model], rows).mean(), rel=1e-4)
                assert in_bits.value == pytest.approx(number.value / np.log(2))
        gap, own, other = (
            report.get("loss_gap", "forget"),
            report.get("loss", "forget"),
            report.get("loss", "forget", "retrained"),
        )
        assert gap is not None and own is not None and other is not None
        assert gap.value == pytest.approx(own.value - other.value)
        assert report.get("loss_gap", "forget", "retrained") is None
    assert "total_loss_in_bits  holdout" in report.table()
    report.save(tmp_path)
    assert UnlearningReport.load(tmp_path).get("total_loss", "forget") == report.get("total_loss", "forget")


def test_a_metric_adds_up_batches_like_any_metric_of_evaluate(metrics_from_outside: None, tmp_path: Path) -> None:
    metric = METRICS["loss_gap"](cache_dir=str(tmp_path))
    metric.add_batch(loss=[1.0, 2.0], retrained_loss=[0.5, 0.5])
    metric.add_batch(loss=[3.0], retrained_loss=[0.5])
    assert metric.compute()["loss_gap"] == pytest.approx(1.5)


def test_a_metric_is_computed_at_each_evaluation_of_the_trainer(metrics_from_outside: None, tmp_path: Path) -> None:
    args = UnlearningConfig(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=2,
        learning_rate=1e-2,
        constraint="none",
        loss="grad_ascent",
        eval_strategy="steps",
        eval_steps=1,
    )
    extra_metrics = training_metrics(SPLITS, ["total_loss", "loss_gap"], retrained=tiny_llama(1))
    trainer = UnlearningTrainer(tiny_llama(), args, SPLITS["forget"], eval_dataset=SPLITS, extra_metrics=extra_metrics)
    trainer.train()
    values = [line["eval_forget_total_loss"] for line in trainer.state.log_history if "eval_forget_total_loss" in line]
    assert len(values) == 2 and values[-1] == pytest.approx(
        total_losses(trainer.model, SPLITS["forget"]).mean(), rel=1e-4
    )
    assert any("eval_forget_loss_gap" in line for line in trainer.state.log_history)


def test_an_attack_runs_by_default_and_by_name_and_gets_a_verdict(attack_from_outside: str) -> None:
    model, retrained = tiny_llama(), tiny_llama(1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = audit(model, SPLITS, retrained=retrained, attacks=[attack_from_outside])
    assert {number.model for number in report.metrics} == {"unlearned", "retrained"}
    assert set(report.audit["verdicts"]) == {"shrunken_probability"} and report.audit["not_run"] == {}
    assert "shrunken_probability  forget" in report.table()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    classifier = audit(tiny_mlp(), {"forget": vector_rows(3)})
    assert classifier.audit["not_run"]["shrinking"] == "it is an attack on texts"
    assert "linear_probe" in classifier.audit["not_run"]  # the others ran as well


def test_the_package_does_not_know_them_once_they_are_removed() -> None:
    with pytest.raises(SettingsError, match="unknown metric 'total_loss'"):
        evaluate_unlearning(tiny_llama(), SPLITS, metrics=["total_loss"])
    with pytest.raises(SettingsError, match="unknown attack 'shrinking'"):
        audit(tiny_llama(), SPLITS, attacks=["shrinking"])
    assert "label_counts" not in MEASUREMENTS


def test_two_entries_cannot_have_one_name() -> None:
    with pytest.raises(SettingsError, match="metric 'loss' is registered already"):
        register_metric("loss")(type("Other", (UnlearningMetric,), {}))
    with pytest.raises(SettingsError, match="attack 'quantisation' is registered already"):
        register_attack("quantisation")(lambda subject: iter(()))
    with pytest.raises(SettingsError, match="measurement 'rows' is registered already"):
        register_measurement("rows")(lambda model, rows, tools: {})
