"""Build the tables of a linear layer, and the contraction that reads them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kancompile.ir import (
    Contraction,
    Expansion,
    IndexQuantizer,
    Layer,
    Program,
    TableExpansion,
    distinct_inputs,
    reads_one_convolution,
)
from kancompile.passes.rounding_methods import round_to_nearest, search_scale
from kancompile.passes.tabulate_expansions.choose_index import LEVELS, choose_index, row_numbers
from kancompile.passes.tabulate_expansions.known import KnownTables, MeasuredInputs
from kancompile.passes.tabulate_expansions.lookup_cost import LookupCost
from kancompile.passes.tabulate_expansions.options import TableOptions
from kancompile.passes.tabulate_expansions.values import (
    STRETCH,
    code_scale,
    measured_samples,
    most_levels,
    rounding_error,
    values_at_rows,
)

_SCALING_SAMPLES = 256


def tabulate_layer(
    program: Program,
    layer: Layer,
    inputs: dict[str, Tensor],
    options: TableOptions,
    samples: int,
    known: KnownTables,
) -> tuple[dict[str, nn.Module], list[str]]:
    """Build the tables of one linear layer and the contraction that reads them."""
    contraction = program.node(layer.contraction, Contraction)
    weight, bias = contraction.weight, contraction.bias
    modules: dict[str, nn.Module] = {}
    notes = []
    folded = []
    start = 0
    for target in layer.expansions:
        expansion = program.node(target, Expansion)
        size = expansion.n_in * expansion.k
        part = weight[:, start : start + size]
        x = inputs[target].reshape(-1, *expansion.in_shape)
        measured = known.inputs_of(target, partial(_measured_inputs, expansion, x, part, samples))
        first, group, cost = measured.first, measured.group, measured.cost
        other = rounding_error(cost.exact, part, options.weight_bits)
        most = most_levels(len(first) * expansion.k, part.numel())
        # rows of one table that all inputs share cost nothing up to 255; tables of many inputs take room
        fewest = LEVELS[0] if len(first) > 1 else min(255, most)
        # the codes of an ordinary layer's inputs have 8 bits, and more rows would tell no more apart
        levels, capped = 256 if expansion.is_identity else options.levels, ""
        if reads_one_convolution(program, target):
            # a convolution hands over 8 bits, and more rows than it tells apart would be of no use
            most = min(most, 256)
            if levels is not None and levels > 256:
                levels, capped = 256, f", not the {levels} asked for since a convolution hands over 8 bits"
        choice = choose_index(cost, other, levels, options.range, most, fewest, options.percentile)
        table = tabulate(expansion, choice.index, x, first, group, part, options)
        notes.append(
            f"layer {layer.name!r}: table of {choice.index.levels} rows over {choice.index.low:.4g} ... "
            f"{choice.index.high:.4g} ({choice.range}{capped}), {table.n_tables} distinct, look-up error "
            f"{choice.error:.3g} beside {other:.3g} of 8-bit codes and {options.weight_bits}-bit weights"
        )
        modules[target] = table
        bias = bias + part @ table.column_offset().flatten()
        folded.append(part * table.column_scale().flatten())
        start += size
    modules[layer.contraction] = contraction.with_weight(torch.cat(folded, dim=1), bias)
    return modules, notes


def _measured_inputs(expansion: Expansion, x: Tensor, weight: Tensor, samples: int) -> MeasuredInputs[LookupCost]:
    first, group = distinct_inputs(expansion, float(x.min()), float(x.max()))
    cost = LookupCost(expansion, measured_samples(x, samples), weight, shared=len(first) == 1)
    return MeasuredInputs(first, group, cost)


def tabulate(
    expansion: Expansion,
    index: IndexQuantizer,
    x: Tensor,
    first: list[int],
    group: Tensor,
    weight: Tensor,
    options: TableOptions,
) -> TableExpansion:
    """Sample the functions at every row and round them to uint8, with the column scales that cost least.

    Args:
        expansion: the float expansion.
        index: its index quantizer.
        x: calibration inputs ``[n, *in_shape]``.
        first, group: the distinct inputs (see :func:`distinct_inputs`).
        weight: this expansion's columns ``[n_out, n_in * k]``.
        options: of the layer.
    """
    values = values_at_rows(expansion, index, x, first)
    low, high = values.amin(1), values.amax(1)  # [T, k]
    exponents = STRETCH if options.column_scaling is None else (options.column_scaling,)
    few = measured_samples(x, _SCALING_SAMPLES).reshape(-1, expansion.n_in)[:_SCALING_SAMPLES]
    rows = row_numbers(index, few)
    best = min(
        (code_scale(high - low, exponent) for exponent in exponents),
        key=lambda scale: scaling_error(values, low, scale, rows, group, weight, options.weight_bits),
    )
    codes = torch.round((values - low[:, None]) / best[:, None]).clamp(0, 255).to(torch.uint8)
    return TableExpansion(
        expansion.in_shape,
        index,
        codes.flatten(0, 1).contiguous(),
        None if len(first) == 1 else (group * index.levels).to(torch.int32),
        best,
        low,
        [branch.k for branch in expansion.branches],  # type: ignore[misc]
        [branch.name for branch in expansion.branches],  # type: ignore[misc]
    )


def scaling_error(
    values: Tensor, low: Tensor, scale: Tensor, rows: Tensor, group: Tensor, weight: Tensor, bits: int
) -> float:
    """Measure what column scales cost: coarse codes of small columns against weights of unequal size.

    Args:
        values: the functions at the rows, ``[T, levels, k]``.
        low, scale: value of code 0 and of one code step, ``[T, k]``.
        rows: row numbers of some calibration inputs, int64 ``[n, n_in]``.
        group: which table an input uses, int64 ``[n_in]``.
        weight: this expansion's columns ``[n_out, n_in * k]``.
        bits: of the weights, rounded to nearest here.

    Returns:
        mean squared error at the output.
    """
    codes = torch.round((values - low[:, None]) / scale[:, None]).clamp(0, 255)
    at = group * values.shape[1] + rows
    noise = (codes * scale[:, None] + low[:, None] - values).flatten(0, 1)[at].flatten(1) @ weight.T
    columns = codes.flatten(0, 1)[at].flatten(1)
    columns = columns - columns.mean(0)
    scaled = weight * scale[group].flatten()
    importance = columns.square().mean(0)
    sizes = (scaled.shape[1],)
    step = search_scale(scaled, bits, sizes, "hessian", importance + 0.01 * importance.mean())
    rounded = round_to_nearest(scaled, step, sizes, bits).float() * step.T
    return float((columns @ (scaled - rounded).T).square().mean() + noise.square().mean())
