"""A contraction that learns: the integer arithmetic of the kernels forward, straight-through slopes backward.

    C = codes of the method;   B = rnd(b / s);   y = s float32(C q + B)
    rows that it hands over, in steps t:   clip(rnd(float32(C q + B) (s / t)) + z, 0, L - 1)

All numbers in the sum are whole, so that float32 gives the integer exactly while the sum of their sizes stays below 2^24; above,
the product is taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.ir import (
    HandOver,
    IntegerContraction,
    convolution_columns,
    convolve_real,
    regroup,
    to_channels_first,
)
from kancompile.qat.methods import IndexMethod, WeightQuantizer, rounded

_EXACT_IN_FLOAT32 = 1 << 24
_INT32_MAX = (1 << 31) - 1


class TrainedContraction(nn.Module):
    """The twin of an integer contraction.

    Attributes:
        quantizer: codes and the factors on the scales.
        bias: float32 ``[n_out]``, what is added to the bias, in units of ``unit``; 0 to begin with.
        unit: real value of one unit of ``bias``.
    """

    scale: Tensor
    real_bias: Tensor
    factors: Tensor | None
    index: IndexMethod | None

    def __init__(
        self, contraction: IntegerContraction, quantizer: WeightQuantizer, index: IndexMethod | None, unit: float
    ) -> None:
        """Take the post-training contraction, its method, and the index that its outputs pass, if any."""
        super().__init__()
        self.layer, self.unit, self.hands_over = contraction.layer, unit, contraction.hands_over
        self.geometry, self.out_shape = contraction.geometry, contraction.out_shape
        self.matrix_shape, self.zero_point = contraction.matrix_shape, contraction.zero_point
        self.group_sizes = contraction.group_sizes
        self.quantizer = quantizer
        self.__dict__["index"] = index  # owned by the whole module, since the table behind shares it
        self.bias = nn.Parameter(torch.zeros(contraction.n_out))
        scale = torch.stack(contraction.scales)
        factors = None if contraction.multiplier is None else contraction.multiplier.of_column().T.float()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("real_bias", contraction.bias.double() * scale[0].double(), persistent=False)
        self.register_buffer("factors", factors, persistent=False)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[n_out, c]``, factors of groups included, bias ``[n_out]`` in float64, and scales ``[g, n_out]``."""
        codes, factor = self.quantizer()
        if self.factors is not None:
            codes = codes * self.factors
        scale = self.scale * factor
        bias = rounded((self.real_bias + self.bias.double() * self.unit) / scale[0].double())
        return codes, bias, scale

    def forward(self, *features: Tensor) -> Tensor:
        """Map float codes ``[b, *, n_in, k]`` to real values, those of rows where it hands rows over."""
        codes, bias, scale = self.integers()
        dtype = torch.float32 if self._is_exact(codes.detach()) else torch.float64
        sums = self._sums(features, codes.to(dtype))
        scale = self._by_output(scale)
        total = (sums[0].double() + self._by_output(bias)).float()
        y = total * scale[0]
        for part, of_group in zip(sums[1:], scale[1:], strict=True):
            y = y + part.float() * of_group
        if self.index is not None:
            with torch.no_grad():
                position = total * (scale[0] / self.index.step())
            y = self.index(y, position)
        return self._shaped(y)

    def _is_exact(self, codes: Tensor) -> bool:
        """Whether no sum of products can leave the whole numbers that float32 holds."""
        reach = max(self.zero_point, 255 - self.zero_point)
        if self.factors is None and -self.quantizer.low * codes.shape[1] * reach < _EXACT_IN_FLOAT32:
            return True
        return float(codes.abs().sum(1).max()) * reach < _EXACT_IN_FLOAT32

    def _by_output(self, value: Tensor) -> Tensor:
        """View ``[..., n_out]`` so that it broadcasts to the sums."""
        return value

    def _shaped(self, y: Tensor) -> Tensor:
        return regroup(y, self.out_shape)

    def _sums(self, features: Sequence[Tensor], codes: Tensor) -> list[Tensor]:
        """Multiply features by codes, one product for each scale group."""
        flat = [feature.flatten(-2) for feature in features]
        columns = (flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)).to(codes.dtype)
        parts = zip(columns.split(self.group_sizes, -1), codes.split(self.group_sizes, 1), strict=True)
        return [nn.functional.linear(column, code) for column, code in parts]

    @torch.no_grad()
    def quantized(self, contraction: IntegerContraction) -> IntegerContraction:
        """Return ``contraction``, the post-training one, with the integers as they are now.

        Raises:
            KanCompileError: a sum could leave the int32 accumulator.
        """
        codes, bias, scale = (value.cpu() for value in self.integers())
        reach = max(self.zero_point, 255 - self.zero_point)
        largest = float((codes.double().abs().sum(1) * reach + bias.abs()).max())
        if largest > _INT32_MAX:
            raise KanCompileError(
                f"layer {self.layer!r}: a sum may reach {largest:.3g} after training, more than the int32 accumulator holds "
                f"({_INT32_MAX}); its scale became too small: lower the learning rate of scales, or use fewer weight bits"
            )
        hands_over = self.hands_over
        if self.index is not None:
            hands_over = HandOver(hands_over.kind, self.index.quantizer())
        trained = contraction.replace(
            codes=codes.reshape(contraction.matrix_shape).to(torch.int8),
            bias=bias.to(torch.int32),
            scale=scale,
            hands_over=hands_over,
        )
        ours, theirs = trained.state_dict(), contraction.state_dict()
        unchanged = trained.hands_over == contraction.hands_over and all(
            torch.equal(ours[name], theirs[name]) for name in theirs
        )
        return contraction if unchanged else trained


class TrainedConvolution(TrainedContraction):
    """The twin of an integer convolution."""

    def _by_output(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *[1] * (len(self.matrix_shape) - 2))

    def _shaped(self, y: Tensor) -> Tensor:
        return y

    def _sums(self, features: Sequence[Tensor], codes: Tensor) -> list[Tensor]:
        geometry = self.geometry
        assert geometry
        columns = to_channels_first(convolution_columns(features, geometry.groups)).to(codes.dtype) - self.zero_point
        return [convolve_real(columns, codes.reshape(self.matrix_shape), None, geometry)]


def twin_of(
    contraction: IntegerContraction, quantizer: WeightQuantizer, index: IndexMethod | None, unit: float
) -> TrainedContraction:
    """Return the twin of a contraction (see :class:`TrainedContraction`)."""
    kind = TrainedConvolution if contraction.kernel else TrainedContraction
    return kind(contraction, quantizer, index, unit)
