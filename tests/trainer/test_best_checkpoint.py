"""Laws of the best checkpoint: it is the best by the metric among those, and only those, that meet the floor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from helpers.questions import letters, tofu_splits
from helpers.tiny import text_rows, tiny_llama
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning, training_metrics
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

FORGET, RETAIN = text_rows(4), text_rows(6, 1)


def config(folder: Path, **options: Any) -> UnlearningConfig:
    common: dict[str, Any] = {
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 6,
        "learning_rate": 2e-2,
        "constraint": "none",
        "loss": "grad_ascent",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_train_batch_size": 4,
    }
    return UnlearningConfig(str(folder), **(common | options))


def best(folder: Path, **options: Any) -> UnlearningConfig:
    chosen: dict[str, Any] = {
        "load_best_model_at_end": True,
        "greater_is_better": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "forget_probability",
    }
    return config(folder, **(chosen | options))


def run(args: UnlearningConfig, **options: Any) -> UnlearningTrainer:
    trainer = UnlearningTrainer(
        tiny_llama(), args, FORGET, eval_dataset={"forget": FORGET, "retain": RETAIN}, **options
    )
    trainer.train()
    return trainer


def evaluations(trainer: UnlearningTrainer, name: str) -> list[float]:
    return [line[f"eval_{name}"] for line in trainer.state.log_history if f"eval_{name}" in line]


def test_the_best_checkpoint_has_forgotten_most_among_those_that_meet_the_floor(tmp_path: Path) -> None:
    free = run(best(tmp_path / "free"))
    forget = evaluations(free, "forget_probability")
    assert forget == sorted(forget, reverse=True) and free.state.best_global_step == len(forget)
    floor = (forget[3] + forget[4]) / 2
    trainer = run(best(tmp_path / "floor", utility_floor={"forget_probability": floor}))
    assert trainer.state.best_global_step == 4
    kept = score_rows(trainer.model, FORGET, PaddingCollator()).probability.mean()
    assert kept == pytest.approx(forget[3], rel=1e-4) and kept > floor


def test_there_is_no_best_checkpoint_if_no_evaluation_meets_the_floor(tmp_path: Path) -> None:
    trainer = run(best(tmp_path, utility_floor={"retain_probability": 1.1}))
    assert trainer.state.best_model_checkpoint is None


def test_a_floor_needs_a_choice_among_checkpoints_and_an_existing_metric(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set load_best_model_at_end and metric_for_best_model"):
        config(tmp_path, utility_floor={"retain_probability": 0.5})
    with pytest.raises(SettingsError, match="utility_floor must be JSON"):
        best(tmp_path, utility_floor="0.5")
    with pytest.raises(
        SettingsError, match=r"utility_floor names 'retain_rouge'; an evaluation has .*eval_retain_loss"
    ):
        run(best(tmp_path, utility_floor={"retain_rouge": 0.5}))


def test_forget_quality_during_training_equals_the_report_and_chooses_the_checkpoint(tmp_path: Path) -> None:
    raw, retrained = tofu_splits(), tiny_llama(1)
    judge = training_metrics(raw, ["forget_quality", "truth_ratio"], retrained=retrained, processing_class=letters())
    args = best(tmp_path, metric_for_best_model="forget_truth_ratio", greater_is_better=True)
    trainer = run(args, extra_metrics=judge)
    ratios, qualities = (evaluations(trainer, f"forget_{name}") for name in ("truth_ratio", "forget_quality"))
    assert len(ratios) == len(qualities) == 6 and len(set(ratios)) == 6
    assert trainer.state.best_global_step == 1 + ratios.index(max(ratios))
    report = evaluate_unlearning(
        trainer.model, raw, retrained=retrained, metrics=["forget_quality", "truth_ratio"], processing_class=letters()
    )
    for name, values in (("truth_ratio", ratios), ("forget_quality", qualities)):
        metric = report.get(name, "forget")
        assert metric is not None and metric.value == pytest.approx(values[ratios.index(max(ratios))], rel=1e-4)


def test_a_training_judge_gives_nan_without_a_retrained_model_and_needs_wrong_answers() -> None:
    judge = training_metrics(tofu_splits(), ["forget_quality"], processing_class=letters())
    assert math.isnan(judge(tiny_llama())["forget_forget_quality"])
    with pytest.raises(DataError, match="needs wrong answers"):
        training_metrics({"forget": FORGET}, ["truth_ratio"])
