"""KAN layers as people write them in networks of their own: over the last dimension, whatever stands before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class GaussianKan(nn.Module):
    """Radial basis of every input beside a SiLU branch: [..., n_in] -> [..., n_out]."""

    centers: Tensor

    def __init__(self, n_in: int, n_out: int, count: int = 6, low: float = -2.0, high: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(low, high, count))
        self.step = (high - low) / (count - 1)
        self.spline = nn.Linear(n_in * count, n_out, bias=False)
        self.base = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-(((x.unsqueeze(-1) - self.centers) / self.step) ** 2))
        output: Tensor = self.spline(bumps.flatten(-2)) + self.base(functional.silu(x))
        return output


class ChebyshevKan(nn.Module):
    """Chebyshev polynomials of tanh(x) by their recursion: [..., n_in] -> [..., n_out]."""

    def __init__(self, n_in: int, n_out: int, degree: int = 4) -> None:
        super().__init__()
        self.degree = degree
        spread = 1 / (n_in * (degree + 1))
        self.coefficients = nn.Parameter(torch.randn(n_in, n_out, degree + 1) * spread)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        found = [torch.ones_like(x), x]
        for _ in range(2, self.degree + 1):
            found.append(2 * x * found[-1] - found[-2])
        return torch.einsum("...id,iod->...o", torch.stack(found, dim=-1), self.coefficients)


class LocalSplineKan(nn.Module):
    """Cubic B-splines of which only the 4 live ones are computed, their coefficients gathered: [b, n_in] -> [b, n_out]."""

    features: Tensor
    offsets: Tensor

    def __init__(self, n_in: int, n_out: int, cells: int = 8, low: float = -1.5, high: float = 1.5) -> None:
        super().__init__()
        self.cells, self.low, self.step = cells, low, (high - low) / cells
        self.coefficients = nn.Parameter(torch.randn(n_in, cells + 3, n_out) * 0.1)
        self.base = nn.Linear(n_in, n_out)
        self.register_buffer("features", torch.arange(n_in)[:, None])
        self.register_buffer("offsets", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        # 0.0: torch.onnx.export takes no bounds of two types
        place = ((x - self.low) / self.step).clamp(0.0, self.cells - 1e-4)
        cell = torch.floor(place)
        t = place - cell
        live = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=-1)
        rows = self.coefficients[self.features, cell.long().unsqueeze(-1) + self.offsets]
        output: Tensor = torch.einsum("bik,biko->bo", live / 6, rows) + self.base(functional.silu(x))
        return output
