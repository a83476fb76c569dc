"""Laws of the outcome: a run says what its mark is, and whether the delivered weights have reached it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny import tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, settings, trained
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.publishing.card import render_card
from hf_unlearn.trainer.trainer import UnlearningTrainer

ASCENT: dict[str, Any] = {"loss": "grad_ascent", "constraint": "none", "learning_rate": 2e-2, "max_steps": 40}
NO_CHANGE: dict[str, Any] = {"constraint": "none", "learning_rate": 0.0, "max_steps": 2}


def finished(folder: Path, *, holdout: Any = None, compute_metrics: Any = None, **changes: Any) -> UnlearningTrainer:
    args = settings(folder, eval_strategy="steps", eval_steps=1, **changes)
    trainer = UnlearningTrainer(
        tiny_llama(), args, FORGET, RETAIN, holdout_dataset=holdout, compute_metrics=compute_metrics
    )
    trainer.train()
    return trainer


def measured(trainer: UnlearningTrainer, metric: str) -> float:
    """The metric on the forget rows, measured without the trainer."""
    return float(getattr(score_rows(trainer.model, FORGET, PaddingCollator()), metric).mean())


CASES = {
    "reached": ("reached", ASCENT | {"forget_metric": "loss"}),
    "missed": ("missed", NO_CHANGE | {"forget_metric": "loss"}),
    "nothing, target": ("nothing to forget", {"forget_target": 1.0}),
    "nothing, loss": ("nothing to forget", {"forget_target": 0.0, "forget_metric": "loss"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_outcome_is_that_of_the_delivered_weights(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, changes = CASES[case]
    before = trained(tiny_llama())
    trainer = finished(tmp_path, holdout=None if "forget_target" in changes else HOLDOUT, **changes)
    outcome, stderr = trainer.outcome, capsys.readouterr().err
    assert outcome is not None and outcome.status == status and outcome.advice
    assert outcome.mark is not None and outcome.value is not None
    assert outcome.value == pytest.approx(measured(trainer, str(outcome.metric)), rel=1e-4)
    assert stderr.splitlines()[0].startswith(f"mark: forget {outcome.metric} has to ") and outcome.summary in stderr
    assert ("already" in stderr.splitlines()[0]) == (status == "nothing to forget")
    moved = any(not torch.equal(before[name], now) for name, now in trained(trainer.model).items())
    assert moved == (status == "reached") and (outcome.missed_by is not None) == (status == "missed")
    if status == "nothing to forget":
        assert trainer.state.global_step == 0 and "no step was made" in trainer.stop_reason
    if status == "missed":
        assert "no weight has changed" in outcome.advice
        assert outcome.missed_by == pytest.approx(abs(outcome.value - outcome.mark))


def test_a_run_without_a_mark_has_no_verdict(tmp_path: Path) -> None:
    outcome = finished(tmp_path, max_steps=1).outcome
    assert outcome is not None and outcome.status == "no mark" and outcome.mark is None and "holdout" in outcome.advice


def test_a_budget_that_ends_the_run_is_the_next_thing_to_change(tmp_path: Path) -> None:
    outcome = finished(
        tmp_path, **{**ASCENT, "forget_target": 1e-9, "constraint": "ridge", "max_retain_drift": 1e-4}
    ).outcome
    assert outcome is not None and outcome.status == "missed" and "raise max_retain_drift" in outcome.advice
    assert "times the mark" in outcome.summary  # 65 times the mark is not a near miss


def test_report_table_and_card_say_it(tmp_path: Path) -> None:
    trainer = finished(tmp_path, holdout=HOLDOUT, **NO_CHANGE)
    assert trainer.outcome is not None
    report = trainer.report()
    report.save(tmp_path)
    report = UnlearningReport.load(tmp_path)
    assert report.outcome["status"] == "missed" and report.outcome["mark"] == trainer.outcome.mark
    for text in (report.table(), render_card(report, model_name="tiny")):
        assert trainer.outcome.summary in text and trainer.outcome.advice in text
    assert "not recorded" in render_card(UnlearningReport(), model_name="tiny").partition("Outcome")[2][:20]
    assert "outcome" not in UnlearningReport().table()


# Own metrics must not change when a run stops


def own_metrics(prediction: Any) -> dict[str, float]:
    return {"probability": 0.0, "loss": 0.0}  # names of the package's metrics, with other values


RULES: dict[str, dict[str, Any]] = {
    "held-out rows": ASCENT | {"forget_metric": "loss"},
    "target": ASCENT | {"forget_metric": "loss", "forget_target": 4.0},
    "attacked": ASCENT
    | {"forget_metric": "loss", "forget_target": 4.0, "adversary_steps": 1, "adversary_learning_rate": 1e-4},
    "retain drop": ASCENT | {"max_retain_drop": 0.001, "forget_target": 1e-9},
}


def ended(folder: Path, rule: str, **own: Any) -> tuple[str, int, dict[str, Tensor]]:
    args = settings(folder, eval_strategy="steps", eval_steps=1, **RULES[rule])
    splits = {"retain": RETAIN} if rule == "retain drop" else None
    holdout = None if "forget_target" in RULES[rule] else HOLDOUT
    trainer = UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, holdout_dataset=holdout, eval_dataset=splits, **own)
    trainer.train()
    return trainer.stop_reason, trainer.state.global_step, trained(trainer.model)


@pytest.mark.parametrize("rule", RULES)
def test_own_metrics_do_not_change_where_a_run_stops(rule: str, tmp_path: Path) -> None:
    reason, step, weights = ended(tmp_path, rule)
    assert 0 < step < ASCENT["max_steps"], reason
    own_reason, own_step, own_weights = ended(tmp_path, rule, compute_metrics=own_metrics)
    assert (own_reason, own_step) == (reason, step)
    assert all(torch.equal(weights[name], own_weights[name]) for name in weights)


# A run that had made all its steps goes on


def made(folder: Path, steps: int, **changes: Any) -> UnlearningTrainer:
    args = settings(folder, constraint="none", max_steps=steps, save_strategy="steps", save_steps=1, **changes)
    return UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN)


def test_a_run_that_had_made_all_its_steps_goes_on_with_more_of_them(tmp_path: Path) -> None:
    made(tmp_path / "parts", 2).train()
    again = made(tmp_path / "parts", 4)
    again.train(resume_from_checkpoint=True)
    whole = made(tmp_path / "whole", 4)
    whole.train()
    assert again.state.global_step == 4 and again.stop_reason == "all 4 steps were made"
    expected, resumed = trained(whole.model), trained(again.model)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    once_more = made(tmp_path / "parts", 4)
    once_more.train(resume_from_checkpoint=True)
    assert once_more.state.global_step == 4 and "all 4 steps" in once_more.stop_reason


@pytest.mark.parametrize("change", [{"forget_target": 1e-9}, {"forget_metric": "accuracy"}])
def test_a_run_that_a_rule_had_ended_does_not_end_again_under_another_rule(
    change: dict[str, Any], tmp_path: Path
) -> None:
    first = {"eval_strategy": "steps", "eval_steps": 1, "loss": "grad_ascent", "learning_rate": 5e-2}
    trainer = made(tmp_path, 40, **first, forget_target=0.01)
    trainer.train()
    assert "target" in trainer.stop_reason and trainer.state.global_step > 0
    with pytest.raises(ValueError, match=f"had ended .* with {next(iter(change))} "):
        made(tmp_path, 40, **{**first, "forget_target": 0.01, **change}).train(resume_from_checkpoint=True)
    again = made(tmp_path, 60, **first, forget_target=0.01)
    again.train(resume_from_checkpoint=True)  # more steps do not undo a rule
    assert again.stop_reason == trainer.stop_reason and again.outcome is not None
    assert again.outcome.status == "reached" and math.isfinite(again.outcome.value or math.nan)
