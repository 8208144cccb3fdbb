"""KAGN: Gram-polynomial KAN with a SiLU base branch, LayerNorm and SiLU after every layer.

Drokin, *Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies* (arXiv 2407.01092), fully
connected form, with P_k the Gram polynomials of ``gram_polynomials``::

    y = silu(LayerNorm(base_weights silu(x) + sum_{i, k} grams_basis_weights[i, o, k] * silu(P_k(tanh(x_i)))))

State dict per layer ``layers.N.``: ``beta_weights`` [degree + 1], ``grams_basis_weights`` [in, out, degree + 1],
``base_weights`` [out, in], ``norm.weight``, ``norm.bias`` [out].
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def gram_polynomials(u: Tensor, beta_weights: Tensor, degree: int) -> list[Tensor]:
    """Evaluate the Gram polynomials P_0 ... P_degree by their three-term recurrence.

    P_0 = 1, P_1 = u, P_m = u * P_{m-1} - b_{m-1} * P_{m-2}, where
    b_n = beta_weights[n] * (m^2 - n^2) * n^2 * (4 n^2 - 1) / m^2 with m = n + 1.  The Gram polynomials proper have a
    fixed b_n; here it is learnt, and the constant factor is the one that public checkpoints were trained with.

    Args:
        u: points in [-1, 1], any shape.
        beta_weights: learnable recurrence weights, [degree + 1]; the first and last are never used.
        degree: highest degree.

    Returns:
        ``degree + 1`` tensors of the shape of ``u``.
    """
    polynomials = [torch.ones_like(u), u][: degree + 1]
    for m in range(2, degree + 1):
        n = m - 1
        factor = (m**2 - n**2) * n**2 * (4 * n**2 - 1) / m**2
        polynomials.append(u * polynomials[-1] - factor * beta_weights[n] * polynomials[-2])
    return polynomials


class GRAMLayer(nn.Module):
    """Map [..., in_channels] to [..., out_channels] by Gram polynomials and a base branch.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        degree: highest polynomial degree.
        generator: source of the initial weights.
        activated: whether LayerNorm and SiLU follow the sum.
    """

    def __init__(
        self, in_channels: int, out_channels: int, degree: int, generator: torch.Generator, activated: bool = True
    ) -> None:
        super().__init__()
        self.degree = degree
        self.beta_weights = nn.Parameter(torch.empty(degree + 1))
        self.grams_basis_weights = nn.Parameter(torch.empty(in_channels, out_channels, degree + 1))
        self.base_weights = nn.Parameter(torch.empty(out_channels, in_channels))
        nn.init.normal_(self.beta_weights, std=1 / (in_channels * (degree + 1)), generator=generator)
        nn.init.xavier_uniform_(self.grams_basis_weights, generator=generator)
        nn.init.xavier_uniform_(self.base_weights, generator=generator)
        self.norm = nn.LayerNorm(out_channels) if activated else None

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., in_channels]."""
        base = functional.linear(functional.silu(x), self.base_weights)
        basis = torch.stack(gram_polynomials(torch.tanh(x), self.beta_weights, self.degree), dim=-1)
        y = base + torch.einsum("...ik,iok->...o", functional.silu(basis), self.grams_basis_weights)
        return y if self.norm is None else functional.silu(self.norm(y))


class KAGN(nn.Module):
    """Chain ``GRAMLayer`` modules of the given widths.

    Args:
        layers_hidden: widths, input first.
        degree: highest polynomial degree.
        generator: source of the initial weights.
        activated_output: whether the last layer also ends in LayerNorm and SiLU.
    """

    def __init__(
        self, layers_hidden: Sequence[int], degree: int, generator: torch.Generator, activated_output: bool = True
    ) -> None:
        super().__init__()
        n_layers = len(layers_hidden) - 1
        self.layers = nn.ModuleList(
            GRAMLayer(n_in, n_out, degree, generator, activated=activated_output or index < n_layers - 1)
            for index, (n_in, n_out) in enumerate(itertools.pairwise(layers_hidden))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network on [..., n_in]."""
        for layer in self.layers:
            x = layer(x)
        return x


def build(
    widths: Sequence[int] = (784, 64, 10), degree: int = 3, activated_output: bool = True, seed: int = 0
) -> nn.Module:
    """Build a KAGN network of the given widths (input first) with weights drawn from ``seed``."""
    return KAGN(widths, degree, torch.Generator().manual_seed(seed), activated_output)
