"""ReLU-KAN: bumps made of two ramps, with trainable ends for each input.

Qiu et al., *ReLU-KAN: New Kolmogorov-Arnold Networks that Only Need Matrix Addition, Dot Multiplication, and ReLU*
(arXiv 2406.02075)::

    phi[b, i, k] = (r * relu(x[b, i] - phase_low[i, k]) * relu(phase_high[i, k] - x[b, i]))^2,   r = 4 g^2 / (k + 1)^2
    y[b, o]      = bias[o] + sum over all of weight[o] * phi[b]

The published code contracts by a convolution of full size and *reshapes* ``phi[b]`` from [in, g + k] to [g + k, in] in front of
it, which reinterprets the order instead of transposing. State dict per layer ``layers.N.``: ``phase_low`` and ``phase_high``
[in, g + k], ``equal_size_conv.weight`` [out, 1, g + k, in] and ``equal_size_conv.bias`` [out].
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.zoo.layer_chain import LayerChain


class ReLUKANLayer(nn.Module):
    """Map [b, input_size] to [b, output_size] by ``g + k`` bumps for each input on 0 ... 1."""

    def __init__(self, input_size: int, g: int, k: int, output_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.count, self.r = g + k, 4 * g * g / ((k + 1) * (k + 1))
        low = torch.arange(-k, g, dtype=torch.float32) / g
        self.phase_low = nn.Parameter(low.repeat(input_size, 1))
        self.phase_high = nn.Parameter((low + (k + 1) / g).repeat(input_size, 1))
        self.equal_size_conv = nn.utils.skip_init(nn.Conv2d, 1, output_size, (self.count, input_size))
        bound = 1 / math.sqrt(self.count * input_size)
        nn.init.uniform_(self.equal_size_conv.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.equal_size_conv.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [b, input_size]."""
        x = x.unsqueeze(2)
        bumps = (torch.relu(x - self.phase_low) * torch.relu(self.phase_high - x) * self.r) ** 2
        image = bumps.reshape(x.shape[0], 1, self.count, x.shape[1])
        return self.equal_size_conv(image).reshape(x.shape[0], -1)


def build(widths: Sequence[int] = (64, 32, 10), g: int = 5, k: int = 3, seed: int = 0) -> nn.Module:
    """Build a ReLU-KAN of the given widths (input first) with weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return LayerChain([ReLUKANLayer(n_in, g, k, n_out, generator) for n_in, n_out in itertools.pairwise(widths)])
