"""Give edges with functions of their own a few common functions for each input.

    y_o = sum_i f_oi(x_i)      ->      y_o = sum_i sum_r V_i[o, r] g_ir(x_i)        r = 1 ... rank, fewer than outputs

Where every edge has its own function (wavelets with a scale for each edge, say), an expansion has as many columns for an
input as there are outputs. The functions out of one input, sampled at the inputs seen in calibration, form a matrix
``F_i [samples, outputs]``. Its singular value decomposition gives the best common functions of each rank (Eckart and
Young, 1936). The samples are a linear map of the expansion's own columns, ``F_i = Phi_i W_i^T``, so the common functions
are as well, ``g_i = Phi_i M_i``, and stay functions that can be evaluated anywhere::

    Phi_i = Q R,   R W_i^T = U S V^T,   M_i = R^+ U_r,   V_i = V_r S_r

The rank is the smallest whose squared error at the output, summed over inputs, is below a stated share of the output's
power. It is one rank for all inputs, so that an expansion stays a tensor. Layers whose inputs share their functions keep
them: their one table is smaller than tables of mixtures would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.ir import Branch, Contraction, Expansion, Layer, Program, Values, distinct_inputs

_SAMPLES = 512
_RANGE_SAMPLES = 64
_LEAST_COLUMNS = 6
_WORTH = 0.6  # share of the columns above which exact ones are better


@dataclass(frozen=True)
class FactorizeExpansions:
    """Factorize expansions where it saves columns; the second run finds nothing more to save.

    Attributes:
        applies: says for a layer's name whether it may be changed.
        tolerance: squared error allowed at the output, as a share of the output's power.
    """

    applies: Callable[[str], bool]
    tolerance: float = 1e-6

    name = "factorize-expansions"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with fewer columns, or the same one.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        found = [layer for layer in program.layers() if self.applies(layer.name) and _has_many_columns(program, layer)]
        if not found:
            return program
        read = program.inputs(x[:_SAMPLES], [layer.expansions[0] for layer in found])
        modules: dict[str, nn.Module] = {}
        notes = []
        for layer in found:
            expansion = program.node(layer.expansions[0], Expansion)
            contraction = program.node(layer.contraction, Contraction)
            factors = factorize(expansion, contraction.weight, read[layer.expansions[0]], self.tolerance)
            if factors is None:
                continue
            mixed, weight, error = factors
            modules[layer.expansions[0]] = mixed
            modules[layer.contraction] = contraction.with_weight(weight)
            notes.append(
                f"layer {layer.name!r}: {expansion.k} functions of each input replaced by {mixed.k} common ones, squared "
                f"error {error:.2g} of the output's power"
            )
        return program.replace_modules(modules, notes) if modules else program


def _has_many_columns(program: Program, layer: Layer) -> bool:
    expansion = program.module(layer.expansions[0])
    return (
        len(layer.expansions) == 1
        and program.contraction(layer).geometry is None
        and program.is_float(layer)
        and isinstance(expansion, Expansion)
        and len(expansion.in_shape) == 1
        and expansion.k >= _LEAST_COLUMNS
    )


def factorize(
    expansion: Expansion, weight: Tensor, x: Tensor, tolerance: float
) -> tuple[Expansion, Tensor, float] | None:
    """Find common functions of each input; ``None`` where they are not far fewer, or inputs share their functions.

    Args:
        expansion: of ``n_in`` inputs and ``k`` functions.
        weight: float32 ``[n_out, n_in * k]``.
        x: inputs seen in calibration ``[n, n_in]``.
        tolerance: squared error allowed, as a share of the output's power.

    Returns:
        the expansion of the common functions, its weights, and the share of the output's power that is lost.
    """
    x = x.reshape(-1, expansion.n_in)
    low, high = float(x.min()), float(x.max())
    if len(distinct_inputs(expansion, low, high)[0]) * 2 <= expansion.n_in:
        return None
    with torch.no_grad():
        phi = expansion(x.reshape(-1, *expansion.anchor_shape)).double()
        power = float((phi.flatten(1) @ weight.double().T).square().sum(1).mean())
    # a few points over the whole range keep the functions in bounds where calibration saw little
    even = expansion.sample_inputs(torch.linspace(low, high, _RANGE_SAMPLES)).double()
    samples = torch.cat([phi / len(phi) ** 0.5, even * (0.01 / _RANGE_SAMPLES**0.5)]).transpose(0, 1)  # [n_in, s, k]
    edges = weight.double().reshape(len(weight), expansion.n_in, expansion.k).permute(1, 2, 0)  # [n_in, k, n_out]
    _, r = torch.linalg.qr(samples)
    u, s, vh = torch.linalg.svd(r @ edges, full_matrices=False)
    lost = torch.cat([s.square().sum(0).flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    rank = max(1, int((lost > tolerance * power).sum()))
    if power == 0 or rank > _WORTH * expansion.k:
        return None
    mix = (torch.linalg.pinv(r, rtol=1e-9) @ u[:, :, :rank]).float()
    combined = (s[:, :rank, None] * vh[:, :rank]).permute(2, 0, 1).flatten(1).float()
    position = torch.arange(expansion.n_in * rank).reshape(expansion.n_in, rank)
    branch = Branch("factors", Mixture(expansion, mix), position)  # type: ignore[arg-type]
    return Expansion(expansion.anchor_shape, [branch]), combined, float(lost[rank]) / power


class Mixture(nn.Module):
    """Linear combinations of the functions of each input.

    Attributes:
        expansion: the functions.
        mix: float32 ``[n_in, k, r]``.
    """

    mix: Tensor

    def __init__(self, expansion: Expansion, mix: Tensor) -> None:
        super().__init__()
        self.expansion = expansion
        self.register_buffer("mix", mix)

    def forward(self, x: Tensor) -> Tensor:
        """Map the anchor to ``[b, n_in, r]``."""
        mixed: Tensor = (self.expansion(x).unsqueeze(-2) @ self.mix).squeeze(-2)
        return mixed
