"""The plan of a C file: what is computed in which order on which array, in integers, as data.

Arrays hold row numbers of tables, channels last, in the order in which the loops read them. A contraction is a convolution
whose window may be a single tap at a single position, which is a linear layer. Shapes use ``t`` taps, ``g`` channel groups,
``c`` columns of one group at one tap, ``n`` outputs of one group, ``k`` functions of an input, ``L`` rows of a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kancompile.targets.c99.float_inputs import FloatStep

Array = NDArray[Any]


@dataclass(frozen=True)
class Buffer:
    """Row numbers of one value, ``uint8_t`` or, where ``wide``, ``uint16_t``."""

    name: str
    size: int
    wide: bool = False

    @property
    def c_type(self) -> str:
        """Type of an element."""
        return "uint16_t" if self.wide else "uint8_t"


@dataclass(frozen=True)
class Index:
    """``clip(rint(x / scale) + zero_point, 0, levels - 1)``, ONNX QuantizeLinear; see ``IndexQuantizer``.

    Where it ``truncates``, ``trunc(clip(x, 0, levels - 1))``, as ``operators.floor_index`` does.
    """

    scale: float
    zero_point: int
    levels: int
    truncates: bool = False


@dataclass(frozen=True)
class Read:
    """One expansion of a contraction: which table each row number of an array selects a row of.

    Attributes:
        buffer: the array of row numbers, ``[positions, n_in]``.
        table: uint8 ``[rows, k]``.
        first_row: int64 ``[n_in]``, where the table of an input begins; ``None`` where there is one for all.
        n_in: inputs at one position.
        order: where each input stands in the array, ``None`` where in order; only while a plan is made.
    """

    buffer: Buffer
    table: Array
    first_row: Array | None
    n_in: int
    order: Array | None = None

    @property
    def k(self) -> int:
        """Functions of one input."""
        return int(self.table.shape[1])


@dataclass(frozen=True)
class Window:
    """How a kernel moves over positions; one number for each spatial dimension, none for a linear layer."""

    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Positions that one output sees."""
        return math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """Positions of the output."""
        return math.prod(self.out_size)

    @property
    def leaves_image(self) -> bool:
        """Whether some tap of some output position lies outside."""
        sides = zip(self.in_size, self.out_size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return any(
            pad > 0 or (out - 1) * step + (side - 1) * hold - pad >= size for size, out, side, step, pad, hold in sides
        )


@dataclass(frozen=True)
class Store:
    """How a contraction hands its outputs to a table: as row numbers, each of one form.

    Attributes:
        buffer: where to, ``[positions, n_out]``.
        form: ``"requantize"``: ``rint(float32(sum) * factor[o]) + zero_point``; ``"nearest"``: ``rint(y / scale) +
            zero_point``; ``"affine"``: ``trunc(y * multiplier + offset)``; ``"units"``: ``trunc(y)``; each then clipped to
            the rows; ``y`` the real output. All arithmetic is float32's, rounded after every operation.
        levels: rows of the table.
        factor: float32 ``[n_out]``, for ``"requantize"``.
        zero_point: for ``"requantize"`` and ``"nearest"``.
        multiplier, offset: for ``"affine"``; the multiplier is the scale for ``"nearest"``.
    """

    buffer: Buffer
    form: str
    levels: int
    factor: Array | None = None
    zero_point: int = 0
    multiplier: float = 1.0
    offset: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two stores of the same outputs equal; the factor belongs to the layer."""
        return (self.form, self.levels, self.zero_point, self.multiplier, self.offset)


@dataclass(frozen=True)
class Segment:
    """Neighboring inputs of one read whose columns stand one after the other in the weights."""

    read: int
    first: int
    count: int


@dataclass(frozen=True)
class ScaleGroup:
    """Columns that share a scale: which inputs they belong to, and float32 ``scale`` ``[n_out]``.

    Where all groups have one scale but for whole factors, int8 ``factor`` ``[n_out]`` multiplies the sums of this group. In a
    layer with channel groups, segments count from the first input of a channel group.
    """

    segments: tuple[Segment, ...]
    scale: Array
    factor: Array | None = None


@dataclass(frozen=True)
class Contract:
    """One KAN layer.

    Attributes:
        number: position among the layers.
        layer: its name in the user's model.
        reads: its expansions.
        window: how it moves over positions.
        weight: int8 ``[g, t, c, n]``.
        bits: of a weight code.
        bias: int64 ``[g * n]``, what the sum of unsigned products starts from (zero points of tables included).
        border: int64 ``[t, g * n]``, what a tap outside the image adds; ``None`` where that is 0 or never happens.
        scale_groups: one, or several for a linear layer whose columns are scaled apart.
        stores: what its readers want.
        keeps_sums: whether the int32 sums themselves are the output of the model.
    """

    number: int
    layer: str
    reads: tuple[Read, ...]
    window: Window
    weight: Array
    bits: int
    bias: Array
    border: Array | None
    scale_groups: tuple[ScaleGroup, ...]
    stores: tuple[Store, ...]
    keeps_sums: bool

    @property
    def groups(self) -> int:
        """Channel groups."""
        return int(self.weight.shape[0])

    @property
    def n_out(self) -> int:
        """Outputs at one position, all groups."""
        return int(self.weight.shape[0] * self.weight.shape[3])

    @property
    def adds_reals(self) -> bool:
        """Whether sums of several groups have to be scaled before they can be added."""
        return len(self.scale_groups) > 1 and self.scale_groups[0].factor is None

    @property
    def multiplies_sums(self) -> bool:
        """Whether sums of groups are multiplied by whole factors and then added."""
        return self.scale_groups[0].factor is not None

    def largest_sum(self) -> int:
        """Bound the magnitude of every sum of products, bias included."""
        most = 0
        for group in range(self.groups):
            column, total = 0, np.zeros(self.weight.shape[3], np.int64)
            for scales in self.scale_groups:
                factor = 1 if scales.factor is None else scales.factor.astype(np.int64)
                for segment in scales.segments:
                    read = self.reads[segment.read]
                    size = segment.count * read.k
                    highest = np.tile(read.table.max(0).astype(np.int64), segment.count)
                    part = np.abs(self.weight[group, :, column : column + size].astype(np.int64)).sum(0)
                    total += highest @ part * factor
                    column += size
            most = max(most, int(total.max()))
        outside = 0 if self.border is None else int(np.abs(self.border).sum(0).max())
        return most + outside + int(np.abs(self.bias).max())


@dataclass(frozen=True)
class Gather:
    """``target[i] = source[positions[i]]``."""

    source: Buffer
    target: Buffer
    positions: Array


@dataclass(frozen=True)
class MaxPool:
    """Largest row number of a window, channel by channel; both arrays are ``[positions, channels]``."""

    source: Buffer
    target: Buffer
    window: Window
    channels: int


@dataclass(frozen=True)
class Recode:
    """``target[i] = codes[source[i]]``, ``codes`` uint8, one for each row number."""

    source: Buffer
    target: Buffer
    codes: Array


Step = Contract | Gather | MaxPool | Recode


@dataclass(frozen=True)
class Input:
    """Row numbers that come from the model's real input: ``target[i]`` from ``x[order[i]]``.

    Attributes:
        steps: float operations on ``x`` before.
    """

    target: Buffer
    index: Index
    order: Array
    steps: tuple[FloatStep, ...] = ()


@dataclass(frozen=True)
class Output:
    """The model's real outputs, ``y[j]`` from element ``order[j]`` of what is kept.

    Attributes:
        shape: of the output without the batch.
        order: int64, one for each output.
        source: array of 8-bit codes; ``None`` for the kept sums, which are ``[positions, n_out]``.
        values: float32, the real value of every code.
    """

    shape: tuple[int, ...]
    order: Array
    source: Buffer | None = None
    values: Array | None = None


@dataclass(frozen=True)
class Plan:
    """A whole model: inputs, steps in order, output, and the number of real inputs."""

    input_size: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    output: Output

    def contractions(self) -> list[Contract]:
        """List the layers in the order of evaluation."""
        return [step for step in self.steps if isinstance(step, Contract)]
