"""Layers of precision ``weight-only``: B-splines as a formula, weights rounded with their features, and the smallest file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from scipy.interpolate import BSpline

import kancompile
from examples.zoo import efficient_kan, fast_kan
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.errors import KanCompileError
from kancompile.frontend.capture import capture
from kancompile.ir import Contraction, Program, check
from kancompile.passes.round_float_weights import RoundFloatWeights
from kancompile.passes.uniform_splines import UniformSplines, WriteUniformSplines, layers_with_splines
from kancompile.recipe import DEFAULT_PROFILE, WEIGHT_ONLY, LayerRecipe, package_profile
from kancompile.runtimes.session import RuntimeModel
from tests.convolution_programs import float_convolutions, square

X = torch.rand(256, 2, generator=torch.Generator().manual_seed(3)) * 2 - 1
COSTS = package_profile(DEFAULT_PROFILE).functions


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(efficient_kan.build((2, 4, 2)).eval(), X[:2])


@pytest.fixture(scope="module")
def smallest() -> CompiledModel:
    recipe: dict[str, Any] = {"precision": WEIGHT_ONLY, "metadata": "short"}
    return kancompile.compile(fast_kan.build((2, 10, 2)).eval(), X, recipe=recipe)


def test_the_formula_is_that_of_cubic_splines() -> None:
    knots = np.linspace(-2.2, 2.2, 12)
    found = UniformSplines(torch.from_numpy(knots[2:10]), 0.4)(torch.linspace(-3, 3, 301)).numpy()
    for number in range(8):
        exact = BSpline.basis_element(knots[number : number + 5], extrapolate=False)(np.linspace(-3, 3, 301))
        np.testing.assert_allclose(found[:, number], np.nan_to_num(exact), atol=2e-6)


def test_splines_are_found(captured: Program) -> None:
    writing = WriteUniformSplines(lambda _: True, COSTS)
    written = writing(captured, X)
    check(written)
    assert layers_with_splines(written) == {layer.name for layer in captured.layers()}
    torch.testing.assert_close(written(X), captured(X), atol=1e-5, rtol=1e-5)
    assert WriteUniformSplines(lambda _: False, COSTS)(captured, X) is captured
    assert writing(written, X) is written


def test_weights_make_up_for_each_other(captured: Program) -> None:
    rounding = RoundFloatWeights(lambda _: True)
    rounded = rounding(captured, X)
    check(rounded)
    assert rounding(rounded, X) is rounded
    nearest = captured
    for layer in captured.layers():
        before, after = (program.node(layer.contraction, Contraction) for program in (captured, rounded))
        assert after.codes is not None
        assert after.codes.codes.dtype == torch.int8
        assert torch.equal(after.codes.values(), after.weight)
        assert torch.equal(after.bias, before.bias)  # there was none
        scale = before.weight.abs().amax(1, keepdim=True) / 127
        plain = before.with_weight(torch.round(before.weight / scale) * scale)
        nearest = nearest.replace_modules({layer.contraction: plain})
    expected = captured(X)
    assert (rounded(X) - expected).square().mean() < 0.5 * (nearest(X) - expected).square().mean()


def test_the_file_is_smaller_than_the_parameters_and_computes_the_simulation(smallest: CompiledModel) -> None:
    assert len(smallest.model_bytes) < 4 * sum(one.numel() for one in fast_kan.build((2, 10, 2)).parameters())
    fresh = torch.rand(64, 2, generator=torch.Generator().manual_seed(4)) * 2 - 1
    found = RuntimeModel(smallest.model_bytes, 1).run(fresh.numpy())[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, smallest.program(fresh).numpy(), atol=1e-5)
    operators = {node.op_type for node in onnx.load_from_string(smallest.model_bytes).graph.node}
    assert {"Flatten", "Concat"} <= operators
    assert "Reshape" not in operators
    assert [layer["weight_bits"] for layer in smallest.manifest["layers"]] == [8, 8]
    assert all(layer["arithmetic"] == "float" for layer in smallest.manifest["layers"])
    assert LayerRecipe(precision=WEIGHT_ONLY).wider == ("int16", "float")


def test_convolutions_refuse_it() -> None:
    program = float_convolutions((1, 6, 6), [square(2, 3)])
    with pytest.raises(KanCompileError, match="'weight-only' for a convolution"):
        RoundFloatWeights(lambda _: True)(program, torch.rand(4, 1, 6, 6))


@pytest.mark.slow
def test_the_smallest_file_takes_it_below_the_parameters() -> None:
    model = fast_kan.build((2, 10, 2)).eval()
    compiled = kancompile.compile(model, X, recipe={"optimize": "size"})
    assert len(compiled.model_bytes) < 4 * sum(one.numel() for one in model.parameters())
    assert {layer["weight_bits"] for layer in compiled.manifest["layers"]} == {8}
    assert any("weight-only" in note for note in compiled.manifest["notes"])
