"""BSRBF-KAN: B-splines and radial basis functions added up, behind a layer norm.

Ta, *BSRBF-KAN: A combination of B-splines and Radial Basis Functions in Kolmogorov-Arnold Networks* (arXiv 2406.11173)::

    u       = layer_norm(x)
    y[b, o] = sum_i base_weight[o, i] * silu(u[b, i])
            + sum_{i, k} spline_weight[o, (i, k)] * (B_k(u[b, i]) + exp(-((u[b, i] - rbf.grid[k]) / h)^2))

State dict per layer ``layers.N.``: ``layernorm``, ``base_weight`` [out, in], ``spline_weight`` [out, in * (G + order)], the
buffer ``grid`` [in, G + 2 order + 1] and ``rbf.grid`` [G + order], which is not trained.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.zoo.efficient_kan import b_spline_basis
from examples.zoo.layer_chain import LayerChain


class RadialBasis(nn.Module):
    """Gaussians at ``count`` equal distances, one distance wide."""

    def __init__(self, low: float, high: float, count: int) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(low, high, count), requires_grad=False)
        self.width = (high - low) / (count - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n] to [..., n, count]."""
        return torch.exp(-(((x.unsqueeze(-1) - self.grid) / self.width) ** 2))


class BSRBFKANLayer(nn.Module):
    """Map [..., input_dim] to [..., output_dim]."""

    def __init__(
        self, input_dim: int, output_dim: int, grid_size: int, spline_order: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        low, high, count = -1.5, 1.5, grid_size + spline_order
        self.spline_order = spline_order
        self.layernorm = nn.LayerNorm(input_dim)
        self.base_weight = nn.Parameter(torch.empty(output_dim, input_dim))
        self.spline_weight = nn.Parameter(torch.empty(output_dim, input_dim * count))
        for weight in (self.base_weight, self.spline_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        step = (high - low) / grid_size
        knots = torch.arange(-spline_order, grid_size + spline_order + 1) * step + low
        self.register_buffer("grid", knots.expand(input_dim, -1).contiguous())
        self.rbf = RadialBasis(low, high, count)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., input_dim]."""
        x = self.layernorm(x)
        basis = (b_spline_basis(x, self.grid, self.spline_order) + self.rbf(x)).flatten(-2)
        return functional.linear(functional.silu(x), self.base_weight) + functional.linear(basis, self.spline_weight)


def build(widths: Sequence[int] = (64, 32, 10), grid_size: int = 5, spline_order: int = 3, seed: int = 0) -> nn.Module:
    """Build a BSRBF-KAN of the given widths (input first) with weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    pairs = itertools.pairwise(widths)
    return LayerChain([BSRBFKANLayer(n_in, n_out, grid_size, spline_order, generator) for n_in, n_out in pairs])
