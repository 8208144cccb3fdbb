"""FasterKAN: reflectional switch functions on a layer-normalised input, without base branch or bias.

Delis, *FasterKAN* (2024), with g_k the ``num_grids`` centres::

    y = spline_linear(1 - tanh((LayerNorm(x)_i - g_k) * inv_denominator)^2)

State dict per layer ``layers.N.``: ``layernorm.weight``, ``layernorm.bias`` [in], ``rbf.grid`` [num_grids],
``rbf.inv_denominator`` [], ``spline_linear.weight`` [out, in * num_grids] (feature-major).
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.zoo.seeded_layers import seeded_linear


class ReflectionalSwitchBasis(nn.Module):
    """Evaluate 1 - tanh(u)^2 around every centre: [...] -> [..., num_grids].

    Args:
        grid_min: first centre, in units of the normalised input.
        grid_max: last centre.
        num_grids: number of centres.
        inv_denominator: inverse width of the bumps.
        use_inv_denominator: whether u is (x - g) * inv_denominator, the published formula, or plain x - g.  Released
            FasterKAN code stores the parameter and evaluates x - g, so checkpoints trained with it need False.
    """

    def __init__(
        self, grid_min: float, grid_max: float, num_grids: int, inv_denominator: float, use_inv_denominator: bool
    ) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(grid_min, grid_max, num_grids), requires_grad=False)
        self.inv_denominator = nn.Parameter(torch.tensor(inv_denominator), requires_grad=False)
        self.use_inv_denominator = use_inv_denominator

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the basis elementwise."""
        distance = x.unsqueeze(-1) - self.grid
        if self.use_inv_denominator:
            distance = distance * self.inv_denominator
        return 1 - torch.tanh(distance) ** 2


class FasterKANLayer(nn.Module):
    """Normalise, expand and contract: [..., n_in] -> [..., n_out]."""

    def __init__(self, n_in: int, n_out: int, rbf: ReflectionalSwitchBasis, generator: torch.Generator) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(n_in)
        self.rbf = rbf
        self.spline_linear = seeded_linear(n_in * rbf.grid.numel(), n_out, generator, bias=False)
        nn.init.xavier_uniform_(self.spline_linear.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., n_in]."""
        return self.spline_linear(self.rbf(self.layernorm(x)).flatten(-2))


class FasterKAN(nn.Module):
    """Chain ``FasterKANLayer`` modules of the given widths (input first)."""

    def __init__(
        self,
        layers_hidden: Sequence[int],
        generator: torch.Generator,
        grid_min: float = -1.2,
        grid_max: float = 0.2,
        num_grids: int = 8,
        inv_denominator: float = 0.5,
        use_inv_denominator: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FasterKANLayer(
                n_in,
                n_out,
                ReflectionalSwitchBasis(grid_min, grid_max, num_grids, inv_denominator, use_inv_denominator),
                generator,
            )
            for n_in, n_out in itertools.pairwise(layers_hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network on [..., n_in]."""
        for layer in self.layers:
            x = layer(x)
        return x


def build(
    widths: Sequence[int] = (784, 64, 10),
    grid_min: float = -1.2,
    grid_max: float = 0.2,
    num_grids: int = 8,
    inv_denominator: float = 0.5,
    use_inv_denominator: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Build a FasterKAN of the given widths (input first) with weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return FasterKAN(widths, generator, grid_min, grid_max, num_grids, inv_denominator, use_inv_denominator)
