"""Recognize functions that are constant between jumps at even distances, and give each constant a row.

    f(x) = g(round(x / s))      ->      rows s apart, whose borders are the jumps of f

So are the functions of a network that was trained with quantized activations: fake quantization, learned steps, tables of
integers. Rows that are chosen as for smooth functions, by measured error, are many times as many, and wrong beside every jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kancompile.ir import Expansion, IndexQuantizer

_PROBES = 64
_NEAR = 1e-4  # of the range: so far apart are two probes, which 256 steps tell apart in 3 of 100 cases
_GRID = 4096
_BLOCK_ELEMENTS = 1 << 22
_MOST_ROWS = 256
_HALVINGS = 32
_EVEN = 0.01  # of a step
_INSIDE = 0.49


@dataclass(frozen=True)
class Steps:
    """A lattice that holds all jumps of some functions.

    Attributes:
        first: input of the first jump.
        distance: of neighbors on the lattice, in input units.
        cells: how many of them lie between the first and the last jump.
    """

    first: float
    distance: float
    cells: int

    @property
    def off_center(self) -> float:
        """By how much jumps lie above the middle between two multiples of the distance, in input units."""
        place = self.first / self.distance - 0.5
        return (place - round(place)) * self.distance

    @property
    def is_centered(self) -> bool:
        """Whether jumps lie halfway between two multiples of the distance, as those of rounding do."""
        return abs(self.off_center) <= _EVEN * self.distance

    def quantizer(self) -> IndexQuantizer | None:
        """Give the quantizer with one row for the inputs between two neighbors, and one more on either side.

        Rows lie on multiples of their distance. ``None`` where they and 0 are more than 256.
        """
        zero_point, levels = 1 - math.ceil(self.first / self.distance - _EVEN), self.cells + 2
        if zero_point < 0:
            zero_point, levels = 0, levels - zero_point
        levels = max(levels, zero_point + 1)
        return IndexQuantizer(float(np.float32(self.distance)), zero_point, levels) if levels <= _MOST_ROWS else None


def step_quantizer(expansion: Expansion, x: Tensor) -> IndexQuantizer | None:
    """Find the quantizer whose rows are the constants of the functions of an expansion.

    Args:
        expansion: functions of any number of inputs.
        x: calibration inputs, any shape.

    Returns:
        ``None`` where there are no steps (:func:`find_steps`), or too many. Jumps have to be halfway between two rows; other ones
        will do where inputs are multiples of the distance, as sums of integers are.
    """
    values, inputs = _evaluator(expansion), torch.unique(x)
    for steps in find_steps(expansion, x):
        index = steps.quantizer()
        if index is not None and (_constant_in_rows(values, index, inputs) or _constant_at(values, index, inputs)):
            return index
    return None


def find_steps(expansion: Expansion, x: Tensor) -> Iterator[Steps]:
    """Find the lattice of the jumps of functions that are constant between them.

    Args:
        expansion: functions of any number of inputs.
        x: calibration inputs, any shape.

    Yields:
        that of all jumps in three times the range of the inputs, so that functions stay right where calibration did not reach,
        then that of the jumps in the range; nothing where a function is not constant between jumps, where jumps are on no
        lattice, or where nothing jumps.
    """
    low, high = float(x.min()), float(x.max())
    values = _evaluator(expansion)
    if not low < high or expansion.is_identity or not _is_stepped(values, low, high):
        return
    for margin in (high - low, 0.0):
        jumps = _jumps(values, low - margin, high + margin)
        steps = None if jumps is None else lattice_of(jumps)
        if steps is not None:
            yield steps


def lattice_of(jumps: Tensor) -> Steps | None:
    """Find the coarsest lattice that holds all jumps, ascending float64 ``[n]``; ``None`` where there is none.

    One jump is halfway between 0 and another place, or at 0 and distances are 1.
    """
    first, last = float(jumps[0]), float(jumps[-1])
    if len(jumps) == 1:
        return Steps(first, 2 * abs(first) or 1.0, 0)
    nearest = float(torch.diff(jumps).min())
    cells = round((last - first) / nearest) if nearest > 0 else 0
    if not 0 < cells < _MOST_ROWS:
        return None
    distance = (last - first) / cells
    places = (jumps - first) / distance
    return Steps(first, distance, cells) if float((places - places.round()).abs().max()) <= _EVEN else None


def _evaluator(expansion: Expansion) -> Callable[[Tensor], Tensor]:
    block = max(1, _BLOCK_ELEMENTS // (expansion.n_in * expansion.k))

    def values(points: Tensor) -> Tensor:
        spread = points.to(torch.float32)[:, None].expand(-1, expansion.n_in)
        return torch.cat([expansion.evaluate_inputs(part).flatten(1) for part in spread.split(block)])

    return values


def _is_stepped(values: Callable[[Tensor], Tensor], low: float, high: float) -> bool:
    """Whether all functions are equal at most pairs of near inputs, and do not stay so over the range."""
    generator = torch.Generator().manual_seed(0)
    places = (torch.arange(_PROBES, dtype=torch.float64) + torch.rand(_PROBES, generator=generator)) / _PROBES
    points = low + (high - low) * places
    here, near = values(points), values(points + _NEAR * (high - low))
    return float((here == near).all(1).double().mean()) > 0.75 and not torch.equal(here, here[:1].expand_as(here))


def _jumps(values: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor | None:
    """Find where functions change, by halving, float64 ``[n]``; ``None`` where that is at too many places."""
    points = torch.linspace(low, high, _GRID, dtype=torch.float64)
    found = values(points)
    changed = (found[1:] != found[:-1]).any(1)
    if not 0 < int(changed.sum()) < _MOST_ROWS:
        return None
    left, right, known = points[:-1][changed], points[1:][changed], found[:-1][changed]
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        same = (values(middle) == known).all(1)
        left, right = torch.where(same, middle, left), torch.where(same, right, middle)
    return (left + right) / 2


def _constant_in_rows(values: Callable[[Tensor], Tensor], index: IndexQuantizer, x: Tensor) -> bool:
    """Whether functions are constant over the cells of all rows, and beyond them as far as the inputs reach."""
    middle = index.rows()
    expected = values(middle)
    sides = [values(middle + share * index.scale) for share in (-_INSIDE, _INSIDE, -_INSIDE / 2, _INSIDE / 2)]
    beyond = values(torch.tensor([min(float(x[0]), index.low), max(float(x[-1]), index.high)], dtype=torch.float64))
    ends = torch.stack([expected[0], expected[-1]])
    return all(torch.equal(side, expected) for side in sides) and torch.equal(beyond, ends)


def _constant_at(values: Callable[[Tensor], Tensor], index: IndexQuantizer, x: Tensor) -> bool:
    """Whether the functions are at all of some inputs what they are at their rows, and a little above these."""
    middle = index.rows()
    expected = values(middle)
    if not torch.equal(values(middle + _EVEN * index.scale), expected):
        return False
    rows = index(x.float()).long()
    return all(
        torch.equal(values(part), expected[place])
        for part, place in zip(x.split(_GRID), rows.split(_GRID), strict=True)
    )
