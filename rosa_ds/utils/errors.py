"""The kinds of error, beside ValueError and OSError, that a user sees as a message and not as a traceback."""

INTERRUPTED_STATUS = 75  # EX_TEMPFAIL: the run was asked to stop and saved its state; start it again with --resume


class RunError(RuntimeError):
    """A run cannot go on: the loss is not finite, or another rank failed. The message says why and what to do."""


class InterruptedRunError(RuntimeError):
    """A run was asked to stop and has saved its state; programs end with status 75."""
