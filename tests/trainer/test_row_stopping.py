"""Laws of row stopping: rows that have reached the mark have no part in a step, rows that are too improbable are pulled
up, and if no row is pushed or pulled, no weight moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.memorised import MEMORISED, mean_nll, memorised
from helpers.tiny import collate, text_rows, tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, settings, trained
from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.presets import preset
from hf_unlearn.trainer.row_stopping import RowStopping
from hf_unlearn.trainer.trainer import UnlearningTrainer


@pytest.mark.parametrize("pushed", [True, False])
def test_pull_and_push_have_norms_in_the_ratio_of_their_rows(pushed: bool, double: None) -> None:
    """Compare the pull of the two lowest rows with a twin's; norms have the ratio of the shares of rows."""
    model, twin, rows = tiny_llama(), tiny_llama(), text_rows(6, seed=5)
    nll_B = torch.tensor([mean_nll(model, [row]).item() for row in rows])
    order = nll_B.argsort()
    low = [rows[i] for i in order[4:]]  # the two least probable ones
    row_stopping = RowStopping(
        StepConstrainer(model, None, None), "probability", 0.0, lowest=math.exp(-nll_B[order[3:5]].mean().item())
    )
    row_stopping.accumulate_pull(model, collate(rows))
    twin_loss = mean_nll(twin, low) * _labels(low) / _labels(rows)
    pull = torch.autograd.grad(twin_loss, list(twin.parameters()))
    row_stopping.mark = (
        math.exp(-nll_B[order[2:4]].mean().item()) if pushed else 1.0
    )  # three rows have not reached it, or none
    inputs, pushes = row_stopping.select_pushed(model, {"forget": collate(rows), "alternate": collate(rows)})
    assert pushes == pushed and all(len(part["labels"]) == (3 if pushed else 6) for part in inputs.values())
    push = [torch.randn_like(p) if pushed else torch.zeros_like(p) for p in twin.parameters()]
    for parameter, gradient in zip(model.parameters(), push, strict=True):
        parameter.grad = gradient.clone()
    row_stopping.add_pull()
    norm_push, norm_pull = (torch.cat([g.flatten() for g in gradients]).norm() for gradients in (push, pull))
    scale = (2 / 6) / (3 / 6) * norm_push / norm_pull if pushed else 1.0
    for (name, parameter), pushing, pulling in zip(model.named_parameters(), push, pull, strict=True):
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, pushing + scale * pulling, atol=1e-6, rtol=1e-4), name


def _labels(rows: list[dict[str, Any]]) -> int:
    return sum(int((collate([row])["labels"][:, 1:] != -100).sum()) for row in rows)


@pytest.mark.parametrize(("share", "moves"), [(0.8, False), (0.3, True), (1.5, True)])
def test_rows_between_both_bounds_do_not_move_the_weights(share: float, moves: bool, tmp_path: Path) -> None:
    """Their probability is 0.8 of the never-seen rows'; the negative controls are below and above the bounds."""
    model = tiny_llama()
    rows = [text_rows(1, seed=5)[0]] * 4
    level = math.exp(-mean_nll(model, rows).item()) / share
    args = settings(tmp_path, max_steps=3, adversary_steps=1, adversary_learning_rate=1e-8, loss="ce_u", momentum=0.9)
    trainer = UnlearningTrainer(model, args, rows, RETAIN, holdout_dataset=HOLDOUT)
    trainer.set_stopping_rows(rows, level)
    before = trained(model)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained(model).items()) == moves


def scores(model: Any, rows: list[dict[str, Any]], metric: str) -> Any:
    return getattr(score_rows(model, rows, collate), metric)


@pytest.mark.parametrize("metric", ["probability", "loss", "accuracy"])
@pytest.mark.parametrize("by_row", [True, False])
def test_a_step_has_the_gradient_of_the_rows_that_have_not_reached_the_mark(
    metric: str, by_row: bool, tmp_path: Path
) -> None:
    """Compare one SGD step of `grad_ascent` with a twin's; the negative control takes all rows."""
    model, twin, rows = tiny_llama(), tiny_llama(), text_rows(6, seed=5)
    score_of = scores(model, rows, metric)
    mark = sorted(score_of)[3] if metric == "loss" else sorted(score_of)[2]
    short = [row for row, s in zip(rows, score_of, strict=True) if (s < mark if metric == "loss" else s > mark)]
    assert 0 < len(short) < len(rows)
    args = settings(
        tmp_path,
        max_steps=1,
        loss="grad_ascent",
        constraint="none",
        relative_step=False,
        learning_rate=0.1,
        momentum=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=6,
        train_only=["*mlp*"],
        forget_metric=metric,
        row_stopping=by_row,
    )
    trainer = UnlearningTrainer(model, args, rows, holdout_dataset=HOLDOUT)
    trainer.set_stopping_rows(rows, mark)
    before = trained(model)
    trainer.train()
    pushed = short if by_row else rows
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("mlp" in name and parameter.ndim > 1)
    (mean_nll(twin, pushed) * _labels(pushed) / _labels(rows)).backward()
    for name, parameter in twin.named_parameters():
        step = trained(model)[name] - before[name]
        expected = torch.zeros_like(step) if parameter.grad is None else 0.1 * parameter.grad
        assert torch.allclose(step, expected, atol=1e-6 + 1e-3 * expected.abs().max().item()), name


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("mark", "moves"), [(1.0, False), (0.0, True)])
def test_no_weight_moves_if_every_row_has_reached_the_mark(
    optim: str, mark: float, moves: bool, tmp_path: Path
) -> None:
    """Neither momentum nor weight decay moves it; the negative control is far from the mark."""
    model = tiny_llama()
    args = settings(tmp_path, max_steps=3, optim=optim, momentum=0.9, weight_decay=0.1, row_stopping=True)
    trainer = UnlearningTrainer(model, args, FORGET, RETAIN, holdout_dataset=HOLDOUT)
    trainer.set_stopping_rows(FORGET, mark)
    before = trained(model)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained(model).items()) == moves


def test_rows_end_just_beyond_the_mark(tmp_path: Path) -> None:
    """One evaluation, after many more steps than needed; the control, without row stopping, pushes all rows further."""
    median = {}
    for by_row in (True, False):
        model = memorised()
        statistics = collect_statistics(model, RETAIN, progress=False)
        args = settings(
            tmp_path,
            max_steps=80,
            eval_strategy="steps",
            eval_steps=80,
            per_device_train_batch_size=4,
            momentum=0.9,
            learning_rate=2e-3,
            loss="ce_u",
            forget_target=0.1,
            row_stopping=by_row,
            constraint_settings={"energy": 0.9},
        )
        trainer = UnlearningTrainer(model, args, MEMORISED, statistics=statistics)
        trainer.train()
        assert trainer.stop_reason, "the forget metric has reached its target"
        median[by_row] = np.median(scores(model, MEMORISED, "loss"))
    assert median[True] < 0.75 * median[False], median


def test_retain_rows_of_a_batch_are_complete_and_other_columns_stay() -> None:
    model, rows = tiny_llama(), text_rows(4, seed=5)
    middle = sorted(scores(model, rows, "probability"))[1]
    row_stopping = RowStopping(StepConstrainer(model, None, None), "probability", middle)
    parts = {"forget": {**collate(rows), "name": "forget"}, "retain": collate(rows), "alternate": collate(rows)}
    selected, pushes = row_stopping.select_pushed(model, parts)
    assert pushes
    assert {name: len(part["labels"]) for name, part in selected.items()} == {"forget": 2, "retain": 4, "alternate": 2}
    assert selected["forget"]["name"] == "forget"


@pytest.mark.parametrize("metric", ["probability", "loss"])
def test_a_row_whose_score_is_nan_is_pushed(metric: str) -> None:
    """Otherwise a broken model would train on; in the negative control all rows have reached the mark."""
    model, rows = tiny_llama(), text_rows(3, seed=5)
    row_stopping = RowStopping(StepConstrainer(model, None, None), metric, 0.0 if metric == "loss" else 1.0)
    assert row_stopping.select_pushed(model, {"forget": collate(rows)})[1] is False
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    inputs, pushes = row_stopping.select_pushed(model, {"forget": collate(rows)})
    assert pushes and len(inputs["forget"]["labels"]) == 3


def test_the_paper_preset_pushes_all_rows() -> None:
    assert preset("paper")["row_stopping"] is False
    assert "row_stopping" not in preset("default")
