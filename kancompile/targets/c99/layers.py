"""What one layer of a program amounts to in integers: weights in loop order, zero points in the bias, forms of its outputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kancompile.ir import Geometry, IndexQuantizer, IntegerContraction, TableExpansion
from kancompile.targets.c99.float_inputs import FloatStep
from kancompile.targets.c99.steps import Array, Buffer, Contract, Index, Read, ScaleGroup, Segment, Store, Window

_UNPLACED = Buffer("", 0)


def plan_linear(number: int, module: IntegerContraction, reads: Sequence[Read]) -> Contract:
    """Plan a linear layer; positions are the leading dimensions that it treats alike."""
    lead = math.prod(module.out_shape) // module.n_out
    codes = [weight.numpy() for weight in module.weights]
    scales = [scale.numpy() for scale in module.scales]
    factors: list[Array | None] = [None] * len(codes)
    if module.multiplier is not None:
        sizes = module.multiplier.group_sizes
        codes = np.split(codes[0] // module.multiplier.of_column().numpy(), np.cumsum(sizes)[:-1])
        scales, factors = scales * len(sizes), list(module.multiplier.factors.numpy())
    if len(codes) == 1 and module.multiplier is None:
        weight = np.concatenate(
            [_in_order(part, read) for part, read in zip(_split(codes[0], reads), reads, strict=True)]
        )
        groups = [ScaleGroup(_all_inputs(reads, 1), scales[0])]
    else:
        parts, groups = [], []
        start = 0
        for part, scale, factor in zip(codes, scales, factors, strict=True):
            widened, segments = _whole_inputs(part, start, reads)
            parts.append(widened)
            groups.append(ScaleGroup(segments, scale, factor))
            start += len(part)
        weight = np.concatenate(parts)
    once = (1,) if lead > 1 else ()
    none = (0,) if lead > 1 else ()
    size = (lead,) if lead > 1 else ()
    return Contract(
        number,
        module.layer,
        tuple(_sorted(read) for read in reads),
        Window(size, size, once, once, none, once),
        weight[None, None],
        module.weight_bits,
        module.bias.numpy().astype(np.int64),
        None,
        tuple(groups),
        (),
        False,
    )


def _split(codes: Array, reads: Sequence[Read]) -> list[Array]:
    bounds = list(itertools.accumulate(read.n_in * read.k for read in reads))[:-1]
    return np.split(codes, bounds)


def _in_order(codes: Array, read: Read) -> Array:
    """Bring the columns of a read, ``[n_in * k, n]``, into the order in which its row numbers are stored."""
    if read.order is None:
        return codes
    return codes.reshape(read.n_in, read.k, -1)[np.argsort(read.order)].reshape(codes.shape)


def _sorted(read: Read) -> Read:
    """Return a read whose tables, too, stand in the stored order."""
    if read.order is None or read.first_row is None:
        return replace(read, order=None)
    return replace(read, order=None, first_row=read.first_row[np.argsort(read.order)])


def _all_inputs(reads: Sequence[Read], groups: int) -> tuple[Segment, ...]:
    return tuple(Segment(number, 0, read.n_in // groups) for number, read in enumerate(reads))


def _whole_inputs(codes: Array, start: int, reads: Sequence[Read]) -> tuple[Array, tuple[Segment, ...]]:
    """Widen the columns ``start ...`` of a scale group to whole inputs, with weights of 0 for columns of other groups."""
    parts, segments = [], []
    stop, base = start + len(codes), 0
    for number, read in enumerate(reads):
        low, high = max(start, base), min(stop, base + read.n_in * read.k)
        if low < high:
            first, last = (low - base) // read.k, -(-(high - base) // read.k)
            widened = np.zeros(((last - first) * read.k, codes.shape[1]), codes.dtype)
            shift = low - base - first * read.k
            widened[shift : shift + high - low] = codes[low - start : high - start]
            parts.append(widened)
            segments.append(Segment(number, first, last - first))
        base += read.n_in * read.k
    return np.concatenate(parts), tuple(segments)


def plan_convolution(
    number: int, module: IntegerContraction, geometry: Geometry, reads: Sequence[Read], spatial: Sequence[int]
) -> Contract:
    """Plan a convolution over an image of ``spatial`` pixels.

    ``sum of w * (q - z)`` over the taps inside the image is ``sum of w * q`` over all taps, ``q = z`` outside, less ``z``
    times the sum of all weights: a part of the bias.
    """
    groups, n = geometry.groups, module.n_out // geometry.groups
    codes = module.matrix.numpy()
    by_tap = codes.reshape(groups, n, codes.shape[1], -1).transpose(0, 3, 2, 1)
    window = Window(
        tuple(spatial),
        tuple(module.out_shape[1:]),
        module.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )
    outside = by_tap.astype(np.int64).sum(2).transpose(1, 0, 2).reshape(window.taps, -1) * module.zero_point
    needs_border = module.zero_point != 0 and window.leaves_image
    return Contract(
        number,
        module.layer,
        tuple(reads),
        window,
        np.ascontiguousarray(by_tap),
        module.weight_bits,
        module.bias.numpy().astype(np.int64) - outside.sum(0),
        outside if needs_border else None,
        (ScaleGroup(_all_inputs(reads, groups), module.scales[0].numpy()),),
        (),
        False,
    )


def pool_window(arguments: Sequence[Any], spatial: tuple[int, ...], out_size: tuple[int, ...]) -> Window:
    """Read the arguments of an ATen max-pooling: input, kernel, stride, padding, dilation, ceil mode."""

    def sides(position: int, default: Sequence[int]) -> tuple[int, ...]:
        given = list(arguments[position]) if len(arguments) > position else []
        values = given or list(default)
        return tuple(int(value) for value in (values * len(spatial))[: len(spatial)])

    kernel = sides(1, [])
    ones = [1] * len(spatial)
    return Window(spatial, out_size, kernel, sides(2, kernel), sides(3, [0]), sides(4, ones))


def requantize(scale: Tensor, output: IndexQuantizer) -> Store:
    """State what the integer kernels of ONNX Runtime do to hand over row numbers."""
    factor = scale / torch.tensor(output.scale, dtype=torch.float32)
    return Store(_UNPLACED, "requantize", output.levels, factor.numpy(), output.zero_point)


def store_for(table: TableExpansion) -> Store:
    """State how a table that reads real values makes row numbers of them."""
    index = table.index
    if table.input == "scaled":
        return Store(_UNPLACED, "units", index.levels)
    if table.input == "float":
        multiplier, offset = index.to_rows()
        return Store(_UNPLACED, "affine", index.levels, multiplier=multiplier, offset=offset)
    return Store(_UNPLACED, "nearest", index.levels, zero_point=index.zero_point, multiplier=index.scale)


def index_of_inputs(table: TableExpansion, count: int) -> tuple[Index, tuple[FloatStep, ...]]:
    """Say how ``count`` real inputs become row numbers, and what is done to them before.

    A table that another use of its layer reads behind a layer has the rounding that is quick there, also for real inputs.
    """
    index = table.index
    if table.input == "real":
        return Index(index.scale, index.zero_point, index.levels), ()
    multiplier, offset = index.to_rows()
    scaling = (("x * c", multiplier), ("x + c", offset)) if table.input == "float" else ()
    steps = tuple(FloatStep(form, torch.full((count,), constant)) for form, constant in scaling)
    return Index(1.0, 0, index.levels, truncates=True), steps


def rows_behind(table: TableExpansion, values: Tensor) -> Array:
    """Return the rows that a table of real inputs has for 8-bit codes that stand for ``values``, float32 ``[codes]``.

    Its own quantizer is applied once and for all.
    """
    if table.input == "real":
        rows = table.index(values)
    else:
        multiplier, offset = (1.0, 0.0) if table.input == "scaled" else table.index.to_rows()
        rows = torch.ops.kancompile.floor_index(values, multiplier, offset, table.index.levels)
    tables = table.table.reshape(table.n_tables, table.index.levels, table.k)
    return tables[:, rows.long()].flatten(0, 1).numpy()
