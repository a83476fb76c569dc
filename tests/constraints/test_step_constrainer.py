"""Laws of the constrained optimizer, for any torch optimizer and without the Trainer.

Each realised step obeys the constraint, whatever momentum, preconditioning and weight decay add, and the original
weights can be restored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import dense_twin as reference
from helpers import tiny as cases
from helpers.constrained_mlp import LAYERS, OPTIMIZERS, Optimizer, Setting, inside, moved
from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.constraints.step_constrainer import StepConstrainer, constrain_optimizer
from hf_unlearn.errors import CoverageError, SettingsError, StatisticsError
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_energy_keeps_every_move_out_of_the_span_of_the_retain_rows(name: str) -> None:
    setting = Setting()
    before, forget = setting.logits(setting.retain), setting.model(setting.forget["pixel_values"])
    optimizer = OPTIMIZERS[name](setting.parameters)
    assert constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(1.0)) is optimizer
    setting.train(optimizer, 60)
    for layer, move_OI in setting.moves().items():
        rows_NI = setting.rows_NI[layer]
        assert np.linalg.norm(move_OI) > 0.05
        assert inside(move_OI, rows_NI) < 2e-6
        restored_ON, original_ON = setting.weight(layer) @ rows_NI.T, setting.original[layer] @ rows_NI.T
        np.testing.assert_allclose(restored_ON, original_ON, atol=2e-6 * max(1, np.linalg.norm(move_OI)))
    unlearned = (setting.model(setting.forget["pixel_values"]) - forget).abs().max()
    assert unlearned > 0.1
    assert (setting.logits(setting.retain) - before).abs().max() < 1e-5 * max(1, unlearned.item())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_the_constraint_moves_enter_the_span(name: str) -> None:
    setting = Setting()
    before = setting.logits(setting.retain)
    optimizer = OPTIMIZERS[name](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, None)
    setting.train(optimizer, 60)
    assert min(inside(move, setting.rows_NI[layer]) for layer, move in setting.moves().items()) > 0.05
    assert (setting.logits(setting.retain) - before).abs().max() > 0.05


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}])
def test_constrained_moves_of_sgd_are_the_same_whether_or_not_gradients_are_projected_first(settings: dict) -> None:
    """So the step hook skips half of the work; a caller who clips gradients projects them. The control: AdamW."""

    def moves(make: Any, project: bool) -> dict[str, np.ndarray]:
        setting = Setting()
        optimizer = make(setting.parameters)
        constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(0.9))
        constrainer: Any = optimizer.constrainer  # type: ignore[attr-defined]
        calls = []
        constrainer.constrain_gradients = lambda: (calls.append(1), type(constrainer).constrain_gradients(constrainer))
        if make is adamw:
            constrainer._is_linear = lambda optimizer: True
        for _ in range(20):
            setting.gradients()
            if project:
                constrainer.constrain_gradients()
            optimizer.step()
        assert len(calls) == 20 * project
        return setting.moves()

    def sgd(parameters: Any) -> Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, **settings)

    def adamw(parameters: Any) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01)

    first, second = moves(sgd, True), moves(sgd, False)
    for layer, move_OI in first.items():
        assert np.linalg.norm(second[layer] - move_OI) < 1e-5 * np.linalg.norm(move_OI)
    first, second = moves(adamw, True), moves(adamw, False)
    assert max(np.linalg.norm(second[n] - move) / np.linalg.norm(move) for n, move in first.items()) > 1e-2


def test_projecting_the_gradient_alone_is_not_enough_for_adamw() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["adamw"](setting.parameters)
    constrainer = StepConstrainer(setting.model, setting.statistics, EnergyConstraint(1.0))
    for _ in range(20):
        setting.gradients()
        constrainer.constrain_gradients()
        optimizer.step()
    assert max(inside(move, setting.rows_NI[layer]) for layer, move in setting.moves().items()) > 0.05


def dense(constraint: Constraint, setting: Setting, layer: str, step_OI: np.ndarray) -> np.ndarray:
    """Twin of a ridge or Kronecker step from raw rows and explicit inverses."""
    rows_NI = setting.rows_NI[layer]
    gram_II = reference.gram_sum(rows_NI) / len(rows_NI)
    if isinstance(constraint, RidgeConstraint):
        return step_OI @ reference.shrinkage(gram_II, constraint.strength)
    assert isinstance(constraint, KroneckerConstraint)
    fisher_OO = setting.statistics.fisher(layer).numpy()
    return reference.kronecker(step_OI, gram_II, fisher_OO, constraint.strength_in, constraint.strength_out)


SOFT = [RidgeConstraint(0.1), KroneckerConstraint(0.1, 0.3)]


@pytest.mark.parametrize("constraint", SOFT)
def test_a_soft_sgd_step_is_the_closed_form_of_the_gradient(constraint: Constraint) -> None:
    setting = Setting(torch.float64)
    optimizer = torch.optim.SGD(setting.parameters, lr=0.1)
    constrain_optimizer(optimizer, setting.model, setting.statistics, constraint)
    gradients = setting.gradients()
    optimizer.step()
    for layer, gradient_OI in zip(LAYERS, gradients, strict=True):
        move_OI = setting.moves()[layer]
        twin_OI = -0.1 * dense(constraint, setting, layer, gradient_OI)
        np.testing.assert_allclose(move_OI, twin_OI, atol=1e-6 * np.abs(gradient_OI).max())
        assert np.linalg.norm(move_OI + 0.1 * gradient_OI) > 0.1 * np.linalg.norm(move_OI)


@pytest.mark.parametrize("constraint", SOFT)
def test_soft_momentum_steps_are_momentum_on_constrained_gradients(constraint: Constraint) -> None:
    setting = Setting(torch.float64)
    optimizer = torch.optim.SGD(setting.parameters, lr=0.1, momentum=0.9)
    constrain_optimizer(optimizer, setting.model, setting.statistics, constraint)
    velocity = {layer: np.zeros_like(setting.original[layer]) for layer in LAYERS}
    twin = dict(setting.original)
    for _ in range(6):
        for layer, gradient_OI in zip(LAYERS, setting.gradients(), strict=True):
            velocity[layer] = 0.9 * velocity[layer] + dense(constraint, setting, layer, gradient_OI)
            twin[layer] = twin[layer] - 0.1 * velocity[layer]
        optimizer.step()
    for layer in LAYERS:
        np.testing.assert_allclose(setting.weight(layer), twin[layer], atol=1e-6)
        assert np.abs(twin[layer] - setting.original[layer]).max() > 1e-2


@pytest.mark.parametrize("constraint", SOFT)
def test_a_soft_adamw_step_is_the_closed_form_of_the_realised_step(constraint: Constraint) -> None:
    free, setting = Setting(torch.float64), Setting(torch.float64)
    for one, kind in ((free, None), (setting, constraint)):
        optimizer = OPTIMIZERS["adamw"](one.parameters)
        constrain_optimizer(optimizer, one.model, one.statistics, kind)
        one.train(optimizer, 1)
    for layer in LAYERS:
        twin_OI = dense(constraint, setting, layer, free.moves()[layer])
        np.testing.assert_allclose(setting.moves()[layer], twin_OI, atol=1e-6)


def test_layers_can_have_different_constraints() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["momentum"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, {"first": EnergyConstraint(1.0), "*": None})
    setting.train(optimizer, 10)
    moves = setting.moves()
    assert inside(moves["first"], setting.rows_NI["first"]) < 1e-5
    assert inside(moves["second"], setting.rows_NI["second"]) > 0.05


def test_the_original_weights_are_in_the_model_within_the_context() -> None:
    setting, constrainer = moved()
    now = {layer: setting.weight(layer) for layer in LAYERS}
    with pytest.raises(KeyError), constrainer.original():
        assert all(np.array_equal(setting.weight(layer), setting.original[layer]) for layer in LAYERS)
        raise KeyError
    assert all(np.array_equal(setting.weight(layer), now[layer]) for layer in LAYERS)
    assert not np.array_equal(now["first"], setting.original["first"])


def test_weights_can_be_restored() -> None:
    setting, constrainer = moved()
    saved, now = constrainer.copy_weights(), setting.weight("first")
    constrainer.restore()
    assert all(not move.any() for move in setting.moves().values())
    constrainer.restore(saved)
    assert np.array_equal(setting.weight("first"), now) and now.any()


def test_an_anchored_bfloat16_weight_does_not_drift_and_one_projected_step_by_step_does() -> None:
    def drift_after(steps: int, anchored: bool) -> float:
        torch.manual_seed(0)
        rows_NI, model = torch.randn(3, 16), nn.Sequential(nn.Linear(16, 8, bias=False)).bfloat16()
        statistics = RetainStatistics(
            gram_sums={"0": rows_NI.double().T @ rows_NI.double()},
            fisher_sums={},
            layers={"0": LayerSums("0", 8, False)},
            positions={"0": 3},
            rows=3,
            labels=0,
            weights="0",
            data="0",
        )
        constrainer = StepConstrainer(model, statistics, EnergyConstraint(1.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        constrainer.attach(optimizer)
        constrainer.measure_leak = True  # measuring stores the weights before the step, which are not the anchor
        first = constrainer.weights[0].anchor.clone()
        for _ in range(steps):
            if not anchored:
                constrainer.weights[0].anchor = model[0].weight.detach().clone()
            model[0].weight.grad = torch.randn(8, 16).bfloat16()
            optimizer.step()
        constrainer.weights[0].anchor = first
        assert (model[0].weight - first).norm() > 0.5 * first.norm()
        return constrainer.drift().relative

    assert drift_after(300, anchored=True) < 0.02
    assert drift_after(300, anchored=False) > 4 * drift_after(300, anchored=True)


def test_gradients_can_be_constrained_before_clipping() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["sgd"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(1.0))
    raw = setting.gradients()
    optimizer.constrainer.constrain_gradients()  # type: ignore[attr-defined]
    for parameter, layer, gradient_OI in zip(setting.parameters, LAYERS, raw, strict=True):
        twin_OI = gradient_OI @ reference.energy_projector(setting.rows_NI[layer], 1.0)
        np.testing.assert_allclose(parameter.grad, twin_OI, atol=1e-6)
        assert np.linalg.norm(gradient_OI - twin_OI) > 1e-3


def test_the_moments_hold_constrained_gradients_only() -> None:
    """What the constraint removes from a step must not fill the optimizer's moments."""
    for constraint, law in ((EnergyConstraint(1.0), True), (None, False)):
        setting = Setting()
        optimizer = OPTIMIZERS["adamw"](setting.parameters)
        constrain_optimizer(optimizer, setting.model, setting.statistics, constraint)
        setting.train(optimizer, 5)
        for layer, parameter in zip(LAYERS, setting.parameters, strict=True):
            moment_OI = optimizer.state[parameter]["exp_avg"].double().numpy()
            assert (inside(moment_OI, setting.rows_NI[layer]) < 1e-5) == law


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transposed_and_plain_weights_obey_alike(kind: str) -> None:
    model, rows = cases.CASES[kind][0](), cases.text_rows(4)
    statistics = collect_statistics(model, rows[:2], progress=False)
    original = {n: statistics_weight(model, n) for n in statistics.layers}
    spans = {n: reference.input_rows(model, rows[:2], n) for n in statistics.layers}
    freeze_unprotected(model, statistics.layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    constrain_optimizer(optimizer, model, statistics, EnergyConstraint(1.0))
    for _ in range(3):
        optimizer.zero_grad()
        (-model(**cases.collate(rows[2:])).loss).backward()
        optimizer.step()
    for name, rows_NI in spans.items():
        move_OI = statistics_weight(model, name) - original[name]
        assert np.linalg.norm(move_OI) > 0.01 and inside(move_OI, rows_NI) < 1e-4, name


def statistics_weight(model: nn.Module, name: str) -> np.ndarray:
    module = model.get_submodule(name)
    weight = module.weight.detach().double().numpy().copy()
    return weight if isinstance(module, nn.Linear) else weight.T


def test_an_uncovered_parameter_is_refused_and_can_be_exposed() -> None:
    setting = Setting()
    setting.model.first.bias.requires_grad_(True)
    parameters = [p for p in setting.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(CoverageError, match=r"first\.bias; call freeze_unprotected"):
        constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint())
    constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(), allow_exposed=("first.bias",))
    bias = setting.model.first.bias.clone()
    setting.train(optimizer, 1)
    assert not torch.equal(bias, setting.model.first.bias)


def test_statistics_of_other_weights_are_refused() -> None:
    setting, _ = moved()
    optimizer = torch.optim.SGD(setting.parameters, lr=0.1)
    with pytest.raises(StatisticsError, match="other weights"):
        constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint())
    with pytest.raises(StatisticsError, match="another model"):
        constrain_optimizer(optimizer, cases.tiny_mlp(width=9), setting.statistics, EnergyConstraint())


def test_a_constraint_without_statistics_is_refused() -> None:
    with pytest.raises(SettingsError, match="a constraint needs statistics"):
        StepConstrainer(cases.tiny_mlp(), None, EnergyConstraint())


def test_a_wrapped_optimizer_is_constrained_within() -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    setting = Setting()
    inner = OPTIMIZERS["momentum"](setting.parameters)
    wrapped: Any = Wrapper(inner)
    assert constrain_optimizer(wrapped, setting.model, setting.statistics, EnergyConstraint(1.0)) is wrapped
    setting.train(inner, 3)
    assert max(inside(move, setting.rows_NI[layer]) for layer, move in setting.moves().items()) < 1e-5
