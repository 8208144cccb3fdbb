"""Describe the univariate functions of a captured region: which inputs share them, how large they are, and their tails.

Nothing about the region is presumed but that every output depends on one input. It is evaluated in float64 where that
computes the same as float32 (it mostly does), so that rounding noise does not hide how well a polynomial fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kancompile.passes.lower_to_polynomials.breakpoints import count_before
from kancompile.passes.lower_to_polynomials.observed_region import Region

_PROBES = 96
_FARTHEST = 1e5
_SEEN = 1025  # points over the range of the inputs, where parts of it lie far away
NEAR = 0.1  # share of the farthest distance within which functions may bend
_ALIKE = 0.03  # share of the tolerance by which functions of two inputs may differ and count as one
_JUMP = 1e-5
_SAME_IN_FLOAT64 = 1e-4


class CannotFit(Exception):
    """Functions have no piecewise polynomial form that reaches the tolerance; the text is the reason, a clause."""


@dataclass(frozen=True)
class Functions:
    """What is to be fitted: the distinct functions of a region, and how they behave far away.

    The error allowed for function ``k`` at ``x`` is ``tolerance * max(scale[k], |f_k(x)|)``.

    Attributes:
        region: the branches.
        group: for every input the number of its set of functions, int64 ``[P]``.
        breakpoints: for every set its breakpoints inside ``low ... high``, float64, ascending.
        scale: largest absolute value where the inputs and the breakpoints lie, float64 ``[T, k]``.
        low, high: beyond these the functions are straight lines.
        below, above: the lines, float64 ``[T, 2, k]``: value at 0 and slope.
        jumps: whether a value jumps at a breakpoint.
        tolerance: relative error allowed.
        double: whether the region is evaluated in float64.
        farthest: distance up to which the lines are compared with the functions.
    """

    region: Region
    group: Tensor
    breakpoints: Sequence[Tensor]
    scale: Tensor
    low: float
    high: float
    below: Tensor
    above: Tensor
    jumps: bool
    tolerance: float
    double: bool
    farthest: float = _FARTHEST

    @property
    def count(self) -> int:
        """Number of distinct sets T."""
        return len(self.breakpoints)

    @property
    def k(self) -> int:
        """Number of functions of one input."""
        return int(self.scale.shape[-1])

    def sample(self, group: Tensor, x: Tensor) -> Tensor:
        """Evaluate the functions of set ``group[m]`` at ``x[m]``, float64 ``[m, k]``."""
        return sample(self.region, self.group, group, x, self.double)

    def error(self, exact: Tensor, value: Tensor, group: Tensor) -> Tensor:
        """Give errors in units of what is allowed, ``[m, k]``, at points of the sets ``group[m]``."""
        return (value - exact).abs() / (self.tolerance * torch.maximum(exact.abs(), self.scale[group]))


def sample(region: Region, membership: Tensor, group: Tensor, x: Tensor, double: bool) -> Tensor:
    """Evaluate a region at points of given sets; the inputs of a set share the work.

    Args:
        region: the branches.
        membership: number of the set of each input, int64 ``[P]``.
        group: set for each point, int64 ``[m]``.
        x: points ``[m]``.
        double: whether to evaluate in float64.
    """
    members = torch.argsort(membership, stable=True)
    sizes = torch.bincount(membership)
    starts = torch.cumsum(sizes, 0) - sizes
    number = count_before(group)
    owner = members[starts[group] + number % sizes[group]]
    row = number // sizes[group]
    filled = torch.zeros(int(row.max()) + 1, region.inputs, dtype=torch.float64)
    filled[row, owner] = x.double()
    order = torch.argsort(row, stable=True)
    starts = torch.arange(0, len(filled) + region.chunk, region.chunk).clamp(max=len(filled))
    bounds = torch.searchsorted(row[order], starts).tolist()
    values = []
    for start, first, last in zip(starts.tolist(), bounds, bounds[1:], strict=False):
        here = order[first:last]
        part = region(filled[start : start + region.chunk], double)
        values.append(part[row[here] - start, owner[here]])
    result = torch.empty(len(x), values[0].shape[-1], dtype=torch.float64)
    result[order] = torch.cat(values)
    return result


def describe_functions(
    region: Region, breakpoints: Sequence[Tensor], low: float, high: float, tolerance: float
) -> Functions:
    """Find the distinct functions of a region, their sizes and asymptotes.

    Args:
        region: the branches.
        breakpoints: of each input, float32.
        low, high: range of the calibration inputs.
        tolerance: relative error allowed.

    Raises:
        CannotFit: a function is not finite, or no straight line far from 0.
    """
    ends = torch.cat([torch.tensor([low, high]), *breakpoints]).double()
    farthest = _FARTHEST
    inner = ends[ends.abs() < NEAR * farthest]
    if not len(inner):  # everything lies far away, so what is far is measured by the inputs
        farthest = 4 * max(abs(low), abs(high)) / NEAR
        inner = ends[ends.abs() < NEAR * farthest]
    seen_low, seen_high = low, high
    low, high = float(inner.min()), float(inner.max())
    survey = _survey(region, _probes(low, high))
    first, group = _distinct(survey.signature, breakpoints, (1e-9 if survey.double else 3e-7) + _ALIKE * tolerance)
    overall = survey.size.amax(0)
    scale = survey.size[first]
    scale = torch.where(scale > 0, scale, torch.where(overall > 0, overall, torch.ones_like(overall)))
    line = torch.zeros(len(first), 2, scale.shape[-1], dtype=torch.float64)
    points = [breakpoints[index].double() for index in first]
    functions = Functions(
        region, group, points, scale, low, high, line, line, False, tolerance, survey.double, farthest
    )
    functions = replace(functions, scale=_largest(functions))
    functions = _with_tails(functions)
    _check_tails(functions, torch.linspace(seen_low, seen_high, _SEEN, dtype=torch.float64))
    kept = [part[(part > functions.low) & (part < functions.high)] for part in points]
    return replace(functions, breakpoints=kept, jumps=_jumps(functions, kept))


def _probes(low: float, high: float) -> Tensor:
    """Give irregular points, so that no lattice of knots hides between them; the second half lies 4 times as wide."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2 * _PROBES, generator=generator, dtype=torch.float64) * (high - low + 1e-3) + low
    middle = 0.5 * (low + high)
    points[_PROBES:] = middle + 4 * (points[_PROBES:] - middle)
    return points.float().double()


@dataclass(frozen=True)
class _Survey:
    """A first look at all inputs: fingerprints ``[P, 4]``, sizes ``[P, k]``, whether float64 computes the same."""

    signature: Tensor
    size: Tensor
    double: bool


def _survey(region: Region, probes: Tensor) -> _Survey:
    double = True
    differences, parts, sizes = [], [], []
    step = max(4, region.chunk)
    for start in range(0, len(probes), step):
        part = probes[start : start + step]
        single = _fill(region, part, False)
        if not bool(torch.isfinite(single).all()):
            raise CannotFit(f"its value at {float(part[(~torch.isfinite(single)).any(2).any(1)][0]):.6g} is not finite")
        values = single
        if double:
            try:
                values = _fill(region, part, True)
            except (RuntimeError, TypeError):  # an operator without float64 kernel, or of mixed types
                double = False
            else:
                size = torch.maximum(single.abs().amax((0, 1)), single.abs()).clamp(min=1e-30)
                differences.append(((values - single).abs() / size).amax((1, 2)))
        parts.append((single, values))
        sizes.append(values[: max(0, _PROBES - start)].abs())
        if region.inputs > 1 << 14:  # keep no more than fingerprints of many inputs
            parts[-1] = (parts[-1][0].float(), parts[-1][1].float())
    # one or two probes may lie on the other side of a jump; where many differ, the model relies on float32
    double = double and float(torch.cat(differences).sort().values[:-2].amax()) <= _SAME_IN_FLOAT64
    size = torch.cat(sizes).amax(0)
    generator = torch.Generator().manual_seed(1)
    weight = 1 / size.amax(0).clamp(min=1e-30)
    signature = torch.zeros(region.inputs, 4, dtype=torch.float64)
    for single, values in parts:
        signs = torch.randn(4, len(values), values.shape[-1], generator=generator, dtype=torch.float64)
        signature += torch.einsum("snk,npk->ps", signs, (values if double else single).double() * weight)
    return _Survey(signature, size, double)


def _fill(region: Region, points: Tensor, double: bool) -> Tensor:
    """Evaluate all inputs at the same points, ``[n, P, k]``."""
    return region(points[:, None].expand(-1, region.inputs), double)


def _distinct(signature: Tensor, breakpoints: Sequence[Tensor], tolerance: float) -> tuple[list[int], Tensor]:
    """Find which inputs share all their functions: the first input of each set, and the set of each input."""
    group = torch.full((len(signature),), -1, dtype=torch.int64)
    first: list[int] = []
    for index in range(len(signature)):
        if group[index] >= 0:
            continue
        alike = (group < 0) & ((signature - signature[index]).abs().amax(1) <= 4 * tolerance)
        for candidate in alike.nonzero()[:, 0].tolist():
            alike[candidate] = _same_breakpoints(breakpoints[candidate], breakpoints[index])
        group[alike] = len(first)
        first.append(index)
    return first, group


def _same_breakpoints(one: Tensor, other: Tensor) -> bool:
    return one is other or (len(one) == len(other) and bool(torch.allclose(one, other, rtol=1e-6, atol=1e-30)))


def _with_tails(functions: Functions) -> Functions:
    """Find beyond which inputs the functions are straight lines."""
    span = functions.high - functions.low
    beyond = torch.logspace(-3, math.log10(functions.farthest), 420)
    steps = torch.cat([torch.linspace(0, span, 513), span + beyond]).double()
    far = int(torch.searchsorted(steps, NEAR * functions.farthest))
    inside = _between(functions.breakpoints)
    ends = []
    for side in (-1.0, 1.0):
        x = (functions.low if side > 0 else functions.high) + side * steps
        group = torch.arange(functions.count).repeat_interleave(len(x))
        exact = functions.sample(group, x.repeat(functions.count)).reshape(functions.count, len(x), -1)
        if not bool(torch.isfinite(exact).all()):
            raise CannotFit("it is not finite far from 0")
        slope = (exact[:, -1] - exact[:, far]) / (x[-1] - x[far])
        slope = torch.where(slope.abs() * functions.farthest < 0.1 * functions.tolerance * functions.scale, 0.0, slope)
        line = torch.stack([exact[:, -1] - slope * x[-1], slope], 1)
        fitted = line[:, :1] + line[:, 1:] * x[:, None]
        error = functions.error(exact.flatten(0, 1), fitted.flatten(0, 1), group).amax(1)
        wrong = (error.reshape(functions.count, -1) > 1).any(0)
        last = int(wrong.nonzero().max()) if bool(wrong.any()) else -1
        if last + 1 >= far:
            raise CannotFit("it is no straight line far from 0")
        edge = float(x[last + 1])
        edge = _outermost(functions, inside, line, edge, float(x[max(last, 0)]), side)
        ends.append((edge, line))
    (low, below), (high, above) = ends
    if low >= high:  # straight lines that meet; what lies between them is one cell
        low, high = high, max(low, high + 1e-3 * max(span, 1e-3))
    return replace(functions, low=low, high=high, below=below, above=above)


def _check_tails(functions: Functions, seen: Tensor) -> None:
    """Make sure that the lines hold for calibration inputs that lie farther away than ends of the range were looked for.

    Args:
        functions: with their tails.
        seen: points over the range of the calibration inputs, ascending.

    Raises:
        CannotFit: a function bends there.
    """
    if float(seen.abs().max()) < NEAR * functions.farthest:
        return
    group = torch.arange(functions.count)
    for x, line in (
        (seen[seen < functions.low], functions.below),
        (seen[seen > functions.high], functions.above),
    ):
        owner, points = group.repeat_interleave(len(x)), x.repeat(functions.count)
        if not len(points):
            continue
        fitted = line[owner, 0] + line[owner, 1] * points[:, None]
        error = functions.error(functions.sample(owner, points), fitted, owner)
        if not bool((error <= 1).all()):
            raise CannotFit("it is no straight line where the inputs are")


@dataclass(frozen=True)
class _Between:
    """Midpoints between neighboring breakpoints, and the breakpoints on both sides."""

    group: Tensor
    left: Tensor
    right: Tensor


def _between(breakpoints: Sequence[Tensor]) -> _Between:
    group = [torch.full((max(len(part) - 1, 0),), number) for number, part in enumerate(breakpoints)]
    return _Between(
        torch.cat(group), torch.cat([part[:-1] for part in breakpoints]), torch.cat([part[1:] for part in breakpoints])
    )


def _outermost(functions: Functions, inside: _Between, line: Tensor, edge: float, wrong: float, side: float) -> float:
    """Move the end of the tail to a breakpoint near it, or outwards where a narrow piece is no part of the line.

    Args:
        functions: what is fitted.
        inside: pieces between breakpoints, which may be too narrow for any sampling.
        line: of the tail.
        edge, wrong: the tail's first sample, and the sample before it, which is no part of the line.
        side: 1 for the upper tail, -1 for the lower.
    """
    points = torch.cat(list(functions.breakpoints))
    near = points[(side * points >= side * wrong) & (side * points <= side * edge)]
    if len(near):
        edge = float((side * near).max() * side)
    if len(inside.group):
        x = 0.5 * (inside.left + inside.right)
        fitted = line[inside.group, 0] + line[inside.group, 1] * x[:, None]
        off = functions.error(functions.sample(inside.group, x), fitted, inside.group).amax(1) > 1
        outer = (inside.right if side > 0 else inside.left)[off] * side
        if len(outer):
            edge = side * max(side * edge, float(outer.max()))
    return edge


def _largest(functions: Functions) -> Tensor:
    """Raise the scales to what the functions reach at and between breakpoints, where probes may have missed a bump."""
    inside = _between(functions.breakpoints)
    if not len(inside.group):
        return functions.scale
    group = inside.group.repeat(2)
    values = functions.sample(group, torch.cat([inside.left, 0.5 * (inside.left + inside.right)])).abs()
    index = group[:, None].expand_as(values)
    return functions.scale.scatter_reduce(0, index, values.nan_to_num(posinf=0.0), "amax")


def _jumps(functions: Functions, breakpoints: Sequence[Tensor]) -> bool:
    """Tell whether a value differs, across a breakpoint, by more than over the floats on its two sides."""
    group = torch.cat([torch.full((len(points),), number) for number, points in enumerate(breakpoints)])
    if not len(group):
        return False
    places = [torch.cat(list(breakpoints)).float()]
    for _ in range(2):
        places.insert(0, torch.nextafter(places[0], torch.full_like(places[0], -math.inf)))
    places.append(torch.nextafter(places[-1], torch.full_like(places[-1], math.inf)))
    values = [sample(functions.region, functions.group, group, x, False) for x in places]
    steps = [(after - before).abs() for before, after in itertools.pairwise(values)]
    size = torch.maximum(functions.scale[group], values[0].abs())
    return bool((steps[1] > _JUMP * size + 4 * torch.maximum(steps[0], steps[2])).any())
