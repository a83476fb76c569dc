"""Laws of relative steps: their norm is the learning rate times the norm of the weights, and the constraint holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.constrained_mlp import LAYERS, OPTIMIZERS, Setting, inside
from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer


@pytest.mark.parametrize("constraint", [None, EnergyConstraint(0.9), RidgeConstraint(), KroneckerConstraint()])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_relative_step_has_the_norm_of_the_learning_rate_times_the_weights(
    name: str, constraint: Constraint | None
) -> None:
    setting = Setting()
    optimizer = OPTIMIZERS[name](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, constraint, relative_step=True)
    for lr in (0.1, 0.001):
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = np.concatenate([setting.weight(layer).ravel() for layer in LAYERS])
        setting.train(optimizer, 1)
        after = np.concatenate([setting.weight(layer).ravel() for layer in LAYERS])
        assert np.linalg.norm(after - before) == pytest.approx(lr * np.linalg.norm(before), rel=2e-4)


def test_a_relative_step_does_not_depend_on_the_scale_of_the_loss_and_an_absolute_one_does() -> None:
    def move(relative: bool, scale: float) -> np.ndarray:
        setting = Setting()
        optimizer = OPTIMIZERS["sgd"](setting.parameters)
        constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(0.9), relative_step=relative)
        setting.gradients(-scale)
        optimizer.step()
        return setting.moves()["first"]

    np.testing.assert_allclose(move(True, 1e-6), move(True, 1e3), rtol=1e-3, atol=1e-7)
    assert np.linalg.norm(move(False, 1e-6)) < 1e-3 * np.linalg.norm(move(False, 1.0))


def test_a_relative_step_keeps_the_guarantee() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["adamw"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(1.0), relative_step=True)
    setting.train(optimizer, 40)
    assert max(inside(move, setting.rows_NI[layer]) for layer, move in setting.moves().items()) < 1e-5


def test_without_a_gradient_there_is_no_step() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["sgd"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(), relative_step=True)
    optimizer.step()
    setting.model.zero_grad()
    for parameter in setting.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not any(move.any() for move in setting.moves().values())
