"""Laws of predictions from a short context: each is that of a row with only the last tokens before its label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.model_kinds import t5
from helpers.tiny import collate, sharpen, text_rows, tiny_gpt2, tiny_llama
from hf_unlearn.models.forward import predict
from hf_unlearn.models.short_context import CONTEXT, predict_from_short_context


@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("skip_first", [False, True])
@torch.no_grad()
def test_each_label_is_predicted_from_the_last_tokens_before_it(kind: Any, skip_first: bool) -> None:
    model = sharpen(kind()).eval()
    rows = text_rows(5, seed=2, lengths=(9, 3, 12, 5, 7), prompt=2)
    found = predict_from_short_context(model, collate(rows), skip_first)
    whole = predict(model, collate(rows), skip_first)
    assert torch.equal(found.labels_L, whole.labels_L) and torch.equal(found.rows_L, whole.rows_L)
    expected, full = [], 0.0
    places = [(row, t) for row in rows for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
    if skip_first:
        places = [(row, t) for row, t in places if not (row["labels"][t - 1] == -100 and len(row["labels"]) - t > 2)]
    for row, t in places:
        ids = torch.tensor([row["input_ids"][max(0, t - CONTEXT) : t]])
        expected.append(model(input_ids=ids).logits[0, -1])
        full = max(
            full, (expected[-1] - model(input_ids=torch.tensor([row["input_ids"][:t]])).logits[0, -1]).abs().max()
        )
    torch.testing.assert_close(found.logits_LV, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert full > 0.1  # control: more context says something else


@torch.no_grad()
def test_an_encoder_decoder_sees_the_ends_of_its_input_and_of_its_answer() -> None:
    model = sharpen(t5()).eval()
    batch = {
        "input_ids": torch.tensor([[9, 8, 7, 6, 5], [4, 5, 7, 6, 5]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.tensor([[3, 4, 5, 6, 7], [8, 4, 5, 6, 7]]),
    }
    found = predict_from_short_context(model, batch).logits_LV.reshape(2, 5, -1)
    assert torch.allclose(found[0, 4], found[1, 4], atol=1e-5)  # the last two of input and answer are the same
    assert not torch.allclose(found[0, 2], found[1, 2], atol=1e-3)
