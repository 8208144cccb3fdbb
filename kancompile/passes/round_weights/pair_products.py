"""Prove that kernels which add two products in 16 bits compute a layer exactly, or say where they would not.

On x86 processors with AVX2 and no VNNI, ONNX Runtime multiplies uint8 by int8 with ``vpmaddubsw``: products of columns ``2j`` and
``2j + 1`` are added in a *saturating* int16 before anything is widened. The sum is exact where

    -32768 <= q0 * w0 + q1 * w1 <= 32767        for all codes (q0, q1) that can meet in the two columns.

Codes are never negative and a single product fits (255 * 127 = 32385), so weights of opposite signs cannot overflow, and
for equal signs ``q0 * |w0| + q1 * |w1| <= 32767`` decides. Two columns of one input are looked up in one row of its table, so
only codes that stand in one row meet; columns of different inputs take their largest codes independently. Codes of 7 bits
on either side always pass: 2 * 255 * 64 = 32640.

Order of the columns: ONNX Runtime packs four neighboring rows of the weight matrix together, from the first one on, blocks
of rows being multiples of four; an odd one is filled up with zeros. A convolution is that product with taps major, channels
minor, pixels outside the image having the code of 0 in all columns. Its columns stand in the order of the program, or where
``kancompile.ir.column_order`` allows it in planes, behind which stand constant columns, of weights of at most 64, which are only
known once the weights are. The columns of a linear layer stand in the order of the program, or where
``kancompile.ir.column_lookup`` allows it functions major. Which of the two is a target's choice, and one rounded program serves
all targets, so that what may stand in another order is exact in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import (
    IntegerContraction,
    Layer,
    Program,
    TableExpansion,
    functions_major,
    group_order,
    is_in_planes,
    plane_order,
    reorders_columns,
)
from kancompile.passes.round_weights.adjacent_pairs import ELEMENTS, AdjacentPairs


def linear_pairs(tables: Sequence[TableExpansion], group_sizes: Sequence[int]) -> AdjacentPairs:
    """Pair the columns of a linear layer; every scale group is a product of its own.

    Args:
        tables: what the layer reads, in order.
        group_sizes: columns of each scale group, in order.
    """
    starts, first = [], 0
    for size in group_sizes:
        starts.append(first + torch.arange(0, size - 1, 2))
        first += size
    order = torch.cat(starts)
    return _pairs(tables, torch.stack([order, order + 1], 1), torch.arange(first), 1, None)


def convolution_pairs(
    tables: Sequence[TableExpansion], groups: int, taps: int, outside: int | None
) -> list[AdjacentPairs]:
    """Pair the columns of every channel group of a convolution that stand in the order of the program.

    Args:
        tables: what the layer reads, in order.
        groups: channel groups.
        taps: of the kernel.
        outside: the code outside of the image, ``None`` without padding.

    Returns:
        for each group the pairs of its weight ``[n_out / groups, c / groups * taps]``, columns major.
    """
    order = group_order([(table.n_in, table.k) for table in tables], groups).reshape(groups, -1)
    columns = _taps_major(torch.arange(order.shape[1]), taps)
    return [_pairs(tables, columns, source, taps, outside) for source in order]


def plane_pairs(tables: Sequence[TableExpansion], taps: int, outside: int | None) -> AdjacentPairs:
    """Pair the columns of a convolution whose columns stand in planes, with an even number of columns at every tap."""
    order = plane_order(tables)
    if len(order) % 2:
        # a constant column follows, or where there is none a column of weight 0
        order = torch.cat([order, torch.tensor([-1])])
    count = sum(table.n_in * table.k for table in tables)
    return _pairs(tables, _taps_major(order, taps), torch.arange(count), taps, outside)


def column_pairs(tables: Sequence[TableExpansion]) -> AdjacentPairs:
    """Pair the columns of a linear layer that stand functions major (``kancompile.ir.column_lookup``)."""
    order = functions_major(tables)
    first = torch.arange(0, len(order) - 1, 2)
    return _pairs(tables, torch.stack([order[first], order[first + 1]], 1), torch.arange(len(order)), 1, None)


def _taps_major(order: Tensor, taps: int) -> Tensor:
    """Pair columns, taps major, and give their places in a weight whose taps are minor; -1 stays, ``[p, 2]``."""
    place = torch.where(order < 0, -1, order * taps + torch.arange(taps)[:, None]).flatten()
    first = torch.arange(0, len(place) - 1, 2)
    return torch.stack([place[first], place[first + 1]], 1)


def _pairs(
    tables: Sequence[TableExpansion], columns: Tensor, source: Tensor, taps: int, outside: int | None
) -> AdjacentPairs:
    """Look the codes of pairs up.

    Args:
        tables: what the layer reads.
        columns: ``[p, 2]``, places in the weight.
        source: number of each column of the weight, before it is repeated for the taps, among those of the tables.
        taps: how often a column is repeated.
        outside: see :class:`AdjacentPairs`.
    """
    widest = max(table.k for table in tables)
    starts, minor, inputs, levels, largest, codes = [], [], [], [], [], []
    rows = n_inputs = 0
    for table in tables:
        begin = torch.zeros(table.n_in, dtype=torch.int64) if table.first_row is None else table.first_row.long()
        per_table = table.table.reshape(table.n_tables, table.rows, table.k).amax(1).to(torch.int64)
        largest.append(per_table[begin // table.rows].flatten())
        starts.append((begin + rows).repeat_interleave(table.k))
        minor.append(torch.arange(table.k).repeat(table.n_in))
        inputs.append(torch.arange(n_inputs, n_inputs + table.n_in).repeat_interleave(table.k))
        levels.append(torch.full((table.n_in * table.k,), table.rows))
        codes.append(torch.nn.functional.pad(table.table.to(torch.int32), (0, widest - table.k)))
        rows += len(table.table)
        n_inputs += table.n_in
    constant = columns < 0
    number = source[columns.clamp(min=0) // taps]
    of_input = torch.where(constant, -1, torch.cat(inputs)[number])
    tap = columns % taps
    same = (of_input[:, 0] == of_input[:, 1]) & (tap[:, 0] == tap[:, 1])
    start = torch.where(same, torch.cat(starts)[number[:, 0]], -1)
    most = torch.where(constant, 255, torch.cat(largest)[number])
    return AdjacentPairs(
        columns,
        most if outside is None else most.clamp(min=outside),
        start,
        torch.cat(minor)[number],
        torch.cat(codes),
        torch.cat(levels)[number[:, 0]],
        outside,
    )


@dataclass(frozen=True)
class Int16Proof:
    """Whether kernels that add pairs of products in 16 bits are exact for a layer.

    Attributes:
        pairs: neighboring columns, all outputs together.
        overflowing: how many of them can leave int16.
        largest: the largest sum that any of them reaches, by magnitude.
    """

    pairs: int
    overflowing: int
    largest: int

    @property
    def holds(self) -> bool:
        """Whether no pair overflows."""
        return self.overflowing == 0


def layer_pairs(contraction: IntegerContraction, tables: Sequence[TableExpansion]) -> list[AdjacentPairs]:
    """Pair the columns of a layer, or of every channel group of a convolution, in both orders where a file may have another."""
    if contraction.geometry is None:
        linear = linear_pairs(tables, contraction.group_sizes)
        if reorders_columns(contraction, tables):
            return [_joined(linear, column_pairs(tables))]
        return [linear]
    outside, taps = contraction.zero_point if contraction.pads else None, contraction.taps
    found = convolution_pairs(tables, contraction.groups, taps, outside)
    if is_in_planes(contraction, tables):
        return [_joined(found[0], plane_pairs(tables, taps, outside))]
    return found


def _joined(one: AdjacentPairs, other: AdjacentPairs) -> AdjacentPairs:
    """Take the pairs of two orders of the same columns together."""
    return AdjacentPairs(
        torch.cat([one.columns, other.columns]),
        torch.cat([one.largest, other.largest]),
        torch.cat([one.start, other.start]),
        torch.cat([one.code_columns, other.code_columns]),
        one.codes,
        torch.cat([one.levels, other.levels]),
        one.outside,
    )


def prove(contraction: IntegerContraction, tables: Sequence[TableExpansion]) -> Int16Proof:
    """Prove an integer layer with its tables as they ship, from nothing but those."""
    count = overflowing = largest = 0
    for weight, part in zip(contraction.flat_weight(), layer_pairs(contraction, tables), strict=True):
        count += len(part.columns) * len(weight)
        overflowing += len(part.overflows(weight)[0])
        largest = max(largest, _largest_sum(part, weight))
    return Int16Proof(count, overflowing, largest)


def prove_layer(program: Program, layer: Layer) -> Int16Proof | None:
    """Prove a layer of a lowered program; ``None`` where it does not compute in integers."""
    contraction = program.module(layer.contraction)
    if not isinstance(contraction, IntegerContraction):
        return None
    return prove(contraction, list(program.tables(layer).values()))


def layer_limits(program: Program, layer: Layer) -> tuple[Tensor, Tensor]:
    """Give bounds within which the codes of an integer layer can move while all its pairs go on to fit.

    Returns:
        smallest and largest code of every weight, int64 ``[n_out, c / groups * taps]`` (see :meth:`AdjacentPairs.limits`).
    """
    contraction = program.node(layer.contraction, IntegerContraction)
    pairs = layer_pairs(contraction, list(program.tables(layer).values()))
    found = [part.limits(weight) for weight, part in zip(contraction.flat_weight(), pairs, strict=True)]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _largest_sum(pairs: AdjacentPairs, weight: Tensor) -> int:
    """Return the largest magnitude of a sum over all pairs, outputs and codes.

    Pairs are taken by falling bound until the next bound is no larger than what was found.
    """
    if not len(pairs.columns):
        return 0
    best = 0
    bounds, outputs, numbers = [], [], []
    step = max(1, ELEMENTS // len(weight))
    for first in range(0, len(pairs.columns), step):
        part = slice(first, first + step)
        w = pairs.columns_of(weight, part)
        alone = w.abs() * pairs.largest[part]
        best = max(best, int(alone.max()))
        together = alone.sum(2) * (w.prod(2) > 0)
        output, pair = (together > best).nonzero(as_tuple=True)
        bounds.append(together[output, pair])
        outputs.append(output)
        numbers.append(pair + first)
    bound, order = torch.cat(bounds).sort(descending=True)
    output, pair = torch.cat(outputs)[order], torch.cat(numbers)[order]
    for first in range(0, len(order), 1024):
        if int(bound[first]) <= best:
            break
        at = slice(first, first + 1024)
        size = pairs.weights(weight, output[at], pair[at]).abs()
        best = max(best, int(pairs.reach(pair[at], size).max()))
    return best
