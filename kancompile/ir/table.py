"""An expansion as an integer table: row numbers in, codes of its functions out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kancompile.ir.operators  # noqa: F401  (registers the operators that torch.ops.kancompile names)
from kancompile.ir.expansion import regroup, to_channels_last
from kancompile.ir.index import IndexQuantizer


class TableExpansion(nn.Module):
    """An expansion as a table look-up, ``phi[b, i, k] ~ scale[t, k] * table[t, row, k] + offset[t, k]``.

    Its output are the codes; the scale and the offset of each column are folded into the contraction.

    Attributes:
        in_shape: ``(*, n_in)``.
        index: the input quantizer.
        input: ``"real"`` quantizes real values as QuantizeLinear does, ``"float"`` in float arithmetic;
            ``"scaled"`` reads real values that already are in units of rows, 0.5 included; ``"index"`` reads row
            numbers that the layer before produced.
        table: uint8 ``[T * levels, k]``, the distinct tables one below the other.
        first_row: int32 ``[n_in]``, where the table of an input begins, or ``None`` where all share one table.
        scale, offset: float32 ``[T, k]``, real value of one code step and of code 0.
        branch_sizes, branch_names: how the ``k`` columns divide into the captured branches.
        channels_first: whether it reads ``[b, n_in, *]``, as in front of a convolution. Row numbers, single bytes, are
            brought channels last before the look-up, not the values.
    """

    table: Tensor
    first_row: Tensor | None
    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        index: IndexQuantizer,
        table: Tensor,
        first_row: Tensor | None,
        scale: Tensor,
        offset: Tensor,
        branch_sizes: Sequence[int],
        branch_names: Sequence[str],
        input: str = "real",
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.in_shape = tuple(in_shape)
        self.index = index
        self.input = input
        self.branch_sizes = tuple(branch_sizes)
        self.branch_names = tuple(branch_names)
        self.register_buffer("table", table)
        self.register_buffer("first_row", first_row)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    @property
    def n_in(self) -> int:
        """Number of inputs that a contraction weighs separately."""
        return int(self.in_shape[-1])

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        return int(self.table.shape[-1])

    @property
    def n_tables(self) -> int:
        """Number of distinct tables."""
        return int(self.table.shape[0]) // self.index.levels

    def with_index(self, index: IndexQuantizer, input: str, table: Tensor | None = None) -> TableExpansion:
        """Return the same look-up behind another index quantizer or kind of input."""
        return self._with(index, input, self.table if table is None else table, self.scale, self.offset)

    def reading_real(self) -> TableExpansion:
        """Return the same look-up for real values, whatever the layer before hands over."""
        if self.input in ("real", "float"):
            return self
        return self.with_index(self.index, "real" if self.index.is_8_bit else "float")

    def with_codes(self, table: Tensor, scale: Tensor, offset: Tensor | None = None) -> TableExpansion:
        """Return the same look-up of other codes, ``scale`` real units a step, code 0 standing for ``offset``."""
        return self._with(self.index, self.input, table, scale, self.offset if offset is None else offset)

    def _with(self, index: IndexQuantizer, input: str, table: Tensor, scale: Tensor, offset: Tensor) -> TableExpansion:
        return TableExpansion(
            self.in_shape,
            index,
            table,
            self.first_row,
            scale,
            offset,
            self.branch_sizes,
            self.branch_names,
            input,
            self.channels_first,
        )

    def to_index(self, x: Tensor) -> Tensor:
        """Map the input to row numbers ``[b, *, n_in]``, whatever the input is."""
        if not self.channels_first:
            x = regroup(x, self.in_shape)
        rows = x if self.input == "index" else self._quantize(x)
        return to_channels_last(rows) if self.channels_first else rows

    def _quantize(self, x: Tensor) -> Tensor:
        if self.input == "real":
            return self.index(x)
        multiplier, offset = (1.0, 0.0) if self.input == "scaled" else self.index.to_rows()
        index: Tensor = torch.ops.kancompile.floor_index(x, multiplier, offset, self.index.levels)
        return index

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to table codes, uint8 ``[b, *, n_in, k]``."""
        codes: Tensor = torch.ops.kancompile.expand(self.to_index(x), self.table, self.first_row)
        return codes

    def column_scale(self) -> Tensor:
        """Real value of one code step of every column, float32 ``[n_in, k]``."""
        return self._per_column(self.scale)

    def column_offset(self) -> Tensor:
        """Real value of code 0 of every column, float32 ``[n_in, k]``."""
        return self._per_column(self.offset)

    def _per_column(self, value: Tensor) -> Tensor:
        if self.first_row is None:
            return value.expand(self.n_in, -1)
        return value[self.first_row.long() // self.index.levels]
