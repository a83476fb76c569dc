"""Values of a report as safe Markdown."""

import math
import re
from collections.abc import Mapping
from typing import Any

from hf_unlearn.core.text import is_finite

NOT_MEASURED, NOT_RECORDED, UNDEFINED = "not measured", "not recorded", "undefined"


# Values as text


def text(value: Any, missing: str = NOT_RECORDED) -> str:
    """Any value of the report as one safe line; numbers with six digits, NaN as "undefined"."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value == "":
        return missing
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else UNDEFINED
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(key)} = {text(item, 'none')}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(text(item, "none") for item in value) or "none"
    # where a file lies on somebody's disk is nobody else's business
    return "a local path" if isinstance(value, str) and re.match(r"[/~]\S*$", value) else escape(value)


def escape(value: Any) -> str:
    """One line of Markdown that reads as `value` does, inside a table too."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", line)


def code(value: Any) -> str:
    """`value` in a code span, where only the bar of a table still has a meaning."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("\\", r"\\").replace("|", r"\|") + "`"


def with_unit(value: Any, unit: str = "") -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.3g}{unit}" if is_finite(value) else UNDEFINED
