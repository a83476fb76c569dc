"""Checks that data sets must pass before training."""

from collections.abc import Mapping, Sized

import torch

from hf_unlearn.data.formats import LABELS, Rows
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import IGNORED


def require_rows(dataset: Sized | None, what: str) -> None:
    """Raise `DataError` if a data set has no rows."""
    if dataset is None or len(dataset) == 0:
        raise DataError(f"the {what} set is empty; give it at least one row")


def require_one_split(dataset: object, what: str) -> None:
    """Raise `DataError` if a data set is several splits by name (such as a `DatasetDict`) in place of the rows of one.

    >>> require_one_split({"train": [], "test": []}, "forget")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.DataError: the forget set is a dict of splits (train, test); pass the rows of one: dict['train']
    """
    if isinstance(dataset, Mapping):
        kind, names = type(dataset).__name__, [str(name) for name in dataset]
        first = repr(names[0]) if names else "..."
        raise DataError(
            f"the {what} set is a {kind} of splits ({', '.join(names)}); pass the rows of one: {kind}[{first}]"
        )


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

    >>> require_disjoint([{"input_ids": [1, 2]}], [{"input_ids": [1, 3]}])
    """
    numbers = {row_hash(forget[i]): i for i in range(len(forget))}
    shared = [(numbers[key], i) for i in range(len(retain)) if (key := row_hash(retain[i])) in numbers]
    if shared:
        raise DataError(
            f"{len(shared)} forget rows are also in the {what} set (first: forget row {shared[0][0]} is {what} row "
            f"{shared[0][1]}); remove them from the {what} set"
        )
