"""Checks that data sets must pass before training."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_unlearn.data.formats import LABELS
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import IGNORED


def require_rows(dataset: Any, what: str) -> None:
    """Raise `DataError` where a data set has no rows."""
    if dataset is None or len(dataset) == 0:
        raise DataError(f"the {what} set is empty; give it at least one row")


def require_alternates(rows: Any, loss: str) -> None:
    """Raise `DataError` where an encoded forget row has no alternate answer."""
    for index in range(len(rows)):
        if not isinstance(rows[index].get("alternate"), Mapping):
            raise DataError(
                f"loss {loss!r} needs an alternate answer for each forget row, row {index} has none: fill its column "
                "'alternate' (a text; of tokenised rows input_ids and labels), or choose loss idk for raw rows"
            )


def require_labels(rows: Any, what: str) -> bool:
    """Raise `DataError` where a row has no label, or only -100; returns whether labels are those of tokens."""
    for index in range(len(rows)):
        row = rows[index]
        labels = next((row[name] for name in LABELS if name in row), None)
        if labels is None or bool((torch.as_tensor(labels) == IGNORED).all()):
            raise DataError(f"row {index} of the {what} set has no label to predict (none, or all -100); leave it out")
    return torch.as_tensor(labels).ndim > 0


def require_disjoint(forget: Any, retain: Any, what: str = "retain") -> None:
    """Raise `DataError` where a row is in the forget set and in the `what` set."""
    keys = {row_hash(forget[i]): i for i in range(len(forget))}
    shared = [(keys[key], i) for i in range(len(retain)) if (key := row_hash(retain[i])) in keys]
    if shared:
        raise DataError(
            f"{len(shared)} forget rows are also in the {what} set (first: forget row {shared[0][0]} is {what} row "
            f"{shared[0][1]}); remove them from the {what} set"
        )
