"""Which names inputs and outputs can have in a file."""

from __future__ import annotations

from collections.abc import Iterable

from kancompile.errors import KanCompileError, shown

_NOT_IN_CODE = set("'\"\\")
"""What ends a text in the code that PyTorch writes about inputs."""


def is_utf8(name: str) -> bool:
    """Whether a file can hold a text: none of its characters is half of one."""
    return name.encode(errors="ignore").decode() == name


def check_output_names(names: Iterable[str]) -> None:
    """Refuse names that no file can hold.

    Raises:
        KanCompileError: a name that is empty or no UTF-8.
    """
    for name in names:
        if not name or not is_utf8(name):
            raise KanCompileError(
                f"model: found an output called {shown(name)}, expected a text that UTF-8 can hold; return it under another name"
            )


def check_input_names(names: Iterable[str], who: str) -> None:
    """Refuse names that PyTorch cannot write into code, or no file can hold.

    Args:
        names: of inputs; a file names them as the data do.
        who: what errors call the data.

    Raises:
        KanCompileError: a name with quotes, backslashes or characters that cannot be printed.
    """
    for name in names:
        if not name.isprintable() or _NOT_IN_CODE & set(name):
            raise KanCompileError(
                f"{who}: found an input called {shown(name)}, expected printable text without quotes and backslashes; give it "
                "another name, also in the model"
            )
