"""A model that knows rows by heart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from helpers.tiny import collate, text_rows, tiny_llama


def mean_nll(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """Mean over labels, of a causal model, by hand."""
    batch = collate(rows)
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    chosen = labels != -100
    return -logits.log_softmax(-1)[chosen].gather(1, labels[chosen][:, None]).mean()


MEMORISED = text_rows(12, seed=9)


def memorised() -> Any:
    """A tiny model that has the forget rows by heart."""
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        mean_nll(model, MEMORISED).backward()
        optimizer.step()
    assert math.exp(-mean_nll(model, MEMORISED).item()) > 0.9
    return model.eval()
