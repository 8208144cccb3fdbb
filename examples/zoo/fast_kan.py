"""FastKAN: Gaussian radial basis functions on a layer-normalised input, plus a base branch on the raw input.

Li, *Kolmogorov-Arnold Networks are Radial Basis Function Networks* (arXiv 2405.06721), with
g_k the ``num_grids`` centres and h their distance::

    y = spline_linear(exp(-((LayerNorm(x)_i - g_k) / h)^2)) + base_linear(silu(x))

State dict per layer ``layers.N.``: ``layernorm.weight``, ``layernorm.bias`` [in], ``rbf.grid`` [num_grids],
``spline_linear.weight`` [out, in * num_grids] (feature-major), ``base_linear.weight`` [out, in], ``base_linear.bias``.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.zoo.seeded_layers import seeded_linear


class GaussianBasis(nn.Module):
    """Evaluate Gaussians at equally spaced centres: [...] -> [..., num_grids]; the width is the centres' distance."""

    def __init__(self, grid_min: float = -2.0, grid_max: float = 2.0, num_grids: int = 8) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(grid_min, grid_max, num_grids), requires_grad=False)
        self.denominator = (grid_max - grid_min) / (num_grids - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the basis elementwise."""
        return torch.exp(-(((x.unsqueeze(-1) - self.grid) / self.denominator) ** 2))


class FastKANLayer(nn.Module):
    """Map [..., n_in] to [..., n_out] by a normalised RBF branch and a base branch.

    Args:
        n_in: width of the input.
        n_out: width of the output.
        generator: source of the initial weights.
        grid_min: first centre, in units of the normalised input.
        grid_max: last centre.
        num_grids: number of centres.
        use_base_update: whether the base branch exists.
        init_scale: standard deviation of the initial spline weights.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        generator: torch.Generator,
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        num_grids: int = 8,
        use_base_update: bool = True,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(n_in)
        self.rbf = GaussianBasis(grid_min, grid_max, num_grids)
        self.spline_linear = seeded_linear(n_in * num_grids, n_out, generator, bias=False)
        nn.init.trunc_normal_(self.spline_linear.weight, std=init_scale, generator=generator)
        self.base_linear = seeded_linear(n_in, n_out, generator) if use_base_update else None

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., n_in]."""
        y = self.spline_linear(self.rbf(self.layernorm(x)).flatten(-2))
        if self.base_linear is not None:
            y = y + self.base_linear(functional.silu(x))
        return y


class FastKAN(nn.Module):
    """Chain ``FastKANLayer`` modules of the given widths (input first)."""

    def __init__(
        self,
        layers_hidden: Sequence[int],
        generator: torch.Generator,
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        num_grids: int = 8,
        use_base_update: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FastKANLayer(n_in, n_out, generator, grid_min, grid_max, num_grids, use_base_update)
            for n_in, n_out in itertools.pairwise(layers_hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network on [..., n_in]."""
        for layer in self.layers:
            x = layer(x)
        return x


def build(
    widths: Sequence[int] = (784, 64, 10),
    grid_min: float = -2.0,
    grid_max: float = 2.0,
    num_grids: int = 8,
    use_base_update: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Build a FastKAN of the given widths (input first) with weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return FastKAN(widths, generator, grid_min, grid_max, num_grids, use_base_update)
