"""Counting the tokens that `max_length` cuts off rows."""

import warnings
from dataclasses import dataclass, field


@dataclass(eq=False)
class LeftOut:
    """How many rows of a set were cut at `max_length`, and how many of their tokens were left out.

    >>> left_out = LeftOut()
    >>> left_out.add(0, tokens=3)
    >>> left_out.warn("forget", n_rows=4, max_length=512)  # doctest: +SKIP
    UserWarning: 1 of 4 rows of the forget set are cut at 512 tokens (max_length), 3 tokens are left out; ...

    Attributes:
        tokens: Number of tokens that were left out.
    """

    tokens: int = 0
    _numbers: set[int] = field(default_factory=set, repr=False)

    @property
    def rows(self) -> int:
        """The number of rows that were cut."""
        return len(self._numbers)

    def add(self, index: int, tokens: int) -> None:
        """Count tokens that are left out of a row."""
        self._numbers.add(index)
        self.tokens += tokens

    def warn(self, what: str, n_rows: int, max_length: int | None) -> None:
        """Warn if a row of the set `what` was cut."""
        if self.rows:
            warnings.warn(
                f"{self.rows} of {n_rows} rows of the {what} set are cut at {max_length} tokens (max_length), "
                f"{self.tokens} tokens are left out; raise max_length, or split long texts into several rows",
                stacklevel=3,
            )
