"""The linear half of a KAN layer, in each form that a program can hold it.

Every KAN layer is a pointwise *expansion* followed by one linear *contraction*::

    phi[b, p, i, k] = basis_k(x[b, p, i])
    y[b, p, o]      = bias[o] + sum over i, k of weight[o, (i, k)] * phi[b, p, i, k]

A contraction that is a convolution sums over a window, too::

    y[b, o, p] = bias[o] + sum over i, k, t of weight[o, (i, k), t] * phi[b, p * stride - padding + t * dilation, i, k]

Only evaluating it and collecting what an output sees (``kancompile.ir.geometry``) need to know of the window; a linear map
is one of a single tap. Expansions yield ``phi`` channels last. Places outside an image count as ``phi = 0``, not as
``x = 0``: padding is applied to the functions. So a constant function is not a bias (it is missing at the border), and in
integers the code that stands for 0 must be the same in all columns.

Column order of the weights: the inputs of every expansion are divided into ``groups`` equal parts (one, where there is no
window). The columns of one group are its part of the first expansion, then its part of the second, and so on; within a part
inputs major, functions minor.

Modules are values: passes build new ones and never write to an existing one. Shapes use ``b`` for the batch, ``p`` or ``*`` for
leading dimensions that a layer treats alike (tokens, pixels), ``n_in``, ``k`` functions per input, ``c = sum of n_in * k``, ``t``
taps (the product of the kernel's sides, 1 without a window).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.ir.block_codes import BlockCodes
from kancompile.ir.expansion import AnyExpansion, regroup, to_channels_first
from kancompile.ir.expectations import expect, expect_finite
from kancompile.ir.geometry import Geometry, flat_weight
from kancompile.ir.index import REAL, HandOver, IndexQuantizer
from kancompile.ir.operators import convolution_columns


class AnyContraction(nn.Module):
    """What float and integer contractions have in common.

    Attributes:
        layer: name of the layer in the user's model, such as ``"layers.0"``.
        out_shape: shape of the output without the batch: ``(*, n_out)`` regrouped, or ``(n_out, *spatial_out)`` of a window.
        geometry: how the window moves; ``None`` for a linear map.
        weight_bits: width of a stored weight.
        zero_point: the feature value that stands for 0: what padding is filled with. 0 for real features, the code of 0
            for table codes; always 0 without a window.
        bias: ``[n_out]``.
        hands_over: the form of its outputs.
    """

    bias: Tensor
    hands_over: HandOver = REAL
    weight_bits: int

    def __init__(self, layer: str, out_shape: Sequence[int], geometry: Geometry | None, zero_point: int) -> None:
        super().__init__()
        self.layer = layer
        self.out_shape = tuple(out_shape)
        self.geometry = geometry
        self.zero_point = zero_point

    @property
    def matrix(self) -> Tensor:
        """Return the weight, or its codes, as ``[n_out, c / groups, *kernel]``."""
        raise NotImplementedError

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Return ``(n_out, c / groups, *kernel)``."""
        return tuple(self.matrix.shape)

    @property
    def output(self) -> IndexQuantizer | None:
        """The quantizer that outputs have passed, or are to pass once they are rounded; ``None`` without one."""
        return self.hands_over.quantizer

    @property
    def n_out(self) -> int:
        """Number of outputs, or of output channels."""
        return int(self.bias.shape[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sides of the window; empty for a linear map."""
        return self.matrix_shape[2:]

    @property
    def taps(self) -> int:
        """Places that a window covers."""
        return math.prod(self.kernel)

    @property
    def groups(self) -> int:
        """Independent parts of the inputs and outputs."""
        return 1 if self.geometry is None else self.geometry.groups

    @property
    def in_columns(self) -> int:
        """Columns that it reads, all groups together."""
        return self.matrix_shape[1] * self.groups

    @property
    def products(self) -> int:
        """Products that add up to one output: columns of a group times taps."""
        return math.prod(self.matrix_shape[1:])

    @property
    def pads(self) -> bool:
        """Whether some outputs see places outside the input."""
        return self.geometry is not None and self.geometry.pads

    def flat_weight(self) -> list[Tensor]:
        """Return the weight, or its codes, of each group: ``[n_out / groups, c / groups * t]``."""
        return flat_weight(self.matrix, self.groups)

    def real_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what the weights stand for, ``[n_out, c / groups, *kernel]``."""
        raise NotImplementedError

    def real_bias(self) -> Tensor:
        """Return what the bias stands for, float32 ``[n_out]``."""
        raise NotImplementedError

    def stored_bytes(self) -> int:
        """Count the bytes that a file needs for the weights."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for manifests and reports."""
        raise NotImplementedError

    def by_output(self, y: Tensor) -> Tensor:
        """View outputs ``[b, *out_shape]`` as one row for each sample and place, ``[rows, n_out]``."""
        return (y if self.geometry is None else y.movedim(1, -1)).reshape(-1, self.n_out)

    def without_mean(self, y: Tensor) -> Tensor:
        """Take the mean over samples and places out of every output of ``[b, *out_shape]``."""
        if self.geometry is not None:
            return y - y.mean([0, *range(2, y.ndim)], keepdim=True)
        flat = self.by_output(y)
        return (flat - flat.mean(0)).reshape(y.shape)

    def replace(self, **fields: Any) -> Self:
        """Return the same contraction with some arguments of its constructor exchanged."""
        return type(self)(**(self.fields() | fields))

    def unrounded(self) -> Self:
        """Return the same contraction yielding real values as they were computed."""
        return self

    def handing_real(self) -> Self:
        """Return the same contraction yielding the real values that its outputs stand for."""
        return self

    def fields(self) -> dict[str, Any]:
        """Return the arguments of its constructor."""
        return {
            "layer": self.layer,
            "bias": self.bias,
            "out_shape": self.out_shape,
            "geometry": self.geometry,
            "zero_point": self.zero_point,
        }

    def text(self) -> str:
        """Describe it in a line of a printed program."""
        if self.geometry is None:
            return f"contract[{self.in_columns} -> {self.n_out}: {self.form()}]"
        window, out = "x".join(map(str, self.kernel)), "x".join(map(str, self.out_shape))
        return f"convolve[{self.in_columns} -> {out}: {window}, {self.geometry}, {self.form()}]"

    def in_words(self) -> str:
        """Say to a reader of a report what it is: sizes, and what its weights are."""
        if self.geometry is None:
            return f"{self.in_columns} columns to {self.n_out} output{'s' if self.n_out != 1 else ''}: {self.weights_in_words()}"
        window = " x ".join(map(str, self.kernel))
        return f"{self.in_columns} columns to {self.n_out} channels, kernel {window}: {self.weights_in_words()}"

    def weights_in_words(self) -> str:
        """Say to a reader of a report what the weights are."""
        return "float weights"

    def form(self) -> str:
        """Say in a printed program in which form it stands."""
        raise NotImplementedError

    def verify(self, expansions: Sequence[AnyExpansion]) -> None:
        """Verify that sizes agree with those of the expansions that it reads, and that its numbers are of their kind.

        Raises:
            KanCompileError: one does not.
        """
        columns = sum(expansion.n_in * expansion.k for expansion in expansions)
        expect(self.layer, "weight columns", self.in_columns, columns)
        expect(self.layer, "weight rows", self.matrix_shape[0], self.n_out)
        expect(self.layer, "output channels left over by the groups", self.n_out % self.groups, 0)
        if self.geometry is None:
            expect(self.layer, "zero point of a map without padding", self.zero_point, 0)
            return
        for expansion in expansions:
            expect(self.layer, "input channels left over by the groups", expansion.n_in % self.groups, 0)
            expect(self.layer, "spatial dimensions", len(expansion.in_shape) - 1, len(self.kernel))
            out_shape = (self.n_out, *self.geometry.out_size(expansion.in_shape[:-1], self.kernel))
            sides = zip(expansion.in_shape[:-1], out_shape[1:], self.out_shape[1:], strict=True)
            if out_shape[0] != self.out_shape[0] or any(size > 1 and a != b for size, a, b in sides):  # 1: any size
                raise KanCompileError(
                    f"layer {self.layer!r}: found output shape {self.out_shape!r}, expected {out_shape!r} for an input "
                    f"of {expansion.in_shape!r} (channels last)"
                )


class Contraction(AnyContraction):
    """A float contraction of one or more expansions.

    It reads real basis values, or the codes of tables, whose scale (and offset, without padding) then are part of weight
    and bias.

    Attributes:
        weight: float32 ``[n_out, c / groups, *kernel]``, columns in the order stated above.
        output: quantizer that the rounded contraction is to have, or ``None`` where the table that alone reads it decides;
            not applied here.
        codes: the weight, flattened to ``[n_out, columns]``, as codes of 16 or 8 bits; ``None`` for any other weight.
    """

    weight: Tensor

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor,
        out_shape: Sequence[int],
        geometry: Geometry | None = None,
        zero_point: int = 0,
        output: IndexQuantizer | None = None,
        codes: BlockCodes | None = None,
    ) -> None:
        super().__init__(layer, out_shape, geometry, zero_point)
        self._output = output
        self.codes = codes
        self.weight_bits = 32 if codes is None else codes.bits
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def matrix(self) -> Tensor:
        """Return the weight."""
        return self.weight

    @property
    def output(self) -> IndexQuantizer | None:
        """The quantizer that the rounded contraction is to have."""
        return self._output

    def real_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight."""
        return self.weight.to(dtype)

    def real_bias(self) -> Tensor:
        """Return the bias."""
        return self.bias

    def stored_bytes(self) -> int:
        """Count the bytes that a file needs for the weights."""
        return self.weight.numel() * self.weight_bits // 8

    def with_weight(self, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Return the same map of other weights, real ones."""
        return self.replace(weight=weight, bias=self.bias if bias is None else bias, codes=None)

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for manifests and reports."""
        return {
            "n_out": self.n_out,
            "columns": self.products,
            "weight_bits": self.weight_bits,
            "weight_bytes": self.stored_bytes(),
            "hands_over": "real values",
        } | ({"arithmetic": "float"} if self.weight_bits == 8 else {})

    def fields(self) -> dict[str, Any]:
        """Return the arguments of its constructor."""
        return super().fields() | {"weight": self.weight, "output": self._output, "codes": self.codes}

    def verify(self, expansions: Sequence[AnyExpansion]) -> None:
        """Verify sizes, and that weights are finite.

        Raises:
            KanCompileError: they are not.
        """
        super().verify(expansions)
        expect_finite(self.layer, "weight", self.weight)

    def form(self) -> str:
        """Say that it computes in float."""
        return "float"

    def forward(self, *features: Tensor) -> Tensor:
        """Map features ``[b, *, n_in, k]`` to ``[b, *out_shape]``."""
        if self.geometry is not None:
            columns = to_channels_first(convolution_columns(features, self.groups)).to(self.weight.dtype)
            columns = columns - self.zero_point if self.zero_point else columns
            return convolve_real(columns, self.weight, self.bias, self.geometry)
        flat = [feature.flatten(-2).to(self.weight.dtype) for feature in features]
        if len(flat) == 1:
            return regroup(nn.functional.linear(flat[0], self.weight, self.bias), self.out_shape)
        if self.weight_bits == 8:  # for the smallest file: one node less than a product for each expansion
            return regroup(
                nn.functional.linear(torch.cat(flat, flat[0].ndim - 1), self.weight, self.bias), self.out_shape
            )
        # one product for each expansion: adding results costs less than copying features side by side
        parts = torch.split(self.weight, [feature.shape[-1] for feature in flat], 1)
        y = nn.functional.linear(flat[0], parts[0], self.bias)
        for feature, part in zip(flat[1:], parts[1:], strict=True):
            y = y + nn.functional.linear(feature, part)
        return regroup(y, self.out_shape)


def convolve_real(columns: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve ``columns`` ``[b, c, *spatial]`` with ``weight`` ``[n_out, c / groups, *kernel]`` in float."""
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    return torch.convolution(
        columns, weight, bias, stride, padding, dilation, False, [0] * len(stride), geometry.groups
    )
