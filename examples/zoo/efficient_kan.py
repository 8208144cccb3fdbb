"""Efficient-KAN: B-spline edges evaluated as one basis expansion and one linear map.

The layer of Liu et al., *KAN: Kolmogorov-Arnold Networks* (arXiv 2404.19756, section 2.2) in the factored form that
the efficient-kan project made popular, with B_k the B-splines of order ``spline_order`` on the knots of feature i::

    y[b, o] = sum_i base_weight[o, i] * silu(x[b, i])
            + sum_{i, k} spline_weight[o, i, k] * spline_scaler[o, i] * B_k(x[b, i])

State dict per layer ``layers.N.``: ``base_weight`` [out, in], ``spline_weight`` [out, in, G + k], ``spline_scaler``
[out, in] (absent with ``enable_standalone_scale_spline=False``), buffer ``grid`` [in, G + 2k + 1].
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def b_spline_basis(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Evaluate all B-splines of ``order`` at ``x`` by the Cox-de Boor recursion.

    De Boor, *A Practical Guide to Splines*, chapter IX; intervals are half open, [t_j, t_{j+1}).

    Args:
        x: points, [..., n_in].
        knots: strictly increasing knots of each feature, [n_in, n_basis + order + 1].
        order: polynomial degree of the pieces (3 is cubic).

    Returns:
        The basis values, [..., n_in, n_basis]; all zero outside the knots.
    """
    x = x.unsqueeze(-1)
    basis = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    for degree in range(1, order + 1):
        first, last = knots[:, : -degree - 1], knots[:, degree + 1 :]
        rising = (x - first) / (knots[:, degree:-1] - first)
        falling = (last - x) / (last - knots[:, 1:-degree])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


class KANLinear(nn.Module):
    """Map [..., in_features] to [..., out_features] through one learnable univariate function per edge.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        grid_size: G, number of knot intervals inside ``grid_range``.
        spline_order: k, degree of the splines.
        scale_noise: size of the random functions that the splines start from.
        scale_base: spread of the initial base weights (1 is the default of ``nn.Linear``).
        scale_spline: spread of the initial scalers, or the factor on the splines where there are no scalers.
        enable_standalone_scale_spline: whether each edge has a learnable factor ``spline_scaler``.
        base_activation: makes the module of the base branch.
        grid_eps: share of the uniform grid in ``update_grid``; 1 keeps grids uniform.
        grid_range: interval covered by the inner knots; k further knots follow on each side.
        generator: source of the initial weights; seed 0 if not given.
    """

    grid: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        enable_standalone_scale_spline: bool = True,
        base_activation: Callable[[], nn.Module] = nn.SiLU,
        grid_eps: float = 0.02,
        grid_range: Sequence[float] = (-1.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if grid_size < 1 or spline_order < 0 or not grid_range[0] < grid_range[1]:
            raise ValueError(
                f"KANLinear: found grid_size {grid_size!r}, spline_order {spline_order!r}, grid_range {grid_range!r}, "
                "expected grid_size >= 1, spline_order >= 0 and an increasing range"
            )
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.in_features = in_features
        self.out_features = out_features
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.grid_eps = grid_eps
        self.base_activation = base_activation()

        step = (grid_range[1] - grid_range[0]) / grid_size
        knots = torch.arange(-spline_order, grid_size + spline_order + 1) * step + grid_range[0]
        self.register_buffer("grid", knots.repeat(in_features, 1))

        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5) * scale_base, generator=generator)

        self.spline_scaler: nn.Parameter | None = None
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
            nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5) * scale_spline, generator=generator)

        noise = torch.rand(grid_size + 1, in_features, out_features, generator=generator) - 0.5
        inner_knots = self.grid.T[spline_order : spline_order + grid_size + 1]
        start = self.fit_coefficients(inner_knots, noise * (scale_noise / grid_size))
        self.spline_weight = nn.Parameter(start if enable_standalone_scale_spline else scale_spline * start)

    def basis(self, x: Tensor) -> Tensor:
        """Evaluate the splines of every feature: [..., in] -> [..., in, G + k]."""
        return b_spline_basis(x, self.grid, self.spline_order)

    def fit_coefficients(self, x: Tensor, y: Tensor) -> Tensor:
        """Fit spline coefficients to curves by least squares, the minimum-norm ones where points are few.

        Args:
            x: points of each feature, [n, in].
            y: values of each edge at these points, [n, in, out].

        Returns:
            Coefficients, [out, in, G + k].
        """
        basis = self.basis(x).transpose(0, 1)  # [in, n, G + k]
        # gelsd: a feature with few distinct values leaves splines without data, so the rank matters, and the default
        # driver gelsy, which also finds it, returned other last bits from run to run for the same input
        solution = torch.linalg.lstsq(basis, y.transpose(0, 1), driver="gelsd").solution  # [in, G + k, out]
        return solution.permute(2, 0, 1).contiguous()

    def scaled_spline_weight(self) -> Tensor:
        """Return the coefficients with the scalers multiplied in, [out, in, G + k]."""
        if self.spline_scaler is None:
            return self.spline_weight
        return self.spline_weight * self.spline_scaler.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., in_features]."""
        leading = x.shape[:-1]
        x = x.reshape(-1, self.in_features)
        base = functional.linear(self.base_activation(x), self.base_weight)
        spline = functional.linear(self.basis(x).flatten(1), self.scaled_spline_weight().reshape(self.out_features, -1))
        return (base + spline).reshape(*leading, self.out_features)

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots of every feature to where its data lie and refit the splines to the same curves.

        Inner knots are ``grid_eps`` times a uniform grid over the data plus ``1 - grid_eps`` times the quantiles
        of the data (Liu et al., section 2.2, update of spline grids).  The unscaled curves are refitted at the
        points ``x``; the scalers stay as they are, so the function is kept up to the error of the fit.

        Args:
            x: a batch of inputs of this layer, [n, in].
            margin: how far the uniform part reaches beyond the data, in input units.

        Raises:
            ValueError: ``x`` does not have the shape [n, in].
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"update_grid: found x of shape {tuple(x.shape)!r}, expected [n, {self.in_features!r}]")
        curves = torch.einsum("bik,oik->bio", self.basis(x), self.spline_weight)

        ordered = x.sort(dim=0).values
        position = torch.linspace(0, len(x) - 1, self.grid_size + 1, device=x.device).round().long()
        adaptive = ordered[position]
        step = (ordered[-1] - ordered[0] + 2 * margin) / self.grid_size
        count = torch.arange(self.grid_size + 1, dtype=x.dtype, device=x.device).unsqueeze(1)
        uniform = ordered[0] - margin + count * step
        inner = self.grid_eps * uniform + (1 - self.grid_eps) * adaptive  # [G + 1, in]

        outside = torch.arange(1, self.spline_order + 1, dtype=x.dtype, device=x.device).unsqueeze(1) * step
        self.grid.copy_(torch.cat([inner[:1] - outside.flip(0), inner, inner[-1:] + outside]).T)
        self.spline_weight.copy_(self.fit_coefficients(x, curves))


class KAN(nn.Module):
    """Chain ``KANLinear`` layers of the given widths, with nothing between them.

    Args:
        layers_hidden: widths, input first.
        **options: passed to every ``KANLinear``.
    """

    def __init__(
        self, layers_hidden: Sequence[int], generator: torch.Generator | None = None, **options: object
    ) -> None:
        super().__init__()
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            KANLinear(n_in, n_out, generator=generator, **options)  # type: ignore[arg-type]
            for n_in, n_out in itertools.pairwise(layers_hidden)
        )

    def forward(self, x: Tensor, update_grid: bool = False) -> Tensor:
        """Evaluate the network on [..., n_in]; with ``update_grid``, first move each layer's knots to its inputs."""
        for layer in self.layers:
            if update_grid:
                layer.update_grid(x.reshape(-1, x.shape[-1]))
            x = layer(x)
        return x


def build(
    widths: Sequence[int] = (64, 64, 10),
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: Sequence[float] = (-1.0, 1.0),
    enable_standalone_scale_spline: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Build an efficient-KAN of the given widths (input first) with weights drawn from ``seed``."""
    return KAN(
        widths,
        grid_size=grid_size,
        spline_order=spline_order,
        grid_range=grid_range,
        enable_standalone_scale_spline=enable_standalone_scale_spline,
        generator=torch.Generator().manual_seed(seed),
    )
