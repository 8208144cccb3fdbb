"""Replace every float expansion by an integer table and fold the table's scales into the weights.

    phi = expand(x)                  q = table[index(x)]              (uint8)
    y = W phi + b          ->        y = V q + b'

with ``phi ~ s * q + z`` for each column, ``V = W diag(s)`` and ``b' = b + W z``. The program then computes in float on
integer features, which is what weight rounding works on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.convolutions import ConvContraction
from kancompile.modules import Contraction, Expansion, IndexQuantizer, TableExpansion
from kancompile.passes.choose_index import LEVELS, LookupCost, choose_index
from kancompile.passes.table_values import (
    STRETCH,
    TableOptions,
    code_scale,
    distinct_inputs,
    measured_samples,
    most_levels,
    rounding_error,
    values_at_rows,
)
from kancompile.passes.tabulate_convolutions import tabulate_convolution
from kancompile.program import Layer, Program

__all__ = ["TableOptions", "TabulateExpansions", "distinct_inputs", "tabulate", "tabulate_layer"]


@dataclass(frozen=True)
class TabulateExpansions:
    """Tabulate the expansions of every layer; layers that already are tables stay.

    Attributes:
        options: gives the options of a layer by its name, ``None`` to keep the layer in float.
        samples: calibration samples used to measure errors (ranges always use all of them).
    """

    options: Callable[[str], TableOptions | None]
    samples: int = 256

    name = "tabulate-expansions"

    def __call__(self, program: Program, x: Tensor) -> Program:
        """Return the tabulated program.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        layers = [layer for layer in program.layers() if self._applies(program, layer)]
        wanted = [target for layer in layers for target in layer.expansions]
        if not any(isinstance(program.module(target), Expansion) for target in wanted):
            return program
        read = program.inputs(x, wanted)
        for layer in layers:
            inputs = {target: read[target] for target in layer.expansions}
            options = self.options(layer.name)
            assert options is not None
            is_linear = isinstance(program.module(layer.contraction), Contraction)
            run = tabulate_layer if is_linear else tabulate_convolution
            modules, said = run(program, layer, inputs, options, self.samples)
            program = program.replace_modules(modules, said)
        return program

    def _applies(self, program: Program, layer: Layer) -> bool:
        is_float = isinstance(program.module(layer.contraction), Contraction | ConvContraction)
        return is_float and self.options(layer.name) is not None


def tabulate_layer(
    program: Program, layer: Layer, inputs: dict[str, Tensor], options: TableOptions, samples: int
) -> tuple[dict[str, nn.Module], list[str]]:
    """Build the tables of one linear layer and the contraction that reads them."""
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, Contraction)
    weight, bias = contraction.weight, contraction.bias
    modules: dict[str, nn.Module] = {}
    notes = []
    folded = []
    start = 0
    for target in layer.expansions:
        expansion = program.module(target)
        assert isinstance(expansion, Expansion)
        size = expansion.n_in * expansion.k
        part = weight[:, start : start + size]
        x = inputs[target].reshape(-1, *expansion.in_shape)
        first, group = distinct_inputs(expansion, float(x.min()), float(x.max()))
        cost = LookupCost(expansion, measured_samples(x, samples), part, shared=len(first) == 1)
        other = rounding_error(cost.exact, part, options.weight_bits)
        most = most_levels(len(first) * expansion.k, part.numel())
        # rows of one table that all inputs share cost nothing up to 256; tables of many inputs take room
        fewest = LEVELS[0] if len(first) > 1 else min(256, most)
        choice = choose_index(cost, other, options.levels, options.range, most, fewest, options.percentile)
        table = tabulate(expansion, choice.index, x, first, group, part, options)
        notes.append(
            f"layer {layer.name!r}: table of {choice.index.levels} rows over {choice.index.low:.4g} ... "
            f"{choice.index.high:.4g} ({choice.range}), {table.n_tables} distinct, look-up error "
            f"{choice.error:.3g} beside {other:.3g} of 8-bit codes and {options.weight_bits}-bit weights"
        )
        modules[target] = table
        bias = bias + part @ table.column_offset().flatten()
        folded.append(part * table.column_scale().flatten())
        start += size
    modules[layer.contraction] = Contraction(contraction.layer, torch.cat(folded, dim=1), bias, contraction.out_shape)
    return modules, notes


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
    best = min(
        (code_scale(high - low, exponent) for exponent in exponents),
        key=lambda scale: scaling_error(scale, high - low, group, weight, options.weight_bits),
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


def scaling_error(scale: Tensor, spread: Tensor, group: Tensor, weight: Tensor, bits: int) -> float:
    """Estimate the error of column scales: coarse small columns against weights of unequal size.

    Codes cost ``scale^2 / 12`` through the weights; weights, rounded with one step per output, cost ``step^2 / 12``
    through the variance of a code, taken as that of a column that uses its range evenly.
    """
    columns = scale[group].flatten()
    code_spread = (spread / scale)[group].flatten()
    codes = (weight.square() * columns.square() / 12).sum(1)
    step = (weight * columns).abs().amax(1) / (2 ** (bits - 1) - 1)
    weights = step.square() / 12 * (code_spread.square() / 12).sum()
    return float((codes + weights).mean())
