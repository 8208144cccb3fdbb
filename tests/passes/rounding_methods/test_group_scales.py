"""Scales of groups as whole multiples of one scale: exact where they are, one product in the file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kancompile
from examples.zoo.efficient_kan import build
from kancompile.ir import IntegerContraction, Program
from kancompile.passes.lowering import lower
from kancompile.passes.rounding_methods import method_named
from kancompile.passes.rounding_methods.group_scales import (
    common_scale,
    largest_multiplier,
    settle_group_scales,
    snap_scales,
)
from kancompile.passes.rounding_methods.problem import objective
from kancompile.passes.rounding_methods.quantizers import code_range
from kancompile.recipe import read_recipe
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS
from tests.passes.rounding_methods.rounding_problems import generator, problem

WIDTHS = (10, 7, 3)


def inputs(n: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, WIDTHS[0], generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def captured() -> Program:
    return kancompile.capture(build(WIDTHS), inputs(2))


@settings(deadline=None)
@given(
    st.integers(2, 3),
    st.lists(st.lists(st.floats(2**-20, 2**20, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_multiples_are_within_half_a_base_and_settled_scales_stay(bits: int, values: list[list[float]]) -> None:
    scale = torch.tensor(values)
    base, multiplier = common_scale(scale, bits)
    assert int(multiplier.min()) >= 1
    assert int(multiplier.max()) * -code_range(bits)[0] <= 64  # two products with uint8 codes fit int16
    clipped = torch.maximum(scale, base)  # a scale below the base becomes the base
    assert bool(((base * multiplier - clipped).abs() <= 0.5001 * base).all())
    again = common_scale(base * multiplier, bits)
    assert torch.equal(again[1], multiplier)
    torch.testing.assert_close(again[0], base, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["uniform", "gptq", "awq+gptq"])
@pytest.mark.parametrize("bits", [2, 3])
def test_settling_costs_little_and_keeps_the_mean(name: str, bits: int) -> None:
    task = problem(bits=bits, group_sizes=(12, 12, 12, 12), c=48, tied_columns=torch.arange(48) % 6)
    method = method_named(name)
    free = method(task, generator())
    settled = settle_group_scales(task, free, method)
    base, multiplier = common_scale(settled.scale, bits)
    torch.testing.assert_close(base * multiplier, settled.scale, rtol=1e-6, atol=0)
    # half a base is at most 1 / 16 of these scales, which moves a code of 2 by an eighth of a step; rounding moves it by a half
    assert objective(task, settled) <= (1 + 1 / 8) * objective(task, free)
    mean, _ = task.column_moments
    left = (task.weight.double() - settled.dequantized().double()) @ mean - settled.offset.double()
    assert float(left.abs().max()) <= 1e-3 * float((task.weight.double() @ mean).abs().max())
    assert largest_multiplier(bits) >= 8
    assert torch.equal(snap_scales(task, settled).codes, settled.codes)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 2), (2, 3), (3, 4)])
@pytest.mark.parametrize("storage", ["smallest", "native", "fastest"])
def test_groups_are_one_product_in_the_file(captured: Program, bits: int, group_size: int, storage: str) -> None:
    recipe = {"weight_bits": bits, "method": "gptq", "granularity": "group", "group_size": group_size}
    program = lower(captured, inputs(), read_recipe(recipe))
    for layer in program.layers():
        contraction = program.module(layer.contraction)
        assert isinstance(contraction, IntegerContraction)
        assert len(contraction.group_sizes) == 1
        assert contraction.multiplier is not None
        assert len(contraction.multiplier.group_sizes) > 1
    model = TARGETS["ort-cpu"].emit(program, {}, storage)
    test = inputs(300, seed=1) * 1.5
    np.testing.assert_array_equal(RuntimeModel(model).run(test.numpy())[0], program(test).numpy())
    assert sum(node.op_type == "Gemm" for node in onnx.load_from_string(model).graph.node) == 2


def test_groups_of_wider_codes_stay_products_of_their_own(captured: Program) -> None:
    recipe = {"weight_bits": 4, "method": "uniform", "granularity": "group", "group_size": 5}
    program = lower(captured, inputs(), read_recipe(recipe))
    contraction = program.module(program.layers()[0].contraction)
    assert isinstance(contraction, IntegerContraction)
    assert contraction.multiplier is None
    assert len(contraction.group_sizes) > 1


def test_groups_lower_the_error_at_two_bits(captured: Program) -> None:
    test = inputs(1000, seed=1)
    exact = captured(test)

    def error(**keys: object) -> float:
        recipe = read_recipe({"weight_bits": 2, "method": "gptq"} | keys)
        return float((lower(captured, inputs(), recipe)(test) - exact).square().mean())

    assert error(granularity="group", group_size=1) < 0.7 * error()


@pytest.mark.slow
def test_block_reconstruction_works_with_groups(captured: Program) -> None:
    recipe = {"weight_bits": 2, "method": "brecq", "granularity": "group", "group_size": 2}
    program = lower(captured, inputs(100), read_recipe(recipe))
    test = inputs(300, seed=1)
    model = TARGETS["ort-cpu"].emit(program, {}, "smallest")
    np.testing.assert_array_equal(RuntimeModel(model).run(test.numpy())[0], program(test).numpy())
