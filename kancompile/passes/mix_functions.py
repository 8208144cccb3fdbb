"""Give the channels of a convolution fewer functions, where those that they share depend on each other.

    phi(x) ~ U g(x) + m,   g(x) = A phi(x) - l        ->        y = conv(g(x), W U) + conv(1, W m),     r < k functions g

Polynomials and a base branch are often nearly linearly dependent on the inputs that occur: the five functions of a trained
Gram-polynomial convolution of degree 3 were three and a constant, up to an error 52 dB to 65 dB below the output. Every function
less saves a look-up of each channel and pixel, and its share of the integer convolution.

With ``C`` the covariance of ``phi`` over calibration inputs and ``M`` the sum of ``w w^T`` over outputs, channels and taps, the
squared error at the output, channels and taps taken as independent, is ``tr(M D)`` of the covariance ``D`` of what is left. The
subspace of least error follows from the eigenvectors ``Q`` of ``M^1/2 C M^1/2`` (Eckart and Young, 1936):
``A = Q_r^T M^1/2`` and ``U = M^-1/2 Q_r``. Within it the basis is ``U_S A phi``: approximations of ``r`` of the functions
themselves, so that ranges and weights keep their sizes.

``l`` is the least value of each function, so that 0 is the lowest code of all of them: padding, which is code 0 of every column,
then leaves each column the whole range of codes. What is constant goes into one more function, 1, since it is missing at the
border.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.ir import MOST_PLANES, Branch, Contraction, Expansion, Layer, Program, Values, distinct_inputs, nodes_of

_SAMPLES = 64
_VALUES = 1 << 18
_RANGE_POINTS = 1024
_RANGE_WEIGHT = 1e-4
_DEPENDENT = 1e-6
_MOST_FUNCTIONS = 12


@dataclass(frozen=True)
class MixFunctions:
    """Replace the functions of convolutions by fewer mixtures; the second run finds nothing more to save.

    Attributes:
        tolerance: says for a layer's name which squared error is allowed at its output, as a share of the output's
            variance; layers with 0 stay as they are.
    """

    tolerance: Callable[[str], float]

    name = "mix-functions"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with fewer functions, or the same one.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        found = [
            layer for layer in program.layers() if self.tolerance(layer.name) > 0 and _is_candidate(program, layer)
        ]
        if not found:
            return program
        picked = torch.linspace(0, len(x) - 1, min(len(x), _SAMPLES)).long()
        read = program.inputs(x[picked], [layer.expansions[0] for layer in found])
        modules: dict[str, nn.Module] = {}
        notes = []
        for layer in found:
            expansion = program.node(layer.expansions[0], Expansion)
            contraction = program.node(layer.contraction, Contraction)
            mixed = mix(expansion, contraction, read[layer.expansions[0]], self.tolerance(layer.name))
            if mixed is None:
                continue
            modules[layer.expansions[0]], modules[layer.contraction], share = mixed
            notes.append(
                f"layer {layer.name!r}: {expansion.k} functions of each channel replaced by {mixed[0].k - 1} mixtures and a "
                f"constant, squared error {share:.2g} of the output's variance"
            )
        return program.replace_modules(modules, notes) if modules else program


def _is_candidate(program: Program, layer: Layer) -> bool:
    """Whether a layer is a convolution of one expansion that no other layer reads."""
    expansion = program.module(layer.expansions[0])
    readers = {user.target for node in nodes_of(program, layer.expansions[0]) for user in node.users}
    return (
        len(layer.expansions) == 1
        and len(readers) == 1
        and program.contraction(layer).geometry is not None
        and program.is_float(layer)
        and isinstance(expansion, Expansion)
        and expansion.channels_first
        and 2 < expansion.k <= _MOST_FUNCTIONS
    )


def mix(
    expansion: Expansion, contraction: Contraction, x: Tensor, tolerance: float
) -> tuple[Expansion, Contraction, float] | None:
    """Find fewer functions; ``None`` where none can be saved, or channels have functions of their own.

    Args:
        expansion: of ``k`` functions of each channel.
        contraction: its convolution.
        x: inputs seen in calibration ``[n, n_in, *spatial]``.
        tolerance: squared error allowed, as a share of the output's variance.

    Returns:
        the expansion of the mixtures and a constant, its convolution, and the share of the output's variance that is lost.
    """
    low, high = float(x.min()), float(x.max())
    if len(distinct_inputs(expansion, low, high)[0]) > 1:
        return None
    values = x.flatten()
    phi = expansion.sample_shared(values[:: max(1, len(values) // _VALUES)]).double()
    # a few points over the whole range keep the functions in bounds where calibration saw little
    even = expansion.sample_shared(torch.linspace(low, high, _RANGE_POINTS)).double()
    mean = phi.mean(0)
    covariance = (phi - mean).T @ (phi - mean) / len(phi) + _RANGE_WEIGHT * (even - mean).T @ (even - mean) / len(even)
    n_out, size, *kernel = contraction.weight.shape
    weight = contraction.weight.double().reshape(n_out, size // expansion.k, expansion.k, -1)
    energy = torch.einsum("oikt,oilt->kl", weight, weight) / n_out
    root, inverse = _roots(energy)
    shares, directions = torch.linalg.eigh(root @ covariance @ root)
    shares, directions = shares.flip(0).clamp(min=0), directions.flip(1)
    power = _variance(expansion, contraction, x)
    lost = torch.cat([shares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) / max(power, 1e-30)
    rank = max(1, int((lost > tolerance).sum()))
    varying = int(((phi - mean).abs().amax(0) > 0).sum())
    if rank > min(MOST_PLANES, varying - 1):
        return None
    forward, back = root @ directions[:, :rank], inverse @ directions[:, :rank]  # A^T and U, [k, r]
    forward, back = _near_given(forward, back, torch.cat([phi, even]), weight)
    least = torch.cat([phi, even]).matmul(forward).amin(0)
    rest = mean - back @ (forward.T @ mean) + back @ least
    region = Mixture(expansion, forward.float(), least.float())
    count = torch.Size(expansion.in_shape).numel() * (rank + 1)
    position = torch.arange(count).reshape(*expansion.in_shape, rank + 1)
    branch = Branch("mixtures", region, position)  # type: ignore[arg-type]
    combined = torch.einsum("oikt,kr->oirt", weight, torch.cat([back, rest[:, None]], dim=1))
    replaced = contraction.with_weight(combined.reshape(n_out, -1, *kernel).float().contiguous())
    return Expansion(expansion.anchor_shape, [branch], channels_first=True), replaced, float(lost[rank])


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


def _variance(expansion: Expansion, contraction: Contraction, x: Tensor) -> float:
    """Measure the output's variance over images and pixels, the mean over channels."""
    outputs = torch.cat([contraction(expansion(part)) for part in x.split(16)]).movedim(1, 0).flatten(1)
    return float(outputs.double().var(1, correction=0).mean())


class Mixture(nn.Module):
    """Linear combinations of the functions that all channels share, and 1.

    Attributes:
        expansion: the functions.
        mix: float32 ``[k, r]``.
        least: float32 ``[r]``, subtracted.
    """

    mix: Tensor
    least: Tensor

    def __init__(self, expansion: Expansion, mix: Tensor, least: Tensor) -> None:
        super().__init__()
        self.expansion = expansion
        self.register_buffer("mix", mix)
        self.register_buffer("least", least)

    def forward(self, x: Tensor) -> Tensor:
        """Map the anchor to ``[b, *, n_in, r + 1]``."""
        mixed = self.expansion(x) @ self.mix - self.least
        return torch.cat([mixed, torch.ones_like(mixed[..., :1])], dim=-1)
