"""Convolutional KAN with B-spline kernels, and a small image classifier made of them.

As the convolutions of efficient-KAN: every tap of a kernel is a spline of one pixel plus a multiple of its SiLU::

    y = BatchNorm(conv(silu(x), base) + conv(cat_k B_k(x), spline))

B_k are the cubic B-splines of a uniform grid, 0 outside its extension by three knots on either side; their channels stand
feature-major: channel c * n_basis + k is B_k of channel c.

State dict per layer ``layers.N.``: ``base.weight`` [out, in, K, K], ``spline.weight`` [out, in * n_basis, K, K], buffer
``knots`` [n_basis + order + 1], ``norm.*`` (BatchNorm2d); the head is ``output.weight`` [n_classes, channels], ``output.bias``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.zoo.seeded_layers import seeded_conv2d, seeded_linear


class SplineConv2d(nn.Module):
    """Convolve [batch, n_in, height, width] with kernels whose taps are B-splines.

    Args:
        n_in, n_out: channels.
        kernel_size: K, side of the kernel.
        generator: source of the initial weights.
        grid_size: intervals of the grid over -1 ... 1.
        order: of the splines.
        stride: stride of both convolutions.
        padding: zeros added on each side, after the expansion.
    """

    knots: Tensor

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size: int,
        generator: torch.Generator,
        grid_size: int = 5,
        order: int = 3,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("knots", torch.arange(-order, grid_size + order + 1) * (2 / grid_size) - 1)
        self.base = seeded_conv2d(n_in, n_out, kernel_size, generator, stride, padding)
        self.spline = seeded_conv2d(n_in * (grid_size + order), n_out, kernel_size, generator, stride, padding)
        self.norm = nn.BatchNorm2d(n_out)

    def basis(self, x: Tensor) -> Tensor:
        """Evaluate the B-splines by the recursion of Cox and de Boor, [..., n_basis]."""
        x, knots = x.unsqueeze(-1), self.knots
        values = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
        for degree in range(1, self.order + 1):
            left = (x - knots[: -degree - 1]) / (knots[degree:-1] - knots[: -degree - 1])
            right = (knots[degree + 1 :] - x) / (knots[degree + 1 :] - knots[1:-degree])
            values = left * values[..., :-1] + right * values[..., 1:]
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer, giving [batch, n_out, height', width']."""
        channels = self.basis(x).movedim(-1, 2).flatten(1, 2)
        return self.norm(self.base(functional.silu(x)) + self.spline(channels))


class SplineConvClassifier(nn.Module):
    """Classify images by 3x3 ``SplineConv2d`` layers, a global average and a linear head.

    Args:
        channels: channels of the input and of every layer.
        strides: stride of every layer, one a layer.
        n_classes: number of classes.
        generator: source of the initial weights.
        grid_size: intervals of the grid.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        n_classes: int,
        generator: torch.Generator,
        grid_size: int = 5,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                SplineConv2d(n_in, n_out, 3, generator, grid_size, stride=stride, padding=1)
                for n_in, n_out, stride in zip(channels[:-1], channels[1:], strides, strict=True)
            )
        )
        self.output = seeded_linear(channels[-1], n_classes, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits [batch, n_classes] of images [batch, channels[0], height, width]."""
        return self.output(functional.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


def build(
    channels: Sequence[int] = (3, 16, 32, 64, 64),
    strides: Sequence[int] = (1, 2, 2, 1),
    n_classes: int = 10,
    grid_size: int = 5,
    seed: int = 0,
) -> nn.Module:
    """Build a convolutional B-spline classifier with weights drawn from ``seed``."""
    return SplineConvClassifier(channels, strides, n_classes, torch.Generator().manual_seed(seed), grid_size)
