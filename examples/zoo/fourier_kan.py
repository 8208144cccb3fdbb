"""Fourier KAN: edges are short Fourier series.

GistNoesis, *FourierKAN* (2024), with frequencies k = 1 ... G::

    y[b, o] = bias[o] + sum_{i, k} fouriercoeffs[0, o, i, k] * cos(k x[b, i])
                      + sum_{i, k} fouriercoeffs[1, o, i, k] * sin(k x[b, i])

State dict per layer ``layers.N.``: ``fouriercoeffs`` [2, out, in, G] and ``bias`` [1, out].
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FourierKANLayer(nn.Module):
    """Map [..., input_dim] to [..., output_dim] by cosines and sines of ``grid_size`` frequencies."""

    def __init__(self, input_dim: int, output_dim: int, grid_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.fouriercoeffs = nn.Parameter(torch.empty(2, output_dim, input_dim, grid_size))
        nn.init.normal_(self.fouriercoeffs, std=1 / math.sqrt(input_dim * grid_size), generator=generator)
        self.bias = nn.Parameter(torch.zeros(1, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., input_dim]."""
        phase = x.unsqueeze(-1) * torch.arange(1, self.grid_size + 1, dtype=x.dtype, device=x.device)
        cosine = torch.einsum("...ik,oik->...o", torch.cos(phase), self.fouriercoeffs[0])
        sine = torch.einsum("...ik,oik->...o", torch.sin(phase), self.fouriercoeffs[1])
        return cosine + sine + self.bias[0]


class FourierKAN(nn.Module):
    """Chain ``FourierKANLayer`` modules of the given widths.

    Args:
        layers_hidden: widths, input first.
        grid_size: number of frequencies.
        generator: source of the initial weights.
        normalise: whether hidden values pass LayerNorm (without parameters) and tanh, which keeps the
            phases within one unit.
    """

    def __init__(
        self, layers_hidden: Sequence[int], grid_size: int, generator: torch.Generator, normalise: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FourierKANLayer(n_in, n_out, grid_size, generator) for n_in, n_out in itertools.pairwise(layers_hidden)
        )
        self.between = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Tanh()) if normalise else nn.Identity()
            for width in layers_hidden[1:-1]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network on [..., n_in]."""
        x = self.layers[0](x)
        for between, layer in zip(self.between, self.layers[1:], strict=True):
            x = layer(between(x))
        return x


def build(
    widths: Sequence[int] = (64, 32, 10), grid_size: int = 5, normalise: bool = False, seed: int = 0
) -> nn.Module:
    """Build a Fourier KAN of the given widths (input first) with weights drawn from ``seed``."""
    return FourierKAN(widths, grid_size, torch.Generator().manual_seed(seed), normalise)
