"""The main law of the package, in a plain training loop.

With energy 1.0, full coverage and fewer retain positions than input features, gradient ascent on the forget rows does
not change the retain logits beyond rounding, while the forget logits move; without the constraint the retain logits
move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny as cases
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics

MODELS = {"Linear": cases.tiny_llama, "Conv1D": cases.tiny_gpt2}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
}
ROWS = cases.text_rows(8, lengths=(5, 6))
RETAIN, FORGET = ROWS[:4], ROWS[4:]  # 22 retain positions, 32 input features and more


def logits(model: nn.Module, rows: list[cases.Row]) -> Tensor:
    """Return the logits at the unmasked positions, in eval mode."""
    batch = cases.collate(rows)
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def ascend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    """Make gradient ascent steps with dropout, accumulation over 2 batches and clipping at 1.0."""
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        for rows in (FORGET[:2], FORGET[2:]):
            (-model(**cases.collate(rows)).loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def unlearn(
    layer_type: str, optimizer_name: str, energy: float | None, **collecting: Any
) -> tuple[float, float, float]:
    """Return the largest change of a retain and of a forget logit, and the rise of the forget rows' loss."""
    model = MODELS[layer_type](dropout=0.1)
    statistics = collect_statistics(model, RETAIN, progress=False, **collecting)
    assert all(statistics.positions[key] < len(gram) for key, gram in statistics.gram_sums.items())
    coverage = freeze_unprotected(model, statistics.layers)
    assert len(coverage.protected) == len(statistics.layers) and not coverage.exposed
    optimizer = OPTIMIZERS[optimizer_name]([p for p in model.parameters() if p.requires_grad])
    constrain_optimizer(optimizer, model, statistics, None if energy is None else EnergyConstraint(energy))
    before = [logits(model, rows) for rows in (RETAIN, FORGET)]
    losses = [model(**cases.collate(FORGET)).loss.item()]
    torch.manual_seed(0)
    ascend(model, optimizer)
    after = [logits(model, rows) for rows in (RETAIN, FORGET)]
    losses.append(model(**cases.collate(FORGET)).loss.item())
    retain, forget = ((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
    return retain, forget, losses[1] - losses[0]


@pytest.mark.parametrize("layer_type", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_retain_logits_stay_the_same_while_forget_rows_are_unlearned(layer_type: str, optimizer: str) -> None:
    retain, forget, rise = unlearn(layer_type, optimizer, 1.0)
    assert retain < 1e-5
    assert forget > 1e-2
    assert rise > 1e-2


@pytest.mark.parametrize("layer_type", MODELS)
def test_the_law_holds_with_a_sketch_that_holds_all_retain_rows(layer_type: str) -> None:
    retain, forget, _ = unlearn(layer_type, "adamw", 1.0, sketch_above=0, sketch_rank=24)
    assert retain < 1e-4 and forget > 1e-2  # the vectors are computed with a pseudo-inverse: more rounding
    with pytest.warns(UserWarning, match="the sketch of"):
        assert unlearn(layer_type, "adamw", 1.0, sketch_above=0, sketch_rank=8)[0] > 1e-3


@pytest.mark.parametrize("layer_type", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_the_constraint_the_retain_logits_move(layer_type: str, optimizer: str) -> None:
    retain, forget, rise = unlearn(layer_type, optimizer, None)
    assert retain > 1e-2
    assert forget > 1e-2
    assert rise > 1e-2


def test_a_lower_energy_weakens_the_guarantee() -> None:
    exact, partial, none = (unlearn("Linear", "adamw", energy)[0] for energy in (1.0, 0.8, None))
    assert 100 * exact < partial < none
