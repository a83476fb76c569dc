"""Held-out rows to rehearse: the model is held to what it said about them before."""

from hf_unlearn.data.batches import select
from hf_unlearn.data.formats import Rows

FEWEST = 4
"""Held-out rows, from which half of them are rehearsed: each half has two rows then."""


def split_held_out(rows: Rows) -> tuple[Rows | None, Rows]:
    """Return the held-out rows to rehearse and those to judge by: every second row of each, or None and all rows.

    Rows that were rehearsed are not rows to judge by.

    >>> rehearsed, judged = split_held_out([{"id": 0}, {"id": 1}, {"id": 2}, {"id": 3}, {"id": 4}])
    >>> [row["id"] for row in rehearsed], [row["id"] for row in judged]
    ([1, 3], [0, 2, 4])
    >>> split_held_out([{"id": 0}])
    (None, [{'id': 0}])
    """
    if len(rows) < FEWEST:
        return None, rows
    return select(rows, range(1, len(rows), 2)), select(rows, range(0, len(rows), 2))


def joined(*sets: Rows | None) -> Rows | None:
    """Return the rows of all sets that are given; None if none is."""
    given = [rows for rows in sets if rows is not None]
    if len(given) < 2:
        return given[0] if given else None
    return [rows[index] for rows in given for index in range(len(rows))]
