"""Join codes, scales and bias of a rounded layer to integer modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.ir import (
    Contraction,
    ConvContraction,
    GroupMultiplier,
    Layer,
    Program,
    QuantizedContraction,
    QuantizedConvContraction,
    TableExpansion,
    group_order,
    layer_tables,
    tied_columns,
)
from kancompile.passes.rounding_methods import Rounded, common_scale

_INT32_MAX = (1 << 31) - 1


def merge_groups(parts: Sequence[Rounded]) -> Rounded:
    """Put the rounded channel groups of a convolution below each other: ``codes [n_out, c / groups * t]``."""
    if len(parts) == 1:
        return parts[0]
    scaled = any(part.column_scale is not None for part in parts)
    whole = [torch.ones(part.codes.shape[1]) for part in parts]
    scales = [one if part.column_scale is None else part.column_scale for part, one in zip(parts, whole, strict=True)]
    return Rounded(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts], dim=1),
        torch.cat([part.offset for part in parts]),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        parts[0].group_sizes,
        torch.cat(scales) if scaled else None,
    )


def integer_convolution(program: Program, layer: Layer, rounded: Rounded, bits: int) -> dict[str, nn.Module]:
    """Build the modules of a rounded convolution, and of tables whose columns the method rescaled.

    Args:
        program: the tabulated program, with the layer's float convolution and original tables.
        layer: the layer.
        rounded: its rounding, all groups together.
        bits: of its weights.

    Raises:
        KanCompileError: a sum could leave the int32 accumulator.
    """
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, ConvContraction)
    real_bias = contraction.bias + rounded.offset
    # scales so small that the bias in their units would leave int32: outputs whose weights all round to 0
    scale = torch.maximum(rounded.scale[0], (real_bias.abs() / (1 << 28)).clamp(min=1e-30))
    bias = torch.round(real_bias.double() / scale.double())
    reach = max(contraction.zero_point, 255 - contraction.zero_point)
    largest = float((rounded.codes.double().abs().sum(1) * reach + bias.abs()).max())
    if largest > _INT32_MAX:
        raise KanCompileError(
            f"layer {layer.name!r}: a sum of {rounded.codes.shape[1]} products may reach {largest:.3g}, more than the int32 "
            f"accumulator holds ({_INT32_MAX}); use fewer weight bits for this layer"
        )
    modules: dict[str, nn.Module] = {
        layer.contraction: QuantizedConvContraction(
            contraction.layer,
            rounded.codes.reshape(contraction.weight.shape).contiguous(),
            bias.to(torch.int32),
            scale,
            contraction.geometry,
            contraction.out_shape,
            contraction.zero_point,
            bits,
            contraction.output,
        )
    }
    if rounded.column_scale is not None:
        tables = layer_tables(program, layer)
        modules |= dict(zip(layer.expansions, _rescaled(tables, contraction, rounded.column_scale), strict=True))
    return modules


def _rescaled(
    tables: Sequence[TableExpansion], contraction: ConvContraction, column_scale: Tensor
) -> list[TableExpansion]:
    """Shrink the code range of table columns about the code of 0, by ``column_scale [c * t]``, equal in tied columns."""
    order = group_order([(table.n_in, table.k) for table in tables], contraction.geometry.groups)
    ties = tied_columns(tables)[order]
    taps = len(column_scale) // len(order)
    of_tie = torch.ones(int(ties.max()) + 1)
    of_tie[ties] = column_scale[::taps]
    zero_point, start = contraction.zero_point, 0
    rescaled = []
    for table in tables:
        size = table.n_tables * table.k
        fraction = of_tie[start : start + size].reshape(table.n_tables, table.k)
        start += size
        codes = table.table.reshape(table.n_tables, table.index.levels, table.k).float() - zero_point
        narrowed = (torch.round(codes * fraction[:, None]) + zero_point).to(torch.uint8)
        scale = table.scale / fraction
        offset = table.offset + zero_point * (table.scale - scale)
        rescaled.append(table.with_codes(narrowed.flatten(0, 1), scale, offset))
    return rescaled


def integer_modules(
    program: Program, layer: Layer, rounded: Rounded, bits: int, shares_scale: bool = False
) -> dict[str, nn.Module]:
    """Build the modules of a rounded layer: the contraction, and tables whose columns the method rescaled.

    Args:
        program: the tabulated program, with the layer's float contraction and original tables.
        layer: the layer.
        rounded: its rounding.
        bits: of its weights.
        shares_scale: whether scales of groups are multiples of one and become part of the weights.
    """
    contraction = program.module(layer.contraction)
    if isinstance(contraction, ConvContraction):
        return integer_convolution(program, layer, rounded, bits)
    assert isinstance(contraction, Contraction)
    modules: dict[str, nn.Module] = {layer.contraction: to_integers(contraction, rounded, bits, shares_scale)}
    if rounded.column_scale is not None:
        tables = layer_tables(program, layer)
        modules |= dict(zip(layer.expansions, rescale_tables(tables, rounded.column_scale), strict=True))
    return modules


def rescale_tables(tables: Sequence[TableExpansion], column_scale: Tensor) -> list[TableExpansion]:
    """Let every table column use only a fraction of its code range, ``column_scale`` ``[c]``, equal in tied columns."""
    ties = tied_columns(tables)
    of_tie = torch.ones(int(ties.max()) + 1)
    of_tie[ties] = column_scale
    rescaled, start = [], 0
    for table in tables:
        size = table.n_tables * table.k
        fraction = of_tie[start : start + size].reshape(table.n_tables, table.k)
        start += size
        codes = table.table.reshape(table.n_tables, table.index.levels, table.k).float()
        narrowed = torch.round(codes * fraction[:, None]).to(torch.uint8)
        rescaled.append(table.with_codes(narrowed.flatten(0, 1), table.scale / fraction))
    return rescaled


def to_integers(
    contraction: Contraction, rounded: Rounded, bits: int, shares_scale: bool = False
) -> QuantizedContraction:
    """Join codes, scales and bias to an integer contraction; with ``shares_scale`` one of a single scale group.

    Raises:
        KanCompileError: a sum could leave the int32 accumulator, or the bias does not fit.
    """
    scale, codes, multiplier = rounded.scale, rounded.codes.T.contiguous(), None
    group_sizes = rounded.group_sizes
    if shares_scale and len(group_sizes) > 1:
        base, factors = common_scale(scale, bits)
        multiplier = GroupMultiplier(factors, group_sizes)
        scale, codes, group_sizes = base[None], codes * multiplier.of_column(), (codes.shape[0],)
    scale = _representable(scale, contraction.bias + rounded.offset)
    bias = torch.round((contraction.bias + rounded.offset).double() / scale[0].double())
    largest = codes.double().abs().sum(0) * 255 + bias.abs()
    if float(largest.max()) > _INT32_MAX:
        raise KanCompileError(
            f"layer {contraction.layer!r}: a sum of {codes.shape[0]} products may reach {float(largest.max()):.3g}, "
            f"more than the int32 accumulator holds ({_INT32_MAX}); use fewer weight bits for this layer"
        )
    return QuantizedContraction(
        contraction.layer,
        codes,
        bias.to(torch.int32),
        scale,
        contraction.out_shape,
        bits,
        group_sizes,
        multiplier=multiplier,
    )


def _representable(scale: Tensor, bias: Tensor) -> Tensor:
    """Raise scales so small that the bias in their units would leave int32: outputs whose weights all round to 0."""
    least = bias.abs() / (1 << 28)
    first = torch.maximum(scale[0], least.clamp(min=1e-30))
    return torch.cat([first[None], scale[1:]])
