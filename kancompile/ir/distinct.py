"""Which inputs of an expansion share all their functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.ir.expansion import Expansion

_PROBES = 769


_SAME = 1e-6


def distinct_inputs(expansion: Expansion, low: float, high: float) -> tuple[list[int], Tensor]:
    """Find which inputs share all their functions.

    Returns:
        the first input of each distinct set of functions, and for every input the number of its set, int64 ``[n_in]``.
    """
    margin = 0.5 * (high - low) + 1e-3
    generator = torch.Generator().manual_seed(0)  # irregular probes, so that no lattice of knots hides between them
    points = torch.rand(_PROBES, generator=generator).sort().values * (high - low + 2 * margin) + low - margin
    values = sample_inputs(expansion, points)
    values = values.transpose(0, 1).flatten(1)
    values = values / values.abs().amax().clamp(min=1e-30)
    group = torch.full((len(values),), -1, dtype=torch.int64)
    first: list[int] = []
    while bool((group < 0).any()):
        leader = int((group < 0).nonzero()[0])
        alike = (group < 0) & ((values - values[leader]).abs().amax(1) <= _SAME)
        group[alike] = len(first)
        first.append(leader)
    return first, group


def sample_inputs(expansion: Expansion, points: Tensor) -> Tensor:
    """Evaluate every input at the same points, ``[n, n_in, k]``; leading dimensions are treated alike."""
    if len(expansion.in_shape) > 1:
        return expansion.sample_inputs(points)
    return torch.cat([expansion.sample(part) for part in points.split(64)])
