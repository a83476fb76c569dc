"""Laws of the drift meter and of the leak of a step: both equal their dense twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from helpers import dense_twin as reference
from helpers import tiny as cases
from helpers.constrained_mlp import LAYERS, OPTIMIZERS, Setting, inside, moved
from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.drift import step_leak
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.constraints.step_constrainer import StepConstrainer, constrain_optimizer
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics


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
    """What is left of the move in the span of the rows is rounding, and the meter resolves it to rounding.

    The meter's products are float32: their error is of the order of `2^-24 |D| |X|`. The control computes the trace
    `tr(D gram D^T)` itself in float32: its error is `2^-24` of the squares, whose root is thousands of times larger.
    """
    setting, constrainer = moved(EnergyConstraint(1.0))
    for layer, move_OI in setting.moves().items():
        rows_NI, original_OI = setting.rows_NI[layer], setting.original[layer]
        twin = reference.relative_drift(rows_NI, move_OI, original_OI)
        scale = np.linalg.norm(move_OI) * np.linalg.norm(rows_NI) / np.linalg.norm(original_OI @ rows_NI.T)
        bound = 4 * 2**-24 * scale
        assert twin < bound and abs(constrainer.drift().by_layer[layer] - twin) < bound
        gram_II = setting.statistics.gram(layer).float()
        move32_OI, original32_OI = torch.tensor(move_OI).float(), torch.tensor(original_OI).float()
        squares = [((m @ gram_II) * m).sum().item() for m in (move32_OI, original32_OI)]
        assert abs(squares[0] / squares[1]) ** 0.5 > 10 * bound


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


def test_without_a_move_the_drift_is_zero_and_without_statistics_it_is_empty() -> None:
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
        positions={"0": 1},
        rows=1,
        labels=1,
        weights="0",
        data="0",
    )
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
    assert large == pytest.approx(500**2 * small, rel=1e-3)  # a quadratic form, so
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


def test_the_leak_measures_an_unconstrained_step() -> None:
    setting = Setting()
    constrainer = StepConstrainer(setting.model, setting.statistics, EnergyConstraint(1.0))
    for weight in constrainer.weights:
        weight.before = weight.parameter.detach().clone()
    before = {layer: setting.weight(layer) for layer in LAYERS}
    setting.train(OPTIMIZERS["adamw"](setting.parameters), 1)
    steps = {layer: setting.weight(layer) - before[layer] for layer in LAYERS}
    removed = sum((np.linalg.norm(s) * inside(s, setting.rows_NI[layer])) ** 2 for layer, s in steps.items())
    total = sum(np.linalg.norm(s) ** 2 for s in steps.values())
    assert step_leak(constrainer.weights) == pytest.approx((removed / total) ** 0.5, rel=1e-3)
    assert removed / total > 0.01
