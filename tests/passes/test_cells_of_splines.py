"""Splines become cubic cells at their knots in whatever form they are written, and bytes weigh in the choice of cells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kancompile.frontend import capture
from kancompile.ir import PolynomialExpansion
from kancompile.passes.lower_to_polynomials import LowerToPolynomials
from kancompile.passes.lower_to_polynomials.form_cost import Beside
from kancompile.passes.lowering import WIDE_TOLERANCE

INPUTS, GRID = 3, 5
KNOTS = torch.arange(-3, GRID + 4) * 0.8 - 2.0
X = torch.rand(300, INPUTS, generator=torch.Generator().manual_seed(0)) * 4 - 2


def _recursion(x: Tensor, t: Tensor, inside: Tensor) -> Tensor:
    """Cox and de Boor's recursion from the cells ``inside`` which inputs lie, to degree 3."""
    values = inside.to(x.dtype)
    for k in (1, 2, 3):
        left, right = (x - t[..., : -k - 1]) / (t[..., k:-1] - t[..., : -k - 1]), t[..., k + 1 :] - x
        values = left * values[..., :-1] + right / (t[..., k + 1 :] - t[..., 1:-k]) * values[..., 1:]
    return values


def _cells(numbers: Tensor) -> Tensor:
    return numbers[..., None] - 1 == torch.arange(len(KNOTS) - 1)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "greater or equal, less": lambda x, t: _recursion(x, t, (x >= t[..., :-1]) & (x < t[..., 1:])),
    "greater, less or equal": lambda x, t: _recursion(x, t, (x > t[..., :-1]) & (x <= t[..., 1:])),
    "knots first": lambda x, t: _recursion(x, t, (t[..., :-1] <= x) & (t[..., 1:] > x)),
    "searchsorted": lambda x, t: _recursion(
        x, t, _cells(torch.searchsorted(KNOTS, x[..., 0].contiguous(), right=True))
    ),
    "bucketize": lambda x, t: _recursion(x, t, _cells(torch.bucketize(x[..., 0].contiguous(), KNOTS, right=True))),
    "relu": lambda x, t: _recursion(x, t, -torch.relu(x - t).sign().diff()),
    "clamp": lambda x, t: _recursion(x, t, -(x - t).clamp(min=0).sign().diff()),
}


class Splines(nn.Module):
    """A layer of splines written in one of the forms, behind an affine map of its input."""

    def __init__(self, form: str, expanded: bool, slope: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.form, self.slope, self.shift = FORMS[form], slope, shift
        self.register_buffer("knots", KNOTS.expand(INPUTS, -1).contiguous() if expanded else KNOTS)
        functions = self.form(torch.zeros(1, INPUTS, 1), self.knots).shape[-1]
        self.weight = nn.Parameter(torch.randn(4, INPUTS * functions, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        values = self.form((x * self.slope + self.shift)[..., None], self.knots)
        return nn.functional.linear(values.flatten(1), self.weight)


@pytest.mark.parametrize("form", FORMS)
def test_knots_are_found_in_every_form(form: str) -> None:
    for model in (Splines(form, expanded=False), Splines(form, expanded=True, slope=0.5, shift=0.1)):
        program = LowerToPolynomials(WIDE_TOLERANCE)(capture(model, X[:2]), X)
        (table,) = (program.module(target) for layer in program.layers() for target in layer.expansions)
        assert isinstance(table, PolynomialExpansion), program.notes
        assert table.degree == 3, program.notes
        assert table.table_bytes < 1 << 13, program.notes
        expected = model(X).detach()
        # the functions are cubic between the knots, so that cells that begin there hold them to rounding
        assert float((program(X) - expected).abs().max()) < 2e-6 * float(expected.abs().max())


def test_a_form_four_times_as_large_must_be_twice_as_fast() -> None:
    beside = Beside(1 << 20, 0.0)
    table = 3 * ((1 << 20) + (1 << 12))
    assert beside.cost(50.0, table) == pytest.approx(beside.cost(100.0))
    assert Beside(0, 0.0).cost(34.0, 282_384) > Beside(0, 0.0).cost(70.0, 7_488)
    assert Beside(1 << 23, 0.0).cost(34.0, 282_384) < Beside(1 << 23, 0.0).cost(70.0, 7_488)
