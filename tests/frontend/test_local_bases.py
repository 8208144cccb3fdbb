"""Capture of KANs that compute only the functions that live where an input lies, and what an index may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.errors import KanCompileError
from kancompile.frontend import capture
from kancompile.frontend.flow import analyse
from kancompile.ir import Program
from kancompile.progress import quiet
from tests.frontend import local_bases
from tests.frontend.capturing import captured, draw, expansions, functions_are_shared

GATHERED = {  # the functions of each edge, one for each of three outputs
    "gather": local_bases.GatheredLine(),
    "einsum": local_bases.GatheredCubic(),
    "einsum, functions first": local_bases.GatheredCubic("kib,biko->bo"),
    "index of one dimension": local_bases.SlicedWeights(),
    "index_select": local_bases.TakenRows(),
    "searchsorted": local_bases.UnevenKnots(),
    "mask": local_bases.MaskedEnds(),
}
WRITTEN = {  # the row of basis functions, the same for all inputs
    "one_hot": (local_bases.OneHotBucket(), 6),
    "topk": (local_bases.NearestCenters(), 5),
    "index_add": (local_bases.FlatIndexAdd(), 11),
    **{
        how: (local_bases.ScatteredBasis(how), 11)
        for how in ("scatter", "scatter_add", "scatter_reduce", "index_put", "one by one")
    },
}


def check_everywhere(model: local_bases.LocalBasis, program: Program) -> None:
    """Compare on the knots, beside them, and far outside of the grid."""
    knots = getattr(model, "knots", torch.linspace(-2, 2, model.intervals + 1)).flatten()
    points = torch.cat([knots, knots.nextafter(torch.tensor(9.0)), knots.nextafter(torch.tensor(-9.0)), 9 * draw(40)])
    x = torch.stack([points.roll(place) for place in range(model.n_in)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", GATHERED)
def test_gathered_weights_are_functions_of_each_edge(how: str) -> None:
    program = captured(GATHERED[how], (4,))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.k) == ((4,), 3)
    assert not program.unrecognized
    check_everywhere(GATHERED[how], program)


@pytest.mark.parametrize("how", WRITTEN)
def test_live_functions_are_written_into_a_row(how: str) -> None:
    model, functions = WRITTEN[how]
    program = captured(model, (4,))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.k) == ((4,), functions)
    assert functions_are_shared(expansion)
    assert not program.unrecognized
    check_everywhere(model, program)


@pytest.mark.parametrize("model", [GATHERED["einsum"], WRITTEN["scatter"][0], WRITTEN["index_add"][0]])
def test_local_functions_become_integers(model: nn.Module) -> None:
    rows = 4 * torch.rand(512, 4, generator=torch.Generator().manual_seed(1)) - 2
    with quiet():
        compiled = kancompile.compile(model, rows[:256])
        result = kancompile.validate(compiled.model_bytes, model, rows[256:], program=compiled.program)
    assert result.compiled.sqnr_db > 30


@pytest.mark.parametrize(
    ("model", "line", "reason"),
    [
        (local_bases.IntervalOfTwo(), "number = (number + number.roll", "nonlinear function of several features"),
        (local_bases.IntervalOfTwo(gathered=False), "number = (number + number.roll", "nonlinear function of several"),
        (local_bases.ScatteredByAnother(), "number.roll(1, 1), basis)", "values of several features in one place"),
        (local_bases.FlatIndexAdd(spare=1), "row.index_add", "writes that may put values of several features"),
        (
            local_bases.UnclampedIndex(),
            "(place - left).unsqueeze(-1)).sum(1)",
            r"other inputs than the example \(index .* clamp its index",
        ),
    ],
)
def test_what_an_index_mixes_is_no_function_of_one_input(model: nn.Module, line: str, reason: str) -> None:
    with open(local_bases.__file__) as file:
        number = next(number for number, text in enumerate(file, 1) if line in text)
    with pytest.raises(KanCompileError, match=rf"found no KAN layer.*local_bases.py:{number}\): [^;]*{reason}"):
        capture(model, (4,))


def test_what_an_example_does_not_reach_is_not_left_out() -> None:
    model = local_bases.PickedInput()
    program = captured(model, (3,))
    assert [entry.reason for entry in program.unrecognized] == ["lookup that may pick values of several features"]
    x = torch.tensor([[200.0, 0.3, -0.7], [0.0, 0.3, -0.7]])
    torch.testing.assert_close(program(x), model(x))


def test_values_added_in_constant_groups_are_a_contraction() -> None:
    factors = draw(8, seed=33)

    def grouped(x: Tensor) -> Tensor:
        basis = torch.cat([torch.sin(x), torch.cos(2 * x)], dim=1)
        groups = torch.tensor([0, 1, 1, 0, 2, 2, 2, 1])
        return basis.new_zeros(x.shape[0], 3).index_add(1, groups, basis * factors)

    program = captured(Function(grouped), (4,))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.k) == ((4,), 2)


def test_as_many_values_as_a_mask_has_are_refused_with_their_line() -> None:
    def selected(x: Tensor) -> Tensor:
        return x + torch.sin(x[x > 0]).sum()

    with pytest.raises(KanCompileError, match=r"test_local_bases.py:\d+: found .*other samples"):
        capture(Function(selected), (4,))


def test_an_index_that_leaves_its_tensor_is_refused_with_its_line() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(draw(9, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.table[(2 * x + 4).floor().long()].sum(1)

    with pytest.raises(KanCompileError, match=r"test_local_bases.py:\d+\): a lookup fails on other inputs .*; clamp"):
        capture(Narrow(), torch.linspace(-1.9, 1.9, 12).view(3, 4))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


KNOTS = torch.tensor([-1.0, 0.0, 2.0])
BOUNDED: list[tuple[Callable[[Tensor], Tensor], float, float]] = [
    (lambda x: x.floor().long().clamp(0, 7), 0, 7),
    (lambda x: x.floor().clamp(max=7).long(), -math.inf, 7),
    (lambda x: 3 - 2 * x.long().clamp(0, 4), -5, 3),
    (lambda x: ((x.clamp(-1, 1) + 1) / 2 * 8).floor().long(), 0, 8),
    (lambda x: (x.clamp(0, 1 - 1e-9) * 8).long(), 0, 8),  # float32 has no number between
    (lambda x: (torch.sigmoid(x) * 8).long().clamp(max=7), 0, 7),
    (lambda x: (torch.tanh(x) * 3).round().long() // 2, -2, 1),
    (lambda x: torch.searchsorted(KNOTS, x), 0, 3),
    (lambda x: torch.bucketize(x, KNOTS) - 1, -1, 2),
    (lambda x: (x.unsqueeze(-1) - KNOTS).abs().argmin(-1), 0, 2),
    (lambda x: x.long() % 5, 0, 4),
    (lambda x: torch.where(x > 1, x.long().clamp(2, 9), 1), 1, 9),
    (lambda x: (x > 0).long() + (x > 1).long(), 0, 2),
    (lambda x: torch.cat([x.long().clamp(0, 3), x.long().clamp(2, 6) + 1], 1), 0, 7),
    (lambda x: x.long().clamp(0, 300).to(torch.uint8).long(), -math.inf, math.inf),  # wraps around
    (lambda x: (place := x.long().clamp(-2, 3)) * place, -math.inf, math.inf),  # 0 is not at an end
    (lambda x: x.clamp(0, 3) / x, -math.inf, math.inf),
    (lambda x: x.long() - x.long(), -math.inf, math.inf),  # 0, which takes algebra
]


@pytest.mark.parametrize(("function", "low", "high"), BOUNDED)
def test_bounds_of_values(function: Callable[[Tensor], Tensor], low: float, high: float) -> None:
    rows = draw(3, 2, seed=1)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Function(function), (rows,), dynamic_shapes=shapes).run_decompositions()
    flow = analyse(program, rows)
    least, most = flow.bounds(flow.outputs[0])
    assert least.shape == most.shape == function(rows).shape
    assert (float(least.min()), float(most.max())) == (low, high)
    values = function(torch.cat([draw(3, 2, seed=seed, scale=4.0**seed) for seed in range(6)])).double().nan_to_num()
    assert low <= float(values.min())
    assert float(values.max()) <= high
