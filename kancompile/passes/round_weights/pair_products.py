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
minor, pixels outside the image having the code of 0 in all columns. Its columns stand as ``kancompile.ir.column_order`` says;
behind planes stand constant columns, of weights of at most 64, which are only known once the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kancompile.ir import (
    IntegerContraction,
    Layer,
    Program,
    TableExpansion,
    group_order,
    is_in_planes,
    plane_order,
)

INT8_MAX, INT16_MAX = (1 << 7) - 1, (1 << 15) - 1
LARGEST_CONSTANT = 64
_ALWAYS_FITS = 64
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class AdjacentPairs:
    """The pairs of columns of one integer product, and the codes that can meet in them.

    Attributes:
        columns: int64 ``[p, 2]``: the two columns of every pair, by their place in the weight ``[n_out, c]``; the second is -1
            for a constant column, which counts as one of weight 64 and code 255.
        largest: int64 ``[p, 2]``: the largest code of each.
        start: int64 ``[p]``: first row of the table in which both columns are looked up, -1 where they belong to
            different inputs.
        code_columns: int64 ``[p, 2]``: their columns in ``codes``; only read where ``start`` is not -1.
        codes: int32 ``[rows, k]``, all tables of the layer one below the other, filled up with 0 to the widest.
        levels: int64 ``[p]``: rows of that table.
        outside: the code of both columns outside of an image, or ``None`` where nothing is padded.
    """

    columns: Tensor
    largest: Tensor
    start: Tensor
    code_columns: Tensor
    codes: Tensor
    levels: Tensor
    outside: int | None = None

    def overflows(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the pairs that a weight makes overflow.

        Args:
            weight: int8 codes ``[n_out, c]``.

        Returns:
            output and pair of each, int64 ``[e]``, and the largest sum, int64 ``[e]``.
        """
        outputs, pairs, sums = [], [], []
        step = max(1, _ELEMENTS // max(1, weight.shape[0]))
        for first in range(0, max(1, len(self.columns)), step):  # a layer of one column has no pairs
            part = slice(first, first + step)
            w = self.columns_of(weight, part)
            bound = (w.abs() * self.largest[part]).sum(2)
            output, pair = ((w.prod(2) > 0) & (bound > INT16_MAX)).nonzero(as_tuple=True)
            pair = pair + first
            reach = self.reach(pair, self.weights(weight, output, pair).abs())
            found = reach > INT16_MAX
            outputs.append(output[found])
            pairs.append(pair[found])
            sums.append(reach[found])
        return torch.cat(outputs), torch.cat(pairs), torch.cat(sums)

    def weights(self, weight: Tensor, output: Tensor, pair: Tensor) -> Tensor:
        """Return the two weights of some pairs, int64 ``[e, 2]``."""
        columns = self.columns[pair]
        found = weight[output[:, None], columns.clamp(min=0)].to(torch.int64)
        return torch.where(columns < 0, found[:, :1].sign() * LARGEST_CONSTANT, found)

    def limits(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Give bounds within which the codes of a weight can move while all pairs go on to fit, as they do now.

        Two sizes of at most 64 fit beside each other whatever the table (``2 * 255 * 64 = 32640``). In another pair the
        larger weight neither grows nor changes its sign; the smaller one may have any size against that sign, and with it
        what it has now or what the largest codes leave room for.

        Args:
            weight: int8 codes ``[n_out, c]``.

        Returns:
            smallest and largest code of every weight, int64 ``[n_out, c]``.
        """
        low, high = torch.full(weight.shape, -INT8_MAX), torch.full(weight.shape, INT8_MAX)
        step = max(1, _ELEMENTS // max(1, len(weight)))
        for first in range(0, len(self.columns), step):
            part = slice(first, first + step)
            w, columns, largest = self.columns_of(weight, part), self.columns[part], self.largest[part]
            size = w.abs()
            small = (size <= _ALWAYS_FITS).all(2)
            for which in (0, 1):
                other = 1 - which
                own, partner = w[..., which], w[..., other]
                leads = size[..., which] > size[..., other] if which else size[..., which] >= size[..., other]
                sign = partner.sign()
                room = (INT16_MAX - largest[:, other] * size[..., other]) // largest[:, which].clamp(min=1)
                most = torch.maximum(own * sign, room).clamp(max=INT8_MAX)  # in the direction of the partner
                least = torch.where(sign > 0, -INT8_MAX, -most)
                most = torch.where(sign > 0, most, INT8_MAX)
                least = torch.where(leads, own.clamp(max=0), least)
                most = torch.where(leads, own.clamp(min=0), most)
                known = columns[:, which] >= 0
                low[:, columns[known, which]] = torch.where(small, -_ALWAYS_FITS, least)[:, known]
                high[:, columns[known, which]] = torch.where(small, _ALWAYS_FITS, most)[:, known]
        return low, high

    def columns_of(self, weight: Tensor, part: slice) -> Tensor:
        """Return the weights of a range of pairs, int64 ``[n_out, p, 2]``."""
        columns = self.columns[part]
        found = weight[:, columns.clamp(min=0)].to(torch.int64)
        return torch.where(columns < 0, found[..., :1].sign() * LARGEST_CONSTANT, found)

    def reach(self, pair: Tensor, size: Tensor) -> Tensor:
        """Return the largest ``q0 * size0 + q1 * size1`` of some pairs, int64 ``[e]``, for sizes ``[e, 2]``."""
        sums = (self.largest[pair] * size).sum(1)
        for part, codes in self._joint(pair):
            sums[part] = (codes * size[part, None]).sum(2).amax(1)
        return sums

    def room(self, pair: Tensor, size: Tensor, which: int) -> Tensor:
        """Return the largest size that one of the weights may have beside the other as it is, int64 ``[e]``.

        Args:
            pair: some pairs.
            size: of their weights, ``[e, 2]``, each at most 127.
            which: 0 or 1.
        """
        other = 1 - which
        largest = self.largest[pair]
        free = INT16_MAX - largest[:, other] * size[:, other]
        result = free // largest[:, which].clamp(min=1)
        for part, codes in self._joint(pair):
            left = INT16_MAX - codes[:, :, other] * size[part, other, None]
            result[part] = torch.where(codes[:, :, which] > 0, left // codes[:, :, which].clamp(min=1), 127).amin(1)
        return result.clamp(max=127)

    def _joint(self, pair: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for pairs within one table, places in ``pair`` and codes that decide, ``[e', points, 2]``, in chunks."""
        number, points = self._fronts
        joint = (number[pair] >= 0).nonzero().flatten()
        for part in joint.split(max(1, _ELEMENTS // (2 * points.shape[1]))):
            yield part, points[number[pair[part]]]

    @cached_property
    def _fronts(self) -> tuple[Tensor, Tensor]:
        """Codes of two columns of a table that none of its other rows exceeds in both, which alone decide what fits.

        Returns:
            int64 ``[p]``, number of each pair's front, -1 where a pair has none; int64 ``[fronts, points, 2]``, filled up with 0.
        """
        number = torch.full((len(self.columns),), -1)
        joint = (self.start >= 0).nonzero().flatten()
        keys = torch.cat([self.levels[joint, None], self.start[joint, None], self.code_columns[joint]], dim=1)
        keys, number[joint] = keys.unique(dim=0, return_inverse=True)
        fronts = [
            self._front(part)
            for alike in _runs(keys)
            for part in alike.split(max(1, _ELEMENTS // (2 * int(alike[0, 0]))))
        ]
        most = max((front.shape[1] for front in fronts), default=1)
        padded = [torch.nn.functional.pad(front, (0, 0, 0, most - front.shape[1])) for front in fronts]
        return number, torch.cat(padded) if padded else torch.zeros(0, 1, 2, dtype=torch.int64)

    def _front(self, keys: Tensor) -> Tensor:
        rows = keys[:, 1:2] + torch.arange(int(keys[0, 0]))
        codes = self.codes[rows[:, :, None], keys[:, None, 2:]].to(torch.int64)  # [n, rows, 2]
        if self.outside is not None:
            codes = torch.cat([codes, torch.full_like(codes[:, :1], self.outside)], dim=1)
        order = (codes[..., 0] * 256 + codes[..., 1]).sort(dim=1, descending=True).values
        second = order % 256
        before = torch.nn.functional.pad(second.cummax(1).values[:, :-1], (1, 0), value=-1)
        decides = second > before
        order = torch.where(decides, order, 0).sort(dim=1, descending=True).values[:, : int(decides.sum(1).max())]
        return torch.stack([order // 256, order % 256], dim=2)


def _runs(keys: Tensor) -> list[Tensor]:
    """Divide sorted rows where their first number changes."""
    return list(keys.split(keys[:, 0].unique_consecutive(return_counts=True)[1].tolist())) if len(keys) else []


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
    """Pair the columns of a layer: of all of it, or of every channel group of a convolution."""
    if contraction.geometry is None:
        return [linear_pairs(tables, contraction.group_sizes)]
    outside, taps = contraction.zero_point if contraction.pads else None, contraction.taps
    if is_in_planes(contraction, tables):
        return [plane_pairs(tables, taps, outside)]
    return convolution_pairs(tables, contraction.groups, taps, outside)


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
    step = max(1, _ELEMENTS // len(weight))
    for first in range(0, len(pairs.columns), step):
        part = slice(first, first + step)
        w = weight[:, pairs.columns[part]].to(torch.int64)
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
