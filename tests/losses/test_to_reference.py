"""Laws of `to_reference`: it equals a dense float64 twin, is least at the reference, and follows it, not the label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from helpers.loss_batches import made_up
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses import LOSSES, build_loss
from hf_unlearn.losses.to_reference import to_reference
from hf_unlearn.models.forward import Predictions


def twin(z_LV: np.ndarray, r_LV: np.ndarray, labels: np.ndarray, huber: float) -> np.ndarray:
    log_q, log_p = log_softmax(z_LV, axis=1), log_softmax(r_LV, axis=1)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(1)
    d = log_p[np.arange(len(labels)), labels] - log_q[np.arange(len(labels)), labels]
    return divergence + huber * np.where(np.abs(d) <= 1, d**2 / 2, np.abs(d) - 0.5)


@pytest.mark.parametrize("huber", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [0.5, 8.0])  # differences on both sides of the bend at one nat
def test_it_equals_its_twin(huber: float, scale: float) -> None:
    now, reference = made_up(40, 11, scale=scale), made_up(40, 11, scale=scale, seed=1)
    reference = Predictions(reference.logits_LV.detach(), now.labels_L, now.rows_L, now.n_rows)
    values = to_reference(now, reference, huber=huber)
    arrays = [p.logits_LV.detach().double().numpy() for p in (now, reference)]
    np.testing.assert_allclose(values.detach().numpy(), twin(*arrays, now.labels_L.numpy(), huber), rtol=1e-4)


def test_it_is_least_at_the_reference_and_pulls_from_both_sides() -> None:
    """Losses that push have no such point (control)."""
    reference = made_up(seed=1)
    at = Predictions(reference.logits_LV.detach().clone().requires_grad_(), *_rest(reference))
    values = to_reference(at, reference)
    assert values.detach().abs().max() < 1e-6
    assert torch.autograd.grad(values.sum(), at.logits_LV)[0].abs().max() < 1e-6
    pushed = torch.autograd.grad(LOSSES["ce_u"].term(at, None).sum(), at.logits_LV)[0]
    assert pushed.abs().max() > 1e-2
    for sign in (1, -1):  # a label that is too probable is lowered, one that is too improbable is raised
        moved = reference.logits_LV.detach().clone()
        moved[torch.arange(len(moved)), reference.labels_L] += sign
        moved.requires_grad_()
        slope_LV = torch.autograd.grad(to_reference(Predictions(moved, *_rest(reference)), reference).sum(), moved)[0]
        slope_L = slope_LV.gather(1, reference.labels_L.unsqueeze(1)).squeeze(1)
        assert (sign * slope_L > 0).all()


def test_the_second_term_lowers_a_label_that_the_reference_finds_improbable() -> None:
    """The divergence hardly sees the difference between 1e-4 and 1e-8, the second term does (control: without it)."""
    rows = torch.tensor([0]), torch.tensor([0]), 1
    reference = Predictions(torch.tensor([[-9.0, 0.0, 0.0]]), *rows)
    far = torch.tensor([[-18.0, 0.0, 0.0]])
    assert to_reference(Predictions(far, *rows), reference, huber=0.0) < 1e-2
    assert to_reference(Predictions(far, *rows), reference) > 4


def test_a_loss_with_a_target_needs_its_reference_and_rehearses() -> None:
    loss = build_loss("to_reference")
    assert loss.reference_contents == {"forget": "logits"} and loss.rehearses
    assert not build_loss("to_reference", {"alpha": 0}).rehearses and not build_loss("npo").rehearses
    assert build_loss("npo").reference_contents == {}
    batch = {"forget": {"pixel_values": torch.eye(3), "labels": torch.tensor([0, 1, 2])}}
    with pytest.raises(SettingsError, match="reads the reference model's predictions; pass `reference`"):
        loss(torch.nn.Identity(), batch)


def _rest(predictions: Predictions) -> tuple[torch.Tensor, torch.Tensor, int]:
    return predictions.labels_L, predictions.rows_L, predictions.n_rows
