"""The order in which the columns of a convolution stand in a file, where it is not that of the program.

    program   channels major, functions minor:   f0(x0) f1(x0) 1  f0(x1) f1(x1) 1  ...
    planes    functions major, channels minor:   f0(x0) f0(x1) ...  f1(x0) f1(x1) ...  constants

Few functions are looked up fastest one after the other, each into a plane of its own. Functions that have the same code in
every row of their table (the constant that padding needs) need no plane: all of them together are a handful of columns of
known codes, which :func:`constant_block` chooses so that every integer sum of the layer stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir.integer_contraction import IntegerContraction
from kancompile.ir.table import TableExpansion

MOST_PLANES = 5
"""Functions of a channel up to which planes take less time than looking up whole rows of two channels at a time."""
_ALIGNED = 4
"""ONNX Runtime's fast convolution needs a multiple of so many input channels; with others it takes up to twice as long."""
_LARGEST_WEIGHT = 64
"""Two neighboring products of 8-bit codes with weights up to this size always fit int16 (2 * 255 * 64 = 32640)."""


def varying_functions(table: TableExpansion) -> Tensor:
    """Give the numbers of the functions whose code differs between rows or tables, int64, increasing."""
    return torch.nonzero((table.table != table.table[:1]).any(0)).flatten()


def is_in_planes(contraction: IntegerContraction, tables: Sequence[TableExpansion]) -> bool:
    """Whether a convolution's columns stand in planes in a file: no groups, and few functions of each channel."""
    counts = [len(varying_functions(table)) for table in tables]
    return contraction.groups == 1 and all(0 < count <= MOST_PLANES for count in counts)


def plane_order(tables: Sequence[TableExpansion]) -> Tensor:
    """Give the program's number of every column in planes, int64; columns of constant functions are left out."""
    parts, start = [], 0
    for table in tables:
        numbers = torch.arange(start, start + table.n_in * table.k).reshape(table.n_in, table.k)
        parts.append(numbers[:, varying_functions(table)].T.flatten())
        start += table.n_in * table.k
    return torch.cat(parts)


@dataclass(frozen=True)
class ConstantBlock:
    """Columns of the same code at every pixel, in place of the constant functions of all channels.

    Attributes:
        codes: code of each column.
        weight: int8 ``[n_out, m, *kernel]``.
    """

    codes: tuple[int, ...]
    weight: Tensor


def constant_block(contraction: IntegerContraction, tables: Sequence[TableExpansion], planes: int) -> ConstantBlock:
    """Write what constant functions contribute as the fewest columns that give exactly the same integer sums.

        sum over channels i, constant functions k of w[o, i, k, t] (q_k - z)   =   sum over j of v[o, j, t] (c_j - z)

    The codes ``c_j - z`` are powers of ``2 L + 1``, the number of values of a weight ``-L ... L``, so that they can write any
    integer, and for the largest ones as often as needed the largest code there is.

    Args:
        contraction: the convolution.
        tables: what it reads.
        planes: number of the other columns; all together are filled up to a multiple of 4 with columns of weight 0.
    """
    z = contraction.zero_point
    sums = torch.zeros(contraction.n_out, *contraction.kernel, dtype=torch.int64)
    start = 0
    for table in tables:
        weight = contraction.matrix[:, start : start + table.n_in * table.k].to(torch.int64)
        weight = weight.reshape(contraction.n_out, table.n_in, table.k, *contraction.kernel)
        varying = set(varying_functions(table).tolist())
        for k in range(table.k):
            if k not in varying:
                sums += weight[:, :, k].sum(1) * (int(table.table[0, k]) - z)
        start += table.n_in * table.k
    digits = _digits(int(sums.abs().max()), z, contraction.weight_bits)
    filling = -(planes + len(digits)) % _ALIGNED
    weights = torch.zeros(contraction.n_out, len(digits) + filling, *contraction.kernel, dtype=torch.int8)
    most = _most(contraction.weight_bits)
    for column, digit in enumerate(digits):
        part = torch.round(sums.double() / digit).clamp(-most, most).to(torch.int64)
        weights[:, column] = part.to(torch.int8)
        sums = sums - part * digit
    assert not bool(sums.any()), "the digits of a constant block write every sum"
    return ConstantBlock(tuple(z + digit for digit in digits) + (z,) * filling, weights)


def _most(bits: int) -> int:
    return min(_LARGEST_WEIGHT, (1 << (bits - 1)) - 1)


def _digits(largest: int, zero_point: int, bits: int) -> list[int]:
    """Choose code differences, largest first, that write every integer up to ``largest`` with weights of ``bits`` bits."""
    if largest == 0:
        return []
    most = _most(bits)
    reach = 255 - zero_point if zero_point < 128 else -zero_point
    sign = 1 if reach > 0 else -1
    digits, written = [], 0  # written: the largest integer that the digits so far write, and with it all below
    while written < largest and 2 * written < abs(reach):
        digits.append(min(2 * written + 1, abs(reach)))
        written += most * digits[-1]
    while written < largest:
        digits.append(abs(reach))
        written += most * abs(reach)
    return [sign * digit for digit in reversed(digits)]
