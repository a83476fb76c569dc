"""Laws of the constrained optimizer, for any torch optimizer and without the Trainer.

Each realised step obeys the constraint, whatever momentum, preconditioning and weight decay add; the drift meter equals
its dense twin; the original weights can be had back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import dense_twin as reference
from helpers import tiny as cases
from torch import Tensor, nn

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.drift import step_leak
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.constraints.step_constrainer import StepConstrainer, constrain_optimizer
from hf_unlearn.errors import CoverageError, SettingsError, StatisticsError
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
}
if not hasattr(torch.optim, "Adafactor"):
    del OPTIMIZERS["adafactor"]
LAYERS = ("first", "second")


class Setting:
    """An MLP, 3 retain rows, 4 forget rows, and statistics of the retain rows on the original weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = cases.tiny_mlp(inputs=6, width=8).to(dtype)
        rows = [r | {"pixel_values": r["pixel_values"].to(dtype)} for r in cases.vector_rows(7)]
        self.retain, self.forget = rows[:3], cases.collate(rows[3:])
        self.statistics = collect_statistics(self.model, self.retain, fisher=True, progress=False)
        self.original = {name: self.weight(name) for name in LAYERS}
        self.rows_NI = {name: reference.input_rows(self.model, self.retain, name) for name in LAYERS}
        freeze_unprotected(self.model, find_layers(self.model))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def weight(self, name: str) -> np.ndarray:
        return self.model.get_submodule(name).weight.detach().double().numpy().copy()

    def moves(self) -> dict[str, np.ndarray]:
        return {name: self.weight(name) - self.original[name] for name in LAYERS}

    def gradients(self, sign: float = -1) -> list[np.ndarray]:
        """Gradients of ascent on the forget rows, left in `.grad`."""
        self.model.zero_grad()
        logits = self.model(self.forget["pixel_values"])
        (sign * nn.functional.cross_entropy(logits.float(), self.forget["labels"])).backward()
        return [p.grad.detach().double().numpy().copy() for p in self.parameters]

    def train(self, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            self.gradients()
            optimizer.step()

    def logits(self, rows: Sequence[cases.Row]) -> Tensor:
        with torch.no_grad():
            return self.model(cases.collate(rows)["pixel_values"])


def inside(move_OI: np.ndarray, rows_NI: np.ndarray) -> float:
    """Share `|D U| / |D|` of a move that lies in the span of the rows, by the SVD of the rows."""
    outside_OI = move_OI @ reference.energy_projector(rows_NI, 1.0)
    return float(np.linalg.norm(move_OI - outside_OI) / np.linalg.norm(move_OI))


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
    """So that the step hook saves itself half of the work; a caller who clips projects them. The control: AdamW."""

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


def test_layers_can_have_constraints_of_their_own() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["momentum"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, {"first": EnergyConstraint(1.0), "*": None})
    setting.train(optimizer, 10)
    moves = setting.moves()
    assert inside(moves["first"], setting.rows_NI["first"]) < 1e-5
    assert inside(moves["second"], setting.rows_NI["second"]) > 0.05


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


def test_no_gradient_is_no_step() -> None:
    setting = Setting()
    optimizer = OPTIMIZERS["sgd"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(), relative_step=True)
    optimizer.step()
    setting.model.zero_grad()
    for parameter in setting.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not any(move.any() for move in setting.moves().values())


def moved(constraint: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Setting, StepConstrainer]:
    setting = Setting(dtype)
    optimizer = OPTIMIZERS["momentum"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, constraint)
    setting.train(optimizer, 5)
    return setting, optimizer.constrainer  # type: ignore[attr-defined]


def test_the_original_weights_are_there_for_a_while() -> None:
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


@pytest.mark.parametrize("constraint", [None, EnergyConstraint(0.5), RidgeConstraint(), KroneckerConstraint()])
def test_the_drift_equals_its_dense_twin(constraint: Constraint | None) -> None:
    setting, constrainer = moved(constraint)
    drift, kl = constrainer.drift(), 0.0
    for layer, move_OI in setting.moves().items():
        rows_NI = setting.rows_NI[layer]
        twin = reference.relative_drift(rows_NI, move_OI, setting.original[layer])
        assert drift.by_layer[layer] == pytest.approx(twin, rel=1e-4)
        gram_II = reference.gram_sum(rows_NI) / len(rows_NI)
        kl += reference.second_order_kl(gram_II, setting.statistics.fisher(layer).numpy(), move_OI, 1.0)
    assert drift.kl == pytest.approx(kl, rel=1e-4, abs=0) and kl > 1e-12
    assert drift.relative == pytest.approx(np.sqrt(np.mean(np.square(list(drift.by_layer.values())))))
    if constraint is None:
        other = reference.relative_drift(
            setting.rows_NI["first"], 2 * setting.moves()["first"], setting.original["first"]
        )
        assert drift.by_layer["first"] != pytest.approx(other, rel=0.1)


def test_the_drift_of_a_fully_constrained_move_is_not_drowned_in_rounding() -> None:
    setting, constrainer = moved(EnergyConstraint(1.0))
    for layer, move_OI in setting.moves().items():
        twin = reference.relative_drift(setting.rows_NI[layer], move_OI, setting.original[layer])
        # the twin's 3e-8 are themselves what rounding has left of the move: how much depends on the CPU's products
        assert twin < 1e-6 and constrainer.drift().by_layer[layer] == pytest.approx(twin, rel=0.5)
        gram_II = setting.statistics.gram(layer).float()  # control: the same trace in float32
        move32_OI, original32_OI = torch.tensor(move_OI).float(), torch.tensor(setting.original[layer]).float()
        squares = [((m @ gram_II) * m).sum().item() for m in (move32_OI, original32_OI)]
        assert abs(max(squares[0], 0.0) / squares[1]) ** 0.5 != pytest.approx(twin, rel=0.5)


def test_the_kl_counts_positions_per_label() -> None:
    """A language model has fewer label positions than positions; the KL is per label."""
    model, rows = cases.tiny_llama(), cases.text_rows(3, prompt=3)
    statistics = collect_statistics(model, rows, fisher=True, progress=False, layers=["*.0.mlp.down_proj"])
    name = "model.layers.0.mlp.down_proj"
    freeze_unprotected(
        model, [name], freeze=["*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*", "*gate*", "*up_proj*", "*.1.*"]
    )
    constrainer = StepConstrainer(model, statistics, None)
    move = 0.01 * torch.randn_like(model.get_submodule(name).weight)
    with torch.no_grad():
        model.get_submodule(name).weight += move
    gram_II = statistics.gram_sums[name].numpy()  # sums: trace(F D G D^T) / 2 = 1/2 sum / N, per label: / L
    fisher_OO = statistics.fisher_sums[name].numpy()
    sums = reference.second_order_kl(gram_II, fisher_OO, move.double().numpy(), 1.0)
    assert statistics.labels == 20 - 9 and statistics.positions[name] == 20
    assert constrainer.drift().kl == pytest.approx(sums / (20 * 11), rel=1e-3)


def test_no_move_is_no_drift_and_no_statistics_no_number() -> None:
    setting = Setting()
    drift = StepConstrainer(setting.model, setting.statistics, EnergyConstraint()).drift()
    assert (drift.relative, drift.kl) == (0, 0) and set(drift.by_layer) == set(LAYERS)
    nothing = StepConstrainer(setting.model, None, None).drift()
    assert nothing.by_layer == {} and nothing.kl is None and nothing.relative == 0
    without = collect_statistics(setting.model, setting.retain, progress=False)
    assert StepConstrainer(setting.model, without, None).drift().kl is None


def test_the_predicted_kl_is_the_second_order_kl_of_a_softmax_layer() -> None:
    """For one linear layer with a softmax and one input direction, gram x fisher is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False)).double()
    x_I = torch.randn(3, dtype=torch.float64)
    p_O = model(x_I).softmax(0).detach()
    statistics = RetainStatistics(
        gram_sums={"0": torch.outer(x_I, x_I)},
        fisher_sums={"0": torch.diag(p_O) - torch.outer(p_O, p_O)},  # E over labels of (p - e_y)(p - e_y)^T
        layers={"0": LayerSums("0", 5, False)},
        positions={"0": 1}, rows=1, labels=1, weights="0", data="0",
    )  # fmt: skip
    constrainer = StepConstrainer(model, statistics, None)
    direction_OI = torch.randn(5, 3, dtype=torch.float64)

    def predicted_and_true(size: float) -> tuple[float, float]:
        constrainer.restore()
        with torch.no_grad():
            model[0].weight += size * direction_OI
            after_O = model(x_I).softmax(0)
        predicted = constrainer.drift().kl
        assert predicted is not None
        return predicted, (p_O * (p_O.log() - after_O.log())).sum().item()

    small, true_small = predicted_and_true(1e-2)
    large, true_large = predicted_and_true(5.0)
    assert small == pytest.approx(true_small, rel=0.02)
    assert large == pytest.approx(500**2 * small, rel=1e-3)  # a quadratic form, so that
    assert abs(large / true_large - 1) > 0.05  # a large move is predicted to second order only


def test_the_sampled_fisher_is_the_true_one_on_average() -> None:
    """Many rows with all but the same input: the collected Fisher approaches `diag(p) - p p^T`."""
    model = cases.sharpen(cases.tiny_mlp(bias=False), 2.0)
    generator = torch.Generator().manual_seed(0)
    x_I = torch.randn(6, generator=generator)
    rows = [{"pixel_values": x_I + 1e-5 * torch.randn(6, generator=generator)} for _ in range(2000)]
    statistics = collect_statistics(model, rows, fisher=True, batch_size=2000, layers=["second"], progress=False)
    p_O = model(x_I.unsqueeze(0))[0].softmax(0).double().detach()
    exact_OO = torch.diag(p_O) - torch.outer(p_O, p_O)
    assert (statistics.fisher("second") - exact_OO).norm() < 0.07 * exact_OO.norm()
    label = int(p_O.argmax())
    data_OO = torch.outer(
        p_O - nn.functional.one_hot(torch.tensor(label), 5), p_O - nn.functional.one_hot(torch.tensor(label), 5)
    )
    assert (data_OO - exact_OO).norm() > 0.3 * exact_OO.norm()  # the empirical Fisher of the likeliest label is not it


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_leak_of_a_step_is_measured(name: str) -> None:
    setting = Setting()
    optimizer = OPTIMIZERS[name](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, EnergyConstraint(1.0))
    constrainer: StepConstrainer = optimizer.constrainer  # type: ignore[attr-defined]
    setting.train(optimizer, 1)
    assert constrainer.leak is None
    constrainer.measure_leak = True
    setting.train(optimizer, 3)
    assert constrainer.leak is not None and constrainer.leak < 1e-5


def test_the_leak_sees_a_step_that_is_not_constrained() -> None:
    setting = Setting()
    constrainer = StepConstrainer(setting.model, setting.statistics, EnergyConstraint(1.0))
    for part in constrainer.weights:
        part.before = part.parameter.detach().clone()
    before = {layer: setting.weight(layer) for layer in LAYERS}
    setting.train(OPTIMIZERS["adamw"](setting.parameters), 1)
    steps = {layer: setting.weight(layer) - before[layer] for layer in LAYERS}
    removed = sum((np.linalg.norm(s) * inside(s, setting.rows_NI[layer])) ** 2 for layer, s in steps.items())
    total = sum(np.linalg.norm(s) ** 2 for s in steps.values())
    assert step_leak(constrainer.weights) == pytest.approx((removed / total) ** 0.5, rel=1e-3)
    assert removed / total > 0.01


def test_an_anchored_bfloat16_weight_does_not_drift_and_one_projected_step_by_step_does() -> None:
    def drift_after(steps: int, anchored: bool) -> float:
        torch.manual_seed(0)
        rows_NI, model = torch.randn(3, 16), nn.Sequential(nn.Linear(16, 8, bias=False)).bfloat16()
        statistics = RetainStatistics(
            gram_sums={"0": rows_NI.double().T @ rows_NI.double()}, fisher_sums={},
            layers={"0": LayerSums("0", 8, False)}, positions={"0": 3}, rows=3, labels=0, weights="0", data="0",
        )  # fmt: skip
        constrainer = StepConstrainer(model, statistics, EnergyConstraint(1.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        constrainer.attach(optimizer)
        constrainer.measure_leak = True  # measuring keeps the weights before the step; they are no anchor
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


def test_gradients_are_constrained_before_clipping_if_asked_and_once() -> None:
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
    """What a step would lose anyway must not fill the optimizer's moments."""
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
