"""The Hessian of a layer's squared error and its triangular factor, both in one square matrix.

For ``E |D (q - mean)|^2`` the Hessian with respect to one row of weights is twice the covariance of the features. The
factor 2 cancels everywhere and is left out: ``H = S + damping``. With 27,648 columns one float32 matrix takes 2.85 GiB, so
``H`` stays in the strictly lower triangle while its Cholesky factor overwrites the upper one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.passes.rounding_methods.problem import RoundingProblem, SecondMoments

_BLOCK = 512
_RANK_COLUMNS = 8192
_RETRIES = 5


class FactoredHessian:
    """``H = R R^T`` with ``R`` upper triangular, rows and columns in the order of processing.

    Attributes:
        packed: float32 ``[m, m]``: ``R`` in the upper triangle with the diagonal, ``H`` below it.
        diagonal: float32 ``[m]``, of ``H``.
        damping: what was added to the diagonal of the covariance.
        notes: retries with a larger damping.
    """

    def __init__(self, covariance: Tensor, damping: float, layer: str) -> None:
        """Factor a covariance in place; ``damping`` is relative to the mean of its diagonal, times 10 on failure.

        Raises:
            KanCompileError: no damping up to ``10**5`` times the given one makes the matrix positive definite.
        """
        self.packed = covariance
        variance = covariance.diagonal().clone()
        notes = []
        mean = float(variance.mean())
        for attempt in range(_RETRIES + 1):
            self.damping = damping * 10.0**attempt * mean
            self.diagonal = variance + self.damping
            if attempt:
                _restore_upper(self.packed)
                notes.append(f"Hessian not positive definite, damping raised to {damping * 10.0**attempt:g}")
            self.packed.diagonal().copy_(self.diagonal)
            if _factor_upper(self.packed):
                self.notes = tuple(notes)
                return
        raise KanCompileError(
            f"layer {layer!r}: Hessian is not positive definite with damping {damping * 10.0**_RETRIES:g} of its mean "
            "diagonal; check the calibration data for extreme values, or choose method 'uniform'"
        )

    @property
    def m(self) -> int:
        """Number of columns."""
        return int(self.packed.shape[0])

    def columns(self, start: int, stop: int) -> Tensor:
        """Return columns of ``H``, float32 ``[m, stop - start]``, read from the lower triangle."""
        square = self.packed[start:stop, start:stop].tril(-1)
        square = square + square.T + torch.diag(self.diagonal[start:stop])
        return torch.cat([self.packed[start:stop, :start].T, square, self.packed[stop:, start:stop]])

    def multiply_at(self, positions: Tensor, x: Tensor) -> Tensor:
        """Return ``H[:, positions] x`` for ascending positions (int64 ``[p]``) and ``x`` ``[p, n_out]``."""
        if len(positions) == self.m:
            return self.multiply(x)
        result = torch.zeros(self.m, x.shape[1], dtype=x.dtype, device=x.device)
        number = torch.arange(self.m, device=self.packed.device)
        for start in range(0, len(positions), _BLOCK):
            part = positions[start : start + _BLOCK]
            # H stands below the diagonal: entry (i, j) in row i where j < i, else in row j
            strip = torch.where(number[:, None] > part, self.packed[:, part], self.packed[part].T)
            strip[part, torch.arange(len(part), device=part.device)] = self.diagonal[part]
            result += strip @ x[start : start + _BLOCK]
        return result

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``H x`` for ``x`` ``[m, n_out]``."""
        result = torch.empty_like(x)
        for start in range(0, self.m, _BLOCK):
            stop = min(start + _BLOCK, self.m)
            result[start:stop] = self.columns(start, stop).T @ x
        return result


def _restore_upper(packed: Tensor) -> None:
    for start in range(0, packed.shape[0], _BLOCK):
        stop = min(start + _BLOCK, packed.shape[0])
        packed[:start, start:stop] = packed[start:stop, :start].T
        square = packed[start:stop, start:stop]
        lower = square.tril(-1)
        square.copy_(lower + lower.T)


def _factor_upper(packed: Tensor) -> bool:
    """Overwrite the upper triangle of a symmetric matrix by ``R`` with ``H = R R^T``; tell whether that worked.

    Blocks are eliminated from the last to the first, which is a Cholesky factorization of the matrix read backwards.
    """
    for stop in range(packed.shape[0], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        square = packed[start:stop, start:stop]
        upper = square.triu()
        symmetric = upper + upper.triu(1).T
        lower, info = torch.linalg.cholesky_ex(symmetric.flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(lower).all()):
            return False
        factor = lower.flip(0, 1).contiguous()
        square.copy_(square.tril(-1) + factor)
        if start == 0:
            break
        above = torch.linalg.solve_triangular(factor.T, packed[:start, start:stop], upper=False, left=False)
        packed[:start, start:stop] = above
        for left in range(0, start, _BLOCK):
            right = min(left + _BLOCK, start)
            kept = packed[left:right, left:right].tril(-1)
            packed[:right, left:right] -= above[:right] @ above[left:right].T
            corner = packed[left:right, left:right]
            corner.copy_(corner.triu() + kept)
    return True


def permute_symmetric(matrix: Tensor, order: Tensor) -> None:
    """Reorder rows and columns of a square matrix in place, one strip at a time."""
    for start in range(0, matrix.shape[0], _BLOCK):
        strip = matrix[:, start : start + _BLOCK]
        strip.copy_(strip[order])
    for start in range(0, matrix.shape[0], _BLOCK):
        strip = matrix[start : start + _BLOCK]
        strip.copy_(strip[:, order])


def owned_covariance(problem: RoundingProblem, moments: SecondMoments) -> Tensor:
    """Return a covariance that may be overwritten: a copy where the problem keeps the moments, else the only one."""
    kept = problem.__dict__.get("_moments") is moments
    return moments.covariance.clone() if kept else moments.covariance


def rank_notes(problem: RoundingProblem, moments: SecondMoments) -> tuple[str, ...]:
    """Warn when there are fewer samples than live columns, with the numerical rank of the covariance.

    Rank is the number of eigenvalues above ``1e-5`` of the mean variance, counted by Sylvester's law of inertia from
    an ``L D L^T`` factorization; with more than 8192 live columns only its bound ``n - 1`` is given.
    """
    m = len(moments.live)
    if moments.n >= m:
        return ()
    text = f"{moments.n} calibration samples for {m} columns that vary, numerical rank "
    if m > _RANK_COLUMNS:
        text += f"at most {moments.n - 1}"
    else:
        text += str(_eigenvalues_above(moments.covariance, 1e-5 * float(moments.covariance.diagonal().mean())))
    return (f"{text}; directions without samples follow the damping alone, more samples help",)


def _eigenvalues_above(matrix: Tensor, threshold: float) -> int:
    shifted = matrix.clone()
    shifted.diagonal().sub_(threshold)
    factor, pivots = torch.linalg.ldl_factor(shifted)
    pairs = int((pivots < 0).sum()) // 2  # a 2 x 2 pivot has one positive and one negative eigenvalue
    return int((factor.diagonal()[pivots > 0] > 0).sum()) + pairs
