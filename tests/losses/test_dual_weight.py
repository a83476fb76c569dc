"""Laws of the dual weight: it follows the bound on the retain loss, and comes back from its state."""

from __future__ import annotations

import json

import pytest
from torch import nn

from helpers import reference_losses as reference
from helpers.loss_batches import Batch, dense, moved
from helpers.tiny import (
    CASES,
    collate,
    sharpen,
    text_rows,
    tiny_gpt2,
)
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.losses import build_loss
from hf_unlearn.losses.dual_weight import DualWeight


def with_alternates(case: str) -> tuple[nn.Module, nn.Module, Batch]:
    """(model, original, batch) with alternate answers of other lengths than the forget answers."""
    make, rows = CASES[case]
    original = sharpen(make(), 1.5)
    alternate = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2)), "alternate": collate(alternate)}
    return moved(original), original, batch


def test_dual_weight_rises_while_the_bound_is_broken_and_falls_to_zero_at_most() -> None:
    dual = DualWeight(1.0, eps=0.5, eta=2.0, warmup_epochs=1)
    dual.end_step(3.0, epoch=0.5)
    assert dual.value == 1  # warming up
    seen = []
    for retain in (0.75, 0.5, 0.0, 0.0):
        dual.end_step(retain, epoch=1.5)
        seen.append(dual.value)
    assert seen == [1.5, 1.5, 0.5, 0.0]
    dual.reset()
    assert dual.value == 1.0


def test_dual_weight_warms_up_to_the_end_of_an_epoch() -> None:
    dual = DualWeight(1.0, eps=0.0, warmup_epochs=1)
    for epoch, value in ((0.5, 1.0), (1.0, 1.0), (1.5, 2.0), (2.0, 3.0)):
        dual.end_step(1.0, epoch)
        assert dual.value == value


def test_dual_weight_by_epoch_is_updated_by_the_mean_over_its_steps() -> None:
    dual = DualWeight(1.0, eps=0.5, warmup_epochs=0, update_upon="epoch")
    dual.end_step(1.0, epoch=0.5)
    assert dual.value == 1.0
    dual.end_step(2.0, epoch=1.0)
    assert dual.value == 2.0 and not dual.pending
    dual.end_step(1.0, epoch=1.25)
    assert dual.value == 2.0


def test_a_dual_weight_is_restored_from_its_state() -> None:
    dual = DualWeight(1.0, eps=0.1, warmup_epochs=0, update_upon="epoch")
    dual.end_step(0.7, 0.5)
    again, fresh = (DualWeight(1.0, eps=0.1, warmup_epochs=0, update_upon="epoch") for _ in range(2))
    again.load_state(json.loads(json.dumps(dual.state())))
    for weight in (dual, again, fresh):
        weight.end_step(0.3, 1.0)
    assert again.value == dual.value == 1.0 + 0.5 - 0.1 != fresh.value


def test_pdu_uses_the_current_dual_weight_and_adds_up_the_retain_loss_of_the_step() -> None:
    model, _, batch = with_alternates("llama")
    loss = build_loss("pdu", {"eps": 0.2, "alpha": 50})
    assert loss.dual is not None and loss.dual.value == 50
    forget, retain = (
        reference.pdu(dense(model, batch["forget"]), []),
        reference.retain_nll(dense(model, batch["retain"])),
    )
    assert loss(model, batch).item() == pytest.approx(forget + 50 * retain, rel=1e-5)
    assert loss.dual.take().item() == pytest.approx(retain, rel=1e-5) and loss.dual.take().item() == 0
    loss.dual.value = 0.0
    assert loss(model, batch).item() == pytest.approx(forget, rel=1e-5)
    assert loss.dual.take().item() == pytest.approx(retain, rel=1e-5)  # a weight of 0 can rise again
    counts = {term: 2 * count for term, count in loss.counts(model, batch).items()}
    for _ in range(2):  # two equal micro-batches
        loss(model, batch, None, counts)
    assert loss.dual.take().item() == pytest.approx(retain, rel=1e-5)


def test_pdu_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="'pdu' needs the setting eps, a bound on the retain loss"):
        build_loss("pdu")
    with pytest.raises(SettingsError, match="update_upon must be step or epoch, got 'batch'"):
        build_loss("pdu", {"eps": 1, "update_upon": "batch"})
    with pytest.raises(SettingsError, match="eta must be at least 0, got -1"):
        build_loss("pdu", {"eps": 1, "eta": -1})
    with pytest.raises(SettingsError, match="'npo' has no setting 'eps'"):
        build_loss("npo", {"eps": 1})
    with pytest.raises(DataError, match="'pdu' needs retain rows"):
        build_loss("pdu", {"eps": 1})(tiny_gpt2(), {"forget": collate(text_rows(2))})
