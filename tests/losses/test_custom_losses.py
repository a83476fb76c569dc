"""Losses given as functions, and what a loss refuses: wrong terms, labels and rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import reference_losses as reference
from helpers.loss_batches import Batch, before, dense, gradients, made_up, moved
from helpers.tiny import (
    CASES,
    CLASSES,
    collate,
    image_rows,
    requires_asset,
    sharpen,
    text_rows,
    tiny_gpt2,
    tiny_llama,
    tiny_vit,
)
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.losses import LOSSES, build_loss, register_loss
from hf_unlearn.models.forward import Predictions, predict


def with_alternates(case: str) -> tuple[nn.Module, nn.Module, Batch]:
    """(model, original, batch) with alternate answers of other lengths than the forget answers."""
    make, rows = CASES[case]
    original = sharpen(make(), 1.5)
    alternate = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2)), "alternate": collate(alternate)}
    return moved(original), original, batch


def likelihood(predictions: Predictions, original: None, *, weight: float = 1.0) -> Tensor:
    return weight * (-predictions.nll_L).exp()


def test_a_function_is_a_loss() -> None:
    model, _, batch = with_alternates("gpt2")
    loss = build_loss(likelihood, {"weight": 2.0})
    assert loss.name == f"{__name__}:likelihood" and not loss.needs_original
    p = [reference.softmax(z)[y] for z, y in reference.pairs(dense(model, batch["forget"]))]
    assert loss(model, batch).item() == pytest.approx(2 * np.mean(p), rel=1e-5)
    assert build_loss(loss) is loss
    with pytest.raises(SettingsError, match="has no setting 'beta', only gamma, alpha, retain, weight"):
        build_loss(likelihood, {"beta": 1})


def test_a_loss_is_named_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses_for_test.py").write_text(
        "from hf_unlearn.losses import register_loss\n"
        "def square(predictions, original, *, scale=1.0):\n    return scale * (-2 * predictions.nll_L).exp()\n"
        "@register_loss('own_for_test', unit='row', reads_original='nll')\n"
        "def rise(predictions, original):\n"
        "    return original.sum_by_row(original.nll_L) - predictions.sum_by_row(predictions.nll_L)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    model, original, batch = with_alternates("gpt2")
    try:
        loss = build_loss("own_losses_for_test:square", {"scale": 3.0})
        p = [reference.softmax(z)[y] for z, y in reference.pairs(dense(model, batch["forget"]))]
        assert loss(model, batch).item() == pytest.approx(3 * np.mean(np.square(p)), rel=1e-5)
        named = build_loss("own_losses_for_test:rise")
        assert named.kind is LOSSES["own_for_test"] and named.needs_original
        assert torch.isfinite(named(model, batch, before(model, original)))
    finally:
        LOSSES.remove("own_for_test")
    with pytest.raises(SettingsError, match="cannot import loss 'own_losses_for_test:nothing'"):
        build_loss("own_losses_for_test:nothing")
    with pytest.raises(SettingsError, match="cannot import loss 'no_such_module_at_all:f': No module named"):
        build_loss("no_such_module_at_all:f")
    with pytest.raises(SettingsError, match="is not a function of"):
        build_loss("own_losses_for_test:number")


def test_a_term_with_the_wrong_number_of_values_is_an_error() -> None:
    model, _, batch = with_alternates("gpt2")
    with pytest.raises(SettingsError, match=r"must return one value per label \(\d+ here\), got \[\]"):
        build_loss(lambda predictions, original: predictions.nll_L.mean())(model, batch)
    name = "by_row_for_test"
    try:
        register_loss(name, unit="row")(lambda predictions, original: predictions.nll_L)
        with pytest.raises(SettingsError, match=r"must return one value per row \(4 here\), got \[\d+\]"):
            build_loss(name)(model, batch)
    finally:
        LOSSES.remove(name)


# Labels that cannot be


@pytest.mark.parametrize(("make", "rows", "wrong"), [(tiny_vit, image_rows, CLASSES), (tiny_vit, image_rows, -3)])
def test_a_label_outside_the_classes_is_an_error(make: Any, rows: Any, wrong: int) -> None:
    batch = collate([row | {"labels": wrong if i == 1 else 0} for i, row in enumerate(rows(3))])
    with pytest.raises(DataError, match=rf"label {wrong} is none of the model's 5 classes \(0 to 4\)"):
        predict(make(), batch)


def test_a_row_longer_than_the_context_is_an_error() -> None:
    batch = collate(text_rows(2, lengths=(33,)))
    with pytest.raises(DataError, match="a row has 33 tokens, the model's context is 32; lower max_length"):
        predict(tiny_gpt2(), batch)
    assert torch.isfinite(predict(tiny_llama(), batch).logits_LV).all()  # whose context is 64


def test_labels_that_do_not_fit_the_logits_are_an_error() -> None:
    batch = collate(image_rows(3))
    with pytest.raises(ModelError, match=r"gives logits \[3, 5\] for labels \[3, 5\]"):
        predict(tiny_vit(), {**batch, "labels": torch.zeros(3, 5, dtype=torch.long)})


def test_losses_run_on_a_real_model() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(requires_asset("stories260K"), dtype=torch.float32).eval()
    rows = text_rows(3, lengths=(9, 12, 8))
    batch = {
        "forget": collate(rows),
        "retain": collate(text_rows(2, seed=1)),
        "alternate": collate(text_rows(3, seed=2)),
    }
    original = copy.deepcopy(model)
    for name, settings in (("dpo", {}), ("rmu", {"layer": 2})):
        result = gradients(build_loss(name, settings)(model, batch, before(model, original)), model)
        assert torch.isfinite(result).all() and result.abs().max() > 0


def test_made_up_predictions_have_no_extras() -> None:
    assert made_up().hidden is None and made_up().alternate is None and made_up().inputs is None
