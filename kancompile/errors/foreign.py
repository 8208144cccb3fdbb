"""Read what others wrote: whatever breaks on the content of a file is the file's fault, and is told as one error.

On damaged or hostile content readers raise what they like: the errors that they document, and RecursionError, OverflowError,
MemoryError or AttributeError from somewhere inside. A list of them is never complete, so this is the place that takes them all.
"""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from kancompile.errors.exceptions import KanCompileError

MOST_TEXT_BYTES = 1 << 26
_DEEPEST = 64
_MOST_ITEMS = 1 << 22
_MOST_SHOWN = 300
_PIECE_BYTES = 1 << 24


@contextmanager
def foreign(who: str, way_out: str) -> Iterator[None]:
    """Turn whatever is raised inside the block into one error about the file.

    All that trusts the content belongs inside, not the call alone that reads it. Where memory ends, it is because the content
    asks for it. Errors of kancompile pass as they are; Ctrl-C and an exit are no errors of a reader.

    Args:
        who: what is read, such as ``"recipe 'r.toml'"``.
        way_out: what the user can do.

    Raises:
        KanCompileError: something was raised.
    """
    try:
        yield
    except KanCompileError:
        raise
    except Exception as error:
        raise KanCompileError(f"{who}: cannot be read ({reason(error)}); {way_out}") from error


@contextmanager
def naming_file(source: Any) -> Iterator[None]:
    """Name the file in errors about what it held, for checks that are the same wherever their data come from.

    Args:
        source: its path; anything else names no file.
    """
    try:
        yield
    except KanCompileError as error:
        path = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
        if not path or path in str(error) or repr(path) in str(error):
            raise
        raise type(error)(f"{error} (in {path!r})") from error


def reason(error: BaseException) -> str:
    """Say in a clause what an exception of a reader means."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return f"asks for more memory than there is{': ' + str(error) if str(error) else ''}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text that says something, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def shown(value: Any) -> str:
    """Write a value for an error: ``repr`` of bounded length; integers of thousands of digits have none at all."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def read_text(path: Path, who: str, way_out: str, most: int = MOST_TEXT_BYTES) -> str:
    """Read a text file in UTF-8.

    Raises:
        KanCompileError: it cannot be read, or has more than ``most`` bytes, of which no more are read.
    """
    content = read_bytes(path, who, way_out, most)
    with foreign(who, way_out):
        return content.decode("utf-8")


def read_bytes(path: Path, who: str, way_out: str, most: int) -> bytes:
    """Read a whole file.

    Raises:
        KanCompileError: it cannot be read, or has more than ``most`` bytes, of which no more are read.
    """
    pieces, left = [], most + 1
    with foreign(who, way_out), path.open("rb") as file:
        # a single call would take the memory of all that might come
        while left and (piece := file.read(min(left, _PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
    if not left:
        raise KanCompileError(f"{who}: found more than {most:,} bytes, expected a smaller file; {way_out}")
    return b"".join(pieces)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON to data that can be written as JSON again: of bounded depth, infinity and NaN as the texts that they were.

    Raises:
        Exception: it is no JSON; call it where :func:`foreign` or the like takes whatever that raises.
    """
    content = json.loads(text, parse_constant=str, parse_float=_finite)
    check_depth(content)
    return content


def check_form(content: Any, form: Any, who: str, way_out: str) -> None:
    """Verify that plain data have the form that their reader relies on.

    Args:
        content: lists, dictionaries, texts and numbers.
        form: a type, or several; ``[form]`` of every item; or the forms of keys, of which those with a ``?`` may be absent.
        who: what is read.
        way_out: what the user can do.

    Raises:
        KanCompileError: they have not; the place is named.
    """
    misfit = _misfit(content, form, "")
    if misfit is not None:
        raise KanCompileError(f"{who}: {misfit}; {way_out}")


def _misfit(content: Any, form: Any, place: str) -> str | None:
    if isinstance(form, dict):
        if not isinstance(content, dict):
            return f"found {shown(content)} at {place or 'the top'}, expected keys and values"
        absent = [key for key in form if not key.endswith("?") and key not in content]
        if absent:
            return f"found no {absent[0]!r} at {place or 'the top'}"
        items = [
            (content[name], inner, f"{place}.{name}")
            for key, inner in form.items()
            if (name := key.rstrip("?")) in content
        ]
    elif isinstance(form, list):
        if not isinstance(content, list):
            return f"found {shown(content)} at {place or 'the top'}, expected a list"
        items = [(item, form[0], f"{place}[{number}]") for number, item in enumerate(content)]
    else:
        allowed = form if isinstance(form, tuple) else (form,)
        if type(content) in allowed or (type(content) is int and float in allowed):
            return None
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        return f"found {shown(content)} at {place or 'the top'}, expected {names}"
    return next((found for item in items if (found := _misfit(*item)) is not None), None)


def parse_literal(text: str) -> Any:
    """Read a Python literal: numbers, text, lists and the like.

    Raises:
        ValueError: it is none.
    """
    try:
        return ast.literal_eval(text)
    except Exception as error:  # the parser has errors of its own for depth, size and keys that cannot be any
        raise ValueError(reason(error)) from error


def _finite(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text


def check_depth(content: Any) -> None:
    """Refuse nested lists and dictionaries that a recursive reader, or ``repr``, could not follow.

    Raises:
        ValueError: they are nested more than 64 deep, or hold millions of values at one depth.
    """
    level = [content]
    for _ in range(_DEEPEST):
        inner = [value for value in level if isinstance(value, dict | list)]
        items = (item for value in inner for item in (value.values() if isinstance(value, dict) else value))
        level = list(islice(items, _MOST_ITEMS + 1))
        if len(level) > _MOST_ITEMS:  # a few lines of YAML may hold one list in another many times
            raise ValueError(f"more than {_MOST_ITEMS:,} values")
        if not level:
            return
    raise ValueError(f"nested more than {_DEEPEST} deep")
