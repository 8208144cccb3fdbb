"""Loops of windows that move over positions, as convolutions and poolings have them."""

from __future__ import annotations

from collections.abc import Sequence

from kancompile.targets.c99.c_text import for_loop, indented
from kancompile.targets.c99.steps import Window


def over_positions(window: Window, body: Sequence[str]) -> list[str]:
    """Run ``body`` for every ``position`` of the output, whose coordinates are ``y0``, ``y1``, ..."""
    lines = [
        f"const uint32_t position = {_flat([f'y{axis}' for axis in range(len(window.out_size))], window.out_size)};",
        *body,
    ]
    for axis in reversed(range(len(window.out_size))):
        lines = for_loop(f"y{axis}", window.out_size[axis], lines)
    return lines


def over_taps(window: Window, inside: Sequence[str], outside: Sequence[str]) -> list[str]:
    """Run a body for every ``tap``: ``inside`` where its ``source`` position lies in the image, else ``outside``."""
    axes = range(len(window.kernel))
    lines = (
        [f"const uint32_t tap = {_flat([f't{axis}' for axis in axes], window.kernel)};"]
        if _uses([*inside, *outside], "tap")
        else []
    )
    flat = _flat([f"(uint32_t)x{axis}" for axis in axes], window.in_size)
    inner = [f"const uint32_t source = {flat};", *inside]
    checked = [axis for axis in axes if _leaves(window, axis)]
    if checked:
        test = " && ".join(f"x{axis} >= 0 && x{axis} < {window.in_size[axis]}" for axis in checked)
        lines += [f"if ({test}) {{", *indented(inner), "}"]
        if outside:
            lines[-1:] = ["} else {", *indented(outside), "}"]
    else:
        lines += inner
    for axis in reversed(axes):
        at = (
            f"const int32_t x{axis} = (int32_t)(y{axis} * {window.stride[axis]}u + t{axis} * {window.dilation[axis]}u)"
            f" - {window.padding[axis]};"
        )
        lines = for_loop(f"t{axis}", window.kernel[axis], [at, *lines])
    return lines


def _uses(lines: Sequence[str], word: str) -> bool:
    return any(f"{word} " in line or f"[{word}" in line for line in lines)


def _leaves(window: Window, axis: int) -> bool:
    last = (window.out_size[axis] - 1) * window.stride[axis] + (window.kernel[axis] - 1) * window.dilation[axis]
    return window.padding[axis] > 0 or last - window.padding[axis] >= window.in_size[axis]


def _flat(coordinates: Sequence[str], sizes: Sequence[int]) -> str:
    """Write the row-major number of a position."""
    if not coordinates:
        return "0"
    text = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        text = f"({text}) * {size}u + {coordinate}" if " " in text else f"{text} * {size}u + {coordinate}"
    return text
