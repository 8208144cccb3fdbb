"""The one exception that a user of kancompile has to catch."""

from __future__ import annotations

import re

_MOST_CHARACTERS, _LAST_CHARACTERS = 1_800, 500
_MOST_LINES, _LAST_LINES = 20, 5
_CONTROLS = re.compile(r"[^\S \n]|[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class KanCompileError(Exception):
    """Report something that the caller can mend.

    The text follows one form: who (layer, argument or file), what was found, what was expected, the way out.
    The command line prints it without a traceback and exits with code 2. Whatever a file held, the text fits on a screen,
    with its end, where the way out stands, and steers no terminal.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(_on_a_screen(printable(str(text))))


class ThresholdMissedError(KanCompileError):
    """The input is fine, but what was asked of the result cannot be reached; nothing was written."""


def printable(text: str) -> str:
    """Escape what a terminal would obey, or could not encode; line breaks stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _on_a_screen(text: str) -> str:
    lines = text.split("\n")
    if len(lines) > _MOST_LINES:
        text = "\n".join([*lines[: _MOST_LINES - _LAST_LINES - 1], "...", *lines[-_LAST_LINES:]])
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - _LAST_CHARACTERS]} ... {text[-_LAST_CHARACTERS:]}"
