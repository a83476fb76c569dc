"""Every error that hf_unlearn raises on purpose.

Each message names the thing, what was seen, and the way out, in one line. All of them derive from `UnlearningError`,
so `except UnlearningError` (and the command line's exit code 2) covers exactly the failures that a user can mend.
"""

import math
from collections.abc import Mapping
from typing import Any


class UnlearningError(Exception):
    """Base of the family. Never raised itself."""


class SettingsError(UnlearningError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(UnlearningError, ValueError):
    """A data set is empty, lacks a column, or overlaps with one that it must not overlap with."""


class ModelError(UnlearningError, ValueError):
    """The model has no layer that can be handled, or not the layer that was asked for."""


class CoverageError(UnlearningError, ValueError):
    """A trainable parameter is neither protected by statistics nor explicitly allowed to be exposed."""


class StatisticsError(UnlearningError, ValueError):
    """A statistics artifact is damaged, too new, or belongs to another model."""


class OutputError(UnlearningError, OSError):
    """The output folder cannot be written without losing something."""


class LedgerError(UnlearningError, ValueError):
    """A ledger is damaged, missing or held by another process, or its key is wrong, too short or not at hand."""


class NonFiniteLossError(UnlearningError, ArithmeticError):
    """The loss became NaN or infinite; the last good weights are back in the model when this is raised."""


class PushError(UnlearningError, RuntimeError):
    """A push to the Hub did not come to its end. What it publishes lies whole in a local folder; a re-run resumes.

    Attributes:
        folder: The local folder, or None where nothing local is at stake (`purge_history`).
        command: What resumes.
    """

    def __init__(self, message: str, folder: str | None = None, command: str | None = None):
        super().__init__(message)
        self.folder, self.command = folder, command


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
