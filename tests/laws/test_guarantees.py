"""What the package promises of its steps: the signature law, closed forms of the soft constraints, relative steps.

Each law has its negative control: the same run without the constraint breaks it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import collate, text_rows, tiny_gpt2, tiny_llama
from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.constraints.step_constrainer import StepConstrainer, constrain_optimizer
from hf_unlearn.models.forward import predict
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics

MAKERS: dict[str, Callable[..., Any]] = {"Conv1D": tiny_gpt2, "Linear": tiny_llama}
OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.1),
}
RETAIN, FORGET = text_rows(2, seed=1), text_rows(4, seed=2)


def _labelled(rows: list) -> dict[str, Tensor]:
    batch = dict(collate(rows))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def _logits(model: nn.Module, rows: list) -> Tensor:
    model.eval()
    batch = collate(rows)
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["attention_mask"].bool()]


def _ascend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    """Gradient ascent on the forget rows: dropout on, two micro-batches a step, gradients clipped."""
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        for part in (FORGET[:2], FORGET[2:]):
            (-predict(model, _labelled(part)).nll_L.mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()


def _run(layer: str, optimizer: str, constraint: ConstraintLike, relative: bool = False) -> tuple[float, float]:
    """Largest change of the retain and of the forget logits over 20 steps."""
    model = MAKERS[layer](dropout=0.1, width=64)
    statistics = collect_statistics(model.eval(), RETAIN, fisher=True, progress=False)
    assert all(n < len(statistics.gram_sums[key]) for key, n in statistics.positions.items())  # the law's premise
    freeze_unprotected(model, statistics.layers)
    chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    constrain_optimizer(chosen, model, statistics, constraint, relative_step=relative)
    retain, forget = _logits(model, RETAIN), _logits(model, FORGET)
    _ascend(model, chosen)
    moved = (_logits(model, RETAIN) - retain).abs().max(), (_logits(model, FORGET) - forget).abs().max()
    return moved[0].item(), moved[1].item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", MAKERS)
def test_full_energy_keeps_retain_logits_while_forget_logits_move(layer: str, optimizer: str) -> None:
    retain, forget = _run(layer, optimizer, EnergyConstraint(1.0))
    assert retain < 1e-5 * max(1.0, forget)
    assert forget > 1e-2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", MAKERS)
def test_without_the_constraint_retain_logits_move(layer: str, optimizer: str) -> None:
    assert _run(layer, optimizer, None)[0] > 1e-2


def _statistics(model: nn.Module) -> RetainStatistics:
    return collect_statistics(model.eval(), text_rows(12, seed=3), fisher=True, progress=False)


def _dense(constraint: Any, gram_II: Tensor, fisher_OO: Tensor, step_OI: Tensor) -> Tensor:
    """The constraints of METHOD, section 3, by explicit inverses and projectors."""
    eye_I, eye_O = torch.eye(len(gram_II), dtype=torch.float64), torch.eye(len(fisher_OO), dtype=torch.float64)
    if isinstance(constraint, EnergyConstraint):
        left, spectrum, _ = torch.linalg.svd(gram_II)
        weights = spectrum.sqrt() if constraint.spectrum == "singular_values" else spectrum
        rank = next(k for k in range(1, len(weights) + 1) if weights[:k].sum() >= constraint.energy * weights.sum())
        return step_OI @ (eye_I - left[:, :rank] @ left[:, :rank].T)
    price_in = constraint.strength if isinstance(constraint, RidgeConstraint) else constraint.strength_in
    right = torch.linalg.inv(eye_I + gram_II / (price_in * gram_II.trace() / len(gram_II)))
    if isinstance(constraint, RidgeConstraint):
        return step_OI @ right
    price_out = constraint.strength_out * fisher_OO.trace() / len(fisher_OO)
    return torch.linalg.inv(eye_O + fisher_OO / price_out) @ step_OI @ right


CONSTRAINTS = [
    EnergyConstraint(0.8),
    EnergyConstraint(0.95, spectrum="eigenvalues"),
    RidgeConstraint(0.01),
    KroneckerConstraint(0.01, 0.1),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_bound_constraints_equal_their_dense_twin(constraint: Any) -> None:
    statistics = _statistics(tiny_llama())
    bound = bind_constraints(statistics, constraint)
    assert set(bound) == set(statistics.layers)
    for name in list(statistics.layers)[:8]:
        gram_II, fisher_OO = statistics.gram(name), statistics.fisher(name)
        step_OI = torch.randn(len(fisher_OO), len(gram_II), dtype=torch.float64, generator=torch.manual_seed(0))
        wanted_OI = _dense(constraint, gram_II, fisher_OO, step_OI)
        torch.testing.assert_close(bound[name](step_OI), wanted_OI, rtol=1e-4, atol=1e-5)
        assert (wanted_OI - step_OI).norm() > 0.1 * step_OI.norm()  # the comparison is of something


@pytest.mark.parametrize("constraint", [RidgeConstraint(0.01), KroneckerConstraint(0.01, 0.1)], ids=str)
@pytest.mark.parametrize("layer", MAKERS)
def test_soft_constraints_on_sgd_equal_constrained_gradients(layer: str, constraint: Any) -> None:
    model, lr = MAKERS[layer](), 0.05
    statistics = _statistics(model)
    freeze_unprotected(model, statistics.layers)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=lr)
    constrain_optimizer(optimizer, model, statistics, constraint)
    before = {n: p.detach().clone() for n, p in trained.items()}
    predict(model, _labelled(FORGET)).nll_L.mean().backward()
    optimizer.step()
    for part in optimizer.constrainer.weights:  # type: ignore[attr-defined]
        name = part.owner
        gradient_OI = part.matrix(part.parameter.grad).double()
        wanted_OI = -lr * _dense(constraint, statistics.gram(name), statistics.fisher(name), gradient_OI)
        moved_OI = part.matrix(part.parameter.detach() - before[f"{name}.weight"]).double()
        torch.testing.assert_close(moved_OI, wanted_OI, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("constraint", [None, EnergyConstraint(0.8), KroneckerConstraint()], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_relative_steps_have_the_norm_that_the_learning_rate_names(optimizer: str, constraint: Any) -> None:
    model = tiny_llama()
    statistics = _statistics(model)
    freeze_unprotected(model, statistics.layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = OPTIMIZERS[optimizer](trained)
    constrain_optimizer(chosen, model, statistics, constraint, relative_step=True)
    lr = chosen.param_groups[0]["lr"]
    for _ in range(3):
        before = [p.detach().clone() for p in trained]
        chosen.zero_grad()
        predict(model, _labelled(FORGET)).nll_L.mean().backward()
        chosen.step()
        step = torch.nn.utils.get_total_norm([p.detach() - b for p, b in zip(trained, before, strict=True)])
        assert step.item() == pytest.approx(lr * torch.nn.utils.get_total_norm(before).item(), rel=1e-3)


def test_anchored_bf16_weights_do_not_drift_where_plain_rounding_does() -> None:
    def drift(anchored: bool) -> float:
        model = tiny_llama(width=64)
        statistics = collect_statistics(model.eval(), RETAIN, progress=False)
        model.bfloat16()
        freeze_unprotected(model, statistics.layers)
        constrainer = StepConstrainer(model, statistics, EnergyConstraint(1.0))
        optimizer = torch.optim.SGD([p.parameter for p in constrainer.weights], lr=1e-2)
        if anchored:
            constrainer.attach(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            for part in constrainer.weights:
                noise = torch.randn(part.parameter.shape, generator=generator).bfloat16()
                part.parameter.grad = noise
            if not anchored:
                constrainer.constrain_gradients()
            optimizer.step()
        return constrainer.drift().relative

    assert drift(anchored=True) < 0.5 * drift(anchored=False)


def test_original_weights_come_back_and_go_again() -> None:
    model = tiny_gpt2()
    constrainer = StepConstrainer(model, None, None)
    original = _logits(model, FORGET)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved = _logits(model, FORGET)
    with constrainer.original():
        assert torch.equal(_logits(model, FORGET), original)
    assert torch.equal(_logits(model, FORGET), moved)
    assert not torch.equal(moved, original)
    constrainer.restore()
    assert torch.equal(_logits(model, FORGET), original)
