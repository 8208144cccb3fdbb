import dataclasses

import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.rounding_methods.adaround import AdaRound
from kancompile.passes.rounding_methods.awq import Awq, search_column_scales
from kancompile.passes.rounding_methods.gptq import Gptq
from kancompile.passes.rounding_methods.problem import FeatureSource, objective, rescaled
from kancompile.passes.rounding_methods.uniform import Uniform
from tests.passes.rounding_methods.rounding_problems import generator, problem


def two_kinds_of_columns(bits, tied=True):
    """A quarter of the columns has weights 40 times as large, as a SiLU column beside spline columns."""
    tied_columns = torch.arange(64) % 4 if tied else torch.arange(64)
    task = problem(c=64, n=1024, bits=bits, tied_columns=tied_columns)
    return dataclasses.replace(task, weight=task.weight * torch.where(torch.arange(64) % 4 == 0, 40.0, 1.0))


def test_float_function_is_unchanged():
    task = two_kinds_of_columns(4)
    s = search_column_scales(task)
    table = torch.rand(300, 64, generator=generator(), dtype=torch.float64) * 255  # a float table, not rounded
    before = table @ task.weight.double().T
    after = (table * s.double()) @ (task.weight.double() / s.double()).T
    assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())
    # and with the weights that are really handed on, in float32
    handed_on = rescaled(task, s).weight
    torch.testing.assert_close(handed_on * s, task.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_scales_are_fractions_equal_within_ties(tied):
    task = two_kinds_of_columns(3, tied)
    s = search_column_scales(task)
    assert bool(((s > 0) & (s <= 1)).all())
    assert float(s.max()) == 1
    if tied:
        assert all(len(s[task.tied_columns == tie].unique()) == 1 for tie in range(4))
    assert float(s[torch.arange(64) % 4 == 0].mean()) > 3 * float(s[torch.arange(64) % 4 != 0].mean())


# nearest rounding cannot spend what it gains in small columns on the error of large ones, the others can
@pytest.mark.parametrize(
    ("inner", "share"),
    [(Uniform(), 0.99), (Gptq(), 0.5), (AdaRound(iterations=150), 0.5)],
    ids=["uniform", "gptq", "adaround"],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_error_falls_where_columns_differ_in_size(inner, share, bits):
    task = two_kinds_of_columns(bits)
    plain, scaled = inner(task, generator()), Awq(inner=inner)(task, generator())
    assert scaled.column_scale is not None
    assert objective(task, scaled) < share * objective(task, plain)


def test_rounding_of_a_coarse_table_bounds_the_scales():
    # 8-bit weights leave so little error that a table of few codes would dominate it
    s = search_column_scales(two_kinds_of_columns(8))
    assert float(s.min()) > 1 / 32
    assert float(search_column_scales(two_kinds_of_columns(2)).min()) <= float(s.min())


def test_equal_columns_keep_the_full_range_and_say_so():
    task = problem(bits=8, c=32, tied_columns=torch.zeros(32, dtype=torch.int64))
    rounded = Awq()(task, generator())
    assert rounded.column_scale is None
    assert rounded.notes[-1] == "table columns keep their full code range, no column scale was better"
    assert torch.equal(rounded.codes, Gptq()(task, generator()).codes)


def test_codes_hold_for_the_table_that_was_made_coarser():
    task = two_kinds_of_columns(4)
    rounded = Awq()(task, generator())
    q = torch.cat(list(task.features)).float()
    y = torch.round(q * rounded.column_scale) @ (rounded.codes.float() * rounded.scale.T).T + rounded.offset
    residual = q @ task.weight.T - y
    error = float(residual.square().mean())
    assert float(residual.mean(0).abs().max()) < 1e-2 * error**0.5  # the bias holds for the coarse table, too
    assert objective(task, rounded) == pytest.approx(error, rel=1e-3)
    assert FeatureSource.from_tensor(q).scaled(rounded.column_scale).n == len(q)


def test_final_tables_are_refused():
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0': method 'awq' rescales table columns"):
        Awq()(problem(), generator())
