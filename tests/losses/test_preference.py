"""Laws of the losses that read more than one answer's predictions: alternate answers (dpo, altpo, idk), a layer's
outputs (rmu), the row itself (random_label), a dual weight (pdu); and of losses that users bring. Each has a twin or
an identity, and a negative control."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers import reference_losses as reference
from helpers.loss_batches import Batch, before, dense, forget_likelihood, gradients, memorised, moved, step
from helpers.tiny import (
    CASES,
    collate,
    image_rows,
    sharpen,
    text_rows,
    tiny_vit,
)
from hf_unlearn.errors import DataError
from hf_unlearn.losses import LOSSES, build_loss
from hf_unlearn.models.forward import Predictions, predict

PREFERENCES = ("dpo", "altpo", "idk")
TEXT = ("gpt2", "llama")


def with_alternates(case: str) -> tuple[nn.Module, nn.Module, Batch]:
    """(model, original, batch) with alternate answers of other lengths than the forget answers."""
    make, rows = CASES[case]
    original = sharpen(make(), 1.5)
    alternate = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2)), "alternate": collate(alternate)}
    return moved(original), original, batch


# Alternate answers


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("case", TEXT)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_equals_its_twin(name: str, case: str, beta: float) -> None:
    model, original, batch = with_alternates(case)
    dense_ = [dense(m, batch[part]) for part in ("forget", "alternate") for m in (model, original)]
    twin = reference.dpo(*dense_, beta=beta)
    settings = {"alpha": 0} | ({} if beta == 0.1 else {"beta": beta})  # 0.1 is the default
    loss = build_loss(name, settings)(model, batch, before(model, original)).item()
    assert loss == pytest.approx(twin, rel=1e-5)
    swapped = reference.dpo(*dense_[2:], *dense_[:2], beta=beta)
    assert abs(loss - swapped) > 1e-3  # the sign trap
    assert abs(loss - reference.npo(*dense_[:2], beta=beta)) > 1e-3


def test_preference_with_an_unchanged_alternate_is_npo() -> None:
    model, original, batch = with_alternates("llama")

    def values(alternate: Predictions, name: str) -> Tensor:
        with torch.no_grad():
            now, old = predict(model, batch["forget"]), predict(original, batch["forget"])
            both = [Predictions(**{**vars(p), "alternate": alternate}) for p in (now, old)]
            return LOSSES[name].term(*both)

    torch.testing.assert_close(*(values(predict(original, batch["alternate"]), name) for name in ("dpo", "npo")))


@pytest.mark.parametrize("case", TEXT)
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_small_step_down_prefers_the_alternate_answer(name: str, case: str) -> None:
    _, original, batch = with_alternates(case)
    batch["forget"] = memorised(original, batch["forget"])
    loss, changes = build_loss(name, {"alpha": 0.01}), []
    for size in (2e-3, -2e-3):
        model = copy.deepcopy(original)
        step(model, loss(model, batch, before(model, original)), size)
        parts = ({"forget": batch["forget"]}, {"forget": batch["alternate"]})
        changes.append([forget_likelihood(model, part) - forget_likelihood(original, part) for part in parts])
    (forget, alternate), (forget_up, alternate_up) = changes
    assert forget < -1e-5 and alternate > 1e-5 and forget_up > 1e-5 and alternate_up < -1e-5


def test_preference_says_what_it_needs() -> None:
    model, original, batch = with_alternates("gpt2")
    loss = build_loss("dpo")
    with pytest.raises(DataError, match="'dpo' needs an alternate answer for each forget row: a column 'alternate'"):
        loss(model, {"forget": batch["forget"]}, before(model, original))
    short = {**batch, "alternate": collate(text_rows(3))}
    with pytest.raises(DataError, match="4 forget rows have 3 alternate answers"):
        loss(model, short, before(model, original))
    images = {"forget": collate(image_rows(3)), "alternate": collate(image_rows(3))}
    with pytest.raises(DataError, match="'dpo' compares answers of several tokens; for class labels use"):
        loss(tiny_vit(), images, before(tiny_vit(), tiny_vit()))
    assert {name: kind.alternate_answer for name, kind in LOSSES.items() if kind.alternate_answer} == {
        "dpo": "own",
        "altpo": "own",
        "idk": "idk",
    }


# Micro-batches


@pytest.mark.parametrize(
    ("name", "case"), [("dpo", "llama"), ("rmu", "gpt2"), ("rmu", "vit"), ("rmu", "bert"), ("random_label", "bert")]
)
def test_micro_batches_with_counts_add_up_to_their_batch(name: str, case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = moved(original)
    parts_rows = {"forget": rows(4, seed=1), "retain": rows(5, seed=2)}
    if name == "dpo":
        parts_rows["alternate"] = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    cut = {"forget": 1, "retain": 3, "alternate": 1}
    loss = build_loss(name, {"alpha": 0.7} | ({"layer": 1} if name == "rmu" else {}))
    scope = before(model, original)
    whole = {part: collate(result) for part, result in parts_rows.items()}
    parts = [
        {p: collate(r[: cut[p]]) for p, r in parts_rows.items()},
        {p: collate(r[cut[p] :]) for p, r in parts_rows.items()},
    ]
    counts = [loss.counts(model, part) for part in parts]
    total = {term: sum(count[term] for count in counts) for term in counts[0]}
    assert total == loss.counts(model, whole)
    torch.testing.assert_close(
        sum(loss(model, part, scope, total) for part in parts), loss(model, whole, scope), rtol=1e-5, atol=1e-6
    )
    g_big = gradients(loss(model, whole, scope), model)
    g_sum = sum(gradients(loss(model, part, scope, total), model) for part in parts)
    assert (g_sum - g_big).norm() < 1e-4 * g_big.norm()
    plain = sum(loss(model, part, scope) for part in parts) / len(parts)
    assert abs(plain - loss(model, whole, scope)) > 1e-5
