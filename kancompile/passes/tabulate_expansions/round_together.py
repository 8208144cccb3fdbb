"""Round all codes of a table together, so that their errors cancel at the output of the layer behind.

    y[p, o] = sum over taps t, channels i, functions k of  w[o, i, k, t] (s_k c[row(p, t, i), k] + l_k)

is linear in the codes ``c``, so the squared error over output pixels ``p`` and channels ``o`` is a quadratic form

    (c - c*)^T H (c - c*),    H = Cov(a),   a[p, o, (r, k)] = s_k * sum over t, i with row(p, t, i) = r of w[o, i, k, t]

around the unrounded codes ``c*``. A covariance, because a mean error goes into the bias. Functions that nearly depend on each
other are contracted with weights that nearly cancel, and neighboring pixels often share a row; nearest rounding knows
neither. Starting from it, one row after the other is moved to the best of all its neighbors (every code up to one step up or
down), until no row gains: a descent on the objective of ``rounding_methods``, with codes in place of weights. It costs nothing at
run time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import IndexQuantizer
from kancompile.passes.rounding_methods import add_products, mirror

_MOST_TOGETHER = 5
_MOST_CODES = 2048
_EQUATIONS = 1 << 14
_BLOCK_ELEMENTS = 1 << 22
_UNSEEN_SHARE = 1e-2
_SWEEPS = 12


@dataclass(frozen=True)
class Patches:
    """What outputs, or a sample of the output pixels of a convolution, see of one expansion.

    Attributes:
        seen: inputs ``[p, t, n_in]``, of ``t`` taps.
        inside: whether a tap lies inside the image, bool ``[p, t, 1]``.
        weights: ``[n_out / groups, n_in / groups * k * t]`` for each group, channels major, taps minor.
        k: functions of a channel.
    """

    seen: Tensor
    inside: Tensor
    weights: tuple[Tensor, ...]
    k: int


def round_together(
    codes: Tensor,
    values: Tensor,
    scale: Tensor,
    offset: Tensor,
    hessian_of: Callable[[Tensor], Tensor],
    most: int = 255,
) -> Tensor:
    """Improve the codes of a table that all channels share.

    Args:
        codes: integers in 0 ... ``most`` to start from, float ``[levels, k]``. Columns of one code stay as they are; so do all
            where more than 5 columns vary, or more than 2,048 codes: functions so many overlap little.
        values: what they stand for, ``[levels, k]``.
        scale, offset: real value of a code step and of code 0, ``[k]``.
        hessian_of: gives, for the numbers of some functions, how errors of their values add up (:func:`code_hessian`).
        most: the largest code.

    Returns:
        codes of no larger objective, ``[levels, k]``.
    """
    varying = torch.nonzero((codes != codes[:1]).any(0)).flatten()
    if not 0 < len(varying) <= _MOST_TOGETHER or codes.shape[0] * len(varying) > _MOST_CODES:
        return codes
    step = scale[varying].double()
    target = (values[:, varying].double() - offset[varying].double()) / step
    hessian = hessian_of(varying) * (step[:, None] * step).repeat(len(codes), len(codes))
    better = codes.clone()
    better[:, varying] = descend(codes[:, varying].double(), target, hessian, most).to(codes.dtype)
    return better


def code_hessian(patches: Patches, index: IndexQuantizer, functions: Tensor) -> Tensor:
    """Measure how errors of table values add up at the output.

    Rows that calibration does not see count as a hundredth of an average row, all their inputs independent.

    Args:
        patches: what output pixels see.
        index: which row an input reads.
        functions: numbers of the functions, int64 ``[m]``.

    Returns:
        float64 ``[levels * m, levels * m]``, rows major: the squared error, mean over outputs, of an error in each value.
    """
    levels, m, groups = index.levels, len(functions), len(patches.weights)
    _, taps, n_in = patches.seen.shape
    n_out = sum(len(weight) for weight in patches.weights)
    pixels = min(len(patches.seen), max(1, _EQUATIONS // n_out))
    picked = torch.linspace(0, len(patches.seen) - 1, pixels).long()
    rows = index(patches.seen[picked]).long().reshape(pixels, taps, groups, -1)
    inside = patches.inside[picked].float()
    total = torch.zeros(levels * m, levels * m, dtype=torch.float64)
    unseen = torch.zeros(m, m, dtype=torch.float64)
    for group, flat in enumerate(patches.weights):
        weight = flat.reshape(len(flat), n_in // groups, patches.k, taps)[:, :, functions]
        weight = weight.permute(0, 3, 1, 2).flatten(1, 2)  # [outputs, taps * channels, m]
        unseen += torch.einsum("oim,oin->mn", weight.double(), weight.double())
        mean = torch.zeros(len(flat), levels * m, dtype=torch.float64)
        block = max(1, _BLOCK_ELEMENTS // (len(flat) * levels * m))
        for start in range(0, pixels, block):
            row = rows[start : start + block, :, group].flatten(1)
            counted = inside[start : start + block].expand(-1, -1, n_in // groups).flatten(1)
            slopes = torch.zeros(len(row), len(flat), levels, m)
            place = row[:, None, :, None].expand(-1, len(flat), -1, m)
            slopes.scatter_add_(2, place, weight * counted[:, None, :, None])
            mean += slopes.flatten(2).sum(0).double()
            add_products(total, slopes.flatten(2).flatten(0, 1))
        total -= mean.T @ mean / pixels
    mirror(total)
    total /= pixels * n_out
    share = torch.eye(levels, dtype=torch.float64) * (_UNSEEN_SHARE / levels / n_out)
    return total + torch.kron(share, unseen)


def descend(codes: Tensor, target: Tensor, hessian: Tensor, most: int = 255) -> Tensor:
    """Move one row after the other to the best of its neighbors, until none gains.

    Args:
        codes: integers in 0 ... ``most``, float64 ``[levels, m]``.
        target: unrounded codes ``[levels, m]``.
        hessian: ``[levels * m, levels * m]``, rows major.
        most: the largest code.

    Returns:
        codes ``[levels, m]``.
    """
    levels, m = codes.shape
    moves = torch.tensor(list(itertools.product((0.0, -1.0, 1.0), repeat=m)), dtype=torch.float64)  # the first: stay
    own = hessian.reshape(levels, m, levels, m)[torch.arange(levels), :, torch.arange(levels)]
    curvature = torch.einsum("am,rmn,an->ra", moves, own, moves)
    codes = codes.clone()
    slope = hessian @ (codes - target).flatten()
    tolerance = 1e-12 * float(hessian.diagonal().sum())
    for _ in range(_SWEEPS):
        changed = False
        for row in range(levels):
            place = slice(row * m, (row + 1) * m)
            moved = codes[row] + moves
            gain = 2 * moves @ slope[place] + curvature[row]
            gain[((moved < 0) | (moved > most)).any(1)] = torch.inf
            best = int(gain.argmin())
            if float(gain[best]) < -tolerance:
                codes[row] = moved[best]
                slope += hessian[:, place] @ moves[best]
                changed = True
        if not changed:
            break
    return codes
