"""Chebyshev KAN: edges are polynomials in the Chebyshev basis of a squashed input.

SynodicMonth, *ChebyKAN* (2024); SS et al., *Chebyshev Polynomial-Based Kolmogorov-Arnold Networks* (arXiv
2405.07200), with T_k(u) = cos(k * acos(u))::

    y[b, o] = sum_{i, k} cheby_coeffs[i, o, k] * T_k(u(x[b, i])),   u = tanh, or clamp to [-1 + eps, 1 - eps]

State dict per layer ``layers.N.``: ``cheby_coeffs`` [in, out, degree + 1], buffer ``arange`` [degree + 1] (int64); with
``layer_norm``, ``norms.N.weight`` and ``norms.N.bias`` between the layers.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

CLAMP_EPS = 1e-6
"""Distance kept from -1 and 1 with ``squash="clamp"``: the derivative of acos is infinite there."""


class ChebyKANLayer(nn.Module):
    """Map [..., input_dim] to [..., output_dim] by Chebyshev polynomials up to ``degree``.

    Args:
        input_dim: width of the input.
        output_dim: width of the output.
        degree: highest polynomial degree.
        generator: source of the initial weights.
        squash: how the input is brought into [-1, 1].

    Raises:
        ValueError: ``squash`` is neither "tanh" nor "clamp".
    """

    arange: Tensor

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        degree: int,
        generator: torch.Generator,
        squash: Literal["tanh", "clamp"] = "tanh",
    ) -> None:
        super().__init__()
        if squash not in ("tanh", "clamp"):
            raise ValueError(f"ChebyKANLayer: found squash {squash!r}, expected 'tanh' or 'clamp'")
        self.squash = squash
        self.cheby_coeffs = nn.Parameter(torch.empty(input_dim, output_dim, degree + 1))
        nn.init.normal_(self.cheby_coeffs, std=1 / (input_dim * (degree + 1)), generator=generator)
        self.register_buffer("arange", torch.arange(degree + 1))

    def basis(self, x: Tensor) -> Tensor:
        """Evaluate T_0 ... T_degree of the squashed input: [...] -> [..., degree + 1]."""
        u = torch.tanh(x) if self.squash == "tanh" else x.clamp(-1 + CLAMP_EPS, 1 - CLAMP_EPS)
        return torch.cos(torch.acos(u).unsqueeze(-1) * self.arange)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., input_dim]."""
        return torch.einsum("...ik,iok->...o", self.basis(x), self.cheby_coeffs)


class ChebyKAN(nn.Module):
    """Chain ``ChebyKANLayer`` modules of the given widths, with an optional LayerNorm between them."""

    def __init__(
        self,
        layers_hidden: Sequence[int],
        degree: int,
        generator: torch.Generator,
        squash: Literal["tanh", "clamp"] = "tanh",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ChebyKANLayer(n_in, n_out, degree, generator, squash) for n_in, n_out in itertools.pairwise(layers_hidden)
        )
        between = layers_hidden[1:-1]
        self.norms = nn.ModuleList(nn.LayerNorm(width) if layer_norm else nn.Identity() for width in between)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network on [..., n_in]."""
        x = self.layers[0](x)
        for norm, layer in zip(self.norms, self.layers[1:], strict=True):
            x = layer(norm(x))
        return x


def build(
    widths: Sequence[int] = (784, 32, 16, 10),
    degree: int = 4,
    squash: Literal["tanh", "clamp"] = "tanh",
    layer_norm: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Build a Chebyshev KAN of the given widths (input first) with weights drawn from ``seed``."""
    return ChebyKAN(widths, degree, torch.Generator().manual_seed(seed), squash, layer_norm)
