"""Leave out columns of a contraction that carry nothing: zero weights, constant functions, repeated functions.

A function number is removed only if it is removable for all inputs: the functions of different inputs then stay in step,
so that a table can still be shared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Branch, Expansion, to_channels_first

_FLAT = 1e-6
"""Largest variation, relative to its size, of a function that counts as constant."""
_MOST_CONSTANTS = 4096
_REACH, _GAP = 10.0, 0.02
"""How far points reach that are sampled densely, and how far apart they lie."""
_POINTS = 1001
_MARGIN = 4.0  # of an example's range, on both sides


@dataclass(frozen=True)
class Columns:
    """An expansion and the weights of its functions, float32 ``[n_out, n_in, k]``."""

    expansion: Expansion
    weight: Tensor


@functools.cache
def sample_points() -> Tensor:
    """Give points that tell functions apart: a grid, irrational steps between, and the ends of what models see."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [torch.linspace(-8, 8, 65), 2 * torch.randn(63, generator=generator), torch.tensor([0.0, -30, 30])]
    )


def sample_tokens(expansion: Expansion, points: Tensor, shift: int = 0) -> Tensor:
    """Evaluate an expansion that treats its tokens alike at the same points for all inputs.

    Points are dealt out over the tokens, so that many tokens cost no more than one.

    Args:
        expansion: of ``in_shape`` ``(*tokens, n_in)``.
        points: ``[n]`` input values.
        shift: deal them out from another token on.

    Returns:
        float32 ``[n, n_in, k]``.
    """
    lead = expansion.in_shape[:-1]
    tokens = math.prod(lead)
    places = torch.arange(len(points) + (-len(points)) % tokens) % len(points)
    dealt = points[places.roll(shift)].reshape(-1, *lead, 1).expand(-1, *expansion.in_shape)
    anchor = to_channels_first(dealt) if expansion.channels_first else dealt.reshape(-1, *expansion.anchor_shape)
    with torch.no_grad():
        values: Tensor = expansion(anchor.contiguous())
    return values.reshape(-1, expansion.n_in, expansion.k).roll(-shift, 0)[: len(points)]


def tokens_are_alike(expansion: Expansion) -> bool:
    """Whether all tokens have the same functions: every point is tried at several tokens, every token with some point."""
    points = sample_points()
    tokens = math.prod(expansion.in_shape[:-1])
    points = points[torch.arange(max(tokens, len(points))) % len(points)]
    first = sample_tokens(expansion, points)
    others = (sample_tokens(expansion, points, shift) for shift in (1, tokens // 2))
    return all(torch.allclose(first, other, rtol=1e-5, atol=1e-6, equal_nan=True) for other in others)


def merge_columns(columns: Columns, values: Tensor, seen: Tensor) -> tuple[Columns | None, Tensor, Tensor]:
    """Remove columns without effect.

    Args:
        columns: expansion and weights.
        values: samples of the expansion at ``sample_points()``, ``[points, n_in, k]``.
        seen: values of its inputs on the example, any shape.

    Returns:
        the reduced columns (``None`` where nothing is left), what the constant functions of each input add to the bias
        ``[n_out, n_in]``, and the samples that remain.
    """
    expansion, weight = columns.expansion, columns.weight.clone()
    shift = torch.zeros(weight.shape[:2])
    keep: list[int] = []
    flat = _constant(values)
    twins = _twins(values)
    if bool(flat.any()) or twins:
        dense = _dense_samples(expansion, seen)
        flat &= False if dense is None else _constant(dense)
        twins = {} if dense is None else {k: j for k, j in twins.items() if agree(dense[..., k], dense[..., j])}
    for k in range(expansion.k):
        if bool(flat[k]):
            shift = shift + weight[..., k] * values[0, :, k]
        elif k in twins:
            weight[..., twins[k]] += weight[..., k]
        else:
            keep.append(k)
    keep = [k for k in keep if bool(weight[..., k].any())]
    if not keep:
        return None, shift, values[..., :0]
    return Columns(_select(expansion, keep), weight[..., keep]), shift, values[..., keep]


def _constant(table: Tensor) -> Tensor:
    """Which functions are constant for every input: ``[points, n_in, k] -> [k]``."""
    low, high = table.amin(0), table.amax(0)
    return (high - low <= _FLAT * (1e-12 + torch.maximum(low.abs(), high.abs()))).all(0)


def _twins(table: Tensor) -> dict[int, int]:
    """Functions that equal an earlier one for every input, ``[points, n_in, k]``: number -> number of the first."""
    twins: dict[int, int] = {}
    first: list[int] = []
    for k in range(table.shape[-1]):
        near = (table[:, 0, first] - table[:, 0, k : k + 1]).abs().amax(0) <= 1e-5 if first else torch.empty(0)
        candidates = [j for j, close in zip(first, near.tolist(), strict=True) if close]
        same = next((j for j in candidates if agree(table[..., k], table[..., j])), None)
        if same is None:
            first.append(k)
        else:
            twins[k] = same
    return twins


def agree(a: Tensor, b: Tensor) -> bool:
    """Equality but for the last bit, in which vectorised kernels differ with the place of an element."""
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def _dense_samples(expansion: Expansion, seen: Tensor) -> Tensor | None:
    """Sample densely, around every number that the region compares with, such as a knot, and where the example lies.

    A function that looks constant on a coarse grid may still live between two close knots. Where there are too many
    numbers to visit nothing can be claimed, and nothing is returned; else ``[points, n_in, k]``.
    """
    numbers = [
        buffer.detach().flatten().float()
        for branch in expansion.branches
        if branch.region is not None
        for buffer in branch.region.buffers()  # type: ignore[union-attr]
        if buffer.is_floating_point()
    ]
    special = torch.cat(numbers) if numbers else torch.empty(0)
    special = torch.unique(special[torch.isfinite(special)])
    if len(special) > _MOST_CONSTANTS:
        return None
    between = (special[1:] + special[:-1]) / 2
    usual = torch.cat([torch.linspace(-_REACH, _REACH, _POINTS), special, between])
    values = [sample_tokens(expansion, part) for part in torch.split(usual, 256)]
    points = _points_around(seen)
    for part in points.split(256) if len(points) else ():  # some functions do not take an empty batch
        around = sample_tokens(expansion, part)
        values.append(around[torch.isfinite(around).all(2).all(1)])  # so far out a function may overflow
    return torch.cat(values)


def _points_around(seen: Tensor) -> Tensor:
    """Give points where data lie of which the usual ones see little: far beyond them, or all between two of them.

    An example is a few rows, so points go on to several times its range. Features of one layer may differ in size, so there
    are some for every power of ten as well.
    """
    finite = seen[torch.isfinite(seen)]
    reach = float(finite.abs().max()) if len(finite) else 0.0
    if reach == 0 or _GAP <= reach <= _REACH:
        return torch.empty(0)
    low, high = float(finite.min()), float(finite.max())
    margin = _MARGIN * (high - low)
    sizes = torch.logspace(-4, math.log10(_MARGIN), _POINTS // 4) * reach
    return torch.cat([torch.linspace(low - margin, high + margin, _POINTS), sizes, -sizes])


def _select(expansion: Expansion, keep: Sequence[int]) -> Expansion:
    branches, start = [], 0
    for branch in expansion.branches:
        assert isinstance(branch, Branch)
        own = [k - start for k in keep if start <= k < start + branch.k]
        start += branch.k
        if own:
            branches.append(Branch(branch.name, branch.region, branch.position[..., own]))
    return Expansion(expansion.anchor_shape, branches, expansion.channels_first)
