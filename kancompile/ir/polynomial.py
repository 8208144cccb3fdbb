"""The float form of an expansion: a piecewise polynomial in plain ATen operators, laid out for ONNX Runtime.

    phi[b, i, k] = sum_j coefficient_j[row, k] * t^j        row, t = cells(x[b, i])

The first and the last cell reach to infinity and hold straight lines. Measured with ONNX Runtime 1.32 on one x86-64
core (efficient-KAN 784-64-10, batch 256), which decided the layout:

* one Gather for each power costs less than a Gather of whole rows and a Split behind it;
* multiplying ``[b, n, k]`` by ``[b, n, 1]`` takes 23 ns for every ``(b, n)``, more than all else. A product with a
  matrix of zeros and ones copies ``t`` to all ``k`` columns in a sixth of that, exactly;
* therefore degree 1 with thousands of cells (an interpolated table) is faster than degree 3 with few.

Shapes: ``b`` batch, ``*`` leading dimensions, ``n_in`` inputs, ``k`` functions of one input, ``T`` distinct tables,
``J`` breakpoints, ``P`` the product of ``(*, n_in)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.ir.block_codes import BlockCodes
from kancompile.ir.expansion import AnyExpansion, regroup, to_channels_last

_GROUP = 16


class Repeat(nn.Module):
    """Copy every element ``k`` times along a new last dimension, as a product with a constant matrix.

    The product is exact for finite values, because each output is one input times 1 plus zeros.
    """

    matrix: Tensor

    def __init__(self, shape: Sequence[int], k: int) -> None:
        """Take the shape of the input without the batch."""
        super().__init__()
        self.shape = tuple(shape)
        self.k = k
        size = group_size(shape)
        self.register_buffer("matrix", torch.kron(torch.eye(size), torch.ones(1, k)))

    def forward(self, t: Tensor) -> Tensor:
        """Map ``[b, *shape]`` to ``[b, *shape, k]``; of shapes with sides of 1, ``[b, *, k]`` of an image of any size."""
        if self.k == 1:
            return t.unsqueeze(-1)
        fixed = all(isinstance(size, int) and size == own for size, own in zip(t.shape[1:], self.shape, strict=True))
        sizes = (-1, *self.shape) if fixed else tuple(t.shape)
        return torch.matmul(t.reshape(-1, self.matrix.shape[0]), self.matrix).reshape(*sizes, self.k)


def group_size(shape: Sequence[int]) -> int:
    """Give the largest group of neighboring elements, up to 16, into which a shape divides.

    More would only multiply more zeros. Groups are whole trailing dimensions, and a divisor of the next: torch.export
    cannot tell for every batch that a view across them is possible.
    """
    size = 1
    for dimension in reversed(shape):
        step = max(divisor for divisor in range(1, _GROUP // size + 1) if dimension % divisor == 0)
        size *= step
        if step != dimension:
            break
    return size


@dataclass(frozen=True)
class Zone:
    """An interval of inputs with cells of its own width.

    Attributes:
        low, high: its ends, float32 values.
        slope: cells for each unit of input.
        first, last: numbers of the cells that begin at its ends.
    """

    low: float
    high: float
    slope: float
    first: int
    last: int


class UniformCells(nn.Module):
    """Find the cell by arithmetic: ``floor(x * slope + shift)``, or with two widths where there is a zone::

        z = clamp(x * zone.slope + shift, zone.first, zone.last), o = (x - clamp(x, zone.low, zone.high)) * slope
        cell = floor(z) + floor(o), place = z - floor(z) + o - floor(o)

    Row 0 holds all inputs below cell ``first``, the last row all from cell ``first + rows - 2`` on. The shift is below 1
    and the parts inside and outside of the zone are kept apart, so that float32 keeps the place as exact as the input.

    Attributes:
        slope, shift: float32 values.
        first: number of the first cell that is not a tail.
        rows: number of cells, both tails included.
        zone: interval with narrower cells, or ``None``.
    """

    def __init__(self, slope: float, shift: float, first: int, rows: int, zone: Zone | None = None) -> None:
        super().__init__()
        self.slope = _float32(slope)
        self.shift = _float32(shift)
        self.first = first
        self.rows = rows
        self.zone = zone and replace(zone, low=_float32(zone.low), high=_float32(zone.high), slope=_float32(zone.slope))

    def forward(self, x: Tensor, first_row: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map ``[b, *, n_in]`` to row numbers (int32) and places within the cells (0 to 1, unbounded in tails)."""
        low, high = self.first - 1, self.first + self.rows - 2
        zone = self.zone
        z = x * (self.slope if zone is None else zone.slope)
        if self.shift != 0.0:
            z = z + self.shift
        if zone is None:
            cell = torch.floor(z.clamp(float(low), float(high)))
            place = z - cell
        else:
            z = z.clamp(float(zone.first), float(zone.last))
            inner = torch.floor(z)
            outside = (x - x.clamp(zone.low, zone.high)) * self.slope
            outer = torch.floor(outside.clamp(float(low - zone.first), float(high - zone.last)))
            cell = inner + outer
            place = (z - inner) + (outside - outer)
        rows = cell.to(torch.int32) - low
        return rows if first_row is None else rows + first_row, place

    def starts(self) -> Tensor:
        """Give the inputs at which the place in each cell is 0, float64 ``[rows]``."""
        number = torch.arange(self.first - 1, self.first + self.rows - 1, dtype=torch.float64)
        if self.zone is None:
            return (number - self.shift) / self.slope
        zone = self.zone
        below = zone.low + (number - zone.first) / self.slope
        above = zone.high + (number - zone.last) / self.slope
        within = (number - self.shift) / zone.slope
        return torch.where(number < zone.first, below, torch.where(number >= zone.last, above, within))


class BreakpointCells(nn.Module):
    """Find the cell by counting the breakpoints at or below ``x``; the place in it is the distance to its left end.

    The distance of neighboring floats is exact, so cells may be as narrow as floats allow.

    Attributes:
        breakpoints: float32 ``[*, n_in, J]``, ascending, infinite where an input has fewer.
        left: float32 ``[T * (J + 1), 1]``, origin of every cell.
    """

    breakpoints: Tensor
    left: Tensor

    def __init__(self, breakpoints: Tensor, left: Tensor) -> None:
        super().__init__()
        self.rows = int(breakpoints.shape[-1]) + 1
        self.register_buffer("breakpoints", breakpoints)
        self.register_buffer("left", left)

    def forward(self, x: Tensor, first_row: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map ``[b, *, n_in]`` to row numbers (int32) and distances from the left ends of the cells."""
        # runs of all breakpoints of an input are long enough for a broadcast, which never took longer than products
        # with matrices of zeros and ones (20 to 240 breakpoints) and needs no such matrices in the file
        rows = (x.unsqueeze(-1) >= self.breakpoints).to(x.dtype).sum(-1).to(torch.int32)
        if first_row is not None:
            rows = rows + first_row
        return rows, x - nn.functional.embedding(rows, self.left).squeeze(-1)


class PolynomialExpansion(AnyExpansion):
    """A float expansion as a piecewise polynomial.

    Attributes:
        in_shape: ``(*, n_in)``.
        cells: how the cell is found.
        degree: of the polynomials; 1 is an interpolated table.
        channels_first: whether the input is ``[b, n_in, *]``, as in front of a convolution.
        coefficient_0 ...: float32 ``[T * rows, k]``, one for each power of the place in the cell.
        first_row: int32, broadcasts to ``in_shape``: where the table of an input begins; ``None`` for one table.
        branch_sizes, branch_names: how the ``k`` columns divide into the captured branches.
        codes: the coefficients of each power as 16-bit codes; ``None`` where they are any float32 numbers.
    """

    first_row: Tensor | None

    def __init__(
        self,
        in_shape: Sequence[int],
        cells: UniformCells | BreakpointCells,
        coefficients: Tensor,
        first_row: Tensor | None,
        branch_sizes: Sequence[int],
        branch_names: Sequence[str],
        channels_first: bool = False,
        codes: Sequence[BlockCodes] | None = None,
    ) -> None:
        """Take coefficients ``[T * rows, degree + 1, k]``, lowest power first."""
        super().__init__()
        self.codes = None if codes is None else tuple(codes)
        self.in_shape = tuple(in_shape)
        self.channels_first = channels_first
        self.cells = cells
        self.degree = int(coefficients.shape[1]) - 1
        self.branch_sizes = tuple(branch_sizes)
        self.branch_names = tuple(branch_names)
        self.register_buffer("first_row", first_row)
        for power in range(self.degree + 1):
            self.register_buffer(f"coefficient_{power}", coefficients[:, power].float().contiguous())
        self.repeat = Repeat(self.in_shape, self.k)

    def with_codes(self, codes: Sequence[BlockCodes]) -> PolynomialExpansion:
        """Return the same cells with coefficients of 16 bits, one matrix ``[T * rows, k]`` for each power."""
        return PolynomialExpansion(
            self.in_shape,
            self.cells,
            torch.stack([power.values() for power in codes], 1),
            self.first_row,
            self.branch_sizes,
            self.branch_names,
            self.channels_first,
            codes,
        )

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        return int(self.get_buffer("coefficient_0").shape[-1])

    @property
    def n_tables(self) -> int:
        """Number of distinct tables."""
        return int(self.get_buffer("coefficient_0").shape[0]) // self.cells.rows

    @property
    def branch_functions(self) -> list[tuple[str, int]]:
        """List the captured branches and how many functions of one input each has, in order."""
        return list(zip(self.branch_names, self.branch_sizes, strict=True))

    @property
    def table_bytes(self) -> int:
        """Size of the coefficients."""
        return (4 if self.codes is None else 2) * (self.degree + 1) * self.get_buffer("coefficient_0").numel()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to basis values ``[b, *, n_in, k]``.

        Raises:
            KanCompileError: an input is NaN, and cells are found by arithmetic.
        """
        # contiguous: the strides of a mere view would decide how torch.export sees a reshape of a dynamic batch
        x = to_channels_last(x).contiguous() if self.channels_first else regroup(x, self.in_shape)
        rows, place = self.cells(x, self.first_row)
        value = self._gather(self.degree, rows)
        if self.degree > 0:
            places = self.repeat(place)
            for power in range(self.degree - 1, -1, -1):
                value = value * places + self._gather(power, rows)
        return value

    def _gather(self, power: int, rows: Tensor) -> Tensor:
        try:
            return nn.functional.embedding(rows, self.get_buffer(f"coefficient_{power}"))
        except IndexError as error:  # row numbers are clamped, all but those of NaN
            raise KanCompileError(
                "program: found NaN among the inputs of a layer of precision 'int16' or 'float', whose cells have no number "
                "for it; ONNX Runtime refuses this call as well, so check inputs before"
            ) from error

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for reports."""
        return super().describe() | {
            "degree": self.degree,
            "bits": 32 if self.codes is None else 16,
            "cells": "uniform" if isinstance(self.cells, UniformCells) else "breakpoints",
            "rows": self.cells.rows,
            "tables": self.n_tables,
            "table_bytes": self.table_bytes,
            "branches": dict(self.branch_functions),
        }

    def stored_bytes(self) -> int:
        """Count the bytes of the coefficients and of what finds and spreads their rows."""
        return sum(value.numel() * value.element_size() for value in self.buffers())

    def evaluated_as(self) -> str:
        """Give degree and cells."""
        return f"polynomials of degree {self.degree} in {self.cells.rows} cells"

    def form(self) -> str:
        """Give branches, degree and cells."""
        return f"{self._branch_text()}, degree {self.degree}, {self.n_tables} table(s) of {self.cells.rows} cells"


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
