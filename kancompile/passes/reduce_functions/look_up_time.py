"""Estimate how long ONNX Runtime takes for a layer that looks each input up, and for one that looks pairs up.

Not a clock decides, but costs of operators that were measured once, so that equal models and recipes give equal files everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kancompile.passes.reduce_functions.words import PLANES

BALANCE = (1, 16, 256)
"""Batch sizes that a file is made for where nothing else is asked."""
_WORTH, _MOST_SLOWER = 0.9, 1.6
MOST_COLUMNS = 4098
"""Columns that are fitted in seconds."""


@dataclass(frozen=True)
class OperatorCosts:
    """Nanoseconds on an x86 server processor with AVX-512 VNNI, one thread, ONNX Runtime 1.32.

    Attributes:
        node: of any node, whatever it does.
        quantize: of an input that is quantized.
        gather: of a row number that Gather looks up, however short the row.
        product: of an 8-bit product.
        load: of a weight that is read, once a batch.
        pick: of an input that is picked from a batch in columns, once a batch.
        word: of a word that is looked up in columns, its index and its taking apart included, for each sample.
        column: of a column of codes that is put in its place, for each sample.
    """

    node: float = 500.0
    quantize: float = 0.2
    gather: float = 8.2
    product: float = 0.0053
    load: float = 0.008
    pick: float = 6.0
    word: float = 2.5
    column: float = 0.12


COSTS = OperatorCosts()
_PAIRED_FROM, _PAIRED = 512, 0.55
_NODES_EACH, _NODES_JOINT, _MEMBERS = 6, 20, 2


def time_of_each(sizes: Sequence[tuple[int, int]], n_out: int, batch: int, costs: OperatorCosts = COSTS) -> float:
    """Estimate nanoseconds of a layer that looks each of its inputs up.

    Args:
        sizes: inputs and functions of an input, of every expansion.
        n_out: outputs.
        batch: samples.
        costs: of the operators.
    """
    inputs, weights = sum(n_in for n_in, _ in sizes), n_out * sum(n_in * k for n_in, k in sizes)
    # wide layers of few rows look two of their inputs up at a time (see targets.onnx.arrange_tables)
    gathers = sum(n_in * (_PAIRED if n_in >= _PAIRED_FROM else 1) for n_in, _ in sizes)
    of_sample = inputs * costs.quantize + gathers * costs.gather + weights * costs.product
    return _NODES_EACH * len(sizes) * costs.node + weights * costs.load + batch * of_sample


def time_of_joint(
    sizes: Sequence[tuple[int, int]], columns: int, n_out: int, batch: int, costs: OperatorCosts = COSTS
) -> float:
    """Estimate nanoseconds of a layer of that many columns, ``PLANES`` to a word."""
    inputs, words, weights = sum(n_in for n_in, _ in sizes), columns / PLANES, columns * n_out
    of_sample = inputs * costs.quantize + words * costs.word + columns * costs.column + weights * costs.product
    once = words * _MEMBERS * costs.pick + weights * costs.load
    return _NODES_JOINT * len(sizes) * costs.node + once + batch * of_sample


def is_faster(sizes: Sequence[tuple[int, int]], n_out: int, columns: int, batches: Sequence[int] = BALANCE) -> bool:
    """Whether joint look-ups are faster on average over batch sizes, as logarithms, and much slower for none of them."""
    ratios = [time_of_joint(sizes, columns, n_out, b) / time_of_each(sizes, n_out, b) for b in batches]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) < _WORTH and max(ratios) <= _MOST_SLOWER


def most_columns(sizes: Sequence[tuple[int, int]], n_out: int, batches: Sequence[int] = BALANCE) -> int:
    """Find the most columns, a multiple of ``PLANES``, that are still faster; 0 where none are."""
    low, high = 0, min(sum(n_in * k for n_in, k in sizes) // 2, MOST_COLUMNS) // PLANES
    while low < high:
        middle = (low + high + 1) // 2
        if is_faster(sizes, n_out, middle * PLANES, batches):
            low = middle
        else:
            high = middle - 1
    return low * PLANES
