"""Tables of text, columns of equal width, and results that show themselves as such."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Printed:
    """A result whose ``repr`` is what is printed for people, in a notebook as well."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def aligned(rows: Sequence[Sequence[str]], last_left: bool = False) -> list[str]:
    """Align the columns of a table: the first to the left, the others to the right, the last as ``last_left`` says."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, len(widths) - 1} if last_left else {0}
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
