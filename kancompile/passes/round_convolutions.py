"""State the rounding of a convolution as that of a matrix product, and build the integer convolution from the answer.

    y[o] = sum over columns and taps of V[o, column, tap] * (q - z)[column, tap] + b       (one row of features per pixel)

Rows are what a sample of output pixels sees, drawn evenly from all calibration images, so that memory is bounded. Features
are the codes less the code of 0: then padding is 0 whatever the weights are rounded to, and a method may rescale columns
about it. Every channel group is a problem of its own; all methods work on them unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir.convolution import ConvContraction, QuantizedConvContraction
from kancompile.ir.geometry import PatchSampler, columns_of_groups, flat_weight, group_order, split_groups
from kancompile.ir.operators import convolution_columns
from kancompile.ir.program import Layer, Program
from kancompile.ir.table import TableExpansion
from kancompile.ir.wiring import branch_of_column, layer_tables, tied_columns
from kancompile.rounding import FeatureSource, Rounded, RoundingProblem

_INT32_MAX = (1 << 31) - 1
_ROWS = 1 << 14
_BYTES = 1 << 29
_CHUNK_BYTES = 1 << 26


def convolution_problems(
    program: Program,
    layer: Layer,
    x: Tensor,
    bits: int,
    generator: torch.Generator,
    rows: int = _ROWS,
    max_bytes: int = _BYTES,
) -> tuple[RoundingProblem, ...]:
    """State the rounding problem of every channel group of a convolution whose earlier layers are rounded.

    Args:
        program: the program.
        layer: the layer.
        x: calibration inputs ``[n, *input_shape]``.
        bits: of the weights.
        generator: draws the output pixels.
        rows: most pixels to use.
        max_bytes: most memory for their features, all groups together.
    """
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, ConvContraction)
    tables = layer_tables(program, layer)
    groups = contraction.geometry.groups
    sampler = PatchSampler(contraction.geometry, contraction.kernel, tables[0].in_shape[:-1])
    order = group_order([(table.n_in, table.k) for table in tables], groups)
    element = 2 if contraction.zero_point else 1
    wanted = max(1, min(rows, max_bytes // (len(order) * sampler.taps * element)))
    image, position = sampler.draw(len(x), wanted, generator)
    features = _features(program, layer, x, contraction, sampler, image, position)
    branches = columns_of_groups(branch_of_column(tables)[order], groups, sampler.taps)
    ties = columns_of_groups(tied_columns(tables)[order], groups, sampler.taps)
    weights = flat_weight(contraction.weight, groups)
    # a table that several groups share cannot be rescaled for one of them
    own = groups == 1 or not _overlap(ties)
    return tuple(
        RoundingProblem(
            layer.name,
            weight,
            FeatureSource.from_tensor(feature),
            bits,
            (),
            branch,
            tie if own else torch.zeros_like(tie),
        )
        for weight, feature, branch, tie in zip(weights, features, branches, ties, strict=True)
    )


def _overlap(parts: Sequence[Tensor]) -> bool:
    return sum(len(part.unique()) for part in parts) > len(torch.cat(list(parts)).unique())


def _features(
    program: Program,
    layer: Layer,
    x: Tensor,
    contraction: ConvContraction,
    sampler: PatchSampler,
    image: Tensor,
    position: Tensor,
) -> list[Tensor]:
    """Collect codes less the zero point, ``[r, c / groups * t]`` for each group: int16, or uint8 where that is 0."""
    size = sum(_elements(program, target) for target in layer.expansions)
    chunk = max(1, min(512, _CHUNK_BYTES // (8 * size)))
    found: list[list[Tensor]] = []
    used = image.unique()
    for part in torch.split(used, chunk):
        traced = program.trace(x[part], layer.expansions)
        columns = convolution_columns([traced[target][1] for target in layer.expansions], contraction.geometry.groups)
        here = (image >= part[0]) & (image <= part[-1])
        local = torch.searchsorted(part, image[here])
        patches = sampler.take(columns, local, position[here], contraction.zero_point)
        if contraction.zero_point:
            patches = patches.to(torch.int16) - contraction.zero_point
        found.append(split_groups(patches, contraction.geometry.groups))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _elements(program: Program, target: str) -> int:
    table = program.module(target)
    assert isinstance(table, TableExpansion)
    return torch.Size(table.in_shape).numel() * table.k


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
