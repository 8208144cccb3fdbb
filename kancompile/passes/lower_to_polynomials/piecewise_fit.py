"""Fit piecewise polynomials to the functions of an expansion, in the form of least cost that keeps a tolerance.

The cost is estimated time multiplied by the root of the bytes (``form_cost``): splines in cubic cells between their knots take a
hundredth of the bytes of an interpolated table and two to three times its time, and are far more exact. Candidates are tried in
the order of their estimated time in ONNX Runtime, by the costs of a profile, of which only the ratios matter; of those that reach
the tolerance within the memory allowed, the one of least cost is taken:

* uniform cells, where all breakpoints lie on one lattice (uniform knots) or there are none; the lattice is subdivided
  until polynomials of the degree fit. If one width for all would need too many rows, cells outside of the outermost
  breakpoints get a width of their own;
* cells that begin at the breakpoints of each input, where knots are not uniform or values jump. How many more are needed
  shows only once they are fitted, so their time is an estimate from below until then.

Polynomials interpolate at Chebyshev nodes (Trefethen, *Approximation Theory and Approximation Practice*, chapter 4),
whose error is within a small factor of the best for every degree, and are computed in float64. Beyond the outermost
cells follow straight lines, the asymptotes of the functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kancompile.ir import BreakpointCells, PolynomialExpansion, UniformCells, Zone, to_channels_first
from kancompile.passes.lower_to_polynomials.breakpoints import count_before
from kancompile.passes.lower_to_polynomials.form_cost import Beside
from kancompile.passes.lower_to_polynomials.region_functions import NEAR, CannotFit, Functions
from kancompile.recipe import FunctionCosts

MOST_BREAKPOINTS = 256

_ACCEPT = 3.0  # how often the tolerance of the fit may be exceeded once float32 rounding is added

_LATTICE = 1e-5  # how far from a lattice, in its steps, breakpoints may lie


@dataclass(frozen=True)
class Fit:
    """A fitted form, not yet a module.

    Attributes:
        cells: how the cell is found.
        coefficients: float64 ``[T * rows, degree + 1, k]``.
    """

    cells: UniformCells | BreakpointCells
    coefficients: Tensor


@dataclass(frozen=True)
class Lowered:
    """A module that computes the functions, and what is known about it.

    Attributes:
        module: the piecewise polynomial.
        nanoseconds: estimated time of ONNX Runtime for each input, one thread.
        error: largest error measured, in float32, relative (see ``Functions``).
        cost: what choices go by (see ``Beside.cost``).
    """

    module: PolynomialExpansion
    nanoseconds: float
    error: float
    cost: float


def lower(
    functions: Functions,
    branches: Sequence[tuple[str, int]],
    most_bytes: int,
    degrees: Iterable[int],
    costs: FunctionCosts,
    beside: Beside,
) -> Lowered:
    """Return the candidate of least cost.

    Args:
        functions: what to fit.
        branches: name and number of functions of each branch.
        most_bytes: how large the coefficients may be.
        degrees: to be tried, each 1 or more.
        costs: of operators.
        beside: what the layer takes apart from the candidates.

    Raises:
        CannotFit: none reaches the tolerance.
    """
    candidates: list[tuple[float, Callable[[], Fit | None]]] = []
    count = 2 + max((len(points) for points in functions.breakpoints), default=0)
    for degree in degrees:
        work = _polynomial_time(degree, functions.k, costs) + (costs.elementwise if functions.count > 1 else 0.0)
        candidates += [
            (work + 6 * costs.elementwise, partial(fit_uniform, functions, degree, most_bytes)),
            (work + 13 * costs.elementwise, partial(fit_two_widths, functions, degree, most_bytes)),
        ]
        work += count * costs.compare + costs.gather + costs.gathered + 3 * costs.elementwise
        candidates.append((work, partial(fit_breakpoints, functions, degree, most_bytes)))
    rejected = math.inf
    best: Lowered | None = None
    for nanoseconds, attempt in sorted(candidates, key=lambda candidate: candidate[0]):
        if best is not None and best.cost <= beside.cost(nanoseconds):
            break
        fit = attempt()
        if fit is None:
            continue
        if isinstance(fit.cells, BreakpointCells):  # how often cells were halved shows only now
            nanoseconds += (fit.cells.rows - count) * costs.compare
        module = _module(functions, fit, branches)
        error = measure(functions, module)
        cost = beside.cost(nanoseconds, module.table_bytes)
        if error <= _ACCEPT * functions.tolerance and (best is None or cost < best.cost):
            best = Lowered(module, nanoseconds, error, cost)
        rejected = min(rejected, error)
    if best is not None:
        return best
    tried = f"; the closest has {rejected:.2g}" if rejected < math.inf else ""
    raise CannotFit(
        f"no polynomials of the degrees tried reach {functions.tolerance:g} with {most_bytes} bytes of coefficients "
        f"and {MOST_BREAKPOINTS} breakpoints{tried}"
    )


def _module(functions: Functions, fit: Fit, branches: Sequence[tuple[str, int]]) -> PolynomialExpansion:
    shape = functions.region.in_shape
    first_row = None
    if functions.count > 1:
        first_row = (functions.group * fit.cells.rows).to(torch.int32).reshape(shape)
        alike = first_row.reshape(-1, shape[-1])
        first_row = alike[0].contiguous() if bool((alike == alike[0]).all()) else first_row
    sizes, names = [size for _, size in branches], [name for name, _ in branches]
    first = functions.region.channels_first
    return PolynomialExpansion(shape, fit.cells, fit.coefficients, first_row, sizes, names, first)


def measure(functions: Functions, module: PolynomialExpansion) -> float:
    """Give the largest relative error of a module, in float32, at irregular points inside and far outside.

    Every input meets points of its own, among them some beside its breakpoints.
    """
    region = functions.region
    generator = torch.Generator().manual_seed(2)
    rows = max(24, min(256, (1 << 17) // region.inputs))
    uniform = torch.rand(rows, region.inputs, generator=generator, dtype=torch.float64)
    span = functions.high - functions.low
    x = functions.low - 0.1 * span + 1.2 * span * uniform
    third = rows // 3
    far = 10 ** (math.log10(NEAR * functions.farthest) * uniform[:third])
    x[:third] = torch.where(uniform[third : 2 * third] < 0.5, functions.low - far, functions.high + far)
    for number, points in enumerate(functions.breakpoints):
        members = (functions.group == number).nonzero()[:, 0]
        if len(points):
            chosen = points[torch.randint(0, len(points), (third, len(members)), generator=generator)]
            x[third : 2 * third, members] = chosen + 1e-3 * span * (uniform[:third, members] - 0.5)
    x = x.float()
    with torch.no_grad():
        shaped = x.reshape(-1, *region.in_shape)
        shaped = to_channels_first(shaped) if region.channels_first else shaped
        value = torch.cat([module(part) for part in torch.split(shaped, 64)]).double()
    exact = region(x, functions.double)
    group = functions.group.expand(rows, -1).flatten()
    error = functions.error(exact.flatten(0, 1), value.reshape(len(group), -1), group)
    return float(error.max()) * functions.tolerance


def _polynomial_time(degree: int, k: int, costs: FunctionCosts) -> float:
    gathers = (degree + 1) * (costs.gather + costs.gathered * k)
    return gathers + (degree * costs.step * k + costs.copy * k if degree else 0.0)


@dataclass(frozen=True)
class _Nodes:
    """Where a polynomial of one degree interpolates, and where its error is looked at; places in 0 ... 1."""

    fit: Tensor
    look: Tensor

    @staticmethod
    def of(degree: int) -> _Nodes:
        count = degree + 1
        fit = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        look = 0.5 - 0.5 * torch.cos(math.pi * torch.linspace(0.02, 0.98, 2 * count + 1, dtype=torch.float64))
        return _Nodes(fit, look)

    def coefficients(self, values: Tensor) -> Tensor:
        """Turn values ``[m, degree + 1, k]`` at the nodes into powers, lowest first."""
        powers: Tensor = torch.linalg.solve(torch.vander(self.fit, increasing=True), values)
        return powers

    def evaluate(self, coefficients: Tensor) -> Tensor:
        """Evaluate at the points where errors are looked at, ``[m, points, k]``."""
        return torch.vander(self.look, coefficients.shape[1], increasing=True) @ coefficients


def _fit_cells(functions: Functions, group: Tensor, left: Tensor, right: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Fit one polynomial to each cell, in the place 0 ... 1; returns ``[m, degree + 1, k]`` and the errors ``[m]``."""
    nodes = _Nodes.of(degree)
    places = torch.cat([nodes.fit, nodes.look])
    x = left[:, None] + places * (right - left)[:, None]
    if not functions.double:  # the place of the float32 number that is evaluated
        x = x.float().double()
    owner = group.repeat_interleave(len(places))
    values = functions.sample(owner, x.flatten()).reshape(*x.shape, -1)
    coefficients = nodes.coefficients(values[:, : degree + 1])
    exact = values[:, degree + 1 :].flatten(0, 1)
    error = functions.error(exact, nodes.evaluate(coefficients).flatten(0, 1), group.repeat_interleave(len(nodes.look)))
    return coefficients, error.reshape(len(group), -1).amax(1)


def _fit_between(functions: Functions, bounds: Tensor, degree: int) -> tuple[Tensor, float]:
    """Fit cells between neighboring bounds for all sets; returns ``[T, cells, degree + 1, k]`` and the largest error."""
    cells = len(bounds) - 1
    group = torch.arange(functions.count).repeat_interleave(cells)
    left, right = bounds[:-1].repeat(functions.count), bounds[1:].repeat(functions.count)
    coefficients, errors = _fit_cells(functions, group, left, right, degree)
    return coefficients.reshape(functions.count, cells, degree + 1, -1), float(errors.max())


def _subdivide(functions: Functions, spans: list[tuple[float, float, int]], degree: int, most: int) -> int | None:
    """Find how often cells must be divided to reach the tolerance; the error falls with their width^(degree + 1).

    Args:
        functions: what to fit.
        spans: intervals and into how many cells each is divided to begin with.
        degree: of the polynomials.
        most: the largest number of cells in all.
    """
    times = 1
    cells = sum(count for _, _, count in spans)
    while cells * times <= most:
        error = max(
            _fit_between(functions, torch.linspace(low, high, count * times + 1, dtype=torch.float64), degree)[1]
            for low, high, count in spans
        )
        if error <= 1.0:
            return times
        if not math.isfinite(error):
            return None
        times = max(times + 1, min(8 * times, math.ceil(1.02 * times * error ** (1 / (degree + 1)))))
    return None


def _lattice(functions: Functions) -> tuple[float, float, int] | None:
    """Give first and last breakpoint and the number of equal steps between them that hits all others.

    Without breakpoints the whole range is one step; ``None`` where they lie on no lattice, or a value jumps.
    """
    if functions.jumps:
        return None
    points = torch.unique(torch.cat(list(functions.breakpoints)))
    if len(points) < 2:
        return (float(points[0]), float(points[0]), 0) if len(points) else (functions.low, functions.high, 1)
    gaps = torch.diff(points)
    step = float(gaps[gaps > 0.01 * float(gaps.max())].min())
    first, last = float(points[0]), float(points[-1])
    count = round((last - first) / step)
    places = (points - first) / ((last - first) / max(count, 1))
    return (first, last, count) if float((places - places.round()).abs().max()) <= _LATTICE else None


def fit_uniform(functions: Functions, degree: int, most_bytes: int) -> Fit | None:
    """Fit with cells of one width; ``None`` where that cannot be done."""
    lattice = _lattice(functions)
    if lattice is None:
        return None
    first, last, steps = lattice
    most = _most_rows(functions, degree, most_bytes)
    outside = [(low, high) for low, high in ((functions.low, first), (last, functions.high)) if high > low]
    width = (last - first) / steps if steps else max(high - low for low, high in outside)
    core = [(first, last, steps)] if steps else []
    spans = [(low, high, math.ceil((high - low) / width)) for low, high in outside]
    times = _subdivide(functions, core + spans, degree, most)
    if times is None:
        return None
    # a few cells more may put a boundary on 0, which saves the shift
    slope = next((n / width for n in range(times, times + 4) if _align(first * n / width)[0] == 0.0), times / width)
    shift, number = _align(first * slope)
    start = number - _ceil((first - functions.low) * slope)
    end = number + _ceil((functions.high - first) * slope)
    return _finish(functions, UniformCells(slope, shift, start, end - start + 2), degree, most)


def fit_two_widths(functions: Functions, degree: int, most_bytes: int) -> Fit | None:
    """Fit with narrow cells between the outermost breakpoints and wide ones outside; ``None`` where that cannot be."""
    lattice = _lattice(functions)
    if lattice is None or lattice[2] == 0 or not functions.breakpoints[0].numel():
        return None
    first, last, steps = lattice
    outside = [(low, high) for low, high in ((functions.low, first), (last, functions.high)) if high > low]
    if not outside:
        return None
    most = _most_rows(functions, degree, most_bytes)
    times = _subdivide(functions, [(first, last, steps)], degree, most)
    width = max(high - low for low, high in outside)
    wide = _subdivide(
        functions, [(low, high, math.ceil((high - low) / width * 4)) for low, high in outside], degree, most
    )
    if times is None or wide is None:
        return None
    inner, outer = steps * times / (last - first), 4 * wide / width
    shift, number = _align(first * inner)
    zone = Zone(first, last, inner, number, number + steps * times)
    start = zone.first - _ceil((first - functions.low) * outer)
    end = zone.last + _ceil((functions.high - last) * outer)
    return _finish(functions, UniformCells(outer, shift, start, end - start + 2, zone), degree, most)


def _most_rows(functions: Functions, degree: int, most_bytes: int) -> int:
    return most_bytes // (4 * functions.count * functions.k * (degree + 1)) - 2


def _ceil(cells: float) -> int:
    return max(0, math.ceil(cells - 1e-6))


def _align(z: float) -> tuple[float, int]:
    """Give the shift, 0 or more and below 1, that makes ``z`` a whole number, and that number."""
    number = math.ceil(z - 1e-6)
    shift = number - z
    return (shift if shift > 1e-9 * max(1.0, abs(z)) else 0.0), number


def _finish(functions: Functions, cells: UniformCells, degree: int, most: int) -> Fit | None:
    """Fit the cells as the float32 constants of the module place them."""
    starts = cells.starts()
    if len(starts) - 2 > most or len(starts) < 3:
        return None
    inner, error = _fit_between(functions, starts[1:], degree)
    if error > _ACCEPT:
        return None
    tails = []
    for start, line in ((starts[0], functions.below), (starts[-1], functions.above)):
        tail = torch.zeros(functions.count, 1, degree + 1, functions.k, dtype=torch.float64)
        tail[:, 0, 0] = line[:, 0] + line[:, 1] * start
        tail[:, 0, 1] = line[:, 1] / cells.slope
        tails.append(tail)
    return Fit(cells, torch.cat([tails[0], inner, tails[1]], 1).flatten(0, 1))


def fit_breakpoints(functions: Functions, degree: int, most_bytes: int) -> Fit | None:
    """Fit with cells that begin at the breakpoints of each set, halved where the degree does not suffice."""
    pieces = _adaptive(functions, degree)
    if pieces is None:
        return None
    group, left, right, coefficients = pieces
    counts = torch.bincount(group, minlength=functions.count)
    rows = int(counts.max()) + 2
    if 4 * functions.count * rows * ((degree + 1) * functions.k + 1) > most_bytes:
        return None
    width = (right - left)[:, None, None]
    coefficients = coefficients / width ** torch.arange(degree + 1)[:, None]
    table = torch.zeros(functions.count, rows, degree + 1, functions.k, dtype=torch.float64)
    origin = torch.zeros(functions.count, rows, dtype=torch.float64)
    starts = torch.full((functions.count, rows - 1), math.inf, dtype=torch.float64)
    place = count_before(group)
    table[group, place + 1] = coefficients
    origin[group, place + 1] = left
    starts[group, place] = left
    every = torch.arange(functions.count)
    starts[every, counts] = functions.high
    origin[:, 0], origin[every, counts + 1] = functions.low, functions.high
    for row, line, x in ((0, functions.below, functions.low), (counts + 1, functions.above, functions.high)):
        table[every, row, 0] = line[:, 0] + line[:, 1] * x
        table[every, row, 1] = line[:, 1]
    if not bool(torch.isfinite(table.float()).all()):
        return None
    spread = starts.float()[functions.group].reshape(*functions.region.in_shape, -1)
    return Fit(BreakpointCells(spread, origin.float().reshape(-1, 1)), table.flatten(0, 1))


def _adaptive(functions: Functions, degree: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Halve cells until all fit; returns set, left, right and coefficients of each cell, in order."""
    ends = [
        torch.cat([torch.tensor([functions.low]), points, torch.tensor([functions.high])]).float().double()
        for points in functions.breakpoints
    ]
    group = torch.cat([torch.full((len(points) - 1,), number) for number, points in enumerate(ends)])
    left, right = torch.cat([points[:-1] for points in ends]), torch.cat([points[1:] for points in ends])
    done: list[tuple[Tensor, ...]] = []
    while len(group):
        coefficients, errors = _fit_cells(functions, group, left, right, degree)
        good = errors <= 1.0
        done.append((group[good], left[good], right[good], coefficients[good]))
        group, left, right = group[~good], left[~good], right[~good]
        middle = ((left + right) / 2).float().double()
        count = torch.bincount(torch.cat([group, group, *(part[0] for part in done)]), minlength=functions.count)
        if int(count.max()) + 1 > MOST_BREAKPOINTS or bool(((middle <= left) | (middle >= right)).any()):
            return None
        group, left, right = torch.cat([group, group]), torch.cat([left, middle]), torch.cat([middle, right])
    parts = [torch.cat([part[number] for part in done]) for number in range(4)]
    order = torch.argsort(parts[1], stable=True)
    order = order[torch.argsort(parts[0][order], stable=True)]
    return parts[0][order], parts[1][order], parts[2][order], parts[3][order]
