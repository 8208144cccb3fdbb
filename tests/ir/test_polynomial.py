"""Piecewise polynomials against float64 oracles, and breakpoints against where they are known to be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.special import erf
from torch import Tensor, nn

from kancompile.ir import Branch
from kancompile.ir.polynomial import BreakpointCells, PolynomialExpansion, Repeat, UniformCells, Zone, group_size
from kancompile.passes.lower_to_polynomials.breakpoints import find_breakpoints
from kancompile.passes.lower_to_polynomials.form_cost import Beside
from kancompile.passes.lower_to_polynomials.observed_region import Region
from kancompile.passes.lower_to_polynomials.piecewise_fit import Lowered, lower
from kancompile.passes.lower_to_polynomials.region_functions import CannotFit, Functions, describe_functions
from kancompile.recipe import DEFAULT_PROFILE, package_profile
from tests.regions import adaptive_knots, branch, silu, spline, uniform_knots

UNIT = 2.0**-24
COSTS = package_profile(DEFAULT_PROFILE).functions
POINTS = torch.unique(torch.cat([-torch.logspace(-3, 4, 200), torch.linspace(-4, 4, 301), torch.logspace(-3, 4, 200)]))


def functions_of(branches: list[Branch], low: float = -1.0, high: float = 1.0, tolerance: float = 1e-6) -> Functions:
    n_in = branches[0].position.shape[0]
    region = Region(tuple(branches), (n_in,), (n_in,))
    breakpoints = find_breakpoints(region, POINTS, COSTS).breakpoints
    assert breakpoints is not None
    return describe_functions(region, breakpoints, low, high, tolerance)


def lowered(
    functions: Functions, k: int, degrees: tuple[int, ...] = (1, 2, 3, 4), most_bytes: int = 1 << 20
) -> Lowered:
    return lower(functions, [("all", k)], most_bytes, degrees, COSTS, Beside(1 << 24, 0.0))


def rounding_bound(module: PolynomialExpansion, largest_place: float) -> float:
    """Bound the float32 error of evaluating a module: Horner's rule, and the place in the cell.

    Horner's rule of degree d errs by at most 2 d u sum|c_j t^j| (Higham, *Accuracy and Stability*, section 5.1), rounding the
    coefficients by u sum|c_j t^j|; the place errs by 2 u |z| (a product and a sum), which moves the value by |p'(t)|.
    """
    starts = module.cells.left.flatten() if isinstance(module.cells, BreakpointCells) else None
    width = 1.0 if starts is None else float(torch.diff(starts.reshape(-1, module.cells.rows)[:, 1:]).max())
    total = torch.zeros(())
    slope = torch.zeros(())
    for power in range(module.degree + 1):
        size = module.get_buffer(f"coefficient_{power}")[1:-1].abs() * width**power
        total, slope = total + size, slope + power * size
    return float(((2 * module.degree + 1) * UNIT * total + 2 * UNIT * (largest_place + 1) * slope).max())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_uniform_splines_equal_scipy(order: int) -> None:
    knots = uniform_knots(3, order=order)
    k = knots.shape[1] - order - 1
    module = lowered(functions_of([spline(knots, order)]), k, (order,)).module
    assert isinstance(module.cells, UniformCells)
    assert module.n_tables == 1
    x = torch.cat([torch.linspace(-3, 3, 4001), torch.tensor([-1e4, 1e4])])
    got = module(x[:, None].expand(-1, 3))
    bound = rounding_bound(module, 3.0 * module.cells.slope) + 1e-9
    for index in range(k):
        element = BSpline.basis_element(knots[0, index : index + order + 2].double().numpy(), extrapolate=False)
        exact = np.nan_to_num(element(x.double().numpy()))
        assert np.abs(got[:, 1, index].double().numpy() - exact).max() <= bound
    assert bound < 1e-5


def test_adaptive_splines_equal_scipy() -> None:
    knots = adaptive_knots(7)
    module = lowered(functions_of([spline(knots)]), 8).module
    assert isinstance(module.cells, BreakpointCells)
    assert (module.degree, module.n_tables) == (3, 7)
    generator = torch.Generator().manual_seed(1)
    near = knots[:, torch.randint(0, 12, (2000,), generator=generator)].T
    x = near + (torch.rand(2000, 7, generator=generator) - 0.5) * 10 ** (-4 * torch.rand(2000, 7, generator=generator))
    x = torch.cat([x, knots.T, torch.full((1, 7), -1e4), torch.full((1, 7), 1e4)])
    got = module(x).double().numpy()
    for feature in range(7):
        for index in range(8):
            # relative to float32 knots; a basis with a gap of 1e-4 has slopes up to 3 / 1e-4 in its neighbour's place,
            # but the distance to a knot is exact, so only the coefficients and Horner's rule round
            element = BSpline.basis_element(knots[feature, index : index + 5].double().numpy(), extrapolate=False)
            exact = np.nan_to_num(element(x[:, feature].double().numpy()))
            assert np.abs(got[:, feature, index] - exact).max() <= 3e-6


def chebyshev(x: Tensor) -> Tensor:
    return torch.cos(torch.acos(torch.tanh(x)).unsqueeze(-1) * torch.arange(5))


def gaussians(x: Tensor) -> Tensor:
    return torch.exp(-(((x.unsqueeze(-1) - torch.linspace(-2, 2, 8)) / 0.57) ** 2))


SMOOTH: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[np.ndarray], np.ndarray]]] = {
    "silu": (1, torch.nn.functional.silu, lambda x: (x / (1 + np.exp(-np.clip(x, -700, None))))[..., None]),
    "gelu": (1, torch.nn.functional.gelu, lambda x: (x * (1 + erf(x / math.sqrt(2))) / 2)[..., None]),
    "tanh": (1, torch.tanh, lambda x: np.tanh(x)[..., None]),
    "chebyshev": (5, chebyshev, lambda x: np.cos(np.arccos(np.tanh(x))[..., None] * np.arange(5))),
    "gaussian": (
        8,
        gaussians,
        lambda x: np.exp(-(((x[..., None] - np.linspace(-2, 2, 8).astype(np.float32)) / 0.57) ** 2)),
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_smooth_functions_hold_everywhere(name: str, degree: int) -> None:
    k, function, oracle = SMOOTH[name]
    functions = functions_of([branch(name, 4, k, function)])
    result = lowered(functions, k, (degree,))
    far = torch.logspace(-3, 4, 3001)
    x = torch.cat([-far, far, torch.linspace(-12, 12, 5001)])
    exact = oracle(x.double().numpy())
    got = result.module(x[:, None].expand(-1, 4))[:, 2].double().numpy()
    scale = np.maximum(np.abs(exact), functions.scale[0].numpy())
    assert (np.abs(got - exact) / scale).max() <= 3e-6
    assert result.error <= 3e-6


@pytest.mark.parametrize("tolerance", [1e-6, 1e-4, 1e-2])
def test_a_looser_tolerance_needs_fewer_cells(tolerance: float) -> None:
    functions = functions_of([silu(3)], tolerance=tolerance)
    module = lowered(functions, 1, (1,)).module
    # a straight line between Chebyshev nodes errs by h^2 max|f''| / 16, and max|silu''| = 1/2
    width = math.sqrt(16 * tolerance * float(functions.scale.min()) / 0.5)
    assert (
        (functions.high - functions.low) / width
        <= module.cells.rows
        <= 1.2 * (functions.high - functions.low) / width + 4
    )


def test_two_widths_keep_wide_tails_small() -> None:
    functions = functions_of([spline(uniform_knots(5)), silu(5)])
    module = lowered(functions, 9, (1,)).module
    assert isinstance(module.cells, UniformCells)
    assert module.cells.zone is not None
    starts = module.cells.starts()
    assert bool((torch.diff(starts) > 0).all())
    rows, place = module.cells(starts[1:-1].float()[:, None], None)
    expected = torch.arange(1, module.cells.rows - 1)[:, None]
    assert float((rows + place - expected).abs().max()) < 2e-3  # float32 rounding of the starts themselves
    # one width for all would need the fine cells of the splines out to where silu is a line
    assert module.cells.rows < 0.25 * (functions.high - functions.low) * module.cells.zone.slope


def test_zone_continues_on_both_sides() -> None:
    zone = Zone(-1.0, 1.0, 10.0, -10, 10)
    cells = UniformCells(2.0, 0.0, -14, 30, zone)
    x = torch.tensor([-100.0, -3.0, -1.25, -1.0, -0.05, 0.0, 0.95, 1.0, 1.6, 3.0, 100.0])
    rows, place = cells(x[None], None)
    assert (rows - 15 + place)[0].tolist() == pytest.approx([-208, -14, -10.5, -10, -0.5, 0, 9.5, 10, 11.2, 14, 208])
    assert int(rows.min()) == 0
    assert int(rows.max()) == 29


@st.composite
def kinked(draw: st.DrawFn) -> tuple[list[float], list[float], list[bool]]:
    gaps = draw(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8))
    places = np.cumsum([draw(st.floats(-2.0, 1.0)), *gaps]).tolist()
    heights = draw(st.lists(st.floats(-1.0, 1.0), min_size=len(places), max_size=len(places)))
    jumps = draw(st.lists(st.booleans(), min_size=len(places), max_size=len(places)))
    return places, heights, jumps


@settings(max_examples=15, deadline=None)
@given(kinked())
def test_random_piecewise_functions(drawn: tuple[list[float], list[float], list[bool]]) -> None:
    """Sums of steps and kinks at arbitrary places: comparisons and relu, each at its own breakpoint."""
    places, heights, jumps = torch.tensor(drawn[0]), torch.tensor(drawn[1]), torch.tensor(drawn[2])

    def function(x: Tensor, places: Tensor, kinks: Tensor, steps: Tensor) -> Tensor:
        distance = x.unsqueeze(-1) - places
        return (torch.relu(distance) * kinks + (x.unsqueeze(-1) >= places) * steps).sum(-1) + torch.tanh(x)

    constants = (places, heights * ~jumps, heights * jumps)
    functions = functions_of([branch("pieces", 3, 1, function, *constants)])
    module = lowered(functions, 1).module
    x = torch.cat(
        [torch.linspace(-6, 10, 1501), places, torch.nextafter(places, torch.tensor(-9e9)), torch.tensor([-1e4, 1e4])]
    )
    exact = function(x.double(), *(constant.double() for constant in constants))
    got = module(x[:, None].expand(-1, 3))[:, 0, 0].double()
    scale = torch.maximum(exact.abs(), functions.scale[0, 0])
    assert float(((got - exact).abs() / scale).max()) <= 3e-6


def test_breakpoints_are_exact() -> None:
    edge = torch.tensor([0.1, -0.3, 0.7])
    above = torch.nextafter(edge, torch.tensor(math.inf))
    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
        ">=": (lambda x, e: (x >= e).float(), edge),
        "<": (lambda x, e: (x < e).float(), edge),
        ">": (lambda x, e: (x > e).float(), above),
        "relu": (lambda x, e: torch.relu(x - e), above),
        "abs": (lambda x, e: torch.abs(e - x), edge),
        "maximum": (lambda x, e: torch.maximum(x, e), edge),
        "clamp": (lambda x, e: torch.clamp(x, min=e), edge),
    }
    for name, (function, expected) in ways.items():
        region = Region((branch(name, 3, 1, function, edge),), (3,), (3,))
        found = find_breakpoints(region, POINTS, COSTS).breakpoints
        assert found is not None
        assert torch.equal(torch.cat(found), expected), name


def test_floor_breaks_at_every_whole_number() -> None:
    region = Region((branch("floor", 2, 1, lambda x: torch.floor(x.clamp(-3.5, 4.5))),), (2,), (2,))
    found = find_breakpoints(region, torch.tensor([-10.0, 10.0]), COSTS).breakpoints
    assert found is not None
    assert found[1].tolist() == [
        -3.5,
        -3.0,
        -2.0,
        -1.0,
        0.0,
        1.0,
        2.0,
        3.0,
        4.0,
        float(np.nextafter(np.float32(4.5), np.float32(5))),
    ]


def test_breakpoints_are_found_for_the_right_input() -> None:
    """States in another order than the inputs, and narrow bumps whose state is the same on both sides."""
    centre = torch.linspace(-2, 2, 9)
    order = torch.tensor([4, 2, 8, 0, 1, 3, 7, 6, 5])
    region = Region(
        (branch("bumps", 9, 1, lambda x, c, o: ((x - c).abs() < 0.2)[:, o].float(), centre, order),), (9,), (9,)
    )
    found = find_breakpoints(region, POINTS, COSTS).breakpoints
    assert found is not None
    for place, points in zip(centre, found, strict=True):
        assert points.tolist() == pytest.approx([float(place) - 0.2, float(place), float(place) + 0.2], abs=1e-6)


def grouped(x: Tensor, place: Tensor) -> Tensor:
    """``relu`` of each of two groups of channels, which are brought to the front as grouped rational functions do."""
    z = x.view(-1, 2, 4).transpose(0, 1).reshape(2, -1) - place[:, None]
    return z.relu().view(2, -1, 4).transpose(0, 1).reshape(-1, 8)


def with_rows_last(x: Tensor, place: Tensor) -> Tensor:
    z = (x.view(-1, 2, 4).permute(1, 2, 0) - place[:, None, None]).reshape(2, -1)
    return z.relu().view(2, 4, -1).permute(2, 0, 1).reshape(-1, 8)


@pytest.mark.parametrize("function", [grouped, with_rows_last])
def test_states_are_read_wherever_their_rows_lie(function: Callable[..., Tensor]) -> None:
    place = torch.tensor([0.25, -1.5])
    region = Region((branch("groups", 8, 1, function, place),), (8,), (8,))
    found = find_breakpoints(region, POINTS, COSTS).breakpoints
    assert found is not None
    for points, expected in zip(found, [0.25] * 4 + [-1.5] * 4, strict=True):
        assert points.tolist() == [pytest.approx(expected, abs=1e-6)]


def test_a_threshold_that_is_touched_but_for_rounding_is_no_breakpoint() -> None:
    """The state of the last row of a batch flickers, as sums of products do that a batch of another size orders otherwise."""

    class Touches(nn.Module):
        seen = False

        def forward(self, x: Tensor) -> Tensor:
            flickers = (x == POINTS[-250]) & torch.tensor(len(x) == len(POINTS))
            self.seen |= bool(flickers.any())
            return (1e-9 * flickers.float() + 0 * x).abs() + x.abs()

    module = Touches()
    region = Region((Branch("touches", module, torch.arange(2)[:, None]),), (2,), (2,))  # type: ignore[arg-type]
    found = find_breakpoints(region, POINTS, COSTS).breakpoints
    assert module.seen
    assert found is not None
    assert [points.tolist() for points in found] == [[pytest.approx(0, abs=1e-30)]] * 2


def test_functions_without_linear_tail_are_refused() -> None:
    for function in (torch.sin, torch.square):
        with pytest.raises(CannotFit, match="no straight line"):
            functions_of([branch("wave", 3, 1, function)])
    with pytest.raises(CannotFit, match="not finite"):
        functions_of([branch("log", 3, 1, torch.log)])
    with pytest.raises(CannotFit, match="of the degrees tried"):
        lowered(functions_of([silu(3)]), 1, (1,), most_bytes=100)


def test_repeat_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (784,), (3, 10), (17,), (1,)):
        t = torch.randn(5, *shape, generator=generator) * 1e4
        assert torch.equal(Repeat(shape, 9)(t), t.unsqueeze(-1).expand(5, *shape, 9))
    assert [group_size(shape) for shape in ((784,), (17,), (3, 10), (64,))] == [16, 1, 10, 16]
