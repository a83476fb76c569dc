"""Laws of the curves: they end at the model that was delivered, and the mark of the run is a line."""

from __future__ import annotations

from typing import Any

import pytest

from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing.plots import delivered_step, metrics_by_step

REACHED = "forget probability 0.1000 reached what held-out rows had before, 0.1100 at step {}"


def made(stopped: str, **settings: Any) -> UnlearningReport:
    """Three steps to 0.02, evaluated after each; 0.1 was delivered, and held-out rows had 0.11."""
    heights = {0: 0.9, 1: 0.5, 2: 0.3, 3: 0.02}
    history = [{"step": s, "eval_forget_probability": v, "eval_holdout_probability": 0.11} for s, v in heights.items()]
    history += [{"step": s, "loss": 0.5, "retain_drift": s / 10} for s in (1, 2, 3)]
    values = {("forget", "unlearned"): 0.1, ("holdout", "original"): 0.11, ("holdout", "unlearned"): 0.1}
    return UnlearningReport(
        metrics=[MetricValue("answer_probability", v, split, model, 9) for (split, model), v in values.items()],
        method={"stopped": stopped},
        settings={"forget_metric": "probability", **settings},
        history=history,
        drift={"relative": 0.22},
    )


def curves(report: UnlearningReport) -> tuple[Any, Any]:
    figure = metrics_by_step(report)
    assert figure is not None
    return figure.axes[0], figure.axes[1]


@pytest.mark.parametrize(
    ("stopped", "step"),
    [
        (REACHED.format(2.25), 2.25),
        (REACHED.format(0.0156), 0.0156),
        (REACHED.format(3), None),
        ("", None),
        ("all steps made", None),
        ("step 3 would drift 0.3, above max_retain_drift 0.25; undone", 2),
        ("step 1 would drift 0.3, above max_retain_drift 0.25; undone", 0),
        ("retain accuracy 0.5 at step 3 is 0.2 worse than before, above max_retain_drop 0.1; undone", 2),
    ],
)
def test_the_delivered_step_is_that_of_the_reason(stopped: str, step: float | None) -> None:
    assert delivered_step(made(stopped)) == step


def test_the_curves_end_at_the_delivered_model_and_not_at_the_last_step() -> None:
    for stopped, end, height, drift in ((REACHED.format(2.25), 2.25, 0.1, 0.22), (REACHED.format(3), 3, 0.02, 0.3)):
        upper, lower = curves(made(stopped))
        forget = upper.lines[0]
        assert (forget.get_xdata()[-1], forget.get_ydata()[-1]) == (end, height)
        assert (lower.lines[0].get_xdata()[-1], lower.lines[0].get_ydata()[-1]) == (end, drift)
        assert len(forget.get_xdata()) == 4


@pytest.mark.parametrize(
    ("settings", "mark"),
    [
        ({}, 0.11),
        ({"forget_target": 0.25}, 0.25),
        ({"forget_metric": "accuracy"}, None),
        ({"adversary_steps": 3}, None),
    ],
)
def test_the_mark_is_a_line_with_its_value(settings: dict[str, Any], mark: float | None) -> None:
    upper, _ = curves(made("", **settings))
    lines = [line.get_ydata()[0] for line in upper.lines if line.get_linestyle() == ":"]
    assert lines == ([] if mark is None else [mark])
    assert upper.get_title(loc="right") == ("" if mark is None else f"dotted: the mark, {mark:.3g}")
