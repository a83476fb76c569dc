"""Fields of settings classes, and checks of their values.

A setting is documented once, by the `help` of its field; the command line's help text and the documentation are made
from it.
"""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from hf_unlearn.errors import SettingsError


def require_numbers(what: str, settings: Mapping[str, object]) -> None:
    """Raise `SettingsError` if a setting of `what` (a loss, a constraint) is not a number."""
    for name, value in settings.items():
        if not is_number(value):
            raise SettingsError(f"{name} of {what} must be a number, got {value!r}")


def require_ranges(settings: object, ranges: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Raise `SettingsError` if an attribute of `settings` is outside its range; None passes.

    >>> from types import SimpleNamespace
    >>> require_ranges(SimpleNamespace(seed=0, energy=1.5), {"seed": (0, math.inf), "energy": (0, 1)})
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.SettingsError: energy must be at least 0 and below 1, got 1.5

    Args:
        settings: Object with the attributes.
        ranges: The least value of each attribute, and the bound that it must be below.
        prefix: Written before the attribute's name, such as `--` for a flag.
    """
    for name, (least, bound) in ranges.items():
        if (value := getattr(settings, name)) is not None and not least <= value < bound:
            limit = "finite" if bound == math.inf else f"below {bound}"
            raise SettingsError(f"{prefix}{name} must be at least {least} and {limit}, got {value}")


def is_number(value: object) -> bool:
    """Return whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and a help text; a list or dict is copied for each instance.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Settings:
    ...     steps: int = setting(10, "Number of steps.")
    >>> Settings().steps, Settings.__dataclass_fields__["steps"].metadata["help"]
    (10, 'Number of steps.')
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
