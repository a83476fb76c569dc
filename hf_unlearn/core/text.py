"""Numbers and tables as text."""

import math
from collections.abc import Sequence
from typing import Any


def is_finite(value: Any) -> bool:
    """Whether it is a number, of numpy or torch too, that is neither NaN nor infinite."""
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, (int, float)) and math.isfinite(value)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, padded to a common width, with a rule under the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def spread(found: Sequence[float], digits: int = 3) -> str:
    """Mean and range, as in `0.981 (0.975-0.990)`; numbers below a thousandth in powers of ten."""
    if not found:
        return "-"
    mean, low, high = sum(found) / len(found), min(found), max(found)
    if low == high:
        return as_text(mean, digits)
    return f"{as_text(mean, digits)} ({as_text(low, digits)}-{as_text(high, digits)})"


def as_text(value: float, digits: int = 3) -> str:
    """So many digits, or a power of ten where none of them would be seen."""
    small = 0 < abs(value) < 10.0**-digits and digits > 0
    return f"{value:.0e}" if small else f"{value:.{digits}f}"
