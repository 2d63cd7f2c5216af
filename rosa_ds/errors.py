"""The one kind of error, beside ValueError and OSError, that a user sees as a message and not as a traceback."""


class RunError(RuntimeError):
    """A run cannot go on: the loss is not finite, or another rank failed. The message says why and what to do."""
