"""Join codes, scales and bias of a rounded layer to integer modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.ir import (
    Contraction,
    GroupMultiplier,
    HandOver,
    IntegerContraction,
    Layer,
    Program,
    TableExpansion,
    group_order,
    layer_tables,
    tied_columns,
)
from kancompile.passes.rounding_methods import Rounded, Width, common_scale, stored_bits

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


def integer_modules(
    program: Program, layer: Layer, rounded: Rounded, bits: Width, shares_scale: bool = False
) -> dict[str, nn.Module]:
    """Build the modules of a rounded layer: the contraction, and tables whose columns the method rescaled.

    Args:
        program: the tabulated program, with the layer's float contraction and original tables.
        layer: the layer.
        rounded: its rounding, all channel groups together.
        bits: of its weights.
        shares_scale: whether scales of groups are multiples of one and become part of the weights.

    Raises:
        KanCompileError: a sum could leave the int32 accumulator.
    """
    contraction = program.node(layer.contraction, Contraction)
    modules: dict[str, nn.Module] = {layer.contraction: to_integers(contraction, rounded, bits, shares_scale)}
    if rounded.column_scale is not None:
        tables = layer_tables(program, layer)
        modules |= dict(zip(layer.expansions, rescale_tables(tables, contraction, rounded.column_scale), strict=True))
    return modules


def rescale_tables(
    tables: Sequence[TableExpansion], contraction: Contraction, column_scale: Tensor
) -> list[TableExpansion]:
    """Let every table column use only a fraction of its code range about the code of 0.

    Args:
        tables: what the contraction reads.
        contraction: of the layer.
        column_scale: the fractions, ``[c * t]``, equal in tied columns.
    """
    order = group_order([(table.n_in, table.k) for table in tables], contraction.groups)
    ties, zero_point, start = tied_columns(tables)[order], contraction.zero_point, 0
    of_tie = torch.ones(int(ties.max()) + 1)
    of_tie[ties] = column_scale[:: contraction.taps]
    rescaled = []
    for table in tables:
        size = table.n_tables * table.k
        fraction = of_tie[start : start + size].reshape(table.n_tables, table.k)
        start += size
        rescaled.append(table.rescaled(fraction, zero_point))
    return rescaled


def to_integers(
    contraction: Contraction, rounded: Rounded, bits: Width, shares_scale: bool = False
) -> IntegerContraction:
    """Join codes, scales and bias to an integer contraction; with ``shares_scale`` one of a single scale group.

    Raises:
        KanCompileError: a sum could leave the int32 accumulator, or the bias does not fit.
    """
    scale, codes, multiplier = rounded.scale, rounded.codes, None
    group_sizes = rounded.group_sizes
    if shares_scale and len(group_sizes) > 1:
        base, factors = common_scale(scale, bits)
        multiplier = GroupMultiplier(factors, group_sizes)
        scale, codes, group_sizes = base[None], codes * multiplier.of_column().T, (codes.shape[1],)
    if contraction.geometry is not None:
        scale, group_sizes = scale[:1], (contraction.weight.shape[1],)
    scale = _representable(scale, contraction.bias + rounded.offset)
    bias = torch.round((contraction.bias + rounded.offset).double() / scale[0].double())
    reach = max(contraction.zero_point, 255 - contraction.zero_point)
    largest = codes.double().abs().sum(1) * reach + bias.abs()
    if float(largest.max()) > _INT32_MAX:
        raise KanCompileError(
            f"layer {contraction.layer!r}: a sum of {codes.shape[1]} products may reach {float(largest.max()):.3g}, "
            f"more than the int32 accumulator holds ({_INT32_MAX}); use fewer weight bits for this layer"
        )
    return IntegerContraction(
        contraction.layer,
        codes.reshape(contraction.weight.shape),
        bias.to(torch.int32),
        scale,
        contraction.out_shape,
        contraction.geometry,
        contraction.zero_point,
        stored_bits(bits),
        group_sizes,
        HandOver("real", contraction.output),
        multiplier,
    )


def _representable(scale: Tensor, bias: Tensor) -> Tensor:
    """Raise scales so small that the bias in their units would leave int32: outputs whose weights all round to 0."""
    least = bias.abs() / (1 << 28)
    first = torch.maximum(scale[0], least.clamp(min=1e-30))
    return torch.cat([first[None], scale[1:]])
