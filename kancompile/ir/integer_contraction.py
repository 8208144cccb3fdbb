"""The linear half of a KAN layer on table codes, in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir.contraction import AnyContraction
from kancompile.ir.expansion import AnyExpansion, regroup
from kancompile.ir.expectations import expect, expect_finite
from kancompile.ir.geometry import Geometry
from kancompile.ir.index import REAL, HandOver
from kancompile.ir.operators import accumulate_convolution, convolution_columns

TRITS = 5
"""Codes of three values in a byte: 3^5 = 243."""
_TRIT_BYTES = 200  # by which nodes that unpack them are larger than those of planes
_YIELDS = {"rows": ", yields row numbers of the table behind", "scaled": ", yields values in units of rows"}


@dataclass(frozen=True)
class GroupMultiplier:
    """Whole factors by which groups of columns differ in scale, already multiplied into the weights.

    Attributes:
        factors: int8 ``[g, n_out]``, positive.
        group_sizes: columns of each group, in order.
    """

    factors: Tensor
    group_sizes: tuple[int, ...]

    def of_column(self) -> Tensor:
        """Spread the factors to one for every weight, int8 ``[c, n_out]``."""
        return torch.repeat_interleave(self.factors, torch.tensor(self.group_sizes), dim=0)


class IntegerContraction(AnyContraction):
    """An integer contraction of table codes, ``y = scale * (codes @ (q - zero_point) + bias)``.

    Attributes:
        weight_bits: width of the weight codes, 2 to 8.
        multiplier: factors that are part of the weights, ``None`` where there are none: weights are codes of
            ``weight_bits`` bits times their group's factor, and a file may store both apart.
        group_sizes: columns of each scale group, in order; a single group where there is a window.
        bias: int32 ``[n_out]`` in units of the first group's scale.
        hands_over: the form of its outputs. An integer convolution can yield at most 256 levels, as row numbers or as the
            real values that these stand for: ONNX Runtime has a fast one with an 8-bit output only. One whose real
            values are not rounded is unfinished, and no target can emit it.
    """

    hands_over: HandOver

    def __init__(
        self,
        layer: str,
        codes: Tensor,
        bias: Tensor,
        scale: Tensor,
        out_shape: Sequence[int],
        geometry: Geometry | None = None,
        zero_point: int = 0,
        weight_bits: int = 8,
        group_sizes: Sequence[int] | None = None,
        hands_over: HandOver = REAL,
        multiplier: GroupMultiplier | None = None,
    ) -> None:
        """Take ``codes`` int8 ``[n_out, c / groups, *kernel]`` and ``scale`` float32 ``[g, n_out]``."""
        super().__init__(layer, out_shape, geometry, zero_point)
        self.weight_bits = weight_bits
        self.group_sizes = tuple(group_sizes or (codes.shape[1],))
        self.hands_over = hands_over
        self.multiplier = multiplier
        if geometry is not None:
            self.register_buffer("weight", codes.contiguous())
            self.register_buffer("bias", bias)
            self.register_buffer("scale", scale[0].contiguous())
            return
        self.register_buffer("bias", bias)
        # as the kernel reads them: a group of columns after the other, outputs last
        for group, part in enumerate(codes.T.split(self.group_sizes)):
            self.register_buffer(f"weight_{group}", part.contiguous())
            self.register_buffer(f"scale_{group}", scale[group].contiguous())

    @property
    def weight_names(self) -> list[str]:
        """Names of the buffers that hold the codes, and of a file's initializers."""
        if self.geometry is not None:
            return ["weight"]
        return [f"weight_{group}" for group in range(len(self.group_sizes))]

    @property
    def weights(self) -> list[Tensor]:
        """Codes of each scale group of a linear map, int8 ``[c_g, n_out]``."""
        return [self.get_buffer(name) for name in self.weight_names]

    @property
    def scales(self) -> list[Tensor]:
        """Scale of each scale group, float32 ``[n_out]``."""
        if self.geometry is not None:
            return [self.get_buffer("scale")]
        return [self.get_buffer(f"scale_{group}") for group in range(len(self.group_sizes))]

    @property
    def matrix(self) -> Tensor:
        """Return the codes, int8 ``[n_out, c / groups, *kernel]``."""
        return torch.cat(self.weights).T if self.geometry is None else self.get_buffer("weight")

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Return ``(n_out, c / groups, *kernel)``."""
        return super().matrix_shape if self.geometry is not None else (self.n_out, sum(self.group_sizes))

    @property
    def scale_matrix(self) -> Tensor:
        """Return the scale of every weight, float32, in a shape that broadcasts to that of the codes."""
        sizes = torch.tensor(self.group_sizes)
        scale = torch.stack(self.scales)
        if len(self.group_sizes) > 1:
            return torch.repeat_interleave(scale, sizes, dim=0).T
        return scale[0].reshape(-1, *[1] * (len(self.matrix_shape) - 1))

    @property
    def product_bits(self) -> int:
        """Bits that hold the weights as they are multiplied: ``weight_bits``, or 8 where factors are part of them."""
        return self.weight_bits if self.multiplier is None else 8

    def real_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what the weights stand for, ``[n_out, c / groups, *kernel]``."""
        return self.matrix.to(dtype) * self.scale_matrix.to(dtype)

    def real_bias(self) -> Tensor:
        """Return what the bias stands for, float32 ``[n_out]``."""
        return self.bias.float() * self.scales[0]

    @property
    def is_ternary(self) -> bool:
        """Whether its codes are -1, 0 and 1."""
        codes = self.matrix if self.multiplier is None else self.weights[0] // self.multiplier.of_column()
        return self.weight_bits == 2 and int(codes.min()) >= -1

    @property
    def packs_trits(self) -> bool:
        """Whether a file with five codes in a byte is smaller than one with four."""
        count = math.prod(self.matrix_shape)
        return count // 4 - count // TRITS > _TRIT_BYTES and self.is_ternary

    def stored_bytes(self) -> int:
        """Count the bytes that a file needs for the weights, factors included."""
        count = math.prod(self.matrix_shape)
        weights = -(-count // TRITS) if self.packs_trits else -(-count * self.weight_bits // 8)
        return weights + (0 if self.multiplier is None else self.multiplier.factors.numel())

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for manifests and reports."""
        groups = self.group_sizes if self.multiplier is None else self.multiplier.group_sizes
        return {
            "n_out": self.n_out,
            "columns": self.products,
            **({} if self.geometry is None else {"kernel": list(self.kernel)}),
            "weight_bits": self.weight_bits,
            **({"weight_values": 3} if self.is_ternary else {}),
            "scale_groups": len(groups),
            "weight_bytes": self.stored_bytes(),
            "hands_over": "row numbers" if self.hands_over.kind == "rows" else "real values",
        }

    def unrounded(self) -> IntegerContraction:
        """Return the same contraction yielding real values as they were computed, or in units of rows where it does so."""
        return self if self.hands_over.kind == "scaled" else self.replace(hands_over=REAL)

    def handing_real(self) -> IntegerContraction:
        """Return the same contraction yielding the real values that a convolution's rounded outputs stand for."""
        if self.geometry is None:
            return self.unrounded()
        return self.replace(hands_over=HandOver("real", self.output))

    def fields(self) -> dict[str, Any]:
        """Return the arguments of its constructor."""
        return super().fields() | {
            "codes": self.matrix,
            "scale": torch.stack(self.scales),
            "weight_bits": self.weight_bits,
            "group_sizes": self.group_sizes,
            "hands_over": self.hands_over,
            "multiplier": self.multiplier,
        }

    def verify(self, expansions: Sequence[AnyExpansion]) -> None:
        """Verify sizes, that codes fit their bits, and that it reads tables alone.

        Raises:
            KanCompileError: they do not.
        """
        for expansion in expansions:
            if not expansion.yields_codes:
                raise KanCompileError(
                    f"layer {self.layer!r}: an integer contraction reads an expansion of float values, "
                    f"{type(expansion).__name__}; tabulate it before rounding the weights"
                )
        super().verify(expansions)
        expect(self.layer, "grouped columns", sum(self.group_sizes), self.matrix_shape[1])
        for scale in self.scales:
            expect(self.layer, "scales", scale.numel(), self.n_out)
            expect_finite(self.layer, "scale", scale)
        self._expect_bits(self.matrix, self.product_bits)
        if self.multiplier is not None:
            factors = self.multiplier.of_column()
            expect(self.layer, "weights that are no multiple", int((self.weights[0] % factors).any()), 0)
            self._expect_bits(self.weights[0] // factors, self.weight_bits)
        if self.output is not None and self.geometry is not None:
            expect(self.layer, "levels above 256 in the output", max(0, self.output.levels - 256), 0)
        if self.output is not None:
            expect(self.layer, "scale groups of a rounded output", len(self.group_sizes), 1)

    def verify_finished(self) -> None:
        """Verify that a target can emit it.

        Raises:
            KanCompileError: it is a convolution whose real values are not rounded.
        """
        if self.geometry is not None and self.output is None:
            raise KanCompileError(
                f"layer {self.layer!r}: convolution has no output quantizer, expected one of at most 256 levels; fuse it "
                "with the table that reads it (pass fuse-index), or replace what it hands over"
            )

    def _expect_bits(self, codes: Tensor, bits: int) -> None:
        limit, low, high = 1 << (bits - 1), int(codes.min()), int(codes.max())
        if low < -limit or high >= limit:
            raise KanCompileError(f"layer {self.layer!r}: weight codes {low} ... {high} do not fit {bits} bits")

    def weights_in_words(self) -> str:
        """Give the bits, the scales, and what it yields where it is not real values."""
        width = "ternary weights" if self.is_ternary else f"{self.weight_bits}-bit weights"
        groups = len(self.group_sizes)
        scales = "" if groups == 1 else f" in {groups} groups with a scale each"
        return f"{width}{scales}{_YIELDS.get(self.hands_over.kind, '')}"

    def form(self) -> str:
        """Give the bits, the scales and what it hands over."""
        width = "ternary" if self.is_ternary else f"{self.weight_bits} bit"
        return f"{width}, {len(self.group_sizes)} scale(s), to {self.hands_over}"

    def forward(self, *features: Tensor) -> Tensor:
        """Map table codes, uint8 ``[b, *, n_in, k]``, to ``[b, *out_shape]`` in the form that it hands over."""
        if self.geometry is not None:
            return self._convolve(features, self.geometry)
        y: Tensor
        output = self.output
        if output is None:
            y = torch.ops.kancompile.contract(list(features), self.weights, self.bias, self.scales, self.weight_bits)
            return regroup(y, self.out_shape)
        y = torch.ops.kancompile.contract_to_index(
            list(features),
            self.weights[0],
            self.bias,
            self.scales[0],
            output.scale,
            output.zero_point,
            output.levels,
            self.weight_bits,
        )
        return regroup(y, self.out_shape)

    def _convolve(self, features: Sequence[Tensor], geometry: Geometry) -> Tensor:
        weight, scale, output = self.get_buffer("weight"), self.get_buffer("scale"), self.output
        moves = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
        if output is None:
            columns = convolution_columns(features, geometry.groups)
            sums = accumulate_convolution(columns, weight, self.zero_point, *moves, geometry.groups)
            per_channel = (-1, *[1] * len(self.kernel))
            return (sums + self.bias.reshape(per_channel)).float() * scale.reshape(per_channel)
        rows: Tensor = torch.ops.kancompile.convolve_to_index(
            list(features),
            weight,
            self.bias,
            scale,
            self.zero_point,
            *moves,
            geometry.groups,
            output.scale,
            output.zero_point,
            output.levels,
            self.weight_bits,
        )
        return rows if self.hands_over.kind == "rows" else output.real(rows)
