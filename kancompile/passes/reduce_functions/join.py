"""Replace the functions of a linear layer by few functions of inputs that are looked up together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from kancompile.ir import Contraction, Expansion, IndexQuantizer, JointTable, distinct_inputs
from kancompile.passes.reduce_functions.codes import CodedWords, SharedBasis, code_words
from kancompile.passes.reduce_functions.fit import LeastSquares
from kancompile.passes.reduce_functions.words import PLANES, Words, find_words
from kancompile.passes.tabulate_expansions import (
    LookupCost,
    Range,
    choose_index,
    measured_samples,
    values_at_rows,
    values_of_inputs,
)

_MOST_LEVELS_OF_PAIRS = 64  # their table has the square of them, which is to stay in the first-level cache
_MOST_LEVELS_GIVEN = 256
_MOST_LEVELS = 1024
_INDEX_SHARE = 0.3  # of the error allowed that the rows of the index may take
_JUDGES = 4  # one sample in so many judges, and does not fit
_CONSTANT = 1e-12  # variance by the mean square, which roundings of float32 reach
_GROWTH = 1.05
_LEAST_SAMPLES = 128
_CHUNK = 512


@dataclass(frozen=True)
class JoinOptions:
    """Choices of one layer.

    Attributes:
        share: of the output's variance that may be lost.
        levels: rows for each input, ``None`` to choose them by measured error.
        range, percentile: see ``choose_index.ranges``.
        column_scaling: exponent of the column maximum that moves to the weights, ``None`` to estimate the best.
        always: whether inputs are looked up together wherever the error allows it, not only where that is faster.
    """

    share: float
    levels: int | None
    range: Range
    percentile: float
    column_scaling: float | None
    always: bool = False


@dataclass(frozen=True)
class Joined:
    """A layer of joint lookups, its weights not yet rounded.

    Attributes:
        tables, contraction: what takes the place of its expansions and contraction.
        lost: share of the output's variance lost, on samples that did not fit.
    """

    tables: list[JointTable]
    contraction: Contraction
    lost: float


@dataclass(frozen=True)
class _Read:
    """What one expansion of a layer reads, and its words, those that carry the most first."""

    expansion: Expansion
    index: IndexQuantizer
    rows: Tensor
    words: Words
    basis: SharedBasis | None


class Stays(Exception):
    """Each input is better looked up by itself."""


def join_layer(
    expansions: Sequence[Expansion],
    contraction: Contraction,
    inputs: Sequence[Tensor],
    samples: int,
    options: JoinOptions,
    most_columns: int,
) -> Joined:
    """Find as few joint functions as the share allows.

    Args:
        expansions: of the layer, each of inputs ``(n_in,)``.
        contraction: without a window.
        inputs: calibration inputs ``[n, ...]`` of every expansion.
        samples: calibration samples used to measure the error of indices.
        options: of the layer.
        most_columns: beyond which nothing is gained.

    Raises:
        Stays: each input is better looked up by itself; the text says why.
    """
    if len(inputs[0]) < _LEAST_SAMPLES:
        raise Stays(f"joint functions take {_LEAST_SAMPLES} calibration samples or more, found {len(inputs[0])}")
    if options.levels is not None and options.levels > _MOST_LEVELS_GIVEN:
        raise Stays(f"joint inputs have at most {_MOST_LEVELS_GIVEN} rows each, found levels = {options.levels}")
    generator, count = torch.Generator().manual_seed(0), len(inputs[0])
    inputs = [torch.cat([x, moved(x, generator)]) for x in inputs]
    chunks = zip(*(x.split(_CHUNK) for x in inputs), strict=True)
    output = torch.cat([contraction(*(one(x) for one, x in zip(expansions, part, strict=True))) for part in chunks])
    output = output.flatten(1)
    # as calibrated, and moved
    powers = [float(part.double().var(0, correction=0).mean()) for part in (output[:count], output[count:])]
    if not powers[0] > _CONSTANT * float(output.double().square().mean()):
        raise Stays("its output is constant over the calibration samples")
    weights = torch.split(contraction.weight, [one.n_in * one.k for one in expansions], dim=1)
    allowed = options.share * min(powers) / len(expansions)
    reads = [
        _read(expansion, contraction, weight, x, samples, options, allowed, most_columns)
        for expansion, weight, x in zip(expansions, weights, inputs, strict=True)
    ]
    owner = torch.cat([torch.full((len(read.words),), number) for number, read in enumerate(reads)])
    owner = owner[torch.cat([read.words.energy for read in reads]).argsort(descending=True, stable=True)]
    owner = owner[: most_columns // PLANES]
    reads = [replace(read, words=read.words.first(int((owner == number).sum()))) for number, read in enumerate(reads)]
    if not all(len(read.words) for read in reads):
        raise Stays("functions of some of its expansions carry nothing")
    coded, codes, weight = _coded(reads, options)
    starts = [0, *itertools.accumulate(one.weight.shape[1] for one in coded)]
    judging = (torch.arange(count) % _JUDGES == 0).repeat(2)  # a sample and its moved copy together
    equations = LeastSquares(codes[~judging], output[~judging], weight)

    @cache
    def lost(words: int) -> float:
        columns = torch.cat(
            [
                start + _columns_of(int((owner[:words] == number).sum()), len(read.words))
                for number, (start, read) in enumerate(zip(starts, reads, strict=False))
            ]
        )
        error = (equations.solve(columns)(codes[judging][:, columns]) - output[judging]).double().square().mean(1)
        return max(float(part.mean()) / power for part, power in zip(error.chunk(2), powers, strict=True))

    wanted = _fewest(lost, len(owner), options.share)
    if wanted is None:
        found = f"{len(owner) * PLANES} joint functions"
        raise Stays(f"{found} still lose more than {options.share:g} of the output's variance")
    kept = [
        replace(read, words=read.words.first(max(1, int((owner[:wanted] == number).sum()))).in_order())
        for number, read in enumerate(reads)
    ]
    coded, kept_codes, weight = _coded(kept, options)
    fitted = LeastSquares(kept_codes, output, weight).solve()
    tables = [one.table(tuple(read.expansion.in_shape)) for one, read in zip(coded, kept, strict=True)]
    return Joined(tables, contraction.replace(weight=fitted.weight, bias=fitted.bias, codes=None), lost(wanted))


def _coded(reads: Sequence[_Read], options: JoinOptions) -> tuple[list[CodedWords], Tensor, Tensor]:
    """Round the words of all expansions; give their codes ``[n, c]`` and weights ``[n_out, c]`` side by side."""
    coded = [code_words(read.words, read.rows, read.index, read.basis, options.column_scaling) for read in reads]
    codes = torch.cat([one(read.rows) for one, read in zip(coded, reads, strict=True)], dim=1)
    return coded, codes, torch.cat([one.weight for one in coded], dim=1)


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move inputs towards a value that some input took: of every sample another share, from none to all of them.

    What calibration never saw would else count for nothing: pixels at the border, say. An MNIST network whose 1,155 columns were
    chosen and fitted without such samples lost 2.6 points under noise (27.4 dB), one with 1,338 columns none (31 dB).
    """
    share = torch.rand((len(x),) + (1,) * (x.dim() - 1), generator=generator)
    others = x.flatten()[torch.randint(x.numel(), x.shape, generator=generator)]
    towards = x + torch.rand(x.shape, generator=generator) * (others - x)
    return torch.where(torch.rand(x.shape, generator=generator) < share, towards, x)


def _read(
    expansion: Expansion,
    contraction: Contraction,
    weight: Tensor,
    x: Tensor,
    samples: int,
    options: JoinOptions,
    allowed: float,
    most_columns: int,
) -> _Read:
    """Choose the index of an expansion's inputs and find its words.

    Inputs are looked up in pairs where few rows are enough, else each with functions of its own, if all share a basis.

    Args:
        expansion, contraction: of the layer.
        weight: columns of the expansion.
        x: what it reads.
        samples, options, most_columns: see :func:`join_layer`.
        allowed: mean squared error at the output.
    """
    group = distinct_inputs(expansion, float(x.min()), float(x.max()))[1]
    is_shared = not bool(group.any())
    cost = LookupCost(
        expansion,
        contraction,
        weight,
        measured_samples(x, samples),
        group if is_shared else torch.arange(expansion.n_in),
    )
    tried = [(2, _MOST_LEVELS_OF_PAIRS), (1, _MOST_LEVELS)]
    if options.levels is not None and options.levels > _MOST_LEVELS_OF_PAIRS:
        tried = tried[1:]
    for together, most_levels in tried:  # noqa: B007 (the last one tried is used below)
        # choose_index stops at a tenth
        wanted = 10 * _INDEX_SHARE * allowed
        choice = choose_index(cost, wanted, options.levels, options.range, most_levels, percentile=options.percentile)
        if choice.error <= allowed or not is_shared:
            break
    if choice.error > allowed:
        raise Stays(
            f"{choice.index.levels} rows for an input lose more than {options.share:g} of the output's variance"
        )
    index = choice.index
    rows = index(x.reshape(len(x), -1)).long()
    shaped = weight.reshape(contraction.n_out, expansion.n_in, expansion.k)
    basis = SharedBasis.of(values_at_rows(expansion, index, x)[0]) if is_shared else None
    values = (
        values_of_inputs(expansion, index, x, torch.arange(expansion.n_in))
        if basis is None
        else basis.values()[:, None].expand(-1, expansion.n_in, -1)
    )
    words = find_words(values, shaped, rows, max(1, most_columns // PLANES), together)
    return _Read(expansion, index, rows, words, basis)


def _columns_of(words: int, count: int) -> Tensor:
    """Number the columns of the first words of ``count``, planes major."""
    return (torch.arange(PLANES)[:, None] * count + torch.arange(words)).flatten()


def _fewest(lost: Callable[[int], float], most: int, share: float) -> int | None:
    """Find the smallest of growing counts whose loss is within the share; ``None`` where that of all is not."""
    growth = range(2, math.ceil(math.log(max(most, 2), _GROWTH)) + 1)
    counts = sorted({min(most, math.ceil(_GROWTH**power)) for power in growth})
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
