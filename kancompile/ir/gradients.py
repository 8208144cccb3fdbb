"""The same program with gradients: integer modules exchanged for twins with equal values and straight-through slopes.

Rounding has no useful derivative, so each twin computes the exact value and passes on the derivative of what it rounds:
a table passes the slope between its neighbouring rows, an index and a weight code pass 1 (Bengio et al., *Estimating or
propagating gradients through stochastic neurons* (2013), the straight-through estimator). Values differ from the integer
program only by float32 rounding of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kancompile.ir.contraction import convolve_real
from kancompile.ir.expansion import to_channels_first, to_channels_last
from kancompile.ir.index import IndexQuantizer
from kancompile.ir.integer_contraction import IntegerContraction
from kancompile.ir.operators import convolution_columns
from kancompile.ir.program import Program
from kancompile.ir.table import TableExpansion

_SLOPE_WINDOWS = 24  # of a table; codes that were rounded together leave slopes over fewer rows noisy


class DifferentiableTable(nn.Module):
    """A table look-up whose output, float codes, depends on its input through the slope of the table."""

    codes: Tensor
    slope: Tensor

    def __init__(self, table: TableExpansion) -> None:
        super().__init__()
        self.table = table
        codes = table.table.float().reshape(table.n_tables, table.index.levels, table.k)
        slope = _slope(codes, max(1, table.index.levels // _SLOPE_WINDOWS))
        self.in_shape = table.in_shape
        self.n_in, self.k = table.n_in, table.k
        self.register_buffer("codes", codes.flatten(0, 1), persistent=False)
        self.register_buffer("slope", slope.flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map real values (or float row numbers) to float codes ``[b, *, n_in, k]``."""
        table = self.table
        row = table.to_index(x.detach().round() if table.input == "index" else x.detach()).long()
        x = to_channels_last(x) if table.channels_first else x.reshape(-1, *table.in_shape)
        if table.input == "index":
            position = x
        else:
            multiplier, offset = (1.0, 0.0) if table.input == "scaled" else table.index.to_rows()
            position = x * multiplier + offset
        # beyond the first and the last row the table is constant
        position = position.clamp(0, table.index.levels)
        if table.first_row is not None:
            row = row + table.first_row
        return self.codes[row] + (position - position.detach()).unsqueeze(-1) * self.slope[row]


class DifferentiableContraction(nn.Module):
    """An integer contraction with float weights that may be exchanged for others.

    Attributes:
        weight: float32 ``[n_out, c / groups * t]``, real value of every weight as the rounding problem has them (taps
            innermost); a trainable tensor may take its place.
        bias: float32 ``[n_out]``.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, contraction: IntegerContraction) -> None:
        super().__init__()
        self.contraction, self.output = contraction, contraction.output
        self.register_buffer("weight", contraction.real_weight().flatten(1).contiguous(), persistent=False)
        self.register_buffer("bias", contraction.real_bias(), persistent=False)

    def forward(self, *features: Tensor) -> Tensor:
        """Map float codes ``[b, *, n_in, k]`` to real values, or to float row numbers of the next table."""
        own = self.contraction
        if own.geometry is None:
            columns = torch.cat([feature.flatten(-2) for feature in features], dim=-1)
            y = nn.functional.linear(columns, self.weight, self.bias).reshape(-1, *own.out_shape)
        else:
            columns = to_channels_first(convolution_columns(features, own.groups))
            weight = self.weight.reshape(own.n_out, -1, *own.kernel)
            y = convolve_real(columns - own.zero_point, weight, self.bias, own.geometry)
        if self.output is None:
            return y
        rows = _soft_index(y, self.output)
        if own.hands_over.kind == "rows":
            return rows
        return (rows - self.output.zero_point) * self.output.scale


def _slope(codes: Tensor, reach: int) -> Tensor:
    """Differences over ``reach`` rows to either side, in codes per row: neighbours alone would show rounding only."""
    rows = torch.arange(codes.shape[1])
    before, after = (rows - reach).clamp(min=0), (rows + reach).clamp(max=codes.shape[1] - 1)
    return (codes[:, after] - codes[:, before]) / (after - before)[:, None]


def _soft_index(y: Tensor, index: IndexQuantizer) -> Tensor:
    position = (y / index.scale + index.zero_point).clamp(0, index.levels - 1)
    return position + (index(y.detach()).to(y.dtype) - position).detach()


def differentiable(program: Program) -> Program:
    """Return the twin of a program: equal values up to float32 rounding, gradients to inputs and weights.

    Evaluate its ``graph_module`` (calling the program itself turns gradients off).
    """
    modules: dict[str, nn.Module] = {}
    for node, contraction in program.nodes(IntegerContraction):
        modules[str(node.target)] = DifferentiableContraction(contraction)
    for node, table in program.nodes(TableExpansion):
        modules[str(node.target)] = DifferentiableTable(table)
    return program.replace_modules(modules) if modules else program
