"""An expansion as an integer table: row numbers in, codes of its functions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir.expansion import AnyExpansion, regroup, to_channels_last
from kancompile.ir.index import HandOver, IndexQuantizer

_PLANE_BYTES = 550  # of the nodes that unpack a bit plane when a file is loaded
_RECEIVES = {"index": ", receives row numbers", "scaled": ", receives values in units of rows"}
_READS = {"rows": "index", "scaled": "scaled"}
"""What a table reads, by what it is handed, other than real values."""


class TableExpansion(AnyExpansion):
    """An expansion as a table lookup, ``phi[b, i, k] ~ scale[t, k] * table[t, row, k] + offset[t, k]``.

    Its output are the codes; the scale and the offset of each column are folded into the contraction.

    Attributes:
        in_shape: ``(*, n_in)``.
        read_shape: shape of what it reads, channels last, where that is another.
        index: the input quantizer.
        picks: which of the elements that it reads it looks up, int64 ``[n_in]``, ``None`` for all in order.
        input: ``"real"`` quantizes real values as QuantizeLinear does, ``"float"`` in float arithmetic;
            ``"scaled"`` reads real values that already are in units of rows, 0.5 included; ``"index"`` reads row
            numbers that the layer before produced.
        table: uint8 ``[T * levels, k]``, the distinct tables one below the other.
        first_row: int32 ``[n_in]``, where the table of an input begins, or ``None`` where all share one table.
        scale, offset: float32 ``[T, k]``, real value of one code step and of code 0.
        branch_sizes, branch_names: how the ``k`` columns divide into the captured branches.
        channels_first: whether it reads ``[b, n_in, *]``, as in front of a convolution. Row numbers, single bytes, are
            brought channels last before the lookup, not the values.
        bits: that hold the codes, 2 to 8; a file may store them in as many.
    """

    yields_codes = True
    picks: Tensor | None
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
        bits: int = 8,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.channels_first = channels_first
        self.in_shape = self.read_shape = tuple(in_shape)
        self.index = index
        self.input = input
        self.branch_sizes = tuple(branch_sizes)
        self.branch_names = tuple(branch_names)
        self.register_buffer("picks", None)
        self.register_buffer("table", table)
        self.register_buffer("first_row", first_row)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        return int(self.table.shape[-1])

    @property
    def is_of_each(self) -> bool:
        """Whether it has functions of each input that it reads, in their order."""
        return self.read_shape == self.in_shape and self.picks is None

    @property
    def rows(self) -> int:
        """Rows of one table."""
        return self.index.levels

    @property
    def n_tables(self) -> int:
        """Number of distinct tables."""
        return int(self.table.shape[0]) // self.rows

    @property
    def branch_functions(self) -> list[tuple[str, int]]:
        """List the captured branches and how many functions of one input each has, in order."""
        return list(zip(self.branch_names, self.branch_sizes, strict=True))

    def replace(self, **fields: Any) -> TableExpansion:
        """Return the same table with some arguments of the constructor exchanged."""
        return TableExpansion(**(self.fields() | fields))

    def fields(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {
            "in_shape": self.in_shape,
            "index": self.index,
            "table": self.table,
            "first_row": self.first_row,
            "scale": self.scale,
            "offset": self.offset,
            "branch_sizes": self.branch_sizes,
            "branch_names": self.branch_names,
            "input": self.input,
            "channels_first": self.channels_first,
            "bits": self.bits,
        }

    def reading(self, handed: HandOver) -> TableExpansion:
        """Return the same table behind a contraction that hands over values of that form."""
        return self.reading_real() if handed.kind == "real" else self.replace(input=_READS[handed.kind])

    def reading_real(self) -> TableExpansion:
        """Return the same lookup for real values, whatever the layer before hands over."""
        if self.input in ("real", "float"):
            return self
        return self.replace(input="real" if self.index.is_8_bit else "float")

    def accepts(self, handed: HandOver) -> bool:
        """Whether it reads outputs of that form as what they are: real values, or rows of its own index."""
        if handed.kind == "real":
            return self.input in ("real", "float")
        return self.input == _READS[handed.kind] and self.index == handed.index

    @property
    def packs(self) -> bool:
        """Whether a file with entries of ``bits`` bits is smaller than one with bytes, the nodes that widen them included."""
        return packing_saves(self.table.numel(), self.bits)

    def stored_bytes(self) -> int:
        """Count the bytes of the table."""
        return packed_bytes(self.table.numel(), self.bits) if self.packs else self.table.numel()

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for manifests and reports."""
        return super().describe() | {
            "levels": self.index.levels,
            "low": self.index.low,
            "high": self.index.high,
            "tables": self.n_tables,
            "table_bytes": self.stored_bytes(),
            **({} if self.bits == 8 else {"table_bits": self.bits}),
            "branches": dict(self.branch_functions),
            "reads": self.input,
        }

    def evaluated_as(self) -> str:
        """Give rows, range and entries of the lookup tables, and what they receive where it is not real values."""
        index = self.index
        tables = "lookup table" if self.n_tables == 1 else f"{self.n_tables} lookup tables"
        entries = "" if self.bits == 8 else f", entries of {self.bits} bits"
        received = _RECEIVES.get(self.input, "")
        return f"{tables} of {index.levels} rows over {index.low:.4g} ... {index.high:.4g}{entries}{received}"

    def form(self) -> str:
        """Give rows and range, and what it reads."""
        index = self.index
        rows = f"{self.n_tables} table(s) of {index.levels} rows"
        entries = "" if self.bits == 8 else f" of {self.bits} bits"
        return f"{rows}{entries}, {index.low:.6g} ... {index.high:.6g}, reads {self.input}"

    def verify(self, layer: str) -> None:
        """Verify that entries fit their bits.

        Raises:
            KanCompileError: one does not.
        """
        largest = int(self.table.max()) if self.table.numel() else 0
        if largest >> self.bits:
            raise KanCompileError(f"layer {layer!r}: table entries up to {largest} do not fit {self.bits} bits")

    def inputs_last(self, x: Tensor) -> Tensor:
        """View what it reads, ``[b, ...]``, as ``[b, *, inputs]``."""
        return super().inputs_last(x) if self.is_of_each else regroup(x, self.read_shape)

    def to_index(self, x: Tensor) -> Tensor:
        """Map the input to row numbers ``[b, *, n_in]``, whatever the input is."""
        if not self.channels_first:
            x = regroup(x, self.read_shape)
        rows = x if self.input == "index" else self._quantize(x)
        if self.picks is not None:
            return rows.index_select(-1, self.picks)
        return to_channels_last(rows) if self.channels_first else rows

    def _quantize(self, x: Tensor) -> Tensor:
        if self.input == "real":
            return self.index(x)
        multiplier, offset = (1.0, 0.0) if self.input == "scaled" else self.index.to_rows()
        index: Tensor = torch.ops.kancompile.floor_index(x, multiplier, offset, self.index.levels)
        return index

    def evaluate_inputs(self, points: Tensor) -> Tensor:
        """Evaluate the functions at points of every input that it reads, as codes ``[n, n_in, k]``."""
        if self.is_of_each:
            return super().evaluate_inputs(points)
        codes: Tensor = self.reading_real()(points.to(torch.float32))
        return codes

    def _evaluate(self, x: Tensor) -> Tensor:
        rows = self.reading_real()._quantize(x.reshape(-1, self.n_in))
        codes: Tensor = torch.ops.kancompile.expand(rows, self.table, self.first_row)
        return codes

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to table codes, uint8 ``[b, *, n_in, k]``."""
        codes: Tensor = torch.ops.kancompile.expand(self.to_index(x), self.table, self.first_row)
        return codes

    def column_scale(self) -> Tensor:
        """Real value of one code step of every column, float32 ``[n_in, k]``."""
        return self.per_input(self.scale)

    def column_offset(self) -> Tensor:
        """Real value of code 0 of every column, float32 ``[n_in, k]``."""
        return self.per_input(self.offset)

    def per_input(self, value: Tensor) -> Tensor:
        """Spread what belongs to the distinct tables, ``[T, k]``, to ``[n_in, k]``."""
        if self.first_row is None:
            return value.expand(self.n_in, -1)
        return value[self.first_row.long() // self.rows]

    def rescaled(self, fraction: Tensor, zero_point: int) -> TableExpansion:
        """Return the table whose columns use only a fraction ``[T, k]`` of their code range about the code of 0."""
        codes = self.table.reshape(self.n_tables, self.rows, self.k).float() - zero_point
        narrowed = (torch.round(codes * fraction[:, None]) + zero_point).to(torch.uint8)
        scale = self.scale / fraction
        offset = self.offset + zero_point * (self.scale - scale) if zero_point else self.offset
        return self.replace(table=narrowed.flatten(0, 1), scale=scale, offset=offset)


def packing_saves(entries: int, bits: int) -> bool:
    """Whether so many entries take fewer bytes in planes of 4, 2 and 1 bits, with the nodes that unpack them, than as bytes."""
    return entries - packed_bytes(entries, bits) > _PLANE_BYTES * bits.bit_count()


def packed_bytes(entries: int, bits: int) -> int:
    """Count the bytes of so many entries of ``bits`` bits."""
    return -(-entries * bits // 8)
