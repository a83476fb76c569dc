"""Every error that hf_unlearn raises on purpose.

Each message names the thing, what was seen, and the way out, in one line. All of them derive from `UnlearningError`,
so `except UnlearningError` (and the command line's exit code 2) covers exactly the failures that a user can mend.
"""


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
