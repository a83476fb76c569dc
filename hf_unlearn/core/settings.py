"""Fields of settings classes, and checks of their values."""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from hf_unlearn.errors import SettingsError


def require_numbers(what: str, settings: Mapping[str, Any]) -> None:
    """Raise `SettingsError` where a setting of `what` (a loss, a constraint) is no number."""
    for name, value in settings.items():
        if not is_number(value):
            raise SettingsError(f"{name} of {what} must be a number, got {value!r}")


def require_ranges(settings: Any, ranges: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Raise `SettingsError` where an attribute of `settings` is below the first of its limits or not below the second.

    None passes. `prefix` comes before the attribute's name, where that makes it a flag's.
    """
    for name, (least, bound) in ranges.items():
        if (value := getattr(settings, name)) is not None and not least <= value < bound:
            limit = "finite" if bound == math.inf else f"below {bound}"
            raise SettingsError(f"{prefix}{name} must be at least {least} and {limit}, got {value}")


def is_number(value: Any) -> bool:
    """Whether it is one; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def setting(default: Any, help: str) -> Any:
    """Dataclass field whose one description is its help text; mutable defaults are copied."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
