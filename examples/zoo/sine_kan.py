"""SineKAN: sines of trainable frequencies, with a phase for each input.

Reinhardt et al., *SineKAN: Kolmogorov-Arnold Networks using sinusoidal activation functions* (arXiv 2407.04149)::

    y[b, o] = bias[o] + sum_{i, k} amplitudes[o, i, k] * sin(freq[k] * x[b, i] + phase[i] + k / (G + 1))

State dict per layer ``layers.N.``: ``freq`` [G], ``phase`` [in], ``amplitudes`` [out, in, G] and ``bias`` [out].
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.zoo.layer_chain import LayerChain


class SineKANLayer(nn.Module):
    """Map [..., input_dim] to [..., output_dim] by ``grid_size`` sines of each input."""

    def __init__(self, input_dim: int, output_dim: int, grid_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.arange(1, grid_size + 1) / (grid_size + 1) ** 0.5)
        self.phase = nn.Parameter(torch.linspace(0, math.pi, input_dim))
        self.register_buffer("steps", torch.arange(1, grid_size + 1) / (grid_size + 1), persistent=False)
        self.amplitudes = nn.Parameter(torch.empty(output_dim, input_dim, grid_size))
        nn.init.normal_(self.amplitudes, std=1 / math.sqrt(input_dim * grid_size), generator=generator)
        self.bias = nn.Parameter(torch.zeros(output_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., input_dim]."""
        angle = x.unsqueeze(-1) * self.freq + self.phase.unsqueeze(-1) + self.steps
        return torch.einsum("...ik,oik->...o", torch.sin(angle), self.amplitudes) + self.bias


def build(widths: Sequence[int] = (64, 32, 10), grid_size: int = 8, seed: int = 0) -> nn.Module:
    """Build a SineKAN of the given widths (input first) with weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return LayerChain([SineKANLayer(n_in, n_out, grid_size, generator) for n_in, n_out in itertools.pairwise(widths)])
