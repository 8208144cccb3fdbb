"""Estimate how long ONNX Runtime takes for a layer that looks each input up, and for one that looks pairs up.

Not a clock decides, but the costs of a profile (``kancompile.recipe.CostProfile``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kancompile.ir import PAIRED_FROM, gains_by_columns
from kancompile.passes.reduce_functions.words import PLANES
from kancompile.recipe import LookUpCosts

BALANCE = (1, 16, 256)
"""Batch sizes that a file is made for where nothing else is asked."""
_WORTH, _MOST_SLOWER = 0.9, 1.25
MOST_COLUMNS = 4098
"""Columns that are fitted in seconds."""


_NODES_EACH, _NODES_JOINT, _MEMBERS = 6, 13, 2


def time_of_each(sizes: Sequence[tuple[int, int]], n_out: int, batch: int, costs: LookUpCosts) -> float:
    """Estimate nanoseconds of a layer that looks each of its inputs up.

    Args:
        sizes: inputs and functions of an input, of every expansion.
        n_out: outputs.
        batch: samples.
        costs: of the operators.
    """
    inputs, weights = sum(n_in for n_in, _ in sizes), n_out * sum(n_in * k for n_in, k in sizes)
    look_ups = sum(n_in * _look_up(n_in, k, costs) for n_in, k in sizes)
    of_sample = inputs * costs.quantize + look_ups + weights * costs.product
    return _NODES_EACH * len(sizes) * costs.node + weights * costs.load + batch * of_sample


def _look_up(n_in: int, k: int, costs: LookUpCosts) -> float:
    """Estimate what ``k`` functions of an input take, in the form that targets.onnx.arrange_tables writes."""
    if gains_by_columns(n_in, k):
        return k * costs.code
    # wide layers of few rows look two of their inputs up at a time
    return costs.gather_paired if n_in >= PAIRED_FROM else costs.gather


def time_of_joint(sizes: Sequence[tuple[int, int]], columns: int, n_out: int, batch: int, costs: LookUpCosts) -> float:
    """Estimate nanoseconds of a layer of that many columns, ``PLANES`` to a word."""
    inputs, words, weights = sum(n_in for n_in, _ in sizes), columns / PLANES, columns * n_out
    of_sample = inputs * costs.quantize + words * costs.word + columns * costs.column + weights * costs.product
    once = words * _MEMBERS * costs.pick + weights * costs.load
    return _NODES_JOINT * len(sizes) * costs.node + once + batch * of_sample


def is_faster(
    sizes: Sequence[tuple[int, int]], n_out: int, columns: int, costs: LookUpCosts, batches: Sequence[int] = BALANCE
) -> bool:
    """Whether joint lookups are faster on average over batch sizes, as logarithms, and much slower for none of them."""
    ratios = [time_of_joint(sizes, columns, n_out, b, costs) / time_of_each(sizes, n_out, b, costs) for b in batches]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) < _WORTH and max(ratios) <= _MOST_SLOWER


def most_columns(
    sizes: Sequence[tuple[int, int]], n_out: int, costs: LookUpCosts, batches: Sequence[int] = BALANCE
) -> int:
    """Find the most columns, a multiple of ``PLANES``, that are still faster; 0 where none are."""
    low, high = 0, min(sum(n_in * k for n_in, k in sizes) // 2, MOST_COLUMNS) // PLANES
    while low < high:
        middle = (low + high + 1) // 2
        if is_faster(sizes, n_out, middle * PLANES, costs, batches):
            low = middle
        else:
            high = middle - 1
    return low * PLANES
