"""Laws of random labels: they are the cross-entropy to another class, drawn from the row and the seed alone."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import reference_losses as reference
from helpers.loss_batches import Batch, dense, forget_likelihood, memorised, step
from helpers.tiny import (
    CLASSES,
    collate,
    image_rows,
    sharpen,
    text_class_rows,
    text_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_vit,
)
from hf_unlearn.errors import DataError
from hf_unlearn.losses import LOSSES, build_loss
from hf_unlearn.models.forward import Predictions, predict


def drawn(model: nn.Module, batch: Batch, seed: int = 0) -> list[int]:
    """The classes that the loss pulls toward: where its gradient by the logits is negative."""
    predictions = predict(model, batch)
    logits_LV = predictions.logits_LV.detach().requires_grad_()
    free = Predictions(logits_LV, predictions.labels_L, predictions.rows_L, predictions.n_rows, inputs=batch)
    slope_LV = torch.autograd.grad(LOSSES["random_label"].term(free, None, seed=seed).sum(), logits_LV)[0]
    assert ((slope_LV < 0).sum(1) == 1).all()
    return slope_LV.argmin(1).tolist()


@pytest.mark.parametrize(("make", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_class_rows)])
def test_random_label_is_the_cross_entropy_to_another_class(make: Any, rows: Any) -> None:
    model, batch = sharpen(make()), collate(rows(8))
    others = drawn(model, batch)
    assert all(other != label for other, label in zip(others, batch["labels"].tolist(), strict=True))
    twin = np.mean(
        [reference.nll(z, y) for (z, _), y in zip(reference.pairs(dense(model, batch)), others, strict=True)]
    )
    loss = build_loss("random_label")(model, {"forget": batch}).item()
    assert loss == pytest.approx(twin, rel=1e-5)
    assert abs(loss - reference.retain_nll(dense(model, batch))) > 1e-3


def test_random_labels_depend_on_the_row_and_the_seed_alone() -> None:
    model, rows = tiny_bert(), text_class_rows(8)
    whole = drawn(model, collate(rows))
    assert drawn(model, collate(rows[5:])) == whole[5:] and drawn(model, collate(rows[::-1])) == whole[::-1]
    assert drawn(model, collate(rows, side="left")) == whole
    assert drawn(model, collate(rows), seed=1) != whole


def test_random_labels_are_uniform_over_the_other_classes() -> None:
    rows = [row | {"labels": 2} for row in image_rows(800)]
    counts = Counter(drawn(tiny_vit(), collate(rows)))
    assert set(counts) == set(range(CLASSES)) - {2}
    assert all(abs(count - 200) < 4 * np.sqrt(800 * 0.25 * 0.75) for count in counts.values())  # four deviations


@pytest.mark.parametrize(("make", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_class_rows)])
def test_a_small_step_down_random_label_lowers_the_forget_probability(make: Any, rows: Any) -> None:
    original, changes = make(), []
    batch = {"forget": memorised(original, collate(rows(6, seed=1)))}
    for size in (2e-3, -2e-3):
        model = copy.deepcopy(original)
        step(model, build_loss("random_label")(model, batch), size)
        changes.append(forget_likelihood(model, batch) - forget_likelihood(original, batch))
    assert changes[0] < -1e-5 and changes[1] > 1e-5


def test_random_label_is_for_classes() -> None:
    with pytest.raises(
        DataError, match="'random_label' is for rows with a class label; for token labels use next_best"
    ):
        build_loss("random_label")(tiny_gpt2(), {"forget": collate(text_rows(2))})
