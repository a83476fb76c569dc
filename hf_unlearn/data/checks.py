"""Checks that data sets must pass before training."""

import warnings
from collections.abc import Iterator, Mapping, Sized
from os import PathLike

import torch
from torch import nn

from hf_unlearn.data.formats import LABELS, Row, Rows
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.errors import DataError
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.causality import sees_what_follows
from hf_unlearn.models.tasks import IGNORED


def require_rows(dataset: Sized | None, what: str) -> None:
    """Raise `DataError` if a data set has no rows."""
    if dataset is None or len(dataset) == 0:
        raise DataError(f"the {what} set is empty; give it at least one row")


def check_container(rows: object, what: str) -> None:
    """Raise `DataError` with what to pass if a data set is not rows but splits, columns, a table, or a name.

    >>> check_container({"text": ["a", "b"]}, "forget")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.DataError: the forget set is a dict with keys ['text'], not a list of rows; pass one of its \
splits, [row] for one row, or datasets.Dataset.from_dict(columns)
    """
    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        raise DataError(
            f"the {what} set is a {kind} with keys {sorted(map(str, rows))}, not a list of rows; pass one of its "
            "splits, [row] for one row, or datasets.Dataset.from_dict(columns)"
        )
    if isinstance(rows, (str, bytes, PathLike)):
        raise DataError(
            f"the {what} set is {rows!r:.80}, not a list of rows; load it first, such as with datasets.load_dataset"
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        raise DataError(f"the {what} set is a {kind}; pass its rows, such as datasets.Dataset.from_pandas(table)")
    if hasattr(rows, "to_pylist") or hasattr(rows, "iloc"):
        method = "to_pylist" if hasattr(rows, "to_pylist") else "tolist"
        raise DataError(f"the {what} set is a {kind}; pass its rows as a list, its {method}()")
    if isinstance(rows, Iterator):
        raise DataError(
            f"the {what} set is a {kind}, which can be read only once; pass list(rows), or a stream that begins again "
            "(datasets.IterableDataset.from_generator)"
        )
    can_be_read = hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")
    if isinstance(rows, type) or not (rows is None or can_be_read):
        raise DataError(f"the {what} set is {rows!r:.80}, not rows; pass a list of rows or a datasets.Dataset")
    if hasattr(rows, "__len__") and not hasattr(rows, "__getitem__"):
        raise DataError(f"the {what} set is a {kind}, whose rows have no numbers; pass list(rows) or its dataset")


def check_row(row: object, what: str, index: int = 0) -> None:
    """Raise `DataError` if a row of a set is not a mapping from column names to values."""
    if isinstance(row, Mapping):
        return
    kind = type(row).__name__
    remedy = "give rows such as {'text': ...} or {'image': ..., 'label': ...}"
    if hasattr(row, "column_names") or (hasattr(row, "columns") and hasattr(row, "to_dict")):
        remedy = "the data set is formatted as tables: pass dataset.with_format(None)"
    raise DataError(f"row {index} of the {what} set is a {kind}, not a mapping from column names to values; {remedy}")


def require_continuing(model: nn.Module, row: Row, what: str) -> None:
    """Raise `DataError` if the model is a masked language model, or one whose tokens see those that follow.

    The labels of such a model must not stand in its input: it would learn to copy. Encoded rows pass if the input is
    masked where a label of `row`, the first one, is.
    """
    tokens, labels = row.get("input_ids"), row.get("labels")
    if tokens is not None and (labels is None or _some_masked(tokens, labels)):
        return
    if sees_what_follows(model):
        kind = type(without_wrapper(getattr(model, "module", model))).__name__
        raise DataError(
            f"the model of the {what} set is a {kind}, whose tokens see those that follow, so it would "
            "only copy its labels; use a model that continues texts (AutoModelForCausalLM, config.is_decoder), or a "
            "classifier"
        )


def _some_masked(tokens: object, labels: object) -> bool:
    """Return whether a label differs from the input at its position, or the two have no common positions.

    Values that are no numbers, which `encoded_checks` refuses, have none.
    """
    try:
        tokens_T, labels_T = torch.as_tensor(tokens), torch.as_tensor(labels)
    except (ValueError, TypeError, RuntimeError):
        return True
    if tokens_T.shape != labels_T.shape:
        return True
    counted_T = labels_T != IGNORED
    return bool((tokens_T != labels_T)[counted_T].any()) or not counted_T.any()


def require_alternates(rows: Rows, loss: str) -> None:
    """Raise `DataError` if an encoded forget row has no alternate answer."""
    for index in range(len(rows)):
        if not isinstance(rows[index].get("alternate"), Mapping):
            raise DataError(
                f"loss {loss!r} needs an alternate answer for each forget row, row {index} has none: fill its column "
                "'alternate' (a text; in tokenized rows input_ids and labels), or choose loss idk for raw rows"
            )


def require_labels(rows: Rows, what: str) -> bool:
    """Return whether labels are per token; raise `DataError` if a row has no label, or only -100."""
    for index in range(len(rows)):
        row = rows[index]
        labels = next((row[name] for name in LABELS if name in row), None)
        if labels is None or bool((torch.as_tensor(labels) == IGNORED).all()):
            raise DataError(f"row {index} of the {what} set has no label to predict (none, or all -100); leave it out")
    return torch.as_tensor(labels).ndim > 0


def require_disjoint(forget: Rows, retain: Rows, what: str = "retain") -> None:
    """Raise `DataError` if a row is in the forget set and in the `what` set.

    Rows of other texts whose tokens are the same because the tokenizer does not know them all are a warning.

    >>> require_disjoint([{"input_ids": [1, 2]}], [{"input_ids": [1, 3]}])
    """
    numbers = {row_hash(forget[i]): i for i in range(len(forget))}
    shared = [(numbers[key], i) for i in range(len(retain)) if (key := row_hash(retain[i])) in numbers]
    unclear = [pair for pair in shared if _only_tokens_agree(forget, retain, *pair)]
    if unclear:
        warnings.warn(
            f"{len(unclear)} forget rows have the tokens of {what} rows with another text (first: forget row "
            f"{unclear[0][0]} and {what} row {unclear[0][1]}), because the tokenizer does not know all of it; the "
            "model cannot tell them apart",
            stacklevel=2,
        )
    shared = [pair for pair in shared if pair not in unclear]
    if shared:
        raise DataError(
            f"{len(shared)} forget rows are also in the {what} set (first: forget row {shared[0][0]} is {what} row "
            f"{shared[0][1]}); remove them from the {what} set"
        )


def _only_tokens_agree(forget: Rows, retain: Rows, forget_index: int, retain_index: int) -> bool:
    """Return whether two rows with the same tokens have other texts, of which tokens are unknown."""
    raw, other, unknown = getattr(forget, "raw", None), getattr(retain, "raw", None), getattr(forget, "unknown", None)
    if raw is None or other is None or unknown is None or unknown not in forget[forget_index].get("input_ids", ()):
        return False
    return row_hash(raw[forget_index]) != row_hash(other[retain_index])
