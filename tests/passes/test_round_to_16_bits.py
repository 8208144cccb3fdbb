"""16-bit layers: the contract of a pass, accuracy, and the file against its simulation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.frontend.capture import capture
from kancompile.ir import Contraction, PolynomialExpansion, check
from kancompile.passes.lower_to_polynomials import LowerToPolynomials
from kancompile.passes.lowering import WIDE_TOLERANCE
from kancompile.passes.round_to_16_bits import RoundTo16Bits
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.kernel_audit import optimized_graph

N_IN = 6
X = torch.rand(200, N_IN, generator=torch.Generator().manual_seed(3)) * 2.4 - 1.2


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return KAN([N_IN, 20, 3], torch.Generator().manual_seed(5)).eval()


@pytest.fixture(scope="module")
def wide(model: torch.nn.Module) -> CompiledModel:
    return kancompile.compile(model, X, recipe={"precision": "int16"})


def test_contract_of_the_pass(model: torch.nn.Module) -> None:
    captured = capture(model, X[:2])
    rounding = RoundTo16Bits(lambda _: True)
    program = LowerToPolynomials(WIDE_TOLERANCE)(captured, X)
    rounded = rounding(program)
    check(rounded)
    assert rounding(rounded) is rounded
    assert RoundTo16Bits(lambda _: False)(program) is program
    for layer in program.layers():
        before, after = program.module(layer.contraction), rounded.module(layer.contraction)
        assert isinstance(before, Contraction)
        assert isinstance(after, Contraction)
        assert before.codes is None
        assert after.codes is not None
        assert torch.equal(after.codes.values(), after.weight)
        # a code is off by half a step, and a row's largest weight has at least 14 bits once columns are scaled alike
        size = after.codes.row_scale[:, None] * after.codes.column_scale
        assert bool(((after.weight - before.weight).abs() <= size).all())
        tables = [rounded.module(target) for target in layer.expansions]
        assert any(isinstance(table, PolynomialExpansion) and table.codes is not None for table in tables)


def test_error_is_below_a_ten_thousandth_of_the_range(model: torch.nn.Module, wide: CompiledModel) -> None:
    x = torch.rand(500, N_IN, generator=torch.Generator().manual_seed(9)) * 2.4 - 1.2
    with torch.no_grad():
        expected = model(x)
    error = RuntimeModel(wide.model_bytes)(x) - expected
    span = expected.amax(0) - expected.amin(0)
    assert float((error.square().mean(0).sqrt() / span).max()) < 1e-4
    far = RuntimeModel(wide.model_bytes)(20 * x)
    with torch.no_grad():
        assert float((far - model(20 * x)).abs().max()) < 1e-3 * float(model(20 * x).abs().max())


def _sizes(program: kancompile.ir.program.Program, x: Tensor) -> Tensor:
    """Sum of the magnitudes of the terms of the last layer, which bounds what float32 sums can differ by."""
    layer = program.layers()[-1]
    arguments = program.trace(x, [layer.contraction])[layer.contraction][0]
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, Contraction)
    sizes = Contraction("", contraction.weight.abs(), contraction.bias.abs(), contraction.out_shape)
    return sizes(*(part.abs() for part in arguments))


def test_the_file_computes_what_the_simulation_computes(wide: CompiledModel) -> None:
    # last layer alone: two orders of summation differ by at most (c + 2) * 2^-24 each of the magnitudes' sum; hidden
    # values differ likewise and the functions behind them have slopes below 10, so ten times as much covers both layers
    simulated, found = wide.program(X), RuntimeModel(wide.model_bytes)(X)
    columns = 20 * 9 + 2
    bound = 11 * 2 * columns * 2.0**-24 * _sizes(wide.program, X)
    assert bool(((simulated - found).abs() <= bound).all())


def test_the_file_holds_16_bits_and_widens_them_at_load(wide: CompiledModel) -> None:
    initializers = onnx.load_from_string(wide.model_bytes).graph.initializer
    codes = [array for array in initializers if array.data_type == onnx.TensorProto.INT16]
    floats = sum(int(np.prod(a.dims)) for a in initializers if a.data_type == onnx.TensorProto.FLOAT)
    assert sum(int(np.prod(array.dims)) for array in codes) > floats  # small tables stay floats
    operators = {node.op_type for node in optimized_graph(wide.model_bytes).node}
    loaded = [array.data_type for array in optimized_graph(wide.model_bytes).initializer]
    assert "Gather" in operators
    assert onnx.TensorProto.INT16 not in loaded
    layers = wide.manifest["layers"]
    assert [layer["weight_bits"] for layer in layers] == [16, 16]
    assert all(entry["bits"] == 16 for layer in layers for entry in layer["expansions"] if "bits" in entry)
