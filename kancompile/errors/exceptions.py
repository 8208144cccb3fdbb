"""The one exception that a user of kancompile has to catch."""

from __future__ import annotations


class KanCompileError(Exception):
    """Report something that the caller can mend.

    The text follows one form: who (layer, argument or file), what was found, what was expected, the way out.
    The command line prints it without a traceback and exits with code 2.
    """


class ThresholdMissedError(KanCompileError):
    """The input is fine, but what was asked of the result cannot be reached; nothing was written."""
