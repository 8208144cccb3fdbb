"""Take weight codes back where two neighboring products could leave int16, so that every processor computes them exactly.

    q0 * w0 + q1 * w1 > 32767 for some codes (q0, q1)     ->     smaller (w0', w1') for which it is not

(``pair_products`` says which processors need that.) Only outputs with such pairs change, each in the better of two ways,
measured on the calibration data:

* its pairs are taken back to what fits: the first weight alone, the second alone, or both by the same factor, whichever
  moves the output least, ``d0^2 Var(q0) + d1^2 Var(q1)``;
* its scale is raised, so that all its codes become smaller, and what still does not fit is taken back. The factor of least
  ``sum over columns of d^2 Var(q)`` is used; 2 would be 7 bits.

The mean error goes into the bias, and layers behind are rounded on what this one then hands over. Some pairs in ten thousand
are concerned as a rule. Methods that make the errors of weights cancel each other lose that where a few weights are taken
back, so all codes of the layer are then polished again (``polish``), within bounds in which all pairs go on to fit.
Where it costs much all the same, the whole layer is rounded to 7 bits by its own method too, which always fits, and the
better of the two is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kancompile.passes.round_weights.adjacent_pairs import INT16_MAX, AdjacentPairs
from kancompile.passes.rounding_methods import (
    Gptq,
    Rounded,
    RoundingProblem,
    bias_correction,
    objective,
    on_fine_table,
    output_errors,
    polish_rounded,
    rescaled,
    round_to_nearest,
    scale_of_column,
)

_MUCH = 3.0  # a bit less costs about four times the error
_FACTORS = tuple(2 ** (step / 12) for step in range(13))


@dataclass(frozen=True)
class Limited:
    """A layer whose pairs all fit int16.

    Attributes:
        parts: one rounding for each problem.
        bits: of the weights.
        pairs: how many pairs did not fit.
        before, after: mean squared output error with and without those pairs.
    """

    parts: list[Rounded]
    bits: int
    pairs: int
    before: float
    after: float

    def note(self) -> str:
        """Say in a line of the report what was done and what it cost."""
        how = f"weights have {self.bits} bits" if self.bits < 8 else "their weights were taken back"
        return (
            f"{self.pairs} pairs of neighboring products could leave int16, {how} so that processors without VNNI are "
            f"exact: mean squared output error {self.before:.4g} -> {self.after:.4g}"
        )


_COST = re.compile(
    r"layer '(.*)': \d+ pairs of neighboring products could leave int16, .* output error (\S+) -> (\S+)$"
)


def cost_of_pairs(notes: Iterable[str], layer: str) -> float:
    """Read from the notes of a program by how much the fitting of pairs raised the error of a layer's weights, 1 for not."""
    for note in reversed(list(notes)):  # the last one says what the weights are now
        found = _COST.match(note)
        if found and found[1] == layer and float(found[2]) > 0:
            return float(found[3]) / float(found[2])
    return 1.0


def limit_layer(
    problems: Sequence[RoundingProblem],
    parts: Sequence[Rounded],
    pairs_of: Callable[[Sequence[Rounded]], Sequence[AdjacentPairs]],
    again: Callable[[int], Sequence[Rounded]],
    polishing: Gptq | None = None,
) -> Limited | None:
    """Make all pairs of a layer fit; ``None`` where they do.

    Args:
        problems: the layer's rounding problems.
        parts: their solutions.
        pairs_of: gives the pairs of each, with the tables as its solution leaves them.
        again: rounds the layer to a number of bits.
        polishing: how codes are polished afterwards; ``None``: they are not.
    """
    limited, count = [], 0
    for problem, part, pairs in zip(problems, parts, pairs_of(parts), strict=True):
        fitting, found = limit_pairs(problem, part, pairs)
        if found and polishing is not None:
            fitting = _polished(problem, fitting, pairs, polishing)
        limited.append(fitting)
        count += found
    if not count:
        return None
    before, after = _error(problems, parts), _error(problems, limited)
    if after > _MUCH * before:
        narrow = list(again(7))
        error = _error(problems, narrow)
        if error < after:
            return Limited(narrow, 7, count, before, error)
    return Limited(limited, 8, count, before, after)


def limit_pairs(problem: RoundingProblem, rounded: Rounded, pairs: AdjacentPairs) -> tuple[Rounded, int]:
    """Make the pairs of one problem fit.

    Returns:
        the rounding, the same object where all fit, and how many did not.
    """
    output, _, _ = pairs.overflows(rounded.codes)
    if not len(output):
        return rounded, 0
    rows = output.unique()
    part = replace(problem, weight=problem.weight[rows])
    given = replace(
        rounded, codes=rounded.codes[rows], scale=rounded.scale[:, rows].clone(), offset=rounded.offset[rows]
    )
    taken_back, coarser = _taken_back(part, given, pairs), _coarser(part, given, pairs)
    better = output_errors(part, coarser) < output_errors(part, taken_back)
    codes, scale, offset = rounded.codes.clone(), rounded.scale.clone(), rounded.offset.clone()
    codes[rows] = torch.where(better[:, None], coarser.codes, taken_back.codes)
    scale[:, rows] = torch.where(better, coarser.scale, taken_back.scale)
    offset[rows] = torch.where(better, coarser.offset, taken_back.offset)
    return replace(rounded, codes=codes, scale=scale, offset=offset), len(output)


def _polished(problem: RoundingProblem, rounded: Rounded, pairs: AdjacentPairs, polishing: Gptq) -> Rounded:
    """Let all other codes make up for those that were taken back, output by output where that helps."""
    limits = pairs.limits(rounded.codes)
    if rounded.column_scale is None:
        polished = polish_rounded(problem, rounded, polishing, polishing.sweeps, limits)
    else:
        coarse = rescaled(problem, rounded.column_scale)
        polished = polish_rounded(coarse, replace(rounded, column_scale=None), polishing, polishing.sweeps, limits)
        polished = on_fine_table(problem, coarse, polished, rounded.column_scale)
    better = output_errors(problem, polished) < output_errors(problem, rounded)
    return replace(
        rounded,
        codes=torch.where(better[:, None], polished.codes, rounded.codes),
        scale=torch.where(better, polished.scale, rounded.scale),
        offset=torch.where(better, polished.offset, rounded.offset),
    )


def _taken_back(problem: RoundingProblem, rounded: Rounded, pairs: AdjacentPairs) -> Rounded:
    """Change the pairs that do not fit, and nothing else."""
    output, pair, _ = pairs.overflows(rounded.codes)
    codes, weights = rounded.codes, pairs.weights(rounded.codes, output, pair)
    fitting = _nearest_fitting(problem, pairs, pair, weights).abs()
    columns, size = pairs.columns[pair], codes.to(torch.int64).abs().flatten()
    for which in (0, 1):
        known = columns[:, which] >= 0
        place = output[known] * codes.shape[1] + columns[known, which]
        size.scatter_reduce_(0, place, fitting[known, which], "amin")  # a column of several pairs fits into all of them
    return _corrected(problem, replace(rounded, codes=(codes.sign() * size.reshape(codes.shape)).to(torch.int8)))


def _coarser(problem: RoundingProblem, rounded: Rounded, pairs: AdjacentPairs) -> Rounded:
    """Round to nearest with the scale of every output raised by the factor that costs least."""
    weight = problem.weight if rounded.column_scale is None else problem.weight / rounded.column_scale
    _, variance = problem.column_moments
    if rounded.column_scale is not None:
        variance = variance * rounded.column_scale.double().square()
    least = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    best = rounded
    for factor in _FACTORS:
        scale = rounded.scale * factor
        codes = round_to_nearest(weight, scale, rounded.group_sizes, problem.bits)
        candidate = _taken_back(problem, replace(rounded, codes=codes, scale=scale), pairs)
        error = weight - candidate.codes * scale_of_column(scale, rounded.group_sizes)
        cost = error.double().square() @ variance
        better = cost < least
        least = torch.where(better, cost, least)
        best = replace(
            candidate,
            codes=torch.where(better[:, None], candidate.codes, best.codes),
            scale=torch.where(better, scale, best.scale),
        )
    return _corrected(problem, best)


def _corrected(problem: RoundingProblem, rounded: Rounded) -> Rounded:
    """Put the mean error of the outputs into the offset; the table of a rescaled layer has its own means."""
    return replace(rounded, offset=bias_correction(problem, rounded.dequantized()))


def _nearest_fitting(problem: RoundingProblem, pairs: AdjacentPairs, pair: Tensor, weights: Tensor) -> Tensor:
    """Choose the best of three ways to make pairs of weights ``[e, 2]`` fit."""
    size = weights.abs()
    both = size * INT16_MAX // pairs.reach(pair, size)[:, None]
    first = torch.stack([pairs.room(pair, size, 0), size[:, 1]], 1)
    second = torch.stack([size[:, 0], pairs.room(pair, size, 1)], 1)
    candidates = torch.stack([both, torch.minimum(first, size), torch.minimum(second, size)])  # [3, e, 2]
    _, variance = problem.column_moments
    columns = pairs.columns[pair]
    cost = ((size - candidates).double().square() * variance[columns.clamp(min=0)]).sum(2)
    cost[0, columns[:, 1] < 0] = cost[2, columns[:, 1] < 0] = torch.inf  # a constant column is not ours to change
    chosen = candidates[cost.argmin(0), torch.arange(len(pair))]
    return chosen * weights.sign()


def _error(problems: Sequence[RoundingProblem], parts: Sequence[Rounded]) -> float:
    errors = [objective(problem, part) for problem, part in zip(problems, parts, strict=True)]
    return sum(errors) / len(errors)
