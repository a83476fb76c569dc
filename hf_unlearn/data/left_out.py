"""Counting the tokens that `max_length` cuts off rows."""

import warnings
from dataclasses import dataclass, field


@dataclass(eq=False)
class LeftOut:
    """How many rows of a set were cut at `max_length`, and how many of their tokens were left out.

    >>> left_out = LeftOut()
    >>> left_out.add(0, tokens=3)
    >>> left_out.rows, left_out.tokens
    (1, 3)

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

    def clear(self) -> None:
        """Forget what was counted, because the rows are read again."""
        self._numbers.clear()
        self.tokens = 0


@dataclass(frozen=True)
class CutWarning:
    """Warns once a set was read that rows of it were cut.

    >>> CutWarning(LeftOut(3, {0}), "forget", max_length=512).warn(n_rows=4)  # doctest: +SKIP
    UserWarning: 1 of 4 rows of the forget set are cut at 512 tokens (max_length), 3 tokens are left out; ...

    Attributes:
        left_out: What was counted.
        what: The name of the set.
        max_length: Where rows are cut.
    """

    left_out: LeftOut
    what: str
    max_length: int | None

    def warn(self, n_rows: int) -> None:
        """Warn if one of `n_rows` rows was cut."""
        if self.left_out.rows:
            warnings.warn(
                f"{self.left_out.rows} of {n_rows} rows of the {self.what} set are cut at {self.max_length} tokens "
                f"(max_length), {self.left_out.tokens} tokens are left out; raise max_length, or split long texts into "
                "several rows",
                stacklevel=3,
            )
