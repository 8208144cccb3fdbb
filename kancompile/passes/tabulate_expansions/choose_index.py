"""Choose, by measured error, how an expansion's input becomes a row number: range and number of rows.

More rows cost next to nothing at run time, so the question is only how many are needed. Hidden inputs often leave a
spline's support far behind (-14 ... 11 around a support of -2.2 ... 2.2), and then 256 rows over the whole range waste
most of them; inputs that lie on a lattice, such as pixels, need exactly the lattice. Both show in one number: the mean
squared error at the layer's output, over calibration inputs, of looking basis values up instead of computing them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import IndexQuantizer
from kancompile.processes import dealt

LEVELS = (16, 32, 64, 128, 255, 512, 1024, 2048, 4096)  # 255 rows fit a byte and leave one number free for pairs
Range = Literal["minmax", "percentile", "mse"]
_LATTICE_LEVELS = 4096
_KEPT_RANGES = 3
_PRUNED_FROM = 64
_END_ROUNDS = 2
_END_SHARES = (0.5, 0.7, 0.85, 1.2)


@dataclass(frozen=True)
class IndexChoice:
    """An index quantizer and the error it causes.

    Attributes:
        index: the quantizer.
        error: mean squared error at the layer's output, in squared output units.
        range: how its range was found.
    """

    index: IndexQuantizer
    error: float
    range: str


def index_over(low: float, high: float, levels: int) -> IndexQuantizer:
    """Spread ``levels`` rows over ``low ... high``, widened to contain 0 as a QuantizeLinear zero point requires."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not np.isfinite(high - low):
        raise KanCompileError(f"input range: found {low} ... {high}, expected finite values")
    span = high - low if high > low else 1.0
    # one row is lost to rounding the zero point unless the range happens to put 0 on a row
    for rows in (levels - 1, levels - 2):
        scale = float(np.float32(max(span / max(rows, 1), 1e-30)))
        zero_point = int(np.clip(np.rint(-low / scale), 0, levels - 1))
        index = IndexQuantizer(scale, zero_point, levels)
        if index.low <= low + 0.01 * scale and index.high >= high - 0.01 * scale:
            break
    return index


def lattice_indices(x: Tensor) -> Iterator[IndexQuantizer]:
    """Recognize inputs on a lattice (pixels, counts) and yield quantizers that keep its points apart.

    The first has one row for each point. QuantizeLinear cannot shift rows by a fraction of a step, but it need not: rows
    stand for the mean of the inputs they receive. A step smaller by 1/1000 keeps points that lie exactly between two
    rows from being rounded to even in pairs. Where 0 lies between two points the last row then may hold two points; the
    second quantizer, with rows half a step apart, has every point for itself.

    Args:
        x: calibration inputs, any shape.
    """
    points = torch.unique(x.double())
    if not 2 <= len(points) <= _LATTICE_LEVELS:
        return
    low, high = float(points[0]), float(points[-1])
    step = (high - low) / round((high - low) / float(torch.diff(points).min()))
    rows = (points - low) / step
    tolerance = max(1e-4, 4e-7 * max(abs(low), abs(high)) / step)
    if float((rows - rows.round()).abs().max()) > min(tolerance, 0.1) or high < 0 or low > 0:
        return
    levels = round((high - low) / step) + 1
    if levels <= _LATTICE_LEVELS:
        zero_point = min(int(np.ceil(-low / step - 1e-3)), levels - 1)
        yield IndexQuantizer(float(np.float32(step * 0.999)), zero_point, levels)
    if 2 * levels - 1 <= _LATTICE_LEVELS:
        yield IndexQuantizer(float(np.float32(step / 2)), round(-low / (step / 2)), 2 * levels - 1)


def ranges(x: Tensor, kind: Range, percentile: float = 99.99) -> Iterator[tuple[str, float, float]]:
    """Yield the input ranges to try as ``(name, low, high)``.

    Args:
        x: calibration inputs, any shape.
        kind: ``"minmax"``: all of the data; ``"percentile"``: without the outermost shares; ``"mse"``: both, with 0.01 %,
            0.1 % and 1 % left out, a margin of 10 % for values that calibration did not see, and ranges shrunk in steps.
        percentile: share of the inputs in percent that lies inside on either side, for ``"percentile"``.
    """
    low, high = float(x.min()), float(x.max())
    if kind in ("minmax", "mse"):
        yield "minmax", low, high
    if kind in ("percentile", "mse"):
        values = x.flatten().sort().values
        for share in (1e-4, 1e-3, 1e-2) if kind == "mse" else (1 - percentile / 100,):
            cut = int(share * (values.numel() - 1))
            if cut > 0 or kind == "percentile":
                yield f"percentile {100 - 100 * share:g}", float(values[cut]), float(values[-1 - cut])
    if kind == "mse":
        yield "minmax + 10 %", low - 0.1 * (high - low), high + 0.1 * (high - low)
        for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            yield f"minmax x {share:g}", low * share, high * share


def row_numbers(index: IndexQuantizer, x: Tensor) -> Tensor:
    """Quantize inputs as the device will, int64 of the shape of ``x``."""
    return index(x).long()


def row_inputs(index: IndexQuantizer, x: Tensor) -> Tensor:
    """Give the input each row stands for: the mean of the calibration inputs it receives, or its nominal value.

    That is the centroid condition of Lloyd (1982) for a quantizer whose cells are given.

    Args:
        index: the quantizer.
        x: calibration inputs, any shape.

    Returns:
        float64 ``[levels]``.
    """
    return row_inputs_of_groups(index, x.reshape(-1, 1), torch.zeros(1, dtype=torch.int64), 0.0)[0]


def row_inputs_of_groups(index: IndexQuantizer, x: Tensor, group: Tensor, prior: float) -> Tensor:
    """Give the input that each row of every table stands for, as :func:`row_inputs` does for one.

    Args:
        index: the quantizer.
        x: calibration inputs ``[..., n_in]``.
        group: number of the table of every input, int64 ``[n_in]``.
        prior: see :func:`row_parts`.

    Returns:
        float64 ``[T, levels]``.
    """
    tables = int(group.max()) + 1
    place = (row_numbers(index, x) + group * index.levels).flatten()
    count = torch.bincount(place, minlength=tables * index.levels).reshape(tables, -1)
    total = torch.bincount(place, weights=x.flatten().double(), minlength=tables * index.levels).reshape(tables, -1)
    nominal = index.rows()
    return torch.where(count > 0, (total + prior * nominal) / (count + prior).clamp(min=1), nominal)


def row_parts(index: IndexQuantizer, x: Tensor, parts: int = 8, prior: float = 0.0) -> tuple[Tensor, Tensor]:
    """Divide the calibration inputs that each row receives into parts of equal size, and give the mean of each part.

    A row that stands for many inputs, above all the first and the last, which take all that lies beyond, is worth the mean of
    the function over them, not the function of their mean.

    Args:
        index: the quantizer.
        x: calibration inputs, any shape.
        parts: of each row.
        prior: how many inputs of the nominal value count beside them. A few inputs say little of those to come: with a table
            for every input and some hundred samples, plain means lost 0.2 to 1.2 dB on fresh ones.

    Returns:
        means and shares of the parts, float64 ``[levels, parts]``, with a prior one part more, shares of each row adding up
        to 1; rows that receive nothing stand for their nominal input.
    """
    values = x.flatten().sort().values
    rows = row_numbers(index, values)
    count = torch.bincount(rows, minlength=index.levels)
    place = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
    part = rows * parts + place * parts // count[rows]
    size = torch.bincount(part, minlength=index.levels * parts).reshape(-1, parts)
    total = torch.bincount(part, weights=values.double(), minlength=index.levels * parts).reshape(-1, parts)
    empty, nominal = (count == 0)[:, None], index.rows()[:, None]
    means = torch.where(size > 0, total / size.clamp(min=1), nominal)
    share = torch.where(empty, 1 / parts, size / count.clamp(min=1)[:, None])
    if not prior:
        return means, share
    own = count[:, None] / (count[:, None] + prior)
    return torch.cat([means, nominal], 1), torch.cat([share * own, 1 - own], 1)


def refine_ends(error_of: MeasuresLookup, choice: IndexChoice) -> IndexChoice:
    """Move the two ends of a range, one at a time, as long as the error falls.

    Functions that saturate on one side only, as a rectifier does, need few rows there.

    Args:
        error_of: measures a quantizer.
        choice: where to start.
    """
    best, levels = choice, choice.index.levels
    for _ in range(_END_ROUNDS):
        before = best
        for end, share in itertools.product((0, 1), _END_SHARES):
            low, high = (best.index.low * (share if end == 0 else 1), best.index.high * (share if end == 1 else 1))
            index = index_over(low, high, levels)
            error = error_of(index)
            if error < best.error:
                best = IndexChoice(index, error, f"{choice.range}, ends refined")
        if best is before:
            break
    return best


class MeasuresLookup(ABC):
    """What measures the error of index quantizers at a layer's output, each one once.

    Attributes:
        x: calibration inputs, any shape.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._known: dict[IndexQuantizer, float] = {}

    def __call__(self, index: IndexQuantizer) -> float:
        """Return the mean squared error over samples (or pixels) and outputs with one quantizer."""
        if index not in self._known:
            self._known[index] = self._measure(index)
        return self._known[index]

    def measure_all(self, indices: Sequence[IndexQuantizer]) -> None:
        """Measure several quantizers, which processes share out."""
        unknown = [index for index in dict.fromkeys(indices) if index not in self._known]
        found = dealt(unknown, lambda index: (torch.tensor(self._measure(index), dtype=torch.float64),))
        self._known |= {index: float(error) for index, (error,) in zip(unknown, found, strict=True)}

    @abstractmethod
    def _measure(self, index: IndexQuantizer) -> float:
        """Measure that error."""


def choose_index(
    error_of: MeasuresLookup,
    other_error: float,
    levels: int | None = None,
    range: Range = "mse",
    most_levels: int = LEVELS[-1],
    fewest_levels: int = LEVELS[0],
    percentile: float = 99.99,
    lowest: float = -math.inf,
) -> IndexChoice:
    """Choose range and number of rows.

    The smallest number of rows is taken whose error at the output is at most a tenth of ``other_error``, what the
    weights and the table codes cost anyway (0.4 dB); where none is, the one with the least error.

    Args:
        error_of: measures a quantizer.
        other_error: mean squared error at the output that does not depend on the choice.
        levels: a fixed number of rows, or ``None`` to choose it.
        range: which ranges to try.
        most_levels: the largest number of rows to try.
        fewest_levels: the smallest number of rows to try.
        percentile: see :func:`ranges`.
        lowest: input below which no range begins.
    """
    most = levels if levels is not None else most_levels
    lattice = [index for index in lattice_indices(error_of.x) if index.levels <= most]
    counts = [levels] if levels is not None else [n for n in LEVELS if fewest_levels <= n <= most_levels]
    bounds = [(name, max(low, lowest), high) for name, low, high in ranges(error_of.x, range, percentile)]
    tried: list[IndexChoice] = []
    for count in sorted({*counts, *(index.levels for index in lattice)}):
        tries = [("lattice", index) for index in lattice if index.levels == count]
        if count in counts:
            tries += [(name, index_over(low, high, count)) for name, low, high in bounds]
        error_of.measure_all([index for _, index in tries])
        found = [IndexChoice(index, error_of(index), name) for name, index in tries]
        if count in counts:
            # of many ranges only those that do well at one size are worth measuring at the next
            best = sorted(found, key=lambda choice: choice.error)[:_KEPT_RANGES]
            kept = {choice.range for choice in best} | {"minmax", "minmax + 10 %"}
            bounds = [bound for bound in bounds if bound[0] in kept] if count >= _PRUNED_FROM else bounds
        tried += found
        best_now = min(found, key=lambda choice: choice.error)
        if levels is None and best_now.error <= 0.1 * other_error:
            return best_now
    return min(tried, key=lambda choice: choice.error)
