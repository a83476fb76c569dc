"""Every error that hf_unlearn raises on purpose.

Each message names the thing, what was seen, and the way out, in one line. All errors derive from `UnlearningError`, so
`except UnlearningError` (and the command line's exit code 2) covers exactly the failures that a user can fix.
"""


class UnlearningError(Exception):
    """Base class of all errors of the package; never raised itself."""


class SettingsError(UnlearningError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(UnlearningError, ValueError):
    """A data set is empty, lacks a column, or overlaps with one that it must not overlap with."""


class ModelError(UnlearningError, ValueError):
    """The model has no layer that can be protected, lacks the layer that was asked for, or cannot be loaded."""


class CoverageError(UnlearningError, ValueError):
    """A trainable parameter is neither protected by statistics nor explicitly allowed to be exposed."""


class StatisticsError(UnlearningError, ValueError):
    """Saved statistics are damaged, too new, or belong to another model."""


class OutputError(UnlearningError, OSError):
    """The output folder cannot be written without losing something."""


class LedgerError(UnlearningError, ValueError):
    """A ledger is damaged, missing or held by another process, or its key is wrong, too short or not available."""


class NonFiniteLossError(UnlearningError, ArithmeticError):
    """The loss became NaN or infinite; when this is raised, the model has its last good weights again."""


class PushError(UnlearningError, RuntimeError):
    """A push to the Hub did not finish. Everything it publishes is in a local folder; the same push again resumes.

    Attributes:
        folder: The local folder, or None if no local files are involved (`purge_history`).
        command: The command that resumes.
    """

    def __init__(self, message: str, folder: str | None = None, command: str | None = None):
        super().__init__(message)
        self.folder, self.command = folder, command
