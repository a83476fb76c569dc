"""Values of a report as safe Markdown."""

import math
import re
from collections.abc import Mapping
from typing import Any

from hf_unlearn.core.text import is_finite

NOT_MEASURED, NOT_RECORDED, UNDEFINED = "not measured", "not recorded", "undefined"


def text(value: Any, missing: str = NOT_RECORDED) -> str:
    """Format any value of the report as one safe line; numbers have six digits, NaN reads "undefined"."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, str) and not value.strip()):
        return missing
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else UNDEFINED
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(key)} = {text(item, 'none')}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(text(item, "none") for item in value) or "none"
    # a path on the user's disk is private
    return "a local path" if isinstance(value, str) and re.match(r"[/~]\S*$", value) else escape(value)


def escape(value: Any) -> str:
    """Format `value` as one line of Markdown that displays it literally, inside a table too."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", line)


def code(value: Any) -> str:
    """Format `value` as a code span; only the bar keeps its meaning there, in a table."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("\\", r"\\").replace("|", r"\|") + "`"


def sentence(value: str | None) -> str:
    """Format a line of a docstring: code spans stay code, everything else is escaped."""
    if not value:
        return NOT_RECORDED
    outside, *spans = str(value).split("`")
    if len(spans) % 2:  # an odd number of backticks
        return escape(value)
    pieces = [_escape_keeping_ends(outside)]
    for span, following in zip(spans[::2], spans[1::2], strict=True):
        pieces += [code(span), _escape_keeping_ends(following)]
    return "".join(pieces).strip()


def with_unit(value: Any, unit: str = "") -> str:
    """Format a number with three digits and its unit; None reads "not measured", NaN "undefined"."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3g}{unit}" if is_finite(value) else UNDEFINED


def percent(value: Any) -> str:
    """Format a share as a percentage; what is not a finite number reads "undefined"."""
    return f"{value:.1%}" if is_finite(value) else UNDEFINED


def _escape_keeping_ends(part: str) -> str:
    """`escape`, with a space kept where `part` begins or ends with one."""
    before, after = part[:1].isspace(), part[-1:].isspace() and part.strip()
    return (" " if before else "") + escape(part) + (" " if after else "")
