"""Compare inputs with the region that a model, or its tables, were made for: raw data are seen there first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Expansion, Program, Values, tensors_of

_PROBES = 513
_CONSTANT = 1e-4
_FEW = 64
NOTICEABLE_SHARE = 0.05
"""Share of values outside the grid from which on a reader is told; trained models have a few."""


@dataclass(frozen=True)
class OutsideGrid:
    """How a model's inputs lie to the grid of the layer that reads them.

    Attributes:
        layer: its name.
        share: of the values that lie outside.
        low, high: of the grid, outside of which the layer's local functions are constant.
        smallest, largest: of the values.
    """

    layer: str
    share: float
    low: float
    high: float
    smallest: float
    largest: float

    def note(self) -> str | None:
        """Say it for people; ``None`` where the share is small."""
        if self.share < NOTICEABLE_SHARE:
            return None
        raw = "raw data? " if self.share > 0.25 else ""
        return (
            f"{raw}{100 * self.share:.0f} % of inputs lie outside the grid {self.low:.3g} ... {self.high:.3g} of layer "
            f"{self.layer!r} (they span {self.smallest:.4g} ... {self.largest:.4g}), where its functions are constant; scale "
            "them as in training; kancompile diagnose names a scaling that fits"
        )


def outside_grid(program: Program, x: Values) -> OutsideGrid | None:
    """Give the share of model inputs outside the grid of the layer that reads them; ``None`` where none has a grid.

    Args:
        program: the float program.
        x: inputs ``[n, *input_shape]``.
    """
    for layer, expansion, read in read_from_input(program, x):
        grid = grid_of(expansion, float(read.abs().max()))
        if grid is not None:
            outside = float(((read < grid[0]) | (read > grid[1])).double().mean())
            return OutsideGrid(layer, outside, *grid, float(read.min()), float(read.max()))
    return None


def read_from_input(program: Program, x: Values) -> Iterator[tuple[str, Expansion, Tensor]]:
    """Yield the layers that read the model's input as it is: name, expansion, and inputs as they read them."""
    few = x[:_FEW]
    for layer in program.layers():
        for target in layer.expansions:
            expansion = program.module(target)
            if isinstance(expansion, Expansion):
                read = program.inputs(few, [target])[target]
                for part, whole in zip(tensors_of(few), tensors_of(x), strict=True):
                    if read.numel() == part.numel() and torch.equal(read.flatten(), part.flatten()):
                        yield layer.name, expansion, whole.reshape(-1, *read.shape[1:])
                        break


def grid_of(expansion: Expansion, largest: float) -> tuple[float, float] | None:
    """Find where the functions that have a grid change at all: outside of it they are constant.

    Branches whose functions go on changing (the base activation, polynomials) have no grid and do not count.

    Args:
        expansion: the float expansion.
        largest: largest absolute input that is of interest.

    Returns:
        lowest and highest input of the grid, ``None`` where no branch has one.
    """
    reach = 4 * max(largest, 4.0)
    # dense near 0, where grids are, and reaching far
    points = torch.sinh(torch.linspace(-math.asinh(reach), math.asinh(reach), _PROBES, dtype=torch.float64))
    values = torch.cat([expansion.sample_inputs(part) for part in points.split(64)]).flatten(1, 1)
    grids = []
    first = 0
    for branch in expansion.branches:
        k = int(branch.k)  # type: ignore[arg-type]
        part = values[..., first : first + k].flatten(1)
        first += k
        scale = _CONSTANT * part.abs().amax().clamp(min=1e-30)
        from_left = ((part - part[0]).abs().amax(1) > scale).nonzero()
        from_right = ((part - part[-1]).abs().amax(1) > scale).nonzero()
        if not len(from_left) or not len(from_right):
            continue
        start, end = int(from_left[0]), int(from_right[-1])
        if start > _PROBES // 20 and end < _PROBES - 1 - _PROBES // 20:
            grids.append((float(points[start - 1]), float(points[end + 1])))
    if not grids:
        return None
    return min(low for low, _ in grids), max(high for _, high in grids)
