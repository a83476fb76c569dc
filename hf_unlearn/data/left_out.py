"""Counting the tokens that `max_length` cuts off rows.

A row that was cut carries the number itself (`CutRow`), so that it is not lost where rows are filtered, selected or
joined.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Subset

from hf_unlearn.data.formats import Rows


@dataclass
class CutCounter:
    """Counts the tokens that an encoder leaves out.

    Attributes:
        tokens: Number of tokens so far.
    """

    tokens: int = 0


class CutRow(dict[str, Any]):
    """An encoded row that was cut.

    >>> CutRow({"input_ids": [1, 2]}, left_out=3)
    {'input_ids': [1, 2]}

    Attributes:
        left_out: Number of its tokens that were left out.
    """

    def __init__(self, row: Mapping[str, Any], left_out: int):
        super().__init__(row)
        self.left_out = left_out


@dataclass(frozen=True)
class LeftOut:
    """How many rows of a set were cut at `max_length`, and how many of their tokens were left out.

    >>> cut = LeftOut.of([{"input_ids": [1]}, CutRow({"input_ids": [1, 2]}, left_out=3)])
    >>> cut.record()
    {'rows': 2, 'rows_cut': 1, 'tokens_cut': 3}
    >>> cut.warn("forget", max_length=2)  # doctest: +SKIP
    UserWarning: 1 of 2 rows of the forget set are cut at 2 tokens (max_length), 3 tokens are left out; ...

    Attributes:
        rows: Number of rows that were cut.
        tokens: Number of tokens that were left out.
        total: Number of rows of the set.
    """

    rows: int = 0
    tokens: int = 0
    total: int = 0

    @classmethod
    def of(cls, rows: Rows) -> "LeftOut":
        """Count the rows of a set; rows that are encoded when they are read (images) are never cut."""
        if not _is_in_memory(rows):
            return cls(total=len(rows))
        cut = [row.left_out for row in (rows[i] for i in range(len(rows))) if isinstance(row, CutRow)]
        return cls(len(cut), sum(cut), len(rows))

    def plus(self, row: Mapping[str, Any]) -> "LeftOut":
        """Return the counts with one more row."""
        tokens = row.left_out if isinstance(row, CutRow) else 0
        return LeftOut(self.rows + bool(tokens), self.tokens + tokens, self.total + 1)

    def record(self) -> dict[str, int]:
        """Return the counts as reports have them."""
        return {"rows": self.total, "rows_cut": self.rows, "tokens_cut": self.tokens}

    def warn(self, what: str, max_length: int | None, stacklevel: int = 3) -> None:
        """Warn if a row of the set `what` was cut."""
        if self.rows:
            warnings.warn(
                f"{self.rows} of {self.total} rows of the {what} set are cut at {max_length} tokens (max_length), "
                f"{self.tokens} tokens are left out; raise max_length, or split long texts into several rows",
                stacklevel=stacklevel,
            )


def cut_records(sets: Mapping[str, Rows | None]) -> dict[str, dict[str, int]]:
    """Return `LeftOut.record` of each set that is given, by its name."""
    return {name: LeftOut.of(rows).record() for name, rows in sets.items() if rows is not None}


def _is_in_memory(rows: object) -> bool:
    while isinstance(rows, Subset):
        rows = cast("object", rows.dataset)
    return isinstance(rows, (list, tuple))
