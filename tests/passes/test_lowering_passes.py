"""The passes between a captured program and an integer one, each with the contract that holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kancompile.ir import Contraction, IntegerContraction, Program, TableExpansion, check, distinct_inputs, show
from kancompile.passes.fuse_index import FuseIndex
from kancompile.passes.reduce_functions import ReduceFunctions
from kancompile.passes.round_weights import RoundWeights
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.rounding_methods.uniform import Uniform
from kancompile.passes.split_branches import SplitBranches
from kancompile.passes.tabulate_expansions import TabulateExpansions
from kancompile.passes.tabulate_expansions.options import TableOptions
from tests.programs import calibration_inputs, float_program


def tabulate(program: Program, **options: object) -> Program:
    return TabulateExpansions(lambda name: TableOptions(**options))(program, calibration_inputs(program))


def round_uniform(program: Program, **options: object) -> Program:
    choices = RoundingOptions(Uniform(), "uniform", **options)
    return RoundWeights(lambda name: choices)(program, calibration_inputs(program))


def signal_to_noise(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


PASSES = {
    "reduce": lambda program: ReduceFunctions(lambda name: True, lambda name: 2e-4)(
        program, calibration_inputs(program)
    ),
    "split": lambda program: SplitBranches(lambda name: True)(program),
    "tabulate": tabulate,
    "round": lambda program: round_uniform(program),
    "fuse": lambda program: FuseIndex()(program),
}


@pytest.mark.parametrize("last", PASSES)
@pytest.mark.parametrize("same", [True, False])
def test_every_pass_keeps_its_contract(last: str, same: bool) -> None:
    program = float_program(same_functions=same)
    x = calibration_inputs(program, seed=2)
    exact = program(x)
    for name, run in PASSES.items():
        before, text = program(x), show(program)
        after = run(program)
        check(after)
        assert show(program) == text, "the input changed"
        assert torch.equal(program(x), before), "the input changed"
        assert signal_to_noise(exact, after(x)) > 33
        if name == last:
            assert run(after) is after, "a second run did something"
            return
        program = after


def test_split_branches_is_exact() -> None:
    program = float_program()
    x = calibration_inputs(program)
    split = SplitBranches(lambda name: name == "layers.1")(program)
    torch.testing.assert_close(split(x), program(x), rtol=1e-5, atol=1e-6)
    assert [len(layer.expansions) for layer in split.layers()] == [1, 2]


def test_tabulated_codes_decode_to_the_functions() -> None:
    program = float_program()
    table = tabulate(program, levels=4096, range="minmax").module("layer0_expand")
    assert isinstance(table, TableExpansion)
    x = calibration_inputs(program, 50)
    decoded = table(x).float() * table.column_scale() + table.column_offset()
    exact = program.module("layer0_expand")(x)
    # half a code, and half a row times the steepest slope (below 1.2 for both kinds of function)
    bound = table.column_scale().max() / 2 + 1.2 * table.index.scale
    assert (decoded - exact).abs().max() <= bound


def test_tables_are_shared_exactly_where_functions_agree() -> None:
    shared, own = tabulate(float_program()), tabulate(float_program(same_functions=False))
    assert shared.module("layer0_expand").n_tables == 1
    assert own.module("layer0_expand").n_tables == 6
    first, group = distinct_inputs(float_program().module("layer0_expand"), -3, 3)
    assert first == [0]
    assert group.tolist() == [0] * 6


def test_fewer_levels_cost_accuracy() -> None:
    program = float_program()
    x = calibration_inputs(program, seed=3)
    quality = [signal_to_noise(program(x), tabulate(program, levels=levels)(x)) for levels in (16, 64, 1024)]
    assert quality == sorted(quality)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_error_follows_the_bits(bits: int) -> None:
    program = tabulate(float_program((20, 16, 6)))
    x = calibration_inputs(program, seed=3)
    rounded = round_uniform(program, bits=bits)
    assert all(isinstance(rounded.module(layer.contraction), IntegerContraction) for layer in rounded.layers())
    assert signal_to_noise(program(x), rounded(x)) > 6 * bits - 9


def test_groups_divide_the_columns() -> None:
    rounded = round_uniform(tabulate(float_program()), granularity="group", group_size=2)
    assert rounded.module("layer0_contract").group_sizes == (10, 10, 10)


def test_bias_joins_the_integer_sum() -> None:
    program = tabulate(float_program())
    rounded = round_uniform(program)
    for layer in program.layers():
        float_layer, integer = program.module(layer.contraction), rounded.module(layer.contraction)
        assert isinstance(float_layer, Contraction)
        zero = [torch.zeros(1, rounded.module(target).n_in, rounded.module(target).k, dtype=torch.uint8)
                for target in layer.expansions]  # fmt: skip
        # bias correction moves it by the mean rounding error; half a step of the scale is rounding
        np.testing.assert_allclose(integer(*zero), float_layer.bias[None], atol=0.05)


def test_fusion_hands_row_numbers_or_scaled_values() -> None:
    rounded = round_uniform(tabulate(float_program(), levels=256))
    assert FuseIndex()(rounded).module("layer1_expand").input == "index"
    fine = round_uniform(tabulate(float_program(), levels=1024))
    fused = FuseIndex()(fine)
    assert fused.module("layer1_expand").input == "scaled"
    x = calibration_inputs(fine, seed=5)
    # both round to the nearest row; values on the edge between two rows may fall on either side
    rows = [program.module("layer1_expand").to_index(program.trace(x, ["layer0_contract"])["layer0_contract"][1])
            for program in (fine, fused)]  # fmt: skip
    assert (rows[0] - rows[1]).abs().max() <= 1
    assert (rows[0] != rows[1]).float().mean() < 0.01
