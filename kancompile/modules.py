"""The two kinds of node that a KAN layer consists of, in each form that a program can hold them.

Every KAN layer is a pointwise *expansion* followed by one linear *contraction*::

    phi[b, i, k] = basis_k(x[b, i])
    y[b, o]      = bias[o] + sum over i, k of weight[o, (i, k)] * phi[b, i, k]

Forms of an expansion: :class:`Expansion` (the captured float region), :class:`TableExpansion` (integer look-up) and
:class:`PolynomialExpansion` (float, piecewise polynomial; see ``kancompile.polynomials``). Forms of a contraction:
:class:`Contraction` (float) and :class:`QuantizedContraction` (integer codes).

Modules are values: passes build new ones and never write to an existing one. Shapes use ``b`` for the batch, ``*`` for
leading dimensions that a layer treats alike (tokens), ``n_in``, ``k`` functions per input, ``c = sum of n_in * k``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import kancompile.operators  # noqa: F401  (registers the operators that torch.ops.kancompile names)


@dataclass(frozen=True)
class IndexQuantizer:
    """How a real input becomes a row number of a table: ``levels`` rows, ``scale`` input units apart.

    Row ``r`` stands for the input ``(r - zero_point) * scale``; inputs beyond the first and last row use that row.
    Rounding is that of ONNX QuantizeLinear; between two layers, tables of more than 256 rows are indexed in float
    instead (see ``operators.floor_index``), which differs at ties only.
    """

    scale: float
    zero_point: int
    levels: int

    @property
    def is_8_bit(self) -> bool:
        """Whether row numbers fit uint8, so that an integer kernel can produce them."""
        return self.levels <= 256

    @property
    def low(self) -> float:
        """Input of the first row."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """Input of the last row."""
        return (self.levels - 1 - self.zero_point) * self.scale

    def to_rows(self) -> tuple[float, float]:
        """Give multiplier and offset with which ``floor(x * multiplier + offset)`` is the row number of ``x``."""
        return 1.0 / self.scale, self.zero_point + 0.5

    def rows(self) -> Tensor:
        """Give the input that each row stands for, float64 ``[levels]``."""
        return (torch.arange(self.levels, dtype=torch.float64) - self.zero_point) * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize real inputs to row numbers (uint8 up to 256 levels, else int32)."""
        index: Tensor = torch.ops.kancompile.quantize_index(x, self.scale, self.zero_point, self.levels)
        return index


def _regroup(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View ``[b, ...]`` as ``[b, *shape]``, without an operator where it already has that shape."""
    return x if tuple(x.shape[1:]) == shape else x.reshape(-1, *shape)


class Branch(nn.Module):
    """One captured univariate region of an expansion: K functions of every input.

    Attributes:
        name: how reports call it, such as ``"spline"`` is not known here, so the name of the region's last node.
        region: graph module that maps the anchor tensor ``[b, *anchor_shape]`` to a tensor of any shape; ``None`` for
            the identity.
        position: int64 ``[*, n_in, k]``, where function ``k`` of input ``i`` stands in the region's flattened output
            (batch excluded); -1 where input ``i`` has fewer functions, which reads as 0.
    """

    position: Tensor

    def __init__(self, name: str, region: fx.GraphModule | None, position: Tensor) -> None:
        super().__init__()
        self.name = name
        self.region = region
        self.register_buffer("position", position)

    @property
    def k(self) -> int:
        """Number of functions of one input."""
        return int(self.position.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map the anchor ``[b, *anchor_shape]`` to basis values ``[b, *, n_in, k]``."""
        values = (x if self.region is None else self.region(x)).flatten(1)
        picked = values[:, self.position.clamp(min=0).flatten()]
        return picked.reshape(-1, *self.position.shape) * (self.position >= 0)


class Expansion(nn.Module):
    """A float expansion: the captured regions of one anchor, evaluated as PyTorch computes them.

    Attributes:
        anchor_shape: shape of the tensor it reads, without the batch.
        branches: regions whose functions stand side by side along ``k``.
        in_shape: ``(*, n_in)``: the anchor's elements, regrouped.
    """

    def __init__(self, anchor_shape: Sequence[int], branches: Sequence[Branch]) -> None:
        super().__init__()
        self.anchor_shape = tuple(anchor_shape)
        self.branches = nn.ModuleList(branches)
        self.in_shape = tuple(branches[0].position.shape[:-1])

    @property
    def n_in(self) -> int:
        """Number of inputs that a contraction weighs separately."""
        return int(self.in_shape[-1])

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        return sum(branch.k for branch in self.branches)  # type: ignore[misc]

    @property
    def is_identity(self) -> bool:
        """Whether it passes its inputs on unchanged (a plain linear layer)."""
        return len(self.branches) == 1 and self.branches[0].region is None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, *anchor_shape]`` to ``[b, *, n_in, k]``."""
        values = [branch(x) for branch in self.branches]
        return values[0] if len(values) == 1 else torch.cat(values, dim=-1)

    def sample(self, points: Tensor) -> Tensor:
        """Evaluate all functions of all inputs at the same points, in float32 as the model computes them.

        Args:
            points: ``[n]`` input values.

        Returns:
            float32 ``[n, *, n_in, k]``.
        """
        filled = points.to(torch.float32).reshape(-1, *[1] * len(self.anchor_shape))
        with torch.no_grad():
            values: Tensor = self(filled.expand(-1, *self.anchor_shape).contiguous())
        return values

    def sample_shared(self, points: Tensor) -> Tensor:
        """Evaluate the functions at points where all inputs have the same functions.

        Points are dealt out over the inputs, so that many points cost no more than a few samples.

        Args:
            points: ``[n]`` input values.

        Returns:
            float32 ``[n, k]``.
        """
        inputs = math.prod(self.in_shape)
        padded = nn.functional.pad(points.to(torch.float32), (0, -len(points) % inputs))
        with torch.no_grad():
            values: Tensor = self(padded.reshape(-1, *self.anchor_shape))
        return values.reshape(-1, self.k)[: len(points)]


class TableExpansion(nn.Module):
    """An expansion as a table look-up, ``phi[b, i, k] ~ scale[t, k] * table[t, row, k] + offset[t, k]``.

    Its output are the codes; the scale and the offset of each column are folded into the contraction.

    Attributes:
        in_shape: ``(*, n_in)``.
        index: the input quantizer.
        input: ``"real"`` quantizes real values as QuantizeLinear does, ``"float"`` in float arithmetic;
            ``"scaled"`` reads real values that already are in units of rows, 0.5 included; ``"index"`` reads row
            numbers that the layer before produced.
        table: uint8 ``[T * levels, k]``, the distinct tables one below the other.
        first_row: int32 ``[n_in]``, where the table of an input begins, or ``None`` where all share one table.
        scale, offset: float32 ``[T, k]``, real value of one code step and of code 0.
        branch_sizes, branch_names: how the ``k`` columns divide into the captured branches.
    """

    table: Tensor
    first_row: Tensor | None
    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        index: IndexQuantizer,
        table: Tensor,
        first_row: Tensor | None,
        scale: Tensor,
        offset: Tensor,
        branch_sizes: Sequence[int],
        branch_names: Sequence[str],
        input: str = "real",
    ) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.index = index
        self.input = input
        self.branch_sizes = tuple(branch_sizes)
        self.branch_names = tuple(branch_names)
        self.register_buffer("table", table)
        self.register_buffer("first_row", first_row)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    @property
    def n_in(self) -> int:
        """Number of inputs that a contraction weighs separately."""
        return int(self.in_shape[-1])

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        return int(self.table.shape[-1])

    @property
    def n_tables(self) -> int:
        """Number of distinct tables."""
        return int(self.table.shape[0]) // self.index.levels

    def with_index(self, index: IndexQuantizer, input: str, table: Tensor | None = None) -> TableExpansion:
        """Return the same look-up behind another index quantizer or kind of input."""
        return TableExpansion(
            self.in_shape,
            index,
            self.table if table is None else table,
            self.first_row,
            self.scale,
            self.offset,
            self.branch_sizes,
            self.branch_names,
            input,
        )

    def with_codes(self, table: Tensor, scale: Tensor) -> TableExpansion:
        """Return the same look-up of other codes, ``scale`` real units a step."""
        return TableExpansion(
            self.in_shape,
            self.index,
            table,
            self.first_row,
            scale,
            self.offset,
            self.branch_sizes,
            self.branch_names,
            self.input,
        )

    def to_index(self, x: Tensor) -> Tensor:
        """Map the input to row numbers ``[b, *, n_in]``, whatever the input is."""
        x = _regroup(x, self.in_shape)
        if self.input == "index":
            return x
        if self.input == "real":
            return self.index(x)
        multiplier, offset = (1.0, 0.0) if self.input == "scaled" else self.index.to_rows()
        index: Tensor = torch.ops.kancompile.floor_index(x, multiplier, offset, self.index.levels)
        return index

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to table codes, uint8 ``[b, *, n_in, k]``."""
        codes: Tensor = torch.ops.kancompile.expand(self.to_index(x), self.table, self.first_row)
        return codes

    def column_scale(self) -> Tensor:
        """Real value of one code step of every column, float32 ``[n_in, k]``."""
        return self._per_column(self.scale)

    def column_offset(self) -> Tensor:
        """Real value of code 0 of every column, float32 ``[n_in, k]``."""
        return self._per_column(self.offset)

    def _per_column(self, value: Tensor) -> Tensor:
        if self.first_row is None:
            return value.expand(self.n_in, -1)
        return value[self.first_row.long() // self.index.levels]


class Contraction(nn.Module):
    """A float contraction of one or more expansions, ``y = weight @ phi + bias``.

    It reads real basis values, or the codes of a table, whose scale and offset then are part of weight and bias.

    Attributes:
        layer: name of the layer in the user's model, such as ``"layers.0"``.
        weight: float32 ``[n_out, c]``; columns are the expansions in order, inputs major, functions minor.
        bias: float32 ``[n_out]``.
        out_shape: shape of the output without the batch; ``(*, n_out)`` regrouped.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: str, weight: Tensor, bias: Tensor, out_shape: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.out_shape = tuple(out_shape)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[0])

    def forward(self, *features: Tensor) -> Tensor:
        """Map features ``[b, *, n_in, k]`` to ``[b, *out_shape]``."""
        flat = [feature.flatten(-2).to(self.weight.dtype) for feature in features]
        columns = flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)
        return _regroup(nn.functional.linear(columns, self.weight, self.bias), self.out_shape)


class QuantizedContraction(nn.Module):
    """An integer contraction of table codes.

    Attributes:
        layer, out_shape: as in :class:`Contraction`.
        weight_bits: width of the weight codes, 2 to 8.
        group_sizes: columns of each scale group, in order.
        bias: int32 ``[n_out]`` in units of the first group's scale.
        output: ``None`` for real outputs, or the index quantizer of the next expansion, whose row numbers it returns.
    """

    bias: Tensor

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        out_shape: Sequence[int],
        weight_bits: int = 8,
        group_sizes: Sequence[int] | None = None,
        output: IndexQuantizer | None = None,
    ) -> None:
        """Take codes ``weight`` int8 ``[c, n_out]`` and ``scale`` float32 ``[g, n_out]``."""
        super().__init__()
        self.layer = layer
        self.out_shape = tuple(out_shape)
        self.weight_bits = weight_bits
        self.group_sizes = tuple(group_sizes or (weight.shape[0],))
        self.output = output
        self.register_buffer("bias", bias)
        for group, part in enumerate(weight.split(self.group_sizes)):
            self.register_buffer(f"weight_{group}", part.contiguous())
            self.register_buffer(f"scale_{group}", scale[group].contiguous())

    @property
    def weights(self) -> list[Tensor]:
        """Codes of each group, int8 ``[c_g, n_out]``."""
        return [self.get_buffer(f"weight_{group}") for group in range(len(self.group_sizes))]

    @property
    def scales(self) -> list[Tensor]:
        """Scale of each group, float32 ``[n_out]``."""
        return [self.get_buffer(f"scale_{group}") for group in range(len(self.group_sizes))]

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return int(self.bias.shape[0])

    def with_output(self, output: IndexQuantizer | None) -> QuantizedContraction:
        """Return the same contraction with another kind of output."""
        return QuantizedContraction(
            self.layer,
            torch.cat(self.weights),
            self.bias,
            torch.stack(self.scales),
            self.out_shape,
            self.weight_bits,
            self.group_sizes,
            output,
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Map table codes, uint8 ``[b, *, n_in, k]``, to ``[b, *out_shape]``: real values or row numbers."""
        y: Tensor
        if self.output is None:
            y = torch.ops.kancompile.contract(list(features), self.weights, self.bias, self.scales, self.weight_bits)
        else:
            y = torch.ops.kancompile.contract_to_index(
                list(features),
                self.weights[0],
                self.bias,
                self.scales[0],
                self.output.scale,
                self.output.zero_point,
                self.output.levels,
                self.weight_bits,
            )
        return _regroup(y, self.out_shape)
