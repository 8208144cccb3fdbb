"""Improve rounded weights without leaving the quadratic objective: coordinate descent and least-squares scales.

Both steps minimise ``tr(D H D^T)``, ``D = V - V_hat``, exactly in what they vary, so the objective never grows:

* codes: for one column at a time, the best code of every output given all other codes of that output. With
  ``G = H D^T`` the minimum over a real value is ``V_hat_k + G_k / H_kk``, and the nearest level to it is the best one;
* scales: for one group at a time, ``delta = (Z H D) / (Z H Z)`` with ``Z`` the codes of the group.

Greedy rounding (GPTQ) fixes each code before it knows the later ones; with 2 or 3 bits that leaves much to win.
Arrays are ``[m, n_out]``: one row is one column of the layer, in the order of the Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.passes.rounding_methods.hessian import FactoredHessian

_BLOCK = 128


@dataclass
class RoundedColumns:
    """Codes and scales that are being improved, transposed.

    Attributes:
        weight: ``V^T``, float32 ``[m, n_out]``.
        codes: integers as float32 ``[m, n_out]``.
        scale: float32 ``[g, n_out]``.
        group: int64 ``[m]``, scale group of each row.
        low, high: smallest and largest code, of all columns or of each, ``[m, n_out]``.
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    group: Tensor
    low: int | Tensor
    high: int | Tensor

    def error(self) -> Tensor:
        """Return ``D^T``, float32 ``[m, n_out]``."""
        return self.weight - self.codes * self.scale[self.group]


def quadratic_error(hessian: FactoredHessian, error: Tensor) -> Tensor:
    """Return ``diag(D H D^T)`` for ``D^T`` ``[m, n_out]``, float64 ``[n_out]``."""
    return (error.double() * hessian.multiply(error).double()).sum(0)


def descend_codes(state: RoundedColumns, hessian: FactoredHessian, gradient: Tensor) -> int:
    """Make one sweep of coordinate descent over all codes; updates ``gradient`` (``H D^T``) too.

    Returns:
        number of codes that changed.
    """
    changed = 0
    for start in range(0, hessian.m, _BLOCK):
        stop = min(start + _BLOCK, hessian.m)
        columns = hessian.columns(start, stop)
        square = columns[start:stop].contiguous()
        local = gradient[start:stop].clone()
        scale = state.scale[state.group[start:stop]]
        old = state.codes[start:stop]
        new = old.clone()
        inverse = 1.0 / (scale * square.diagonal()[:, None])
        step = torch.zeros_like(local)
        low, high = _bounds(state.low, start, stop, local), _bounds(state.high, start, stop, local)
        for k in range(stop - start):
            code = torch.round(new[k] + local[k] * inverse[k]).clamp_(low[k], high[k])
            step[k] = (new[k] - code) * scale[k]
            new[k] = code
            local.addr_(square[:, k], step[k])
        moved = int((new != old).sum())
        if moved:
            changed += moved
            state.codes[start:stop] = new
            gradient.addmm_(columns, step)
    return changed


def _bounds(bound: int | Tensor, start: int, stop: int, like: Tensor) -> Tensor:
    return bound[start:stop].to(like) if isinstance(bound, Tensor) else like.new_tensor(bound).expand(stop - start)


def refine_scale(state: RoundedColumns, hessian: FactoredHessian, gradient: Tensor) -> None:
    """Set each group's scale to its least-squares value, group after group; updates ``gradient`` too.

    A scale that would become zero or negative stays.
    """
    for group in range(state.scale.shape[0]):
        rows = torch.nonzero(state.group == group).flatten()
        codes = state.codes[rows]
        curvature = hessian.multiply_at(rows, codes)
        denominator = (codes.double() * curvature[rows].double()).sum(0)
        slope = (codes.double() * gradient[rows].double()).sum(0)
        change = torch.where(denominator > 0, slope / denominator.clamp(min=1e-300), 0.0).float()
        change = torch.where(state.scale[group] + change > 0, change, 0.0)
        state.scale[group] += change
        gradient -= curvature * change


def polish(state: RoundedColumns, hessian: FactoredHessian, sweeps: int, refine: bool) -> int:
    """Alternate scale refinement and code sweeps until no code changes, at most ``sweeps`` times; return the sweeps."""
    gradient = hessian.multiply(state.error())
    for sweep in range(sweeps):
        if refine:
            refine_scale(state, hessian, gradient)
        if not descend_codes(state, hessian, gradient):
            return sweep + 1
    return sweeps
