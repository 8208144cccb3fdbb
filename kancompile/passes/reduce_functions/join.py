"""Replace the functions of a linear layer by few functions of pairs of inputs that are looked up together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Contraction, Expansion, IndexQuantizer, JointTable
from kancompile.passes.reduce_functions.fit import LeastSquares
from kancompile.passes.reduce_functions.words import PLANES, Words, find_words
from kancompile.passes.tabulate_expansions import (
    STRETCH,
    LookupCost,
    Range,
    choose_index,
    measured_samples,
    values_of_inputs,
)

LARGEST_CODE = 127
"""Of a column. Then two neighbouring products of 8-bit weights stay within int16 on every processor, and the rounding of codes
remains far below what is left out."""
_MOST_LEVELS = 64
_MOST_LEVELS_GIVEN = 256  # a table of all pairs of rows has their square
_INDEX_SHARE = 0.3  # of the error allowed that the rows of the index may take
_JUDGES = 4  # one sample in so many judges, and does not fit
_CONSTANT = 1e-12  # variance by the mean square, which roundings of float32 reach
_GROWTH = 1.05
_LEAST_SAMPLES = 128
_WEIGHT_LEVELS = 127  # that code steps reckon with
NAME = "joint"
"""What reports call the functions, which belong to no branch."""


@dataclass(frozen=True)
class JoinOptions:
    """Choices of one layer.

    Attributes:
        share: of the output's variance that may be lost.
        levels: rows for each input, ``None`` to choose them by measured error.
        range, percentile: see ``choose_index.ranges``.
        column_scaling: exponent of the column maximum that moves to the weights, ``None`` to estimate the best.
        always: whether pairs are looked up wherever the error allows it, not only where that is faster.
    """

    share: float
    levels: int | None
    range: Range
    percentile: float
    column_scaling: float | None
    always: bool = False


@dataclass(frozen=True)
class Joined:
    """A layer of joint look-ups, its weights not yet rounded.

    Attributes:
        table, contraction: what takes the place of its expansion and contraction.
        lost: share of the output's variance lost, on samples that did not fit.
    """

    table: JointTable
    contraction: Contraction
    lost: float


def join_layer(
    expansion: Expansion, contraction: Contraction, x: Tensor, samples: int, options: JoinOptions, most_columns: int
) -> Joined | str:
    """Find as few joint functions as the share allows, or say why each input is better looked up by itself.

    Args:
        expansion: the layer's only one, of inputs ``(n_in,)``.
        contraction: without a window.
        x: calibration inputs ``[n, ...]`` as the expansion reads them.
        samples: calibration samples used to measure the error of indices.
        options: of the layer.
        most_columns: beyond which nothing is gained.
    """
    if len(x) < _LEAST_SAMPLES:
        return f"functions of pairs of inputs take {_LEAST_SAMPLES} calibration samples, found {len(x)}"
    if options.levels is not None and options.levels > _MOST_LEVELS_GIVEN:
        return f"pairs of inputs have at most {_MOST_LEVELS_GIVEN} rows for either, found levels = {options.levels}"
    given = contraction.weight
    output = torch.cat([contraction(expansion(part)) for part in x.split(512)])
    power = float(output.double().var(0, correction=0).mean())
    if power <= _CONSTANT * float(output.double().square().mean()):
        return "its output is constant over the calibration samples"
    each = torch.arange(expansion.n_in)
    cost = LookupCost(expansion, contraction, given, measured_samples(x, samples), each)
    allowed = 10 * _INDEX_SHARE * options.share * power  # choose_index stops at a tenth
    choice = choose_index(cost, allowed, options.levels, options.range, _MOST_LEVELS, percentile=options.percentile)
    index = choice.index
    if choice.error > options.share * power:
        return (
            f"{index.levels} rows for either input of a pair lose more than {options.share:g} of the output's variance"
        )
    values = values_of_inputs(expansion, index, x, each)
    rows = index(x.reshape(len(x), -1)).long()
    shaped = given.reshape(contraction.n_out, expansion.n_in, expansion.k)
    words = find_words(values, shaped, rows, max(1, most_columns // PLANES))
    drafted = _rounded(words, rows, index, options)
    judging = torch.arange(len(x)) % _JUDGES == 0
    codes, weight = drafted(rows), drafted.weight
    equations = LeastSquares(codes[~judging], output[~judging], weight)

    def lost(count: int) -> float:
        columns = _columns_of(torch.arange(count), len(words))
        error = equations.solve(columns)(codes[judging][:, columns]) - output[judging]
        return float(error.double().square().mean()) / power

    count = _fewest(lost, len(words), options.share)
    if count is None:
        found = f"{len(words) * PLANES} functions of pairs of inputs"
        return f"{found} still lose more than {options.share:g} of the output's variance"
    kept = words.first(count).in_order()
    drafted = _rounded(kept, rows, index, options)
    final = LeastSquares(drafted(rows), output, drafted.weight).solve(torch.arange(count * PLANES))
    table = JointTable(
        tuple(expansion.in_shape),
        index,
        kept.members,
        drafted.parts,
        drafted.scale[:, None],
        drafted.offset[:, None],
        NAME,
    )
    return Joined(table, contraction.replace(weight=final.weight, bias=final.bias, codes=None), lost(count))


def _columns_of(words: Tensor, count: int) -> Tensor:
    """Number the columns of some words of ``count``, planes major."""
    return (torch.arange(PLANES)[:, None] * count + words).flatten()


def _fewest(lost: Callable[[int], float], most: int, share: float) -> int | None:
    """Find the smallest of growing counts whose loss is within the share; ``None`` where that of all is not."""
    counts = sorted(
        {min(most, math.ceil(_GROWTH**power)) for power in range(2, math.ceil(math.log(max(most, 2), _GROWTH)) + 1)}
    )
    low, high = 0, len(counts) - 1
    if lost(counts[high]) > share:
        return None
    while low < high:
        middle = (low + high) // 2
        if lost(counts[middle]) <= share:
            high = middle
        else:
            low = middle + 1
    return counts[high]


@dataclass(frozen=True)
class _Rounded:
    """Words as codes.

    Attributes:
        index: of the inputs.
        members: int64 ``[m, w]``.
        parts: uint8 ``[m, k, w, L]``.
        scale, offset: of the columns, float32 ``[k * w]``.
        weight: of their codes, ``[n_out, k * w]``.
    """

    index: IndexQuantizer
    members: Tensor
    parts: Tensor
    scale: Tensor
    offset: Tensor
    weight: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Look row numbers ``[n, n_in]`` up, uint8 ``[n, k * w]``."""
        codes: Tensor = torch.ops.kancompile.expand_joint(rows, self.members, self.parts)
        return codes[..., 0]


def _rounded(words: Words, rows: Tensor, index: IndexQuantizer, options: JoinOptions) -> _Rounded:
    """Choose the code step of every column and round."""
    low = words.values.amin(3)  # [m, k, w]
    spread = (words.values.amax(3) - low).sum(0).flatten()
    weight = words.weight.flatten(1)
    least, largest = spread / LARGEST_CODE, float(spread.max()) / LARGEST_CODE
    variance = _variance(words, rows)
    exponents = STRETCH if options.column_scaling is None else (options.column_scaling,)
    best, scale = float("inf"), least
    for exponent in exponents:
        step = torch.maximum(least.clamp(min=1e-12 * largest).pow(exponent) * largest ** (1 - exponent), least)
        rounding = (weight.square() @ step.square()) * len(words.members) / 12
        weight_step = (weight.abs() * step).amax(1) / _WEIGHT_LEVELS
        error = float((rounding + weight_step.square() / 12 * (variance / step.square()).sum()).mean())
        if error < best:
            best, scale = error, step
    steps = scale.reshape(words.values.shape[1:3])
    parts = torch.round((words.values - low[..., None]) / steps[..., None])
    # roundings of the parts may add up to one more than the largest code
    parts = parts.clamp(0, LARGEST_CODE).to(torch.uint8)
    return _Rounded(index, words.members, parts, scale, low.sum(0).flatten(), weight * scale)


def _variance(words: Words, rows: Tensor) -> Tensor:
    """Measure the variance of every column over calibration inputs, ``[k * w]``."""
    total: Tensor = torch.zeros(())
    few = rows[:: max(1, len(rows) // 512)]
    for inputs, values in zip(words.members, words.values, strict=True):
        at = few[:, inputs].T.expand(values.shape[0], -1, -1)  # [k, w, n]
        total = total + torch.gather(values, 2, at)
    return total.var(2, correction=0).flatten()
