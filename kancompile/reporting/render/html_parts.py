"""Cells and tables of a report page: numbers as people read them, every text escaped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from typing import Any

MISSING = "\N{EN DASH}"


def number(value: Any) -> str:
    """Format a number with four digits; text such as ``nan`` stays, ``None`` becomes a dash."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def decibels(value: Any) -> str:
    """Format a ratio in dB; an infinite one means no error at all."""
    if value is None:
        return MISSING
    if not isinstance(value, int | float):
        return "exact" if value == "inf" else str(value)
    return f"{value:.1f} dB"


def percent(share: Any) -> str:
    """Format a share of 1 in percent; what is not 0 never shows as 0."""
    if not isinstance(share, int | float):
        return MISSING
    if share == 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def data_size(count: float) -> str:
    """Format bytes in powers of 1000, as package indices and stores do."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} bytes"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), wrap: Collection[int] = ()
) -> str:
    """Build a table that scrolls inside its own box.

    Args:
        head: texts, escaped here; a table without any has no head.
        rows: cells of finished HTML.
        classes: of each row.
        wrap: columns of long text.
    """
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = []
    for number_, row in enumerate(rows):
        kind = f' class="{classes[number_]}"' if classes and classes[number_] else ""
        inner = "".join(f"<td{' class=wrap' if i in wrap else ''}>{cell}</td>" for i, cell in enumerate(row))
        body.append(f"<tr{kind}>{inner}</tr>")
    header = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    # focusable, so that a keyboard can scroll it
    return f'<div class="scroll" tabindex="0"><table>{header}<tbody>{"".join(body)}</tbody></table></div>'
