"""Checks of rows that were encoded before: what a model cannot read is found before a pass over them, not in it.

Rows of the package's own encoders are checked where they are made.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_unlearn.data.checks import check_row
from hf_unlearn.data.encoding import EncodedRows, RowStream
from hf_unlearn.data.formats import LABELS, Row, Rows
from hf_unlearn.errors import DataError
from hf_unlearn.models.forward import counted_labels, label_positions
from hf_unlearn.models.tasks import (
    CONTENT_MASK,
    IGNORED,
    context_length,
    has_decoder,
    resize_remedy,
    shifts_labels,
    task_of,
    vocabulary_size,
)

_PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids")
_OF_A_CLASS = ("text-classification", "image-classification")


def check_encoded(rows: "Rows | RowStream", what: str, model: nn.Module, *, labels: bool = False) -> None:
    """Raise `DataError` if the model cannot read a row that was encoded before.

    The tokens of each row are whole numbers that the model has an embedding for, no more than its context has
    positions, and as many as the row's mask has; labels are classes of the model or tokens. Images and other inputs
    are not read.

    >>> check_encoded([{"input_ids": [1, 2], "attention_mask": [1]}], "forget", nn.Linear(2, 2))
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.DataError: row 0 of the forget set has 2 input_ids and 1 attention_mask; give one for each token

    Args:
        rows: The rows of a set.
        what: The name of the set.
        model: The model that is to read them.
        labels: Each row must have a label that the model predicts.
    """
    if isinstance(rows, (EncodedRows, RowStream)) or getattr(rows, "raw", None) is not None:
        return
    for index, row in enumerate(_without_pixels(rows)):
        where = f"row {index} of the {what} set"
        check_row(row, what, index)
        if "input_ids" in row:
            _check_tokens(row, where, model)
        name = next((name for name in LABELS if row.get(name) is not None), None)
        if name is not None:
            _check_labels(row, name, where, model)
            if row.get(CONTENT_MASK) is not None and np.shape(row[CONTENT_MASK]) != np.shape(row[name]):
                raise DataError(
                    f"{where} has {np.size(row[name])} {name} and {np.size(row[CONTENT_MASK])} {CONTENT_MASK}; give "
                    "one number for each label"
                )
            if labels and "input_ids" in row:
                _check_predicted(row, name, where, model)


def _without_pixels(rows: Any) -> Iterator[Any]:
    """Yield the rows, without the inputs that are slow to read and not checked."""
    if hasattr(rows, "select_columns"):  # a Dataset
        read = [name for name in rows.column_names if name in ("input_ids", CONTENT_MASK, *_PER_TOKEN, *LABELS)]
        rows = rows.select_columns(read) if read else rows.select(())
    elif not isinstance(rows, (list, tuple)) and "input_ids" not in rows[0]:
        return
    for index in range(len(rows)):
        yield rows[index]


def _numbers(value: object, name: str, where: str) -> NDArray:
    """Return whole numbers as an array; raise `DataError` if there are others."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (ValueError, TypeError) as error:  # lists of unequal lengths
        raise DataError(f"{where} has {value!r:.60} in column {name!r}; give whole numbers") from error
    if array.dtype.kind not in "iu" and array.size:
        raise DataError(f"{where} has {value!r:.60} in column {name!r}; give whole numbers")
    return array


def _check_tokens(row: Row, where: str, model: nn.Module) -> None:
    tokens = _numbers(row["input_ids"], "input_ids", where)
    if tokens.ndim != 1 or not len(tokens):
        raise DataError(f"{where} has input_ids of shape {list(tokens.shape)}; give a list of at least one token")
    seen = np.ones(len(tokens), dtype=bool)
    for name in _PER_TOKEN:
        if isinstance(row.get(name), (list, tuple, np.ndarray, torch.Tensor)):
            if len(row[name]) != len(tokens):
                raise DataError(
                    f"{where} has {len(tokens)} input_ids and {len(row[name])} {name}; give one for each token"
                )
            seen = _numbers(row[name], name, where).astype(bool) if name == "attention_mask" else seen
    if not seen.any():
        raise DataError(f"{where} has only padding: its attention_mask is 0 at each token; leave it out")
    n_rows, context = vocabulary_size(model), context_length(model)
    unknown = tokens[seen & ((tokens < 0) | (tokens >= n_rows))] if n_rows is not None else tokens[:0]
    if len(unknown):
        raise DataError(f"{where} has the token id {unknown[0]}; {resize_remedy(n_rows or 0)}")
    if context is not None and len(tokens) > context:
        raise DataError(f"{where} has {len(tokens)} tokens, the model's context is {context}; cut the row")


def _check_labels(row: Row, name: str, where: str, model: nn.Module) -> None:
    labels, task = _numbers(row[name], name, where), task_of(model)
    if task in _OF_A_CLASS and labels.ndim:
        raise DataError(f"{where} has {row[name]!r:.60} in column {name!r}; give the number of one class")
    of_tokens = labels.ndim == 1 and "input_ids" in row and not has_decoder(model)
    if of_tokens and len(labels) != len(row["input_ids"]):
        raise DataError(
            f"{where} has {len(row['input_ids'])} input_ids and {len(labels)} {name}; give one for each token"
        )
    if has_decoder(model) and labels.ndim == 1 and (context := context_length(model)) and len(labels) > context:
        raise DataError(f"{where} has {len(labels)} labels, the model's context is {context}; cut the row")
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    n_classes = vocabulary_size(model) if task in ("language-model", "seq2seq") else classes if task else None
    if n_classes is None or (task == "language-model" and not labels.ndim):
        return
    counted = labels != IGNORED
    if of_tokens and isinstance(row.get("attention_mask"), (list, tuple, np.ndarray, torch.Tensor)):
        counted &= np.asarray(row["attention_mask"]).astype(bool)
    wrong = labels[counted & ((labels < 0) | (labels >= n_classes))]
    if wrong.size:
        raise DataError(f"{where} has the label {wrong.flat[0]}, the model has classes 0 to {n_classes - 1}")


def _check_predicted(row: Row, name: str, where: str, model: nn.Module) -> None:
    """Raise `DataError` if each label stands on padding or at the first token, which nothing precedes."""
    inputs = {key: torch.as_tensor(row[key])[None] for key in ("attention_mask",) if row.get(key) is not None}
    inputs["labels"] = torch.as_tensor(row[name])[None]
    if not label_positions(model, counted_labels(model, inputs)).any():
        first = ", or at the first token, which nothing precedes" if shifts_labels(model) else ""
        raise DataError(f"{where} has no label to predict: each is -100, on padding{first}; leave it out")
