"""Errors that a person reads: one sentence saying what is wrong and how to mend it."""


class ForetellError(Exception):
    """Base of every error foretell raises on purpose; the message is one plain sentence."""


class InputError(ForetellError):
    """Bad usage or bad input. The command line prints the sentence and exits with 2."""


class NoRollback(ForetellError):
    """A cache was asked to undo rows it cannot undo. Never ignored, never partial."""
