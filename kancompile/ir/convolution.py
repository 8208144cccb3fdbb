"""Contractions that are convolutions: ``y = conv(phi, weight) + bias`` with ``k`` channels in ``phi`` for each input channel.

    phi[b, p, i, k]  = basis_k(x[b, i, p])                                            p: a pixel
    y[b, o, p]       = bias[o] + sum over i, k, t of weight[o, (i, k), t] * phi[b, p * stride - padding + t * dilation, i, k]

Expansions yield ``phi`` channels last, ``[b, *spatial, n_in, k]``. Pixels outside the image count as ``phi = 0``, not as
``x = 0``: padding is applied to the functions. So a constant function is not a bias (it is missing at the border), and in
integers the code that stands for 0 must be the same in all columns.

Column order of the weights: the input channels of every expansion are divided into ``groups`` equal parts. The columns of
one group are its part of the first expansion, then its part of the second, and so on; within a part channels major,
functions minor. Without groups that is the order of a linear contraction.

Shapes: ``b`` batch, ``s`` spatial dimensions (1 to 3), ``c`` the sum of ``n_in * k`` over the expansions, ``t`` taps (the product
of the kernel's sides).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kancompile.ir.block_codes import BlockCodes
from kancompile.ir.expansion import to_channels_first
from kancompile.ir.geometry import Geometry
from kancompile.ir.index import IndexQuantizer
from kancompile.ir.operators import accumulate_convolution, convolution_columns


class ConvContraction(nn.Module):
    """A float convolution of one or more expansions, padded with zeros.

    It reads real basis values, or the codes of tables, whose scale (and offset, without padding) then are part of weight
    and bias.

    Attributes:
        layer: name of the layer in the user's model.
        weight: float32 ``[n_out, c / groups, *kernel]``, columns in the order stated above.
        bias: float32 ``[n_out]``.
        geometry: stride, padding, dilation and groups.
        out_shape: ``(n_out, *spatial_out)``, channels first.
        zero_point: the feature value that stands for 0: subtracted from every feature, so that padding is 0. It is 0 for
            real features and the code of 0 for table codes.
        output: quantizer that the rounded convolution is to have, or ``None`` where the table that alone reads it decides;
            not applied here.
        codes: the weight, flattened to ``[n_out, columns]``, as 16-bit codes; ``None`` for any other weight.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor,
        geometry: Geometry,
        out_shape: Sequence[int],
        zero_point: int = 0,
        output: IndexQuantizer | None = None,
        codes: BlockCodes | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.codes = codes
        self.geometry = geometry
        self.out_shape = tuple(out_shape)
        self.zero_point = zero_point
        self.output = output
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def n_out(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sides of the kernel."""
        return tuple(self.weight.shape[2:])

    def forward(self, *features: Tensor) -> Tensor:
        """Map features ``[b, *spatial, n_in, k]`` to ``[b, n_out, *spatial_out]``."""
        columns = to_channels_first(convolution_columns(features, self.geometry.groups)).to(self.weight.dtype)
        return convolve_real(
            columns - self.zero_point if self.zero_point else columns, self.weight, self.bias, self.geometry
        )


def convolve_real(columns: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve ``columns`` ``[b, c, *spatial]`` with ``weight`` ``[n_out, c / groups, *kernel]`` in float."""
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    return torch.convolution(
        columns, weight, bias, stride, padding, dilation, False, [0] * len(stride), geometry.groups
    )


class QuantizedConvContraction(nn.Module):
    """An integer convolution of table codes.

    Attributes:
        layer, geometry, out_shape, zero_point: as in :class:`ConvContraction`.
        weight: int8 ``[n_out, c / groups, *kernel]``, codes of at most ``weight_bits`` bits.
        bias: int32 ``[n_out]`` in units of ``scale``.
        scale: float32 ``[n_out]``.
        weight_bits: 2 to 8.
        output: quantizer of the output, at most 256 levels: ONNX Runtime has a fast integer convolution with an 8-bit
            output only. ``None`` while it has not been chosen; the module then yields unrounded real values, which
            no target can emit.
        hands_over: ``"index"`` yields the row numbers that ``output`` makes, for the table behind; ``"real"`` the real
            values that these stand for.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        geometry: Geometry,
        out_shape: Sequence[int],
        zero_point: int = 0,
        weight_bits: int = 8,
        output: IndexQuantizer | None = None,
        hands_over: str = "real",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.geometry = geometry
        self.out_shape = tuple(out_shape)
        self.zero_point = zero_point
        self.weight_bits = weight_bits
        self.output = output
        self.hands_over = hands_over
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)

    @property
    def n_out(self) -> int:
        """Number of output channels."""
        return int(self.bias.shape[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sides of the kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def columns(self) -> int:
        """Products that add up to one output: columns of a group times taps."""
        return math.prod(self.weight.shape[1:])

    def with_output(self, output: IndexQuantizer | None, hands_over: str) -> QuantizedConvContraction:
        """Return the same convolution with another kind of output."""
        return QuantizedConvContraction(
            self.layer,
            self.weight,
            self.bias,
            self.scale,
            self.geometry,
            self.out_shape,
            self.zero_point,
            self.weight_bits,
            output,
            hands_over,
        )

    def with_weight(self, weight: Tensor) -> QuantizedConvContraction:
        """Return the same convolution of other columns."""
        return QuantizedConvContraction(
            self.layer,
            weight,
            self.bias,
            self.scale,
            self.geometry,
            self.out_shape,
            self.zero_point,
            self.weight_bits,
            self.output,
            self.hands_over,
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Map table codes, uint8 ``[b, *spatial, n_in, k]``, to ``[b, n_out, *spatial_out]``: real values or row numbers."""
        shape = self.geometry
        stride, padding, dilation = list(shape.stride), list(shape.padding), list(shape.dilation)
        if self.output is None:
            columns = convolution_columns(features, shape.groups)
            sums = accumulate_convolution(
                columns, self.weight, self.zero_point, stride, padding, dilation, shape.groups
            )
            per_channel = (-1, *[1] * len(self.kernel))
            return (sums + self.bias.reshape(per_channel)).float() * self.scale.reshape(per_channel)
        codes: Tensor = torch.ops.kancompile.convolve_to_index(
            list(features),
            self.weight,
            self.bias,
            self.scale,
            self.zero_point,
            stride,
            padding,
            dilation,
            shape.groups,
            self.output.scale,
            self.output.zero_point,
            self.output.levels,
            self.weight_bits,
        )
        return codes if self.hands_over == "index" else self.output.real(codes)
