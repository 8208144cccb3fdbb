"""Pointwise expansions, ``phi[b, i, k] = basis_k(x[b, i])``, as captured and as tables, and the quantizer of their input.

Shapes use ``b`` for the batch, ``*`` for leading dimensions that a layer treats alike (tokens, pixels), ``n_in`` inputs and
``k`` functions per input. Expansions that feed a convolution read their anchor channels first, as PyTorch stores images,
and yield their functions channels last, ``[b, *, n_in, k]`` with the pixels as ``*``: one look-up then fills the ``k``
neighbouring columns of a channel.
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

    def real(self, index: Tensor) -> Tensor:
        """Give the float32 inputs that uint8 row numbers stand for."""
        x: Tensor = torch.ops.kancompile.dequantize_index(index, self.scale, self.zero_point)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize real inputs to row numbers (uint8 up to 256 levels, else int32)."""
        index: Tensor = torch.ops.kancompile.quantize_index(x, self.scale, self.zero_point, self.levels)
        return index


def to_channels_first(x: Tensor) -> Tensor:
    """View ``[b, *, c]`` as ``[b, c, *]``."""
    return x.movedim(-1, 1)


def to_channels_last(x: Tensor) -> Tensor:
    """View ``[b, c, *]`` as ``[b, *, c]``."""
    return x.movedim(1, -1)


def regroup(x: Tensor, shape: tuple[int, ...]) -> Tensor:
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
        self._window = _window(position)

    @property
    def k(self) -> int:
        """Number of functions of one input."""
        return int(self.position.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map the anchor ``[b, *anchor_shape]`` to basis values ``[b, *, n_in, k]``."""
        values = (x if self.region is None else self.region(x)).flatten(1)
        if self._window is not None and values.shape[1] == self._window[0] * self.position[..., 0].numel():
            width, first = self._window
            return values.reshape(-1, *self.position.shape[:-1], width)[..., first : first + self.k]
        picked = values[:, self.position.clamp(min=0).flatten()]
        return picked.reshape(-1, *self.position.shape) * (self.position >= 0)


def _window(position: Tensor) -> tuple[int, int] | None:
    """Recognise positions that are a slice of rows of equal length: ``(row length, first)``, or ``None``.

    A file then needs a reshape and a slice, where picking single elements takes a gather of each.
    """
    flat = position.reshape(-1, position.shape[-1])
    first = int(flat[0, 0])
    width = int(flat[1, 0]) - first if len(flat) > 1 else 0
    regular = torch.arange(len(flat))[:, None] * width + first + torch.arange(flat.shape[1])
    fits = first >= 0 and first + flat.shape[1] <= width and torch.equal(flat, regular)
    return (width, first) if fits else None


class Expansion(nn.Module):
    """A float expansion: the captured regions of one anchor, evaluated as PyTorch computes them.

    Attributes:
        anchor_shape: shape of the tensor it reads, without the batch.
        branches: regions whose functions stand side by side along ``k``.
        in_shape: ``(*, n_in)``: the anchor's elements, regrouped.
        channels_first: whether the anchor is ``(n_in, *)``, that is, ``in_shape`` is the anchor's shape with the first
            dimension moved to the end, as in front of a convolution. The positions of the branches are channels last.
    """

    def __init__(self, anchor_shape: Sequence[int], branches: Sequence[Branch], channels_first: bool = False) -> None:
        super().__init__()
        self.anchor_shape = tuple(anchor_shape)
        self.branches = nn.ModuleList(branches)
        self.in_shape = tuple(branches[0].position.shape[:-1])
        self.channels_first = channels_first

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

    def sample_inputs(self, points: Tensor) -> Tensor:
        """Evaluate the functions of every input at the same points, where leading dimensions are treated alike.

        Points are dealt out over the leading dimensions (tokens, pixels), so that they cost no more than a few samples.

        Args:
            points: ``[n]`` input values.

        Returns:
            float32 ``[n, n_in, k]``.
        """
        return self.evaluate_inputs(points[:, None].expand(-1, self.n_in))

    def evaluate_inputs(self, points: Tensor) -> Tensor:
        """Evaluate the functions of every input at points of its own, where leading dimensions are treated alike.

        Args:
            points: ``[n, n_in]`` input values.

        Returns:
            float32 ``[n, n_in, k]``.
        """
        lead = self.in_shape[:-1]
        padded = nn.functional.pad(points.to(torch.float32), (0, 0, 0, -len(points) % math.prod(lead)))
        values = self._evaluate(padded.reshape(-1, *self.in_shape))
        return values.reshape(-1, self.n_in, self.k)[: len(points)]

    def sample_shared(self, points: Tensor) -> Tensor:
        """Evaluate the functions at points where all inputs have the same functions.

        Points are dealt out over the inputs, so that many points cost no more than a few samples.

        Args:
            points: ``[n]`` input values.

        Returns:
            float32 ``[n, k]``.
        """
        padded = nn.functional.pad(points.to(torch.float32), (0, -len(points) % math.prod(self.in_shape)))
        return self._evaluate(padded.reshape(-1, *self.in_shape)).reshape(-1, self.k)[: len(points)]

    def _evaluate(self, x: Tensor) -> Tensor:
        anchor = to_channels_first(x) if self.channels_first else x.reshape(-1, *self.anchor_shape)
        with torch.no_grad():
            values: Tensor = self(anchor.contiguous())
        return values


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
        channels_first: whether it reads ``[b, n_in, *]``, as in front of a convolution. Row numbers, single bytes, are
            brought channels last before the look-up, not the values.
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
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.channels_first = channels_first
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
        return self._with(index, input, self.table if table is None else table, self.scale, self.offset)

    def reading_real(self) -> TableExpansion:
        """Return the same look-up for real values, whatever the layer before hands over."""
        if self.input in ("real", "float"):
            return self
        return self.with_index(self.index, "real" if self.index.is_8_bit else "float")

    def with_codes(self, table: Tensor, scale: Tensor, offset: Tensor | None = None) -> TableExpansion:
        """Return the same look-up of other codes, ``scale`` real units a step, code 0 standing for ``offset``."""
        return self._with(self.index, self.input, table, scale, self.offset if offset is None else offset)

    def _with(self, index: IndexQuantizer, input: str, table: Tensor, scale: Tensor, offset: Tensor) -> TableExpansion:
        return TableExpansion(
            self.in_shape,
            index,
            table,
            self.first_row,
            scale,
            offset,
            self.branch_sizes,
            self.branch_names,
            input,
            self.channels_first,
        )

    def to_index(self, x: Tensor) -> Tensor:
        """Map the input to row numbers ``[b, *, n_in]``, whatever the input is."""
        if not self.channels_first:
            x = regroup(x, self.in_shape)
        rows = x if self.input == "index" else self._quantize(x)
        return to_channels_last(rows) if self.channels_first else rows

    def _quantize(self, x: Tensor) -> Tensor:
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
