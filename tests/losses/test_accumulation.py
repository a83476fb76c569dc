"""Micro-batches with their counts add up to their batch, and padding changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import reference_losses as reference
from helpers.loss_batches import (
    NEEDED,
    before,
    gradients,
    moved,
    setup,
)
from helpers.tiny import (
    CASES,
    collate,
    image_rows,
    text_rows,
    tiny_gpt2,
    tiny_vit,
)
from hf_unlearn.losses import build_loss

NAMES = tuple(reference.TWINS)  # losses of single answers; the others have test files of their own


@pytest.mark.parametrize("case", ["gpt2", "vit"])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_with_counts_add_up_to_their_batch(name: str, case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = moved(original)
    forget, retain = rows(4, seed=1), rows(5, seed=2)
    loss, scope = build_loss(name, NEEDED.get(name, {}) | {"alpha": 0.7, "retain": "kl"}), before(model, original)
    whole = {"forget": collate(forget), "retain": collate(retain)}
    parts = [  # unequal in rows and lengths
        {"forget": collate(forget[:1]), "retain": collate(retain[:3])},
        {"forget": collate(forget[1:]), "retain": collate(retain[3:])},
    ]
    counts = [loss.counts(model, part) for part in parts]
    total = {term: sum(count[term] for count in counts) for term in counts[0]}
    assert total == loss.counts(model, whole)
    big = loss(model, whole, scope)
    summed = sum(loss(model, part, scope, total) for part in parts)
    torch.testing.assert_close(summed, big, rtol=1e-5, atol=1e-5)
    g_big = gradients(big, model)
    g_sum = sum(gradients(loss(model, part, scope, total), model) for part in parts)
    assert (g_sum - g_big).norm() < 1e-4 * g_big.norm()
    plain = sum(loss(model, part, scope) for part in parts) / len(parts)
    assert abs(plain - big) > 1e-5  # a mean of means is another loss


def test_counts_are_labels_or_rows() -> None:
    model, batch = tiny_gpt2(), {"forget": collate(text_rows(4)), "retain": collate(text_rows(2))}
    labels, retain = (sum(len(r["input_ids"]) - 2 for r in text_rows(n)) for n in (4, 2))
    assert build_loss("pgu").counts(model, batch) == {"forget": labels}
    assert build_loss("ce_u").counts(model, batch) == {"forget": labels - 3}  # one row has two labels only
    assert build_loss("npo").counts(model, batch) == {"forget": 4, "retain": retain}
    images = {"forget": collate(image_rows(3))}
    assert build_loss("ce_u").counts(tiny_vit(), images) == {"forget": 3}


def test_padding_does_not_change_a_loss() -> None:
    model, original, batch = setup("llama")
    scope = before(model, original)
    padded = {}
    for part, inputs in batch.items():
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded[part] = {k: nn.functional.pad(v, (0, 3), value=fill[k]) for k, v in inputs.items()}
    for name in NAMES:
        loss = build_loss(name, NEEDED.get(name))
        torch.testing.assert_close(loss(model, padded, scope), loss(model, batch, scope), rtol=1e-4, atol=1e-5)
    unmasked = {"forget": {**padded["forget"], "labels": padded["forget"]["labels"].clamp(min=0)}}
    ascent = build_loss("grad_ascent")
    assert abs(ascent(model, unmasked) - ascent(model, batch)) > 1e-2
