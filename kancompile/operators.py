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


@torch.library.custom_op("kancompile::quantize_index", mutates_args=())
def quantize_index(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    """Map ``x`` (float32, ``[b, *]``) to row numbers as ONNX QuantizeLinear does: uint8, or int32 above 256 levels.

    ``clip(rint(x / scale) + zero_point, 0, levels - 1)``: division, half to even, zero point added after rounding.
    """
    step = torch.tensor(scale, dtype=torch.float32)
    rows = torch.clamp(torch.round(x / step) + zero_point, 0, levels - 1)
    return rows.to(torch.uint8 if levels <= 256 else torch.int32)


@quantize_index.register_fake
def _(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8 if levels <= 256 else torch.int32)


@torch.library.custom_op("kancompile::floor_index", mutates_args=())
def floor_index(x: Tensor, multiplier: float, offset: float, levels: int) -> Tensor:
    """Map ``x`` (float32, ``[b, *]``) to int32 row numbers in float arithmetic.

    A QuantizeLinear with a 16-bit output right behind an integer product would pull that product back to float, so
    this is the form for tables of more than 256 rows between two layers.

    ``trunc(clip(x * multiplier + offset, 0, levels - 1))``, the product and the sum each rounded to float32. An offset
    that includes 0.5 makes it round to nearest. A multiplier of 1 and an offset of 0 are left out of the artifact.
    """
    scaled = x * torch.tensor(multiplier, dtype=torch.float32) + torch.tensor(offset, dtype=torch.float32)
    return torch.clamp(scaled, 0, levels - 1).to(torch.int32)


@floor_index.register_fake
def _(x: Tensor, multiplier: float, offset: float, levels: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int32)


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
    return table[rows]


@expand.register_fake
def _(index: Tensor, table: Tensor, first_row: Tensor | None) -> Tensor:
    return table.new_empty((*index.shape, table.shape[-1]))


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
