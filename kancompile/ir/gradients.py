"""The same program with gradients: integer modules exchanged for twins with equal values and straight-through slopes.

Rounding has no useful derivative, so each twin computes the exact value and passes on the derivative of what it rounds:
a table passes the slope between its neighboring rows, an index and a weight code pass 1 (Bengio et al., *Estimating or
propagating gradients through stochastic neurons* (2013), the straight-through estimator). Values differ from the integer
program only by float32 rounding of the sums.

Codes of weights and tables, logarithms of weight scales and biases are parameters of the twins, and :func:`quantized` is
the way back: to the very program, bit for bit, where nothing was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kancompile.ir.contraction import convolve_real
from kancompile.ir.expansion import to_channels_first
from kancompile.ir.index import IndexQuantizer
from kancompile.ir.integer_contraction import IntegerContraction
from kancompile.ir.joint_table import JointTable
from kancompile.ir.operators import convolution_columns
from kancompile.ir.program import Program
from kancompile.ir.table import TableExpansion

_SLOPE_WINDOWS = 24  # of a table; codes that were rounded together leave slopes over fewer rows noisy
_INT32 = (1 << 31) - 1


def _rounded(value: Tensor, low: float, high: float) -> Tensor:
    """Round to whole numbers within limits; the derivative is 1 inside of them and 0 outside."""
    clamped = value.clamp(low, high)
    return clamped + (torch.round(clamped) - clamped).detach()


class DifferentiableTable(nn.Module):
    """A table lookup whose output, float codes, depends on its codes, and on its input through the slope of the table.

    Attributes:
        codes: float32 ``[T * levels, k]``, rounded to those of the table's bits when it is read.
    """

    def __init__(self, table: TableExpansion, trainable: bool) -> None:
        super().__init__()
        self.table = table
        self.in_shape = table.in_shape
        self.n_in, self.k = table.n_in, table.k
        self.codes = nn.Parameter(table.table.float(), requires_grad=trainable)
        self._fixed = None if trainable else self._codes_and_slope()

    def _codes_and_slope(self) -> tuple[Tensor, Tensor]:
        table, codes = self.table, _rounded(self.codes, 0, (1 << self.table.bits) - 1)
        slope = _slope(codes.detach().reshape(table.n_tables, table.index.levels, table.k)).flatten(0, 1)
        return codes, slope

    def forward(self, x: Tensor) -> Tensor:
        """Map real values (or float row numbers) to float codes ``[b, *, n_in, k]``."""
        table = self.table
        row = table.to_index(x.detach().round() if table.input == "index" else x.detach()).long()
        x = table.inputs_last(x)
        if table.picks is not None:
            x = x[:, table.picks]
        if table.input == "index":
            position = x
        else:
            multiplier, offset = (1.0, 0.0) if table.input == "scaled" else table.index.to_rows()
            position = x * multiplier + offset
        # beyond the first and the last row the table is constant
        position = position.clamp(0, table.index.levels)
        if table.first_row is not None:
            row = row + table.first_row
        codes, slope = self._codes_and_slope() if self._fixed is None else self._fixed
        return codes[row] + (position - position.detach()).unsqueeze(-1) * slope[row]

    def quantized(self) -> TableExpansion:
        """Return the table of the codes as they are now."""
        codes = self.codes.detach().round().clamp(0, (1 << self.table.bits) - 1).to(torch.uint8)
        return self.table.replace(table=codes)


class DifferentiableJoint(nn.Module):
    """A lookup of pairs of inputs as the sum of a lookup of each member."""

    def __init__(self, table: JointTable, trainable: bool) -> None:
        super().__init__()
        self.table, self.in_shape, self.n_in, self.k = table, table.in_shape, table.n_in, table.k
        self.members = nn.ModuleList(DifferentiableTable(part, trainable) for part in table.by_member())

    def forward(self, x: Tensor) -> Tensor:
        """Map real values (or float row numbers) to float codes ``[b, c, 1]``."""
        codes = [part(x).transpose(1, 2).reshape(len(x), -1, 1) for part in self.members]
        return torch.stack(codes).sum(0)

    def quantized(self) -> JointTable:
        """Return the table of the codes as they are now; clipped so that sums stay below 256."""
        planes, words, levels = self.table.parts.shape[1:]
        parts = [part.quantized().table.reshape(words, levels, planes).permute(2, 0, 1) for part in self.members]  # type: ignore[operator]
        codes = torch.stack(parts).contiguous().clamp(max=255 // len(parts))
        made_of = self.table.made_of if torch.equal(codes, self.table.parts) else None
        return self.table.replace(parts=codes, made_of=made_of)


class DifferentiableContraction(nn.Module):
    """An integer contraction in float, from parameters of its own or from weights that are set from outside.

    Attributes:
        codes: float32 ``[n_out, c / groups * t]``, rounded to the bits of the weights when it is read; without the whole
            factors of groups.
        log_scale: float32 ``[g, n_out]``, logarithms of what multiplies the scales; 0 to begin with.
        shift: float32 ``[n_out]``, rounded and added to the integer bias; 0 to begin with.
        weight, bias: real values that take the place of all these, ``[n_out, c / groups * t]`` (taps innermost, as the
            rounding problem has them) and ``[n_out]``; ``None``.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, contraction: IntegerContraction, trainable: bool) -> None:
        super().__init__()
        self.contraction, self.output = contraction, contraction.output
        factors = None if contraction.multiplier is None else contraction.multiplier.of_column().T
        narrow = contraction.matrix if factors is None else contraction.matrix // factors
        self.codes = nn.Parameter(narrow.flatten(1).float(), requires_grad=trainable)
        self.log_scale = nn.Parameter(torch.zeros(len(contraction.scales), contraction.n_out), requires_grad=trainable)
        self.shift = nn.Parameter(torch.zeros(contraction.n_out), requires_grad=trainable)
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.factors = None if factors is None else factors.float()

    def real(self) -> tuple[Tensor, Tensor]:
        """Return what weights and bias stand for, ``[n_out, c / groups * t]`` and ``[n_out]``."""
        own = self.contraction
        limit = 1 << (own.weight_bits - 1)
        codes = _rounded(self.codes, -limit, limit - 1)
        if self.factors is not None:
            codes = codes * self.factors
        scale = torch.stack(own.scales) * self.log_scale.exp()
        of_weight = torch.repeat_interleave(scale, torch.tensor(own.group_sizes) * own.taps, dim=0).T
        bias = (own.bias.double() + _rounded(self.shift, -_INT32, _INT32).double()).float() * scale[0]
        return codes * of_weight, bias

    def forward(self, *features: Tensor) -> Tensor:
        """Map float codes ``[b, *, n_in, k]`` to real values, or to float row numbers of the next table."""
        own = self.contraction
        weight, bias = self.real() if self.weight is None or self.bias is None else (self.weight, self.bias)
        if own.geometry is None:
            columns = torch.cat([feature.flatten(-2) for feature in features], dim=-1)
            y = nn.functional.linear(columns, weight, bias).reshape(-1, *own.out_shape)
        else:
            columns = to_channels_first(convolution_columns(features, own.groups))
            shaped = weight.reshape(own.n_out, -1, *own.kernel)
            y = convolve_real(columns - own.zero_point, shaped, bias, own.geometry)
        if self.output is None:
            return y
        rows = _soft_index(y, self.output)
        if own.hands_over.kind == "rows":
            return rows
        return (rows - self.output.zero_point) * self.output.scale

    def quantized(self) -> IntegerContraction:
        """Return the integer contraction of the parameters as they are now."""
        own = self.contraction
        limit = 1 << (own.weight_bits - 1)
        codes = self.codes.detach().round().clamp(-limit, limit - 1).to(torch.int8)
        if own.multiplier is not None:
            codes = codes * own.multiplier.of_column().T
        bias = own.bias.long() + self.shift.detach().double().round().long()
        return own.replace(
            codes=codes.reshape(own.matrix_shape),
            bias=bias.clamp(-_INT32, _INT32).to(torch.int32),
            scale=torch.stack(own.scales) * self.log_scale.detach().exp(),
        )


def _slope(codes: Tensor) -> Tensor:
    """Differences over some rows to either side, in codes per row: neighbors alone would show rounding only."""
    levels = codes.shape[1]
    rows, reach = torch.arange(levels), max(1, levels // _SLOPE_WINDOWS)
    before, after = (rows - reach).clamp(min=0), (rows + reach).clamp(max=levels - 1)
    return (codes[:, after] - codes[:, before]) / (after - before)[:, None]


def _soft_index(y: Tensor, index: IndexQuantizer) -> Tensor:
    position = (y / index.scale + index.zero_point).clamp(0, index.levels - 1)
    return position + (index(y.detach()).to(y.dtype) - position).detach()


def differentiable(program: Program, trainable: bool = False) -> Program:
    """Return the twin of a program: equal values up to float32 rounding, gradients to inputs, codes, scales and biases.

    Evaluate its ``graph_module`` (calling the program itself turns gradients off).

    Args:
        program: an integer program.
        trainable: whether the parameters of the twins ask for gradients.
    """
    modules: dict[str, nn.Module] = {}
    for node, contraction in program.nodes(IntegerContraction):
        modules[str(node.target)] = DifferentiableContraction(contraction, trainable)
    for node, table in program.nodes(TableExpansion):
        modules[str(node.target)] = (
            DifferentiableJoint(table, trainable)
            if isinstance(table, JointTable)
            else DifferentiableTable(table, trainable)
        )
    return program.replace_modules(modules) if modules else program


def quantized(twin: Program) -> Program:
    """Return the integer program of a twin's parameters; without training the program that the twin was made from.

    The hand-over between layers stays: a trained scale moves real outputs, not the units of row numbers.
    """
    modules: dict[str, nn.Module] = {}
    for node, module in twin.nodes(nn.Module):
        if isinstance(module, DifferentiableContraction | DifferentiableTable | DifferentiableJoint):
            modules[str(node.target)] = module.quantized()
    return twin.replace_modules(modules) if modules else twin
