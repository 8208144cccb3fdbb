"""Pieces of C text: constant arrays, loops, indentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kancompile.targets.c99.steps import Array

_WIDTH = 116


def array(c_type: str, name: str, values: Array) -> str:
    """Define a constant array."""
    flat = np.asarray(values).ravel().tolist()
    return f"static const {c_type} {name}[{len(flat)}] = {{\n{_lines(map(str, flat))}\n}};\n"


def float_array(name: str, values: Array) -> str:
    """Define a constant array of float32, written exactly."""
    flat = [f"{float(value).hex()}f" for value in np.asarray(values, np.float32).ravel()]
    return f"static const float {name}[{len(flat)}] = {{\n{_lines(flat)}\n}};\n"


def word_array(name: str, values: Array) -> str:
    """Define a constant array of 16-bit elements, an even number of them, as words of either size."""
    pairs = values.reshape(-1, 2).tolist()
    return (
        f"static const kan_word {name}[KAN_WORDS({values.size})] = {{\n{_lines(f'P({a},{b})' for a, b in pairs)}\n}};\n"
    )


def _lines(items: Iterable[str]) -> str:
    lines: list[str] = []
    line: list[str] = []
    width = 0
    for item in items:
        if width + len(item) + 1 > _WIDTH:
            lines.append(",".join(line))
            line, width = [], 0
        line.append(item)
        width += len(item) + 1
    lines.append(",".join(line))
    return ",\n".join(lines)


def unsigned_type(largest: int) -> str:
    """Name the narrowest unsigned type that holds ``largest``."""
    return "uint8_t" if largest < 1 << 8 else "uint16_t" if largest < 1 << 16 else "uint32_t"


def bytes_of(c_type: str) -> int:
    """Give the size of a type that :func:`unsigned_type` names, or of an ``int32_t``."""
    return {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4, "int32_t": 4}[c_type]


def indented(lines: Iterable[str], depth: int = 1) -> list[str]:
    """Indent lines."""
    return ["    " * depth + line if line else line for line in lines]


def for_loop(variable: str, count: int | str, body: Sequence[str]) -> list[str]:
    """Count a variable from 0; a count of 1 needs no loop."""
    if count == 1:
        return ["{", *indented([f"const uint32_t {variable} = 0;", *body]), "}"]
    return [f"for (uint32_t {variable} = 0; {variable} < {count}; {variable}++) {{", *indented(body), "}"]


def comment(text: str) -> str:
    """Make any text fit for the inside of a comment."""
    for pair in ("*/", "/*", "??"):
        text = text.replace(pair, f"{pair[0]} {pair[1]}")
    return text.encode("ascii", "backslashreplace").decode("ascii").replace("\n", " ")


def is_range(order: Array) -> bool:
    """Whether elements stand in their own order."""
    return bool(np.array_equal(order, np.arange(len(order))))
