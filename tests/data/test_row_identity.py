"""Laws of row hashes: equal rows have equal hashes in whatever form they come, and nothing else has."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.texts import ANSWER, CHAT, QUESTION
from helpers.tiny import collate, text_rows
from hf_unlearn.data.row_identity import (
    batch_hashes,
    combine_rows,
    labelled_batch_hashes,
    labelled_row_hash,
    row_hash,
    rows_to_text,
)

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=8)
PIXELS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=8)


@given(TOKENS, TOKENS)
@settings(max_examples=50, deadline=None)
def test_token_rows_have_equal_hashes_exactly_when_their_tokens_are_equal(left: list[int], right: list[int]) -> None:
    forms = [left, np.array(left), torch.tensor(left), torch.tensor(left, dtype=torch.int32), np.array(left, np.int32)]
    assert len({row_hash({"input_ids": form}) for form in forms}) == 1
    assert (row_hash({"input_ids": left}) == row_hash({"input_ids": torch.tensor(right)})) == (left == right)


@given(PIXELS, PIXELS)
@settings(max_examples=50, deadline=None)
def test_image_rows_have_equal_hashes_exactly_when_their_pixels_are_equal(
    left: list[float], right: list[float]
) -> None:
    forms = [left, np.array(left), np.array(left, np.float32), torch.tensor(left), torch.tensor(left).double()]
    assert len({row_hash({"pixel_values": form}) for form in forms}) == 1
    assert (row_hash({"pixel_values": left}) == row_hash({"pixel_values": torch.tensor(right)})) == (left == right)


def test_half_precision_rows_have_a_hash() -> None:
    values = torch.tensor([0.5, -2.0])
    assert row_hash({"pixel_values": values.bfloat16()}) == row_hash({"pixel_values": values})
    assert row_hash({"pixel_values": values.bfloat16() + 1}) != row_hash({"pixel_values": values})


def test_only_the_model_input_of_a_row_counts() -> None:
    row = text_rows(1)[0]
    assert row_hash(row) == row_hash({"input_ids": row["input_ids"], "label": 3, "id": "x"})
    assert row_hash(row) != row_hash(row | {"input_ids": row["input_ids"][::-1]})
    image = torch.arange(4.0)
    assert row_hash({"pixel_values": image}) != row_hash({"pixel_values": image.reshape(2, 2)})


@pytest.mark.parametrize(
    "row",
    [
        {"text": "in Ulm"},
        {"messages": CHAT},
        {"text": "in Ulm", "tags": ["a", None], "spans": [[1, 2], [3]]},
        {"question": QUESTION, "answer": ANSWER, "id": 4},
    ],
)
def test_raw_rows_are_compared_by_all_their_values(row: dict[str, Any]) -> None:
    again = datasets.Dataset.from_list([row])[0]
    assert row_hash(row) == row_hash(again) == row_hash(dict(reversed(list(row.items()))))
    name = next(iter(row))
    changed = {**row, name: [*row[name], CHAT[0]] if isinstance(row[name], list) else row[name] + " "}
    assert row_hash(row) != row_hash(changed)


def test_a_missing_value_and_the_order_inside_messages_do_not_count() -> None:
    row = {"messages": [{"role": "user", "content": "hello"}], "n": 3}
    as_columns = {"n": 3, "messages": [{"content": "hello", "role": "user", "name": None}], "other": None}
    assert row_hash(row) == row_hash(as_columns)
    assert row_hash(row) != row_hash(row | {"n": 4}) and row_hash(row) != row_hash(as_columns | {"other": 0})


def test_the_labelled_hash_of_a_row_tells_labels_apart() -> None:
    row = {"input_ids": [5, 6], "labels": [-100, 6]}
    assert labelled_row_hash(row) == labelled_row_hash({name: torch.tensor(value) for name, value in row.items()})
    assert labelled_row_hash(row) != labelled_row_hash(row | {"labels": [5, 6]})
    assert row_hash(row) == row_hash(row | {"labels": [5, 6]})


# Rows of a batch


def test_padding_and_the_place_in_the_batch_do_not_count() -> None:
    rows = text_rows(3)
    hashes = batch_hashes(collate(rows))
    assert len(set(hashes)) == 3
    assert batch_hashes(collate(rows, "left")) == hashes and batch_hashes(collate(rows[::-1])) == hashes[::-1]
    unmasked = [{"input_ids": collate(rows, side)["input_ids"]} for side in ("left", "right")]
    assert batch_hashes(unmasked[0]) != batch_hashes(unmasked[1])


def test_labels_count_only_in_the_labelled_hash_of_a_batch() -> None:
    batch = collate(text_rows(2))
    changed = batch | {"labels": batch["labels"].clone().fill_(7)}
    assert batch_hashes(batch) == batch_hashes(changed)
    assert set(labelled_batch_hashes(batch)).isdisjoint(labelled_batch_hashes(changed))


def test_every_input_of_the_model_counts_in_a_batch_and_only_its_main_input_in_a_row() -> None:
    tokens = torch.tensor([[5, 6]])
    batches = [{"input_ids": tokens, "token_type_ids": torch.tensor([types])} for types in ([0, 0], [0, 1])]
    assert batch_hashes(batches[0]) != batch_hashes(batches[1])
    assert len({row_hash({name: tensor[0] for name, tensor in batch.items()}) for batch in batches}) == 1


def test_what_a_decoder_reads_counts_for_an_encoder_decoder() -> None:
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8, -100]])}
    other = batch | {"labels": torch.tensor([[7, 9, -100]])}
    assert batch_hashes(batch) == batch_hashes(other)
    assert batch_hashes(batch, encoder_decoder=True) != batch_hashes(other, encoder_decoder=True)
    given_inputs = batch | {"decoder_input_ids": torch.tensor([[2, 7, 8]])}
    assert batch_hashes(given_inputs, encoder_decoder=True) != batch_hashes(batch, encoder_decoder=True)
    assert batch_hashes({"input_ids": batch["input_ids"]}, encoder_decoder=True) == batch_hashes(batch)


def test_sums_of_hashes_add_and_subtract() -> None:
    first, second = batch_hashes(collate(text_rows(2)))
    both = rows_to_text(first + second)
    assert combine_rows(rows_to_text(first), rows_to_text(second), 1) == both
    assert combine_rows(both, rows_to_text(second), -1) == rows_to_text(first) != both
