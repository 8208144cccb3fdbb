"""Functions that are constant between jumps get a row for each constant, wherever the jumps lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kancompile
from kancompile.ir import Expansion, TableExpansion
from kancompile.passes.lower_to_polynomials import breakpoints
from kancompile.passes.lower_to_polynomials.observed_region import Region
from kancompile.passes.step_functions import find_steps, lattice_of, step_quantizer
from kancompile.recipe import Recipe
from tests.regions import branch

N_IN, K = 3, 2


def quantized(step: float, low: int, high: int, shift: float = 0.0, floor: bool = False) -> Expansion:
    """Tables of random values behind a quantizer of rows ``low ... high``."""
    tables = torch.randn(high - low + 1, K, generator=torch.Generator().manual_seed(0))

    def function(x: Tensor, values: Tensor) -> Tensor:
        places = x / step + shift
        rows = (places.floor() if floor else places.round()).clamp(low, high) - low
        return values[rows.long()]

    return Expansion((N_IN,), [branch("table", N_IN, K, function, tables)])


def inputs(low: float, high: float, n: int = 500) -> Tensor:
    return torch.rand(n, N_IN, generator=torch.Generator().manual_seed(1)) * (high - low) + low


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(-100, 1), st.integers(2, 120))
def test_the_quantizer_of_a_network_is_found(step: float, low: int, high: int) -> None:
    expansion = quantized(step, low, high)
    index = step_quantizer(expansion, inputs((low - 2) * step, (high + 2) * step))
    assert index is not None
    assert abs(index.scale / step - 1) < 1e-4
    assert (index.low / step, index.high / step) == pytest.approx((min(low, 0), high), abs=0.01)


def test_functions_stay_right_where_calibration_did_not_reach() -> None:
    expansion = quantized(0.1, -32, 31)
    index = step_quantizer(expansion, inputs(-1.7, 1.6))
    assert index is not None
    assert index.levels == 64


def test_jumps_off_the_middle_do_where_inputs_are_multiples() -> None:
    expansion = quantized(1.0, -8, 7, floor=True)
    assert step_quantizer(expansion, inputs(-12, 12)) is None
    whole = inputs(-12, 12).round()
    index = step_quantizer(expansion, whole)
    assert index is not None
    assert index.levels == 16
    rows = index.rows()[index(whole).long()]
    assert torch.equal(expansion.evaluate_inputs(rows), expansion.evaluate_inputs(whole))


@pytest.mark.parametrize(
    "function",
    [torch.sigmoid, torch.relu, lambda x: torch.round(x) + 0.01 * x, lambda x: torch.round(x**2), lambda x: 0 * x + 1],
)
def test_other_functions_have_no_steps(function: Callable[[Tensor], Tensor]) -> None:
    expansion = Expansion((N_IN,), [branch("other", N_IN, 1, function)])
    assert not list(find_steps(expansion, inputs(-3, 3)))


def test_lattices_hold_all_jumps() -> None:
    assert lattice_of(torch.tensor([-1.5, -0.5, 2.5], dtype=torch.float64)) is not None
    assert lattice_of(torch.tensor([-1.5, -0.5, 2.2], dtype=torch.float64)) is None
    one = lattice_of(torch.tensor([0.7], dtype=torch.float64))
    assert one is not None
    index = one.quantizer()
    assert index is not None
    assert index(torch.tensor([-9.0, 0.69, 0.71, 9.0])).tolist() == [0, 0, 1, 1]
    far = lattice_of(torch.tensor([1000.5, 1001.5], dtype=torch.float64))
    assert far is not None
    assert far.quantizer() is None


class IntegerTables(nn.Module):
    """A network of published integer tables, as an FPGA runs it: quantized inputs, sums of entries, clipped, as rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randint(-9, 10, (6, 64, 5), generator=generator).float())
        self.register_buffer("second", torch.randint(-60, 60, (5, 64, 3), generator=generator).float())

    def forward(self, x: Tensor) -> Tensor:
        values = torch.round((x + 0.117) / 0.0731)
        for table in (self.first, self.second):
            rows = (values.clamp(-32, 31) + 32).long()
            values = table[torch.arange(len(table)), rows].sum(1)
        return values


def test_integer_tables_stay_what_they_are() -> None:
    model = IntegerTables().eval()
    x, fresh = (torch.randn(500, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    compiled = kancompile.compile(model, x)
    assert torch.equal(compiled.program(3 * fresh), model(3 * fresh))
    tables = [module for module in compiled.program.graph_module.modules() if isinstance(module, TableExpansion)]
    assert [table.rows for table in tables] == [64, 64]
    found = compiled.validate(fresh)
    assert all(layer.sqnr_db > 140 for layer in found.layers)
    assert len(compiled.model_bytes) < len(kancompile.compile(model, x, recipe={"precision": "float"}).model_bytes)


def test_steps_without_end_are_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expansion = Expansion((N_IN,), [branch("round", N_IN, 1, lambda x: torch.round(x / 0.01).clamp(-9, 9))])
    seen = []
    observe = Region.observe
    monkeypatch.setattr(Region, "observe", lambda region, x: seen.append(len(x)) or observe(region, x))
    region = Region(list(expansion.branches), expansion.anchor_shape, expansion.in_shape)
    points = torch.unique(torch.cat([torch.linspace(-2, 2, 100), torch.tensor([-1e4, 1e4])]))
    assert breakpoints.find_breakpoints(region, points, Recipe().costs.functions).breakpoints is None
    assert len(seen) < 20
