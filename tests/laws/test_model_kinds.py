"""Every kind of model, dispatched on layer type alone: one test from collecting to loading what was saved.

The law is that of `test_guarantees`: at energy 1.0 the retain logits stay while the forget logits move; without the
constraint the retain logits move.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny as cases
from helpers.model_kinds import KINDS
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.models.forward import output_logits
from hf_unlearn.models.modes import hold_norm_statistics
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics

RETAIN_ROWS, FORGET_ROWS = 3, 3


def rows_of(kind: str) -> tuple[list[cases.Row], list[cases.Row]]:
    rows = KINDS[kind][1](RETAIN_ROWS + FORGET_ROWS)
    return rows[:RETAIN_ROWS], rows[RETAIN_ROWS:]


def logits(model: nn.Module, rows: list[cases.Row]) -> Tensor:
    """Logits where the rows have a label or an unmasked token, in eval mode."""
    batch = cases.collate(rows)
    with torch.no_grad():
        found = output_logits(model.eval(), batch)
    if found.ndim == 2:
        return found
    mask = batch["attention_mask"].bool()
    return found[mask if found.shape[:2] == mask.shape else batch["labels"] != -100]


def ascend(model: Any, optimizer: torch.optim.Optimizer, rows: list[cases.Row], steps: int = 8) -> None:
    """Gradient ascent in training mode; batch norms hold their statistics."""
    model.train()
    hold_norm_statistics(model)
    batch = cases.collate(rows)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model(**batch).loss).backward()
        optimizer.step()


def retain_statistics(model: nn.Module, kind: str) -> RetainStatistics:
    """Of all rows less the forget rows, which is what a pass over the retain rows gives."""
    retain, forget = rows_of(kind)
    full, gone = (collect_statistics(model, rows, progress=False, batch_size=4) for rows in (retain + forget, forget))
    statistics = full - gone
    afresh = collect_statistics(model, retain, progress=False, batch_size=2)
    assert statistics.data == afresh.data and statistics.positions == afresh.positions
    for key, gram in afresh.gram_sums.items():
        torch.testing.assert_close(statistics.gram_sums[key], gram, rtol=1e-4, atol=1e-4 * gram.abs().max().item())
    return afresh


def unlearn(kind: str, energy: float | None) -> tuple[float, float, Any]:
    """Largest moves of the retain and the forget logits, and the unlearned model."""
    model = KINDS[kind][0]()
    retain, forget = rows_of(kind)
    statistics = retain_statistics(model, kind)
    coverage = freeze_unprotected(model, statistics.layers)
    print(f"{kind}: {coverage.explain()}")
    assert coverage.protected and not coverage.exposed
    before = [logits(model, rows) for rows in (retain, forget)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    constrain_optimizer(optimizer, model, statistics, None if energy is None else EnergyConstraint(energy))
    ascend(model, optimizer, forget)
    after = [logits(model, rows) for rows in (retain, forget)]
    moved = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(before, after, strict=True)]
    return moved[0], moved[1], model


@pytest.mark.parametrize("kind", KINDS)
def test_from_collecting_to_loading(kind: str, tmp_path: Path) -> None:
    retain_move, forget_move, model = unlearn(kind, 1.0)
    assert retain_move < 2e-5
    assert forget_move > 1e-2
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    for rows in rows_of(kind):
        torch.testing.assert_close(logits(loaded, rows), logits(model, rows))
    original = KINDS[kind][0]()
    statistics = retain_statistics(original, kind)
    statistics.save_pretrained(tmp_path / "statistics")
    again = RetainStatistics.from_pretrained(tmp_path / "statistics", model=original)
    assert again.layers == statistics.layers
    for key, gram in statistics.gram_sums.items():
        assert torch.equal(again.gram_sums[key], gram)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_constraint_the_retain_logits_move(kind: str) -> None:
    retain_move, forget_move, _ = unlearn(kind, None)
    assert retain_move > 1e-2
    assert forget_move > 1e-2
