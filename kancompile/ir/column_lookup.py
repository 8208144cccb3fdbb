"""The lookup of few functions of each input of a linear layer, every one in a column of its own.

    program   inputs major, functions minor:   f0(x0) f1(x0) f0(x1) f1(x1) ...
    columns   functions major, inputs minor:   f0(x0) f0(x1) ... f1(x0) f1(x1) ...

ONNX Runtime takes 8 ns for every row number of a Gather, however short the row, and 1 to 2 ns for one of a GatherElements along
the first axis, which reads one code from a table that stands in that column. So up to three functions of an input are faster
column by column: 784 inputs of one function at 256 samples take 0.44 ms in place of 1.84, 64 inputs of three functions 0.10 ms in
place of 0.16, and a single sample takes no longer (one thread, AVX2, casts included).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kancompile.ir.integer_contraction import IntegerContraction
from kancompile.ir.operators import look_up
from kancompile.ir.table import TableExpansion

MOST_FUNCTIONS = 3
PAIRED_FROM = 512
"""Inputs of several functions, from which on the lookup of two of them at a time is as fast or faster."""
_MOST_CODES = 1 << 18
_LEAST_ROWS = 256
"""What files pad small tables to."""


def gains_by_columns(n_in: int, k: int) -> bool:
    """Whether ``k`` functions of each of so many inputs are faster column by column."""
    return k == 1 or (k <= MOST_FUNCTIONS and n_in < PAIRED_FROM)


def fits_columns(table: TableExpansion) -> bool:
    """Whether a table gains by columns and, repeated for every input, is small enough for them."""
    codes = max(table.rows, _LEAST_ROWS) * table.n_in * table.k
    return codes <= _MOST_CODES and gains_by_columns(table.n_in, table.k)


def reorders_columns(contraction: IntegerContraction, tables: Sequence[TableExpansion]) -> bool:
    """Whether the columns of a layer, which is linear, may stand functions major in a file, where that is another order."""
    return (
        len(contraction.group_sizes) == 1
        and any(table.k > 1 for table in tables)
        and all(fits_columns(table) for table in tables)
    )


def functions_major(tables: Sequence[TableExpansion]) -> Tensor:
    """Give the program's number of every column, functions major in each table, int64."""
    parts, start = [], 0
    for table in tables:
        numbers = torch.arange(start, start + table.n_in * table.k).reshape(table.n_in, table.k)
        parts.append(numbers.T.flatten())
        start += table.n_in * table.k
    return torch.cat(parts)


@torch.library.custom_op("kancompile::expand_columns", mutates_args=())
def expand_columns(index: Tensor, table: Tensor, group: Tensor) -> Tensor:
    """Look up the basis values of every input, functions major.

    Args:
        index: row numbers, uint8 or int32, ``[b, *, n_in]``.
        table: uint8 ``[T * L, k]``, the tables one below the other.
        group: int64 ``[n_in]``, which of the ``T`` tables an input reads; all are read.

    Returns:
        uint8 ``[b, *, k * n_in, 1]``.
    """
    rows = len(table) // (int(group.max()) + 1)
    codes = look_up(table, index.long() + rows * group)
    return codes.transpose(-1, -2).flatten(-2).unsqueeze(-1)


@expand_columns.register_fake
def _(index: Tensor, table: Tensor, group: Tensor) -> Tensor:
    return table.new_empty((*index.shape[:-1], index.shape[-1] * table.shape[1], 1))
