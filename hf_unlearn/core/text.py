"""Numbers, tables and objects as text, for reports, the command line and notebooks."""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import fields

_SHORT = 80
"""A text of fewer characters is completed by the cause of its error."""


def is_finite(value: object) -> bool:
    """Return whether a value is a number (also of numpy or torch) that is neither NaN nor infinite.

    >>> is_finite(2), is_finite(math.nan), is_finite("2")
    (True, False, False)
    """
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, (int, float)) and math.isfinite(value)


def one_line(error: BaseException, longest: int = 300) -> str:
    """Return what an error of a library says in one line, for an error message of the package.

    All lines count, because the first often only introduces the others; so does the cause of an error that says little.
    An error without a text is the name of its type.

    >>> one_line(ValueError("Couldn't instantiate the tokenizer from one of: \\n(1) a file, \\n(2) a class"))
    "Couldn't instantiate the tokenizer from one of: (1) a file, (2) a class"

    Args:
        error: The error.
        longest: Most characters; a longer text is cut after a word and ends with `...`.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    cause = " ".join(str(error.__cause__ or "").split())
    if cause and len(text) < _SHORT and cause not in text:
        text = f"{text.rstrip('.:')}: {cause}"
    return text if len(text) <= longest else text[:longest].rpartition(" ")[0].rstrip(" ,;:") + " ..."


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: columns padded to their widest cell, with a rule under the header.

    >>> print(align([["split", "loss"], ["forget", "2.1"]]))
    split   loss
    ------  ----
    forget  2.1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and range of values; the mean alone if all are equal, and a dash if there are none.

    >>> spread([0.97, 0.99]), spread([0.5, 0.5]), spread([])
    ('0.980 (0.970-0.990)', '0.500', '-')
    """
    if not values:
        return "-"
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if low == high:
        return as_text(mean, digits)
    return f"{as_text(mean, digits)} ({as_text(low, digits)}-{as_text(high, digits)})"


def as_text(value: float, digits: int = 3) -> str:
    """Return a number with this many decimals; a small one has two significant digits instead.

    >>> as_text(0.25), as_text(0.0015), as_text(0.00002)
    ('0.250', '0.0015', '2e-05')
    """
    small = 0 < abs(value) < 10.0 ** (1 - digits) and digits > 0
    return f"{value:.2g}" if small else f"{value:.{digits}f}"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with this many significant digits.

    >>> significant(0.98765), significant(0.0015), significant(0.0000231), significant(1.0)
    ('0.988', '0.0015', '2.31e-05', '1')
    """
    return f"{value:.{digits}g}"


class ShortRepr:
    """A `repr` of a dataclass that fits in a line: shapes in place of tensors, counts in place of rows.

    >>> import numpy as np
    >>> from dataclasses import dataclass
    >>> @dataclass(repr=False)
    ... class Scores(ShortRepr):
    ...     values: np.ndarray
    ...     names: list[str]
    ...     split: str = "forget"
    >>> Scores(np.zeros((20, 3)), ["a"] * 20)
    Scores(values=float64[20, 3], names=<20>, split='forget')
    """

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={_Brief().repr(getattr(self, f.name))}' for f in shown)})"


class _Brief(reprlib.Repr):
    """The standard library's short `repr`, with shapes of tensors, names of modules and sizes of containers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother, self.maxlevel = 60, 2

    def repr1(self, x: object, level: int) -> str:
        if isinstance(x, ShortRepr):
            return repr(x)
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if hasattr(x, "forward") or callable(x):
            return f"<{getattr(x, '__name__', type(x).__name__)}>"
        if not isinstance(x, (str, bytes)) and hasattr(x, "__len__") and len(x) > self.maxlist:
            return f"<{len(x)}>"
        return super().repr1(x, level)
