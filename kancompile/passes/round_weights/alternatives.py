"""Try other methods where rounding to nearest limits a layer, and keep what measures best on rows that no method has seen.

With 8 bits rounding to nearest usually costs less than the codes of the tables. Where functions overlap, though, fitted
coefficients are large and of alternating sign, and errors of their own do not cancel; methods that let errors cancel each other
win several dB at no cost at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kancompile.passes.rounding_methods import (
    FeatureSource,
    Method,
    Rounded,
    RoundingProblem,
    Uniform,
    output_errors,
    output_spreads,
)

ENOUGH_DB = 45.0
"""Ratio of what varies in every output to the error of rounding above which no other method is tried."""
ENOUGH_DB_WIDE = 34.0
"""The same for layers of more than 2048 columns, or as many products of their rows, where other methods take seconds."""
WIDE = 2048
_MANY_PRODUCTS = 2e10
_MOST_ROWS, _ROWS_FOR_A_COLUMN = 4096, 6
_BLOCKS, _FOLDS = 50, 5
_WORTH = 0.8


def best_method(
    problems: Sequence[RoundingProblem],
    nearest: Sequence[Rounded],
    alternatives: Mapping[str, Method],
    generator: torch.Generator,
) -> tuple[str, Method, str] | None:
    """Choose a method for one layer.

    Args:
        problems: the rounding problems of the layer: one, or one for each channel group.
        nearest: their solutions by rounding to nearest.
        alternatives: methods to try, by name.
        generator: for their random choices.

    Returns:
        name, method and a clause for the report; ``None`` where nearest rounding does not limit the layer, or none of them leaves
        less than 0.8 of its error on the rows held out.
    """
    is_wide = any(p.c > WIDE or p.features.n * p.c**2 > _MANY_PRODUCTS for p in problems)
    limits = ENOUGH_DB_WIDE if is_wide else ENOUGH_DB
    pairs = list(zip(problems, nearest, strict=True))
    if min(_worst_db(problem, rounded) for problem, rounded in pairs) >= limits:
        return None
    seen, unseen = ([_rows(problem, held_out) for problem in problems] for held_out in (False, True))
    if min(problem.features.n for problem in (*seen, *unseen)) < 2:
        return None
    errors = {"uniform": _judged(Uniform(), seen, unseen, generator)}
    errors |= {name: _judged(method, seen, unseen, generator) for name, method in alternatives.items()}
    best = min(errors, key=lambda name: errors[name])
    if not errors[best] < _WORTH * errors["uniform"]:
        return None
    gain = 10 * math.log10(errors["uniform"] / max(errors[best], 1e-300))
    return best, alternatives[best], f"{best} leaves {gain:.1f} dB less error than rounding to nearest on rows held out"


def _judged(
    method: Method, seen: Sequence[RoundingProblem], unseen: Sequence[RoundingProblem], generator: torch.Generator
) -> float:
    """Round on some rows and measure on others: error of the outputs as a share of what varies in them, the worst one."""
    shares = []
    for problem, held_out in zip(seen, unseen, strict=True):
        error = output_errors(held_out, method(problem, generator))
        shares.append(float((error / output_spreads(held_out).clamp(min=1e-30)).max()))
    return max(shares)


def _worst_db(problem: RoundingProblem, rounded: Rounded) -> float:
    spread, error = output_spreads(problem), output_errors(problem, rounded)
    varying = spread > 0
    if not bool(varying.any()) or float(error[varying].max()) == 0:
        return math.inf
    return float(10 * torch.log10(spread[varying] / error[varying].clamp(min=1e-300)).min())


def _rows(problem: RoundingProblem, held_out: bool) -> RoundingProblem:
    """Give the problem on every fifth block of its rows, or on the others; neighboring rows are of one sample, or alike.

    Of more rows than a choice needs, the first of every block are taken.
    """
    block = max(1, problem.features.n // _BLOCKS)
    kept = -(-max(_MOST_ROWS, _ROWS_FOR_A_COLUMN * problem.c) // _BLOCKS)

    def picked(start: int, count: int) -> Tensor:
        rows = torch.arange(start, start + count)
        return (((rows // block) % _FOLDS == _FOLDS - 1) == held_out) & (rows % block < kept)

    def chunks() -> Iterator[Tensor]:
        start = 0
        for chunk in problem.features:
            part = chunk[picked(start, len(chunk))]
            start += len(chunk)
            if len(part):
                yield part

    count = int(picked(0, problem.features.n).sum())
    return replace(problem, features=FeatureSource(chunks, count, problem.c))
