"""Encoder-decoders: two masks, and cross-attention's inputs, which are the encoder's positions in the decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import dense_twin as reference
from helpers import model_kinds as kinds
from helpers import tiny as cases
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.models.layers import find_layers
from hf_unlearn.statistics.collect import collect_statistics

LAYERS = {
    "encoder.block.1.layer.0.SelfAttention.q": "encoder",
    "decoder.block.1.layer.0.SelfAttention.q": "decoder",
    "decoder.block.1.layer.1.EncDecAttention.q": "decoder",
    "decoder.block.1.layer.1.EncDecAttention.v": "encoder",
    "decoder.block.0.layer.2.DenseReluDense.wo": "decoder",
}


def rows_of(lengths: str) -> list[cases.Row]:
    """`equal`: inputs and answers are padded to one length, so that shapes cannot tell encoder from decoder."""
    rows = kinds.pair_rows(6)
    if lengths == "equal":
        rows = [row | {"labels": (row["labels"] + [5, 6, 7])[: 6 - i % 3]} for i, row in enumerate(rows)]
    return rows


def seen(model: Any, rows: list[cases.Row], layer: str) -> Any:
    """Inputs of a layer, each row alone without mask or padding."""
    found: list[Any] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: found.extend(args[0].detach().double().reshape(-1, args[0].shape[-1]).numpy())
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    handle.remove()
    return np.array(found)


@pytest.mark.parametrize("lengths", ["different", "equal"])
@pytest.mark.parametrize("layer", LAYERS)
def test_each_gram_is_that_of_the_rows_run_alone(layer: str, lengths: str) -> None:
    model, rows = kinds.KINDS["T5"][0](), rows_of(lengths)
    batch = cases.collate(rows)
    assert (batch["labels"].shape == batch["input_ids"].shape) == (lengths == "equal")
    statistics = collect_statistics(model, rows, batch_size=6, progress=False)
    expected = seen(model, rows, layer)
    key = statistics.layers[layer].inputs
    side = "input_ids" if LAYERS[layer] == "encoder" else "labels"
    assert statistics.positions[key] == len(expected) == sum(len(row[side]) for row in rows)
    gram = statistics.gram_sums[key].numpy()
    np.testing.assert_allclose(gram, reference.gram_sum(expected), rtol=1e-3, atol=1e-4 * np.abs(gram).max())


def test_keys_and_values_of_cross_attention_share_the_encoders_gram() -> None:
    model = kinds.KINDS["T5"][0]()
    statistics = collect_statistics(model, rows_of("different"), progress=False)
    name = "decoder.block.{}.layer.1.EncDecAttention.{}".format
    assert statistics.layers[name(0, "v")].inputs == statistics.layers[name(0, "k")].inputs == name(0, "k")
    assert set(statistics.layers) == set(find_layers(model))


@pytest.mark.parametrize("lengths", ["different", "equal"])
def test_fishers_do_not_depend_on_padding_and_subtract(lengths: str) -> None:
    model, rows = kinds.KINDS["T5"][0](), rows_of(lengths)
    batched = collect_statistics(model, rows, fisher=True, batch_size=6, progress=False)
    alone = collect_statistics(model, rows, fisher=True, batch_size=1, progress=False)
    assert batched.data == alone.data and batched.labels == alone.labels == sum(len(row["labels"]) for row in rows)
    for name, fisher in alone.fisher_sums.items():
        torch.testing.assert_close(
            batched.fisher_sums[name], fisher, rtol=1e-3, atol=1e-4 * fisher.abs().max().item() + 1e-12
        )
    assert bind_constraints(batched, KroneckerConstraint()).keys() == batched.layers.keys()


def test_rows_of_one_input_and_different_answers_are_different_rows() -> None:
    model, rows = kinds.KINDS["T5"][0](), rows_of("different")[:1]
    other = [rows[0] | {"labels": [3, 2]}]
    one, two = (collect_statistics(model, r, progress=False) for r in (rows, other))
    assert one.data != two.data
