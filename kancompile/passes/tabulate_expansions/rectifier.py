"""A rectifier in front of a layer is a range that begins at 0: rows hold their own numbers, and nothing is looked up.

    table of relu over low ... high      ->      rows of x over 0 ... high, which saturate below 0

The rows that inputs below 0 took are spent on those above, and a target passes the row numbers on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kancompile.ir import Branch, Expansion, to_channels_last

_POINTS = 255


def is_rectifier(expansion: Expansion, x: Tensor) -> bool:
    """Whether an expansion is ``max(x, 0)`` of every input, as far as points around the inputs ``x`` tell."""
    if (
        expansion.k != 1
        or expansion.is_identity
        or expansion.in_shape[-1] != expansion.anchor_shape[_features(expansion)]
    ):
        return False
    reach = 2 * float(x.abs().max()) + 1.0
    points = torch.rand(_POINTS, generator=torch.Generator().manual_seed(0)) * 2 * reach - reach
    values = expansion.sample_inputs(points)[..., 0]
    return torch.equal(values, points.clamp(min=0)[:, None].expand_as(values))


def identity_of(expansion: Expansion) -> Expansion:
    """Return the expansion that passes on what another one reads, under the name of its branch."""
    numbers = torch.arange(math.prod(expansion.anchor_shape)).reshape(1, *expansion.anchor_shape)
    position = (to_channels_last(numbers) if expansion.channels_first else numbers)[0].reshape(*expansion.in_shape, 1)
    name = str(expansion.branches[0].name)
    return Expansion(expansion.anchor_shape, [Branch(name, None, position.contiguous())], expansion.channels_first)


def _features(expansion: Expansion) -> int:
    return 0 if expansion.channels_first else -1
