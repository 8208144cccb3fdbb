"""The custom operators that a lowered program calls, with the exact arithmetic of the integer kernels that ship.

Every operator is registered with ``torch.library``, so a program that contains it runs in PyTorch, traces with
``torch.export`` and is translated by a target through an operator table. The values are not an approximation of the
target: they are what ONNX Runtime's fused integer kernels compute (int32 accumulation, float32 requantization, round
half to even), which a test compares bit for bit.

Shapes: ``b`` batch, ``*`` any further leading dimensions, ``n_in`` inputs, ``k`` basis functions of one input, ``L`` rows
(levels) of a table, ``T`` distinct tables, ``c`` columns of a contraction, ``n_out`` outputs, ``g`` scale groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kancompile.ir.basis_parts import BasisParts
from kancompile.ir.packed_codes import unpack


@torch.library.custom_op("kancompile::quantize_index", mutates_args=())
def quantize_index(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    """Map ``x`` (float32, ``[b, *]``) to row numbers as ONNX QuantizeLinear does: uint8, or int32 above 256 levels.

    ``clip(rint(x / scale) + zero_point, 0, levels - 1)``: division, half to even, zero point added after rounding. NaN
    is row 0: kernels take the maximum with the lowest row first, and that of NaN and a number is the number.
    """
    step = torch.tensor(scale, dtype=torch.float32)
    rows = torch.clamp(torch.round(x / step) + zero_point, 0, levels - 1).nan_to_num_(0.0)
    return rows.to(torch.uint8 if levels <= 256 else torch.int32)


@quantize_index.register_fake
def _(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8 if levels <= 256 else torch.int32)


@torch.library.custom_op("kancompile::dequantize_index", mutates_args=())
def dequantize_index(index: Tensor, scale: float, zero_point: int) -> Tensor:
    """Map uint8 row numbers to the real values they stand for, as ONNX DequantizeLinear does: float32 of equal shape."""
    return (index.to(torch.int32) - zero_point).float() * torch.tensor(scale, dtype=torch.float32)


@dequantize_index.register_fake
def _(index: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(index, dtype=torch.float32)


@torch.library.custom_op("kancompile::floor_index", mutates_args=())
def floor_index(x: Tensor, multiplier: float, offset: float, levels: int) -> Tensor:
    """Map ``x`` (float32, ``[b, *]``) to int32 row numbers in float arithmetic.

    A QuantizeLinear with a 16-bit output right behind an integer product would pull that product back to float, so
    this is the form for tables of more than 256 rows between two layers.

    ``trunc(clip(x * multiplier + offset, 0, levels - 1))``, the product and the sum each rounded to float32. An offset
    that includes 0.5 makes it round to nearest. A multiplier of 1 and an offset of 0 are left out of the artifact. NaN is row 0.
    """
    scaled = x * torch.tensor(multiplier, dtype=torch.float32) + torch.tensor(offset, dtype=torch.float32)
    return torch.clamp(scaled, 0, levels - 1).to(torch.int32).clamp_(min=0)


@floor_index.register_fake
def _(x: Tensor, multiplier: float, offset: float, levels: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int32)


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows]`` of a table ``[n, k]`` for rows from 0; four times faster than that."""
    return table.index_select(0, rows.flatten()).reshape(*rows.shape, table.shape[1])


@torch.library.custom_op("kancompile::expand", mutates_args=())
def expand(index: Tensor, table: Tensor, first_row: Tensor | None) -> Tensor:
    """Look up the basis values of every input.

    Args:
        index: row numbers, uint8 or int32, ``[b, *, n_in]``.
        table: uint8 ``[T * L, k]``, the tables one below the other.
        first_row: int32 ``[n_in]``, where the table of an input begins; ``None`` where there is one table for all.

    Returns:
        uint8 ``[b, *, n_in, k]``.
    """
    rows = index.long()
    if first_row is not None:
        rows = rows + first_row
    return look_up(table, rows)


@expand.register_fake
def _(index: Tensor, table: Tensor, first_row: Tensor | None) -> Tensor:
    return table.new_empty((*index.shape, table.shape[-1]))


@torch.library.custom_op("kancompile::expand_pairs", mutates_args=())
def expand_pairs(index: Tensor, table: Tensor) -> Tensor:
    """Look up basis values as :func:`expand` does, in a form that lets a target look up two inputs at a time.

    Args:
        index: row numbers below ``L``, uint8 ``[b, *, n_in]``, ``n_in`` even.
        table: uint8 ``[L, k]``, at most 255 rows.

    Returns:
        uint8 ``[b, *, n_in, k]``.
    """
    return look_up(table, index.long())


@expand_pairs.register_fake
def _(index: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((*index.shape, table.shape[-1]))


@torch.library.custom_op("kancompile::expand_planes", mutates_args=())
def expand_planes(
    index: Tensor, words: Sequence[Tensor], sizes: Sequence[int], first_row: Tensor | None, added: Sequence[int]
) -> Tensor:
    """Look up basis values function by function, and put columns of constant codes beside them.

    Up to three functions stand in one number (``kancompile.ir.packed_codes``).

    Args:
        index: row numbers, uint8 or int32, ``[b, *, n_in]``.
        words: tables of packed codes, float32 ``[1, T * L]``, or of the codes of one function, uint8.
        sizes: functions in each word; together ``k``.
        first_row: as in :func:`expand`.
        added: codes of constant columns.

    Returns:
        uint8 ``[b, *, 1, k * n_in + m]``, functions major, the ``m`` constants last.
    """
    rows = index.long()
    if first_row is not None:
        rows = rows + first_row
    parts = [
        code for word, size in zip(words, sizes, strict=True) for code in unpack(look_up(word.T, rows)[..., 0], size)
    ]
    if added:
        parts.append(torch.tensor(added, dtype=torch.uint8).expand(*index.shape[:-1], -1))
    return torch.cat(parts, dim=-1).unsqueeze(-2)


@expand_planes.register_fake
def _(
    index: Tensor, words: Sequence[Tensor], sizes: Sequence[int], first_row: Tensor | None, added: Sequence[int]
) -> Tensor:
    return index.new_empty((*index.shape[:-1], 1, sum(sizes) * index.shape[-1] + len(added)), dtype=torch.uint8)


@torch.library.custom_op("kancompile::expand_joint", mutates_args=())
def expand_joint(index: Tensor, members: Tensor, parts: Tensor) -> Tensor:
    """Look up columns whose row number several inputs share (``kancompile.ir.joint_table``).

    Args:
        index: row numbers below ``L``, uint8 or int32 ``[b, n]``.
        members: int64 ``[m, w]``, the inputs of every word.
        parts: uint8 ``[m, k, w, L]``, codes whose sums over the members stay below 256.

    Returns:
        uint8 ``[b, k * w, 1]``, planes major.
    """
    words, levels = parts.shape[2:]
    first = torch.arange(words) * levels
    total = torch.zeros((), dtype=torch.uint8)
    for inputs, part in zip(members, parts, strict=True):
        rows = (index[:, inputs].long() + first).flatten()
        planes = [plane.flatten()[rows].reshape(-1, words) for plane in part]
        total = total + torch.cat(planes, dim=1)
    return total.unsqueeze(-1)


@expand_joint.register_fake
def _(index: Tensor, members: Tensor, parts: Tensor) -> Tensor:
    return parts.new_empty((index.shape[0], parts.shape[1] * parts.shape[2], 1))


@torch.library.custom_op("kancompile::expand_joint_of_basis", mutates_args=())
def expand_joint_of_basis(
    index: Tensor, members: Tensor, basis: Tensor, mix: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """Look columns up as :func:`expand_joint` does, in parts that follow from integers (``kancompile.ir.basis_parts``).

    Args:
        index, members: as there.
        basis, mix, bias, shift: see ``BasisParts``.
    """
    codes: Tensor = expand_joint(index, members, BasisParts(basis, mix, bias, shift).parts())
    return codes


@expand_joint_of_basis.register_fake
def _(index: Tensor, members: Tensor, basis: Tensor, mix: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    return basis.new_empty((index.shape[0], mix.shape[1] * mix.shape[2], 1))


def _columns(features: Sequence[Tensor]) -> Tensor:
    """Concatenate features ``[b, *, n_in, k]`` to columns ``[b, *, c]``, in the order of the weight's rows."""
    flat = [feature.flatten(-2) for feature in features]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def accumulate(columns: Tensor, weight: Tensor) -> Tensor:
    """Multiply integers exactly: ``columns [.., c]`` times ``weight [c, n_out]``, as int64 ``[.., n_out]``.

    Float64 holds every integer up to 2**53, far above what an int32 accumulator can hold, and its GEMM is fast.
    """
    return (columns.double() @ weight.double()).round().long()


@torch.library.custom_op("kancompile::contract", mutates_args=())
def contract(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor,
    scales: Sequence[Tensor],
    weight_bits: int,
) -> Tensor:
    """Multiply table codes by weight codes and return real values.

    ``sum over groups g of float32(columns_g . weights[g] (+ bias in the first group)) * scales[g]``: one integer product
    for each group of columns, groups added in float32 in their order.

    Args:
        features: uint8 tensors ``[b, *, n_in, k]``, whose last two dimensions, concatenated, are the ``c`` columns.
        weights: int8 ``[c_g, n_out]`` for each group, codes of at most ``weight_bits`` bits; the ``c_g`` add up to ``c``.
        bias: int32 ``[n_out]``, in units of ``scales[0]``.
        scales: float32 ``[n_out]`` for each group.
        weight_bits: 2 to 8; says how a target may store the codes, and does not change the value.

    Returns:
        float32 ``[b, *, n_out]``.
    """
    columns = _columns(features).split([weight.shape[0] for weight in weights], dim=-1)
    total = (accumulate(columns[0], weights[0]) + bias).float() * scales[0]
    for group in range(1, len(weights)):
        total = total + accumulate(columns[group], weights[group]).float() * scales[group]
    return total


@contract.register_fake
def _(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor,
    scales: Sequence[Tensor],
    weight_bits: int,
) -> Tensor:
    return bias.new_empty((*features[0].shape[:-2], weights[0].shape[1]), dtype=torch.float32)


@torch.library.custom_op("kancompile::contract_to_index", mutates_args=())
def contract_to_index(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    out_scale: float,
    out_zero_point: int,
    out_levels: int,
    weight_bits: int,
) -> Tensor:
    """Multiply table codes by weight codes and requantize straight to the row numbers of the next table.

    ``clip(rint(float32(acc) * (scale / out_scale)) + out_zero_point, 0, out_levels - 1)`` with the quotient of the
    scales rounded to float32, which is ONNX Runtime's QGemm.

    Args:
        features, weight, bias, weight_bits: as in :func:`contract`, with a single group.
        scale: float32 ``[n_out]``.
        out_scale, out_zero_point, out_levels: the index quantizer of the next expansion, at most 256 levels.

    Returns:
        uint8 ``[b, *, n_out]``.
    """
    sums = accumulate(_columns(features), weight) + bias
    multiplier = scale / torch.tensor(out_scale, dtype=torch.float32)
    return torch.clamp(torch.round(sums.float() * multiplier) + out_zero_point, 0, out_levels - 1).to(torch.uint8)


@contract_to_index.register_fake
def _(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    out_scale: float,
    out_zero_point: int,
    out_levels: int,
    weight_bits: int,
) -> Tensor:
    return features[0].new_empty((*features[0].shape[:-2], weight.shape[1]))


def convolution_columns(features: Sequence[Tensor], groups: int) -> Tensor:
    """Concatenate features ``[b, *, n_in, k]`` to columns ``[b, *, c]``: group by group, and in a group in their order."""
    if groups == 1 or len(features) == 1:
        return _columns(features)
    parts = [feature.reshape(*feature.shape[:-2], groups, -1) for feature in features]
    return torch.cat(parts, dim=-1).flatten(-2)


def accumulate_convolution(
    columns: Tensor,
    weight: Tensor,
    zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve integers exactly: uint8 ``columns`` ``[b, *, c]`` less ``zero_point``, as int64 ``[b, n_out, *]``.

    A float32 convolution of integers is exact while the sum of all magnitudes stays below 2**24, whatever the order of
    summation. Weights of 8 bits may exceed that; their upper and lower four bits do not up to some 4,000 products, and
    two float32 convolutions are faster than one in float64. Beyond, and on accelerators, whose float32 may be less than
    that, float64 is used.
    """
    x = columns.movedim(-1, 1).to(torch.int16) - zero_point
    largest = max(zero_point, 255 - zero_point)

    def convolve(codes: Tensor, dtype: torch.dtype) -> Tensor:
        arguments = (list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)
        return torch.convolution(x.to(dtype), codes.to(dtype), None, *arguments).round().long()

    def is_exact(codes: Tensor) -> bool:
        return x.device.type == "cpu" and float(codes.double().abs().flatten(1).sum(1).max()) * largest < 1 << 24

    if is_exact(weight):
        return convolve(weight, torch.float32)
    high = weight.to(torch.int16) >> 4
    low = weight.to(torch.int16) - high * 16
    if is_exact(high) and is_exact(low):
        return convolve(high, torch.float32) * 16 + convolve(low, torch.float32)
    return convolve(weight, torch.float64)


@torch.library.custom_op("kancompile::convolve_to_index", mutates_args=())
def convolve_to_index(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_scale: float,
    out_zero_point: int,
    out_levels: int,
    weight_bits: int,
) -> Tensor:
    """Convolve table codes with weight codes and requantize to 8 bits, as ONNX Runtime's QLinearConv.

    ``clip(rint(float32(acc) * (scale / out_scale)) + out_zero_point, 0, out_levels - 1)``, ``acc`` the int32 sum of
    ``weight * (code - zero_point)`` and ``bias``; codes outside the image are ``zero_point``.

    Args:
        features: uint8 tensors ``[b, *, n_in, k]``; see ``kancompile.ir.convolution`` for the order of the columns.
        weight: int8 ``[n_out, c / groups, *kernel]``, codes of at most ``weight_bits`` bits.
        bias: int32 ``[n_out]``, in units of ``scale``.
        scale: float32 ``[n_out]``.
        zero_point: the code that stands for 0, 0 to 255.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, a number for each spatial dimension.
        out_scale, out_zero_point, out_levels: quantizer of the output, at most 256 levels.
        weight_bits: 2 to 8; says how a target may store the codes, and does not change the value.

    Returns:
        uint8 ``[b, n_out, *]``.
    """
    columns = convolution_columns(features, groups)
    sums = accumulate_convolution(columns, weight, zero_point, stride, padding, dilation, groups)
    per_channel = (-1, *[1] * len(stride))
    multiplier = (scale / torch.tensor(out_scale, dtype=torch.float32)).reshape(per_channel)
    scaled = (sums + bias.reshape(per_channel)).float() * multiplier
    return torch.clamp(torch.round(scaled) + out_zero_point, 0, out_levels - 1).to(torch.uint8)


@convolve_to_index.register_fake
def _(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_scale: float,
    out_zero_point: int,
    out_levels: int,
    weight_bits: int,
) -> Tensor:
    spatial = features[0].shape[1:-2]
    sides = zip(spatial, weight.shape[2:], stride, padding, dilation, strict=True)
    out = [(size + 2 * pad - hold * (side - 1) - 1) // step + 1 for size, side, step, pad, hold in sides]
    return features[0].new_empty((features[0].shape[0], weight.shape[0], *out))
