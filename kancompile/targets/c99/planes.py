"""Pack weight codes in as many bits as they have, in the two layouts that the generated loops read.

Codes are stored without sign, ``code + 2^(bits - 1)``, and split into planes of 8, 4, 2 and 1 bits: 3 = 2 + 1, 7 = 4 + 2 + 1.

``wide``: the weights of all outputs for one column stand together, in ``q = 16 / plane bits`` interleaved parts: bit field
``q`` of 16-bit element ``j`` belongs to output ``q * E + j``, ``E`` elements for a column. One table value then multiplies a
whole word, in 16-bit lanes: two outputs in a 32-bit register of a microcontroller, eight or more in a vector register.

``narrow``: the weights of all columns for one output stand together, one after the other. It is for layers of few outputs in a
group, whose columns would leave most of an element empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kancompile.targets.c99.steps import Array

_WASTE = 2  # wide may take this many times the bytes of narrow: its loops are several times as fast
_LANE_MAX = (1 << 16) - 1


@dataclass(frozen=True)
class Plane:
    """Some bits of every weight code of a layer.

    Attributes:
        shift: place of the plane's lowest bit in the code.
        bits: 1, 2, 4 or 8.
        elements: 16-bit elements of a column, always even; 0 for the narrow layout.
        data: uint16 ``[columns of all groups * elements]``, or uint8 for the narrow layout.
    """

    shift: int
    bits: int
    elements: int
    data: Array

    @property
    def fields(self) -> int:
        """Codes in an element."""
        return 16 // self.bits

    @property
    def outputs(self) -> int:
        """Outputs that the elements of one column have room for."""
        return self.fields * self.elements

    @property
    def splits_products(self) -> bool:
        """Whether a product fills a 16-bit lane, so that its upper byte is summed apart.

        A lane then holds the sum of products modulo 2^16, a second one the sum of their upper bytes, and as the lower bytes of
        257 products add up to less than 2^16, both together say what they are.
        """
        return self.bits == 8

    @property
    def lanes(self) -> int:
        """16-bit lanes that an output takes."""
        return 2 if self.splits_products else 1

    def terms(self, largest: int) -> int:
        """Say how many products with table values up to ``largest`` its lanes hold."""
        most = 255 if self.splits_products else max(largest, 1) * ((1 << self.bits) - 1)
        return max(1, _LANE_MAX // most)


def plane_widths(bits: int) -> list[int]:
    """Divide 2 to 8 bits into planes, widest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack(weight: Array, bits: int) -> list[Plane]:
    """Pack the codes of one layer, int8 ``[groups, columns, n]``, in whichever layout suits its size."""
    unsigned = (weight.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    n = weight.shape[2]
    # where few outputs leave room anyway, one plane of more bits than needed takes less of it than several, and less work
    choices = [plane_widths(bits), [4 if bits <= 4 else 8]]
    widths = min(choices, key=lambda planes: (sum(2 * _elements(n, width) for width in planes), len(planes)))
    wide = sum(2 * _elements(n, width) for width in widths)
    if wide * 8 > _WASTE * n * bits:
        return [_narrow(unsigned, shift, width) for shift, width in _placed(plane_widths(bits))]
    return [_wide(unsigned, shift, width) for shift, width in _placed(widths)]


def _placed(widths: list[int]) -> list[tuple[int, int]]:
    return [(sum(widths[:position]), width) for position, width in enumerate(widths)]


def _elements(n: int, bits: int) -> int:
    elements = -(-n * bits // 16)
    return elements + elements % 2


def _wide(unsigned: Array, shift: int, bits: int) -> Plane:
    groups, columns, n = unsigned.shape
    elements, fields = _elements(n, bits), 16 // bits
    values = np.zeros((groups, columns, fields * elements), np.uint16)
    values[..., :n] = (unsigned >> shift) & ((1 << bits) - 1)
    places = (np.arange(fields, dtype=np.uint16) * bits)[:, None]
    packed = np.bitwise_or.reduce(values.reshape(groups, columns, fields, elements) << places, axis=2, dtype=np.uint16)
    return Plane(shift, bits, elements, packed.reshape(-1))


def _narrow(unsigned: Array, shift: int, bits: int) -> Plane:
    fields = 8 // bits
    values = ((unsigned >> shift) & ((1 << bits) - 1)).transpose(0, 2, 1).reshape(-1)
    padded = np.zeros(-(-len(values) // fields) * fields, np.uint8)
    padded[: len(values)] = values
    places = (np.arange(fields) * bits).astype(np.uint8)
    return Plane(shift, bits, 0, np.bitwise_or.reduce(padded.reshape(-1, fields) << places, axis=1, dtype=np.uint8))


@dataclass(frozen=True)
class RowTable:
    """A table as the loops read it: for every row the same number of slots, a code and, where columns are left out, its column.

    Most basis functions are 0 at most inputs (4 of 8 cubic B-splines at every one). Rows then keep only as many slots as the
    fullest of them needs, so that zeros cost nothing and the time does not depend on the input.

    Attributes:
        codes: uint8 ``[rows, slots]``.
        columns: uint8 ``[rows, slots]``, or ``None`` where slot and column are the same.
    """

    codes: Array
    columns: Array | None

    @property
    def slots(self) -> int:
        """Products that one input takes part in, for each output."""
        return int(self.codes.shape[1])

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.codes.size * (1 if self.columns is None else 2))


def row_table(table: Array) -> RowTable:
    """Leave out the zeros of a table, uint8 ``[rows, k]``, where every row has some."""
    slots = max(1, int((table != 0).sum(1).max()))
    if slots == table.shape[1] or table.shape[1] > 256:
        return RowTable(table, None)
    # a stable sort by "is zero" brings the others to the front in their order
    columns = np.argsort(table == 0, axis=1, kind="stable")[:, :slots]
    return RowTable(np.take_along_axis(table, columns, 1), columns.astype(np.uint8))
