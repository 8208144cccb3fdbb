from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kancompile.ir import Contraction, Expansion, IndexQuantizer, Program
from kancompile.passes.tabulate_expansions.choose_index import choose_index, index_over, lattice_indices, row_inputs
from kancompile.passes.tabulate_expansions.lookup_cost import LookupCost
from tests.programs import calibration_inputs, float_program

bounds = st.floats(-100, 100, allow_nan=False, width=32)


@settings(max_examples=200, deadline=None)
@given(bounds, bounds, st.sampled_from([16, 31, 256, 1000, 4096]))
def test_index_covers_its_range_and_zero(a: float, b: float, levels: int) -> None:
    low, high = min(a, b), max(a, b)
    index = index_over(low, high, levels)
    assert 0 <= index.zero_point < levels
    assert index.low <= min(low, 0) + 0.51 * index.scale
    assert index.high >= max(high, 0) - 0.51 * index.scale
    if high - low > 1e-3:
        assert index.scale <= (max(high, 0) - min(low, 0)) / (levels - 2) * 1.001


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 256), st.floats(0.0, 1.0), st.floats(0.01, 10))
def test_lattice_points_keep_rows_of_their_own(count: int, zero_at: float, step: float) -> None:
    # any 8-bit image normalised by a mean and a standard deviation
    points = (torch.arange(count, dtype=torch.float64) - zero_at * (count - 1)) * step
    x = points.float()
    indices = list(lattice_indices(x))
    assert indices
    rows = indices[0](x).long()
    assert len(torch.unique(rows)) >= count - 1  # the last two may share one where 0 lies between points
    if len(rows) == len(torch.unique(rows)):
        np.testing.assert_allclose(row_inputs(indices[0], x)[rows], points, rtol=1e-5, atol=1e-6 * step)


def test_no_lattice_in_continuous_data() -> None:
    assert not list(lattice_indices(torch.randn(5000, generator=torch.Generator().manual_seed(0))))


def test_rows_stand_for_the_mean_of_their_inputs() -> None:
    index = IndexQuantizer(1.0, 2, 5)
    x = torch.tensor([0.1, 0.3, -1.9, 9.0])
    np.testing.assert_allclose(row_inputs(index, x), [-1.9, -1.0, 0.2, 1.0, 9.0], atol=1e-6)


def expansion_and_cost(seed: int = 0) -> LookupCost:
    program = float_program(seed=seed)
    expansion = program.module("layer0_expand")
    assert isinstance(expansion, Expansion)
    return _cost(program, expansion, calibration_inputs(program))


def _cost(program: Program, expansion: Expansion, x: torch.Tensor) -> LookupCost:
    contraction = program.node("layer0_contract", Contraction)
    shared = torch.zeros(expansion.n_in, dtype=torch.int64)
    return LookupCost(expansion, contraction, contraction.weight, x, shared)


def test_error_falls_fourfold_with_twice_the_rows() -> None:
    cost = expansion_and_cost()
    errors = [cost(index_over(-4, 4, levels)) for levels in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 2.5 < coarse / fine < 6.5  # uniform noise: step^2 / 12


def test_takes_the_fewest_rows_that_are_good_enough() -> None:
    cost = expansion_and_cost()
    loose, tight = choose_index(cost, 1e-2), choose_index(cost, 1e-6)
    assert loose.index.levels < tight.index.levels
    assert loose.error <= 1e-3
    assert tight.error <= 1e-7 or tight.index.levels == 4096


def test_fixed_rows_and_limit_are_kept() -> None:
    cost = expansion_and_cost()
    assert choose_index(cost, 1e-9, levels=32).index.levels == 32
    assert choose_index(cost, 0.0, most_levels=128).index.levels <= 128


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse"])
def test_measured_range_is_never_worse_than_minmax(kind: str) -> None:
    cost = expansion_and_cost()
    cost.x[0, 0] = 40.0  # an outlier that a range should not be wasted on
    cost = _cost(float_program(), cost.expansion, cost.x)
    chosen = choose_index(cost, 0.0, levels=64, range=kind)
    plain = choose_index(cost, 0.0, levels=64, range="minmax")
    assert chosen.error <= plain.error or kind == "percentile"
