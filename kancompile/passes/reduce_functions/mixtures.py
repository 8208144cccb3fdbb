"""Find few functions that those of all channels of a convolution are nearly mixtures of.

    phi(x) ~ U g(x) + m,   g(x) = A phi(x) - l,     r < k functions g

Polynomials and a base branch are often nearly linearly dependent on the inputs that occur: the five functions of a trained
Gram-polynomial convolution of degree 3 were three and a constant, up to an error 52 dB to 65 dB below the output.

With ``C`` the covariance of ``phi`` over calibration inputs and ``M`` the sum of ``w w^T`` over outputs, channels and taps, the
squared error at the output, channels and taps taken as independent, is ``tr(M D)`` of the covariance ``D`` of what is left. The
subspace of least error follows from the eigenvectors ``Q`` of ``M^1/2 C M^1/2`` (Eckart and Young, 1936):
``A = Q_r^T M^1/2`` and ``U = M^-1/2 Q_r``. Within it the basis is ``U_S A phi``: approximations of ``r`` of the functions
themselves, so that ranges and weights keep their sizes.

``l`` is the least value of each function, so that 0 is the lowest code of all of them: padding, which is code 0 of every column,
then leaves each column the whole range of codes. Where a convolution pads, what is constant goes into one more function, 1, since
it is missing at the border; else into the bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.ir import MOST_PLANES, Contraction, Expansion

_VALUES = 1 << 18
_RANGE_POINTS = 1024
_RANGE_WEIGHT = 1e-4
_DEPENDENT = 1e-6
_GAIN = 20.0
"""By how much a fit may lower an error that takes channels and taps as independent; seen were 1.1 to 7."""


@dataclass(frozen=True)
class Functions:
    """Mixtures, and weights for them.

    Attributes:
        region: the mixtures.
        weight: of their channels, float64 ``[n_out, n_in / groups, r, t]``.
        constant: weight of the function 1 of every channel, ``[n_out, n_in / groups, t]``.
    """

    region: Mixture
    weight: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Subspace:
    """The directions in which the functions of all channels carry the most of a convolution's output.

    Attributes:
        expansion: of ``k`` functions of each channel.
        weight: float64 ``[n_out, n_in / groups, k, t]``.
        values: of the functions at calibration inputs and all over their range, float64 ``[n, k]``.
        mean: over calibration inputs, ``[k]``.
        lost: squared error at the output with 0, 1, ... functions, channels and taps taken as independent, ``[k + 1]``.
        root, inverse: ``M^1/2`` and its inverse, ``[k, k]``.
        directions: eigenvectors, those that carry the most first, ``[k, k]``.
        has_constant: whether a constant has to be a function.
    """

    expansion: Expansion
    weight: Tensor
    values: Tensor
    mean: Tensor
    lost: Tensor
    root: Tensor
    inverse: Tensor
    directions: Tensor
    has_constant: bool

    @classmethod
    def of(cls, expansion: Expansion, contraction: Contraction, x: Tensor) -> Subspace:
        """Take functions that all channels share, their convolution and inputs seen in calibration ``[n, n_in, *spatial]``."""
        values = x.flatten()
        phi = expansion.sample_shared(values[:: max(1, len(values) // _VALUES)]).double()
        # a few points over the whole range keep the functions in bounds where calibration saw little
        even = expansion.sample_shared(torch.linspace(float(x.min()), float(x.max()), _RANGE_POINTS)).double()
        mean = phi.mean(0)
        covariance = (phi - mean).T @ (phi - mean) / len(phi)
        covariance += _RANGE_WEIGHT * (even - mean).T @ (even - mean) / len(even)
        n_out, size = contraction.weight.shape[:2]
        weight = contraction.weight.double().reshape(n_out, size // expansion.k, expansion.k, -1)
        root, inverse = _roots(torch.einsum("oikt,oilt->kl", weight, weight) / n_out)
        shares, directions = torch.linalg.eigh(root @ covariance @ root)
        shares, directions = shares.flip(0).clamp(min=0), directions.flip(1)
        lost = torch.cat([shares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        return cls(expansion, weight, torch.cat([phi, even]), mean, lost, root, inverse, directions, contraction.pads)

    def ranks(self, allowed: float) -> Iterator[int]:
        """Give how many functions may be enough for a squared error at the output, fewest first."""
        first = max(1, int((self.lost > _GAIN * allowed).sum()))
        varying = int(((self.values - self.mean).abs().amax(0) > 0).sum())
        yield from range(first, min(MOST_PLANES, varying - 1) + 1)

    def functions(self, rank: int) -> Functions:
        """Find that many mixtures."""
        forward, back = (
            self.root @ self.directions[:, :rank],
            self.inverse @ self.directions[:, :rank],
        )  # A^T and U, [k, r]
        forward, back = _near_given(forward, back, self.values, self.weight)
        least = self.values.matmul(forward).amin(0)
        rest = self.mean - back @ (forward.T @ self.mean) + back @ least
        return Functions(
            Mixture(self.expansion, forward.float(), least.float(), self.has_constant),
            torch.einsum("oikt,kr->oirt", self.weight, back),
            torch.einsum("oikt,k->oit", self.weight, rest),
        )


def _roots(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Give the symmetric square root of a matrix, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(energy)
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(roots > 1e-7 * roots.max(), 1 / roots.clamp(min=1e-30), torch.zeros_like(roots))
    return vectors @ torch.diag(roots) @ vectors.T, vectors @ torch.diag(inverse) @ vectors.T


def _near_given(forward: Tensor, back: Tensor, phi: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the basis of a subspace: approximations of ``r`` of the given functions, those whose codes cost least.

    The eigenvectors themselves would be a poor choice. Those of little energy are small differences of large numbers, and
    8-bit weights and codes do not hold them.

    Args:
        forward, back: ``A^T`` and ``U``, float64 ``[k, r]``.
        phi: values of the functions ``[n, k]``, for the range of each mixture.
        weight: float64 ``[n_out, n_in, k, t]``.
    """
    rank = forward.shape[1]
    best, least = (forward, back), float("inf")
    for chosen in itertools.combinations(range(len(forward)), rank):
        rows = back[list(chosen)]
        if float(torch.linalg.matrix_rank(rows, rtol=_DEPENDENT)) < rank:
            continue
        candidate = forward @ rows.T, back @ torch.linalg.inv(rows)
        values = phi @ candidate[0]
        spread = values.amax(0) - values.amin(0)
        cost = float(
            (torch.einsum("oikt,kr->oirt", weight, candidate[1]).square().sum((0, 1, 3)) * spread.square()).sum()
        )
        if cost < least:
            best, least = candidate, cost
    return best


class Mixture(nn.Module):
    """Linear combinations of the functions that all channels share, and 1.

    Attributes:
        expansion: the functions.
        mix: float32 ``[k, r]``.
        least: float32 ``[r]``, subtracted.
        has_constant: whether a constant follows them.
    """

    mix: Tensor
    least: Tensor

    def __init__(self, expansion: Expansion, mix: Tensor, least: Tensor, has_constant: bool) -> None:
        super().__init__()
        self.expansion = expansion
        self.has_constant = has_constant
        self.register_buffer("mix", mix)
        self.register_buffer("least", least)

    def of(self, values: Tensor) -> Tensor:
        """Mix values of the functions, ``[*, k]``, to ``[*, r]``."""
        return values @ self.mix - self.least

    def forward(self, x: Tensor) -> Tensor:
        """Map the anchor to ``[b, *, n_in, r]``, or ``r + 1`` with a constant."""
        mixed = self.of(self.expansion(x))
        return torch.cat([mixed, torch.ones_like(mixed[..., :1])], dim=-1) if self.has_constant else mixed
