"""KANs whose edges are orthogonal polynomials of tanh(x): Jacobi, Hermite, Legendre, Laguerre.

SpaceLearner, *JacobiKAN* (2024), and its relatives::

    y[b, o] = sum_{i, k} coeffs[i, o, k] * P_k(tanh x[b, i])

The recurrences are those of the NIST Digital Library of Mathematical Functions, table 18.9.1. State dict per layer
``layers.N.``: ``NAME_coeffs`` [in, out, degree + 1], NAME being the polynomials' name in lower case. LayerNorm stands between
the layers.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from examples.zoo.layer_chain import LayerChain

Recurrence = Callable[[int], tuple[float, float, float]]


def jacobi(a: float = 1.0, b: float = 1.0) -> Recurrence:
    """Give A, B, C of ``P_(n + 1) = (A x + B) P_n - C P_(n - 1)`` for Jacobi polynomials (DLMF 18.9.2)."""

    def coefficients(n: int) -> tuple[float, float, float]:
        if n == 0:
            return (a + b + 2) / 2, (a - b) / 2, 0.0
        s = 2 * n + a + b
        scale = 2 * (n + 1) * (n + a + b + 1)
        return (
            (s + 1) * (s + 2) / scale,
            (a * a - b * b) * (s + 1) / (scale * s),
            2 * (n + a) * (n + b) * (s + 2) / (scale * s),
        )

    return coefficients


RECURRENCES: dict[str, Recurrence] = {
    "jacobi": jacobi(1.0, 1.0),
    "legendre": jacobi(0.0, 0.0),
    "hermite": lambda n: (2.0, 0.0, 2.0 * n),
    "laguerre": lambda n: (-1 / (n + 1), (2 * n + 1) / (n + 1), n / (n + 1)),
}


class PolynomialKANLayer(nn.Module):
    """Map [..., input_dim] to [..., output_dim] by polynomials up to ``degree``."""

    def __init__(self, input_dim: int, output_dim: int, degree: int, kind: str, generator: torch.Generator) -> None:
        super().__init__()
        if kind not in RECURRENCES:
            raise ValueError(f"PolynomialKANLayer: found {kind!r}, expected one of {sorted(RECURRENCES)!r}")
        self.kind, self.degree = kind, degree
        coefficients = torch.empty(input_dim, output_dim, degree + 1)
        nn.init.normal_(coefficients, std=1 / (input_dim * (degree + 1)), generator=generator)
        self.register_parameter(f"{kind}_coeffs", nn.Parameter(coefficients))

    def basis(self, x: Tensor) -> Tensor:
        """Evaluate the polynomials, [..., n] -> [..., n, degree + 1]."""
        u = torch.tanh(x)
        values = [torch.ones_like(u)]
        for n in range(self.degree):
            slope, shift, back = RECURRENCES[self.kind](n)
            following = (slope * u + shift) * values[-1]
            values.append(following - back * values[-2] if n else following)
        return torch.stack(values, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., input_dim]."""
        return torch.einsum("...ik,iok->...o", self.basis(x), self.get_parameter(f"{self.kind}_coeffs"))


def build(widths: Sequence[int] = (64, 32, 10), kind: str = "jacobi", degree: int = 4, seed: int = 0) -> nn.Module:
    """Build a polynomial KAN of the given widths (input first) with weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    layers = [PolynomialKANLayer(n_in, n_out, degree, kind, generator) for n_in, n_out in itertools.pairwise(widths)]
    return LayerChain(layers, [nn.LayerNorm(width) for width in widths[1:-1]])
