"""How integer convolutions are written in standard ONNX, in the form that ONNX Runtime fuses.

``Transpose -> DequantizeLinear -> Conv -> QuantizeLinear`` becomes a channels-last QLinearConv, and the transpositions
cancel: the lookup in front already yields channels last, since its ``k`` values stand side by side. What is left is one
transposition of bytes for each layer, of row numbers and so ``k`` times fewer than features.

There is no form with more than 8 bits of output that pays: ConvInteger, the other integer convolution of ONNX, took 8
times (one image) to 34 times (32 images) as long as QLinearConv on the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

import kancompile.ir  # noqa: F401  (registers the operators named below)
from kancompile.ir import DIGITS, ZERO_POINT
from kancompile.targets.onnx.function_planes import threaded_rows
from kancompile.targets.onnx.translation import Value, clip_codes, constant

_CHANNELS_LAST_FROM = 8
"""Channels of one pixel that are worth copying in one piece."""


def convolve_to_index(
    features: Sequence[Value],
    weight: Value,
    bias: Value,
    scale: Value,
    zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_scale: float,
    out_zero_point: int,
    out_levels: int,
    weight_bits: int,
) -> Value:
    """Conv between DequantizeLinear and QuantizeLinear: one QLinearConv."""
    n_out, spatial = int(weight.shape[0]), len(stride)
    columns = _channels_first(_columns(features, groups), spatial)
    x = op.DequantizeLinear(columns, constant(np.array(1, np.float32)), constant(np.array(zero_point, np.uint8)))
    # weight and bias must name their zero points, or nothing is fused
    real_weight = op.DequantizeLinear(weight, scale, constant(np.zeros(n_out, np.int8)), axis=0)
    real_bias = op.DequantizeLinear(bias, scale, constant(np.zeros(n_out, np.int32)), axis=0)
    y = op.Conv(
        x,
        real_weight,
        real_bias,
        dilations=list(dilation),
        group=groups,
        kernel_shape=[int(side) for side in weight.shape[2:]],
        pads=[*padding, *padding],
        strides=list(stride),
    )
    codes = op.QuantizeLinear(
        y, constant(np.array(out_scale, np.float32)), constant(np.array(out_zero_point, np.uint8))
    )
    return clip_codes(codes, out_levels)


def _columns(features: Sequence[Value], groups: int) -> Value:
    """View features ``[b, *, n_in, k]`` as columns ``[b, *, c]``, concatenated group by group."""
    if len(features) == 1:
        return _merged(features[0], ())
    if groups == 1:
        return op.Concat(*[_merged(feature, ()) for feature in features], axis=-1)
    parts = op.Concat(*[_merged(feature, (groups,)) for feature in features], axis=-1)
    return op.Reshape(parts, constant(np.array([*_lead(features[0].shape[1:-2]), _size(features)], np.int64)))


def _merged(feature: Value, parts: tuple[int, ...]) -> Value:
    columns = _size([feature]) // (parts[0] if parts else 1)
    return op.Reshape(feature, constant(np.array([*_lead(feature.shape[1:-2]), *parts, columns], np.int64)))


def _lead(spatial: Sequence[Any]) -> list[int]:
    """Say in a Reshape that batch and pixels stay; 0 takes a size from what is reshaped."""
    return [-1, *map(int, spatial)] if all(isinstance(size, int) for size in spatial) else [0] * (1 + len(spatial))


def _size(features: Sequence[Value]) -> int:
    return sum(int(feature.shape[-2]) * int(feature.shape[-1]) for feature in features)


def _channels_first(columns: Value, spatial: int) -> Value:
    return op.Transpose(columns, perm=[0, spatial + 1, *range(1, spatial + 1)])


def expand_planes(
    index: Value, words: Sequence[Value], sizes: Sequence[int], first_row: Value | None, added: Sequence[int]
) -> Value:
    """GatherElements for each word of up to three functions, and a Concat.

    Of few channels, the planes are put together channels first, in long runs, and transposed as bytes.
    """
    n_in, dims = int(index.shape[-1]), len(index.shape) - 2
    lead = _lead(index.shape[1:-1])[1:]  # zeros where the size of an image is open
    is_open = 0 in lead
    rows: Value = index if index.dtype == ir.DataType.INT32 else op.Cast(index, to=ir.DataType.INT32)
    if first_row is not None:
        rows = op.Add(rows, first_row)
    last = n_in >= _CHANNELS_LAST_FROM
    if not last:
        rows = op.Transpose(rows, perm=[0, dims + 1, *range(1, dims + 1)])
    dealt = threaded_rows((1 if is_open else math.prod(lead)) * n_in)
    flat = op.Reshape(rows, constant(np.array([dealt, -1], np.int64)))
    sizes_of_rows = [-1, *lead, n_in] if last else [-1, n_in, *lead]
    whole = op.Shape(rows) if is_open else constant(np.array(sizes_of_rows, np.int64))
    parts = []
    for word, size in zip(words, sizes, strict=True):
        parts += [op.Reshape(code, whole) for code in unpack_codes(op.GatherElements(word, flat, axis=1), size)]
    if added:
        place, ones = [len(added)], [1] * dims
        codes = constant(np.array(added, np.uint8).reshape([1, *ones, *place] if last else [1, *place, *ones]))
        batch = op.Shape(index, start=0, end=1)
        pixels = op.Shape(index, start=1, end=1 + dims) if is_open else constant(np.array(lead, np.int64))
        if is_open:
            count = constant(np.array(place, np.int64))
            sizes_of_codes = [batch, pixels, count] if last else [batch, count, pixels]
        else:
            sizes_of_codes = [batch, constant(np.array([*lead, *place] if last else [*place, *lead], np.int64))]
        parts.append(op.Expand(codes, op.Concat(*sizes_of_codes, axis=0)))
    columns = op.Concat(*parts, axis=-1 if last else 1) if len(parts) > 1 else parts[0]
    if not last:
        columns = op.Transpose(columns, perm=[0, *range(2, dims + 2), 1])
    first = [0] if is_open else [-1]
    return op.Reshape(columns, constant(np.array([*first, *lead, 1, sum(sizes) * n_in + len(added)], np.int64)))


def unpack_codes(word: Value, size: int) -> list[Value]:
    """QuantizeLinear for each code, highest digit first, and DequantizeLinear and Sub in between."""
    if size == 1:
        return [word]
    codes = []
    zero_point = constant(np.array(ZERO_POINT, np.uint8))
    for place in range(size - 1, -1, -1):
        digit = constant(np.array(DIGITS[place], np.float32))
        codes.append(op.QuantizeLinear(word, digit, zero_point))
        if place:
            word = op.Sub(word, op.DequantizeLinear(codes[-1], digit, zero_point))
    return codes[::-1]


def dequantize_index(index: Value, scale: float, zero_point: int) -> Value:
    """DequantizeLinear."""
    return op.DequantizeLinear(index, constant(np.array(scale, np.float32)), constant(np.array(zero_point, np.uint8)))


CONVOLUTION_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.kancompile.convolve_to_index.default: convolve_to_index,
    torch.ops.kancompile.dequantize_index.default: dequantize_index,
    torch.ops.kancompile.expand_planes.default: expand_planes,
}
