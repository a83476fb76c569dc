"""Losses by name: unknown names, settings and traits are errors that name the known ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference_losses as reference
from helpers.loss_batches import (
    NEEDED,
    before,
    dense,
    setup,
)
from helpers.tiny import (
    CASES,
    collate,
    text_class_rows,
)
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.losses import LOSSES, build_loss, register_loss
from hf_unlearn.models.forward import Predictions


def test_unknown_loss_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'gradascent'; did you mean 'grad_ascent'.*choose from .*grad_diff"):
        build_loss("gradascent")


def test_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"loss 'npo' has no setting 'offset', only gamma, alpha, retain, beta"):
        build_loss("npo", {"offset": 0.1})
    assert build_loss("pgu", {"offset": 0.1}).settings == {"offset": 0.1}


@pytest.mark.parametrize(
    ("name", "given", "seen"),
    [
        ("npo", {"gamma": "a"}, "gamma of loss 'npo' must be a number, got 'a'"),
        ("npo", {"beta": None}, "beta of loss 'npo' must be a number, got None"),
        ("ce_u", {"alpha": True}, "alpha of loss 'ce_u' must be a number, got True"),
        ("pdu", {"eps": "x"}, "eps of loss 'pdu' must be a number, got 'x'"),
        ("pdu", {"eps": 0.2, "eta": [1]}, r"eta of loss 'pdu' must be a number, got \[1\]"),
    ],
)
def test_a_setting_that_is_not_a_number_is_an_error(name: str, given: dict, seen: str) -> None:
    with pytest.raises(SettingsError, match=seen):
        build_loss(name, given)
    build_loss("rmu", {"layer": "transformer.h.0"})  # names where names are meant
    build_loss("pdu", {"eps": 1, "update_upon": "epoch"})


def test_unknown_kind_of_retain_term_is_an_error() -> None:
    with pytest.raises(SettingsError, match="retain must be 'nll', 'kl' or 'hidden', got 'mse'"):
        build_loss("npo", {"retain": "mse"})


def test_grad_diff_needs_retain_rows_and_npo_does_not() -> None:
    model, original, batch = setup("vit", retain=False)
    with pytest.raises(DataError, match="'grad_diff' needs retain rows; pass retain_dataset"):
        build_loss("grad_diff")(model, batch)
    assert torch.isfinite(build_loss("npo")(model, batch, before(model, original)))


def test_a_new_loss_is_one_decorator() -> None:
    name = "square_of_the_probability"
    assert name not in LOSSES
    try:

        @register_loss(name, gamma=2.0)
        def square(predictions: Predictions, original: None, *, weight: float = 1.0) -> Tensor:
            return weight * (-2 * predictions.nll_L).exp()

        model, batch = CASES["bert"][0](), {"forget": collate(text_class_rows(3))}
        p = [reference.softmax(z)[y] for z, y in reference.pairs(dense(model, batch["forget"]))]
        result = build_loss(name, NEEDED.get(name, {}) | {"weight": 0.5})(model, batch).item()
        assert result == pytest.approx(2 * 0.5 * np.mean(np.square(p)), rel=1e-5)
    finally:
        LOSSES.remove(name)
    with pytest.raises(SettingsError, match="unknown loss"):
        build_loss(name)


def test_building_a_loss_leaves_the_given_settings_as_they_were() -> None:
    settings = {"gamma": 2.0, "beta": 0.3}
    loss = build_loss("npo", settings)
    assert settings == {"gamma": 2.0, "beta": 0.3} and loss.settings == {"beta": 0.3} and loss.gamma == 2.0
