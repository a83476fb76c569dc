"""Rows that are tokens already, as trl's `SFTTrainer` leaves them in its `train_dataset`: the labels that they mean.

Such rows have `input_ids` and, where only answers are learned, one or both of `MASKS`, which are 1 on the tokens to
predict. Without a mask every token is a label, as `SFTTrainer` trains. Rows that were packed are refused.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hf_unlearn.data.formats import LABELS, Row
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import IGNORED

MASKS = ("completion_mask", "assistant_masks")
"""Columns of trl: 1 on the tokens of the completion, or of the assistant's messages. A label must be in all of them."""
LENGTHS, POSITIONS = "seq_lengths", "position_ids"
"""Columns that show whether a row was packed: the lengths of its texts, or their positions, which begin again."""


def means_labels(row: Row) -> bool:
    """Return whether the labels of a tokenized row follow from its masks or, if it has no labels, from its tokens."""
    return "input_ids" in row and (_label_column(row) is None or any(name in row for name in MASKS))


def _label_column(row: Row) -> str | None:
    """Return the column with a label for each token; a single number, such as a class, does not count."""
    return next((name for name in LABELS if name in row and np.ndim(row[name]) > 0), None)


def may_be_packed(row: Row) -> bool:
    """Return whether a row has a column that shows whether it was packed."""
    return LENGTHS in row or POSITIONS in row


def with_labels(row: Row, where: str, masks: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a tokenized row of a language model with labels in place of its masks.

    >>> with_labels({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, "row 0", ("completion_mask",))
    {'input_ids': [5, 6, 7], 'labels': [-100, 6, 7]}

    Args:
        row: A row with `input_ids`; its labels, if it has some, are those that the masks restrict.
        where: The row, for errors.
        masks: Names of the masks that the set has.

    Raises:
        DataError: A mask is missing, or does not have one value for each token.
    """
    tokens = _numbers(row, "input_ids", where)
    column = _label_column(row)
    labels = tokens if column is None else _numbers(row, column, where)
    for name in masks:
        mask = _numbers(row, name, where)
        if not len(mask) == len(labels) == len(tokens):
            raise DataError(f"{where} has {len(tokens)} tokens and {len(mask)} values in column {name!r}; repair it")
        labels = [label if counts else IGNORED for label, counts in zip(labels, mask, strict=True)]
    rest = {name: value for name, value in row.items() if name not in (*MASKS, *LABELS)}
    alternate = row.get("alternate")
    if isinstance(alternate, Mapping) and means_labels(alternate):
        own = tuple(name for name in MASKS if name in alternate)
        rest["alternate"] = with_labels(alternate, f"the alternate answer of {where}", own)
    return {**rest, "labels": labels}


def refuse_packed(row: Row, where: str) -> None:
    """Raise `DataError` if a row holds several texts.

    >>> refuse_packed({"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}, "row 0 of the forget set")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.DataError: row 0 of the forget set is packed: it holds 2 texts (column 'seq_lengths'), but a row \
is one unit to forget, and its texts would be read as one; give the rows from before packing (SFTConfig(packing=False))
    """
    lengths = row.get(LENGTHS)
    if lengths is not None and (texts := np.size(lengths)) > 1:
        raise _packed(where, texts, LENGTHS)
    positions = row.get(POSITIONS)
    if positions is None or np.ndim(positions) != 1:
        return
    mask = row.get("attention_mask")
    seen = torch.as_tensor(positions if mask is None else mask).bool() | (mask is None)
    places = torch.as_tensor(positions)[seen].tolist() if len(seen) == len(positions) else []
    if restarts := sum(after <= before for before, after in pairwise(places)):
        raise _packed(where, restarts + 1, POSITIONS)


def _packed(where: str, texts: int, column: str) -> DataError:
    return DataError(
        f"{where} is packed: it holds {texts} texts (column {column!r}), but a row is one unit to forget, and its "
        "texts would be read as one; give the rows from before packing (SFTConfig(packing=False))"
    )


def _numbers(row: Row, name: str, where: str) -> list[int]:
    """Return the whole numbers in a column; raise `DataError` if it does not have a list of them."""
    try:
        values = torch.as_tensor(row.get(name))
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, 0)
    if values.ndim != 1 or values.is_floating_point():
        raise DataError(
            f"{where} has {row.get(name)!r:.60} in column {name!r}, not a list of whole numbers; fill it in or leave "
            "the row out"
        )
    return values.long().tolist()
