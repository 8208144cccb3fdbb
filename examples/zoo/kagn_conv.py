"""Convolutional KAGN: Gram-polynomial kernels, and a small image classifier made of them.

Drokin, *Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies* (arXiv 2407.01092), with
P_k the Gram polynomials of ``examples.zoo.gram_kan.gram_polynomials``::

    y = silu(BatchNorm(conv(silu(x), base) + conv(cat_k silu(P_k(tanh(x))), poly)))

The polynomials are concatenated along the channels, degree-major: channel k * n_in + c is P_k of channel c.

State dict per layer ``layers.N.`` and group g: ``poly_weights`` [groups, out/groups, in/groups * (degree + 1), K, K],
``beta_weights`` [degree + 1], ``base_conv.g.weight`` [out/groups, in/groups, K, K], ``layer_norm.g.*``
(BatchNorm2d); the head is ``output.weight`` [n_classes, channels], ``output.bias``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.zoo.gram_kan import gram_polynomials
from examples.zoo.seeded_layers import seeded_conv2d, seeded_linear


class KAGNConv2d(nn.Module):
    """Convolve [batch, n_in, height, width] with kernels whose taps are univariate polynomials.

    Args:
        n_in: input channels, divisible by ``groups``.
        n_out: output channels, divisible by ``groups``.
        kernel_size: K, side of the kernel.
        generator: source of the initial weights.
        degree: highest polynomial degree.
        stride: stride of both convolutions.
        padding: zeros added on each side, after the expansion.
        groups: number of independent channel groups.

    Raises:
        ValueError: the channels do not divide by ``groups``.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size: int,
        generator: torch.Generator,
        degree: int = 3,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if groups < 1 or n_in % groups or n_out % groups:
            raise ValueError(
                f"KAGNConv2d: found {n_in!r} -> {n_out!r} channels, expected multiples of {groups!r} groups"
            )
        self.degree = degree
        self.stride = stride
        self.padding = padding
        self.groups = groups
        group_in, group_out = n_in // groups, n_out // groups
        self.base_conv = nn.ModuleList(
            seeded_conv2d(group_in, group_out, kernel_size, generator, stride, padding) for _ in range(groups)
        )
        self.layer_norm = nn.ModuleList(nn.BatchNorm2d(group_out) for _ in range(groups))
        n_poly = group_in * (degree + 1)
        self.poly_weights = nn.Parameter(torch.empty(groups, group_out, n_poly, kernel_size, kernel_size))
        for weight in self.poly_weights:
            nn.init.kaiming_uniform_(weight, nonlinearity="linear", generator=generator)
        self.beta_weights = nn.Parameter(torch.empty(degree + 1))
        nn.init.normal_(self.beta_weights, std=1 / (kernel_size**2 * n_in * (degree + 1)), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer, giving [batch, n_out, height', width']."""
        outputs = []
        for group, part in enumerate(x.chunk(self.groups, dim=1)):
            basis = torch.cat(gram_polynomials(torch.tanh(part), self.beta_weights, self.degree), dim=1)
            y = self.base_conv[group](functional.silu(part)) + functional.conv2d(
                functional.silu(basis), self.poly_weights[group], stride=self.stride, padding=self.padding
            )
            outputs.append(functional.silu(self.layer_norm[group](y)))
        return outputs[0] if self.groups == 1 else torch.cat(outputs, dim=1)


class KAGNClassifier(nn.Module):
    """Classify images by 3x3 ``KAGNConv2d`` layers, a global average and a linear head.

    Args:
        channels: channels of the input and of every layer.
        strides: stride of every layer.
        n_classes: number of classes.
        generator: source of the initial weights.
        degree: highest polynomial degree.
        groups: channel groups of every layer but the first.

    Raises:
        ValueError: ``strides`` does not have one entry per layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        n_classes: int,
        generator: torch.Generator,
        degree: int = 3,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if len(strides) != len(channels) - 1:
            raise ValueError(
                f"KAGNClassifier: found {len(strides)!r} strides, expected {len(channels) - 1!r}, one a layer"
            )
        self.layers = nn.Sequential(
            *(
                KAGNConv2d(n_in, n_out, 3, generator, degree, stride, padding=1, groups=groups if index else 1)
                for index, (n_in, n_out, stride) in enumerate(zip(channels[:-1], channels[1:], strides, strict=True))
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
    degree: int = 3,
    groups: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Build a convolutional KAGN classifier with weights drawn from ``seed``."""
    return KAGNClassifier(channels, strides, n_classes, torch.Generator().manual_seed(seed), degree, groups)
