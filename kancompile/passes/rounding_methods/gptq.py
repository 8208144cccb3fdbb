"""Round weights column by column, each column's error made up for by the columns not yet rounded.

Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ* (2022), Algorithm 1. There, with ``U`` the upper Cholesky factor of the
inverse Hessian (``H^-1 = U^T U``), rounding column ``k`` subtracts ``(error_k / U_kk) U_k,j`` from every later column
``j``. Let ``R = U^-1``; it is upper triangular and ``H = R R^T``. Summed over all earlier columns, the correction that
column ``k`` has received when its turn comes is

    V'_k = V_k + sum over j < k of (V_j - V_hat_j) R_jk / R_kk,

so one factorization of ``H`` replaces an inversion and a second factorization (Chee et al., *QuIP* (2023), Theorem 6, prove
that both forms are one method). Rows of ``H^-1`` in place of ``U`` are a known wrong variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kancompile.passes.rounding_methods.hessian import FactoredHessian, owned_covariance, permute_symmetric, rank_notes
from kancompile.passes.rounding_methods.polish import RoundedColumns, polish, quadratic_error
from kancompile.passes.rounding_methods.problem import Rounded, RoundingProblem, SecondMoments, corrected
from kancompile.passes.rounding_methods.quantizers import (
    ScaleSearch,
    code_range,
    quantize,
    scale_of_column,
    search_scale,
)

_STACKED_ELEMENTS = 1 << 26


def round_columns(weight: Tensor, factor: Tensor, scale: Tensor, low: int, high: int, block: int = 128) -> Tensor:
    """Run Algorithm 1 on columns in their order of processing.

    Args:
        weight: ``V^T``, float32 ``[m, n_out]``.
        factor: ``R`` in the upper triangle, ``[m, m]``; what lies below is not read.
        scale: float32 ``[m, n_out]`` or broadcastable to it.
        low, high: smallest and largest code.
        block: columns between two matrix products that pass errors on (lazy updates).

    Returns:
        codes as float32 ``[m, n_out]``.
    """
    m = weight.shape[0]
    scale = scale.expand_as(weight)
    diagonal = factor.diagonal()
    error = torch.empty_like(weight)
    codes = torch.empty_like(weight)
    for start in range(0, m, block):
        stop = min(start + block, m)
        target = weight[start:stop].clone()
        if start:
            target += (factor[:start, start:stop].T @ error[:start]) / diagonal[start:stop, None]
        square = factor[start:stop, start:stop] / diagonal[start:stop]
        for k in range(stop - start):
            column = start + k
            codes[column] = quantize(target[k], scale[column], low, high)
            error[column] = weight[column] - codes[column] * scale[column]
            target[k + 1 :].addr_(square[k, k + 1 :], error[column])
    return codes


def ordered_hessian(
    problem: RoundingProblem, moments: SecondMoments, damping: float, activation_order: bool, device: str
) -> tuple[FactoredHessian, Tensor]:
    """Factor the Hessian of the live columns in their order of processing; return it and that order, int64 ``[m]``."""
    order = torch.arange(len(moments.live))
    if activation_order:
        order = torch.argsort(moments.variance[moments.live], descending=True, stable=True)
    covariance = owned_covariance(problem, moments)
    permute_symmetric(covariance, order.to(device))
    return FactoredHessian(covariance, damping, problem.layer), moments.live[order]


@dataclass(frozen=True)
class Gptq:
    """Round by GPTQ, then polish scales and codes under the same objective.

    Attributes:
        scale_search: how the first scales are found (see ``quantizers.search_scale``).
        scale_factors: multiples of those scales, each tried in full for every output; the best one is kept.
        damping: share of the mean diagonal that is added to the Hessian.
        activation_order: take columns by falling variance instead of by position.
        block: columns between two lazy updates.
        sweeps: most rounds of polishing (0: Algorithm 1 alone).
        refine_scale: whether polishing fits the scales too.
        device: where the matrices live.

    Columns that do not vary over the calibration data have no say in the error; they keep their trained weights, rounded
    to nearest, since other data may well reach them.
    """

    compensates: ClassVar[bool] = True
    quick_columns: ClassVar[float] = 8192

    scale_search: ScaleSearch = "hessian"
    scale_factors: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.45)
    damping: float = 0.01
    activation_order: bool = True
    block: int = 128
    sweeps: int = 30
    refine_scale: bool = True
    device: str = "cpu"

    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round ``problem.weight``; draws nothing from ``generator``."""
        moments = problem.second_moments(self.device)
        live = moments.live
        low, high = code_range(problem.bits)
        weight = problem.weight.float()
        damping = self.damping * float(moments.variance[live].mean()) if len(live) else 1.0
        scale = search_scale(
            weight, problem.bits, problem.group_sizes, self.scale_search, moments.variance.float() + damping
        )
        notes = rank_notes(problem, moments)
        if len(live):
            hessian, columns = ordered_hessian(problem, moments, self.damping, self.activation_order, self.device)
            notes += hessian.notes
            state = self._solve(
                weight[:, columns].T.contiguous().to(self.device),
                hessian,
                scale.to(self.device),
                problem.group_of_column[columns].to(self.device),
                (low, high),
            )
            scale = state.scale.cpu()
        codes = quantize(weight, scale_of_column(scale, problem.group_sizes), low, high)
        if len(live):
            codes[:, columns] = state.codes.T.cpu()
        return corrected(problem, codes, scale, notes)

    def _solve(
        self, weight: Tensor, hessian: FactoredHessian, scale: Tensor, group: Tensor, levels: tuple[int, int]
    ) -> RoundedColumns:
        """Try every factor on the scales, polish the best codes of each output."""
        n_out = weight.shape[1]
        least = torch.full((n_out,), torch.inf, dtype=torch.float64, device=weight.device)
        best_codes, best_scale = torch.zeros_like(weight), scale.clone()
        # several factors at once are one wider problem, since outputs do not interact
        at_once = max(1, _STACKED_ELEMENTS // weight.numel())
        for first in range(0, len(self.scale_factors), at_once):
            factors = self.scale_factors[first : first + at_once]
            stacked = torch.cat([scale * factor for factor in factors], dim=1)
            repeated = weight.repeat(1, len(factors))
            codes = round_columns(repeated, hessian.packed, stacked[group], *levels, self.block)
            loss = quadratic_error(hessian, repeated - codes * stacked[group])
            for i in range(len(factors)):
                part = slice(i * n_out, (i + 1) * n_out)
                better = loss[part] < least
                least = torch.where(better, loss[part], least)
                best_codes = torch.where(better, codes[:, part], best_codes)
                best_scale = torch.where(better, stacked[:, part], best_scale)
        state = RoundedColumns(weight, best_codes, best_scale, group, *levels)
        if self.sweeps:
            polish(state, hessian, self.sweeps, self.refine_scale)
        return state


def polish_rounded(
    problem: RoundingProblem,
    rounded: Rounded,
    options: Gptq,
    sweeps: int,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Rounded:
    """Polish the scales and codes that another method found.

    Args:
        problem: the layer.
        rounded: its rounding, without column scale.
        options: how the Hessian is made, and whether scales are refined.
        sweeps: most rounds.
        limits: smallest and largest code of every weight, ``[n_out, c]``; ``None``: those of the bits.
    """
    moments = problem.second_moments(options.device)
    if not len(moments.live):
        return rounded
    hessian, columns = ordered_hessian(problem, moments, options.damping, options.activation_order, options.device)
    low, high = code_range(problem.bits)
    device = options.device
    bounds = (low, high) if limits is None else tuple(limit[:, columns].T.to(device) for limit in limits)
    state = RoundedColumns(
        problem.weight[:, columns].float().T.contiguous().to(device),
        rounded.codes[:, columns].float().T.contiguous().to(device),
        rounded.scale.clone().to(device),
        problem.group_of_column[columns].to(device),
        *bounds,
    )
    polish(state, hessian, sweeps, options.refine_scale)
    scale = state.scale.cpu()
    codes = quantize(problem.weight.float(), scale_of_column(scale, problem.group_sizes), low, high)
    if limits is not None:
        codes = codes.clamp(*limits)
    codes[:, columns] = state.codes.T.cpu()
    return corrected(problem, codes, scale, rounded.notes)
