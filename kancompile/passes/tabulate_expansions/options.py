"""What a recipe says about the tables of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from kancompile.passes.tabulate_expansions.choose_index import Range


@dataclass(frozen=True)
class TableOptions:
    """What a recipe says about the tables of one layer.

    Attributes:
        levels: rows of the table, or ``None`` to choose by measured error.
        range: which input ranges to try.
        percentile: share of the inputs inside the range on either side, in percent, for ``range = "percentile"``.
        weight_bits: bits of the weights that will read the table; their error sets how fine a table need be.
        column_scaling: exponent with which columns are stretched to the full 8 bits (1: each its own range, 0: all the
            range of the largest), or ``None`` to choose by measured error.
        table_bits: bits of the entries, 2 to 8.
    """

    levels: int | None = None
    range: Range = "mse"
    percentile: float = 99.99
    weight_bits: int = 8
    column_scaling: float | None = None
    table_bits: int = 8

    @property
    def largest_code(self) -> int:
        """Largest entry of a table; the smallest is 0."""
        return (1 << self.table_bits) - 1
