"""The ``.tflite`` file against the simulation, in ai-edge-litert's interpreter, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from kancompile.compiler.compile import compile
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import IntegerContraction, Program
from kancompile.runtimes.litert import RUNTIME
from kancompile.targets import TARGETS
from kancompile.targets.litert.emit import emit
from tests.compiled_kan import make_inputs, make_model
from tests.convolution_programs import integer_convolutions, square
from tests.programs import float_program, integer_program
from tests.runtimes.exactness import PROGRAMS, probing_inputs, simulated_outputs
from tests.targets.test_convolutions import CASES as CONVOLUTIONS
from tests.targets.test_ort_cpu import CASES as CHAINS
from tests.targets.test_ort_cpu import inputs

needs_runtime = pytest.mark.needs("litert")


def run(model: bytes, x: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / "model.tflite"
    path.write_bytes(model)
    return RUNTIME.run(path, x)


def operators(model: bytes) -> list[tuple[str, str]]:
    """List operators and the type of their first input, in order."""
    from ai_edge_litert import schema_py_generated as schema

    content = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0))
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    types = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    graph = content.subgraphs[0]
    codes = [names[code.builtinCode] for code in content.operatorCodes]
    return [(codes[node.opcodeIndex], types[graph.tensors[node.inputs[0]].type]) for node in graph.operators]


@needs_runtime
@pytest.mark.parametrize("case", PROGRAMS)
def test_outputs_equal_simulation_on_ties_and_outside_the_tables(case: str, tmp_path: Path) -> None:
    program = PROGRAMS[case]()
    x = probing_inputs(program, 5000)
    expected = simulated_outputs(program, x)
    assert np.unique(expected).size > 50
    np.testing.assert_array_equal(run(emit(program, {}), x, tmp_path), expected)


@needs_runtime
@pytest.mark.parametrize("case", CHAINS, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()) or "plain")
def test_every_form_of_a_chain_is_exact(case: dict, tmp_path: Path) -> None:
    program = integer_program(**case)
    x = inputs(program)
    np.testing.assert_array_equal(run(emit(program, {}), x.numpy(), tmp_path), program(x).numpy())


@needs_runtime
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_form_of_a_convolution_is_exact(case: str, tmp_path: Path) -> None:
    shape, layers, options = CONVOLUTIONS[case]
    program = integer_convolutions(shape, layers, **options)
    x = inputs(program, 33)
    np.testing.assert_array_equal(run(emit(program, {}), x.numpy(), tmp_path), program(x).numpy())


@needs_runtime
def test_products_are_integer_and_every_batch_size_runs(tmp_path: Path) -> None:
    program = integer_program()
    model = emit(program, {})
    found = operators(model)
    assert [kind for name, kind in found if name == "BATCH_MATMUL"] == ["INT8", "INT8"]
    assert not any(name in ("FULLY_CONNECTED", "QUANTIZE", "DEQUANTIZE") for name, _ in found)
    for batch in (1, 2, 7):
        x = inputs(program, batch)
        np.testing.assert_array_equal(run(model, x.numpy(), tmp_path), program(x).numpy())


@needs_runtime
def test_equal_programs_give_equal_bytes_and_metadata_is_kept() -> None:
    first, second = (emit(integer_program(seed=3), {"kancompile.seed": "0"}) for _ in range(2))
    assert first == second
    assert b"kancompile.seed" in first
    assert first != emit(integer_program(seed=4), {"kancompile.seed": "0"})


aten = torch.ops.aten
Step = tuple[Callable[..., object], tuple[object, ...]]
READOUT: list[Step] = [(aten.mean.dim, ([2, 3],)), (aten.linear.default, ("weight", "bias"))]
TAILS: dict[str, list[Step]] = {
    "max-pooling": [(aten.max_pool2d.default, ([2, 2], [2, 2])), *READOUT],
    "average-pooling": [(aten.avg_pool2d.default, ([3, 2],)), *READOUT],
    "silu": [(aten.silu.default, ()), *READOUT],
    "permute, add and softmax": [
        (aten.permute.default, ([0, 2, 3, 1],)),
        (aten.add.Tensor, (0.25,)),
        (aten.reshape.default, ([-1, 180],)),
        (aten.softmax.int, (-1,)),
    ],
}


def with_tail(program: Program, steps: list[Step]) -> Program:
    """Append ATen operators to a program; each reads the one before."""
    generator = torch.Generator().manual_seed(0)
    modules = {n.target: program.module(n.target) for n in program.graph_module.graph.nodes if n.op == "call_module"}
    constants = {"weight": torch.randn(3, 5, generator=generator), "bias": torch.randn(3, generator=generator)}
    graph = fx.Graph()
    value = graph.graph_copy(program.graph_module.graph, {})
    for function, arguments in steps:
        read = [graph.get_attr(name) if isinstance(name, str) else name for name in arguments]
        value = graph.call_function(function, (value, *read))
    graph.output(value)
    return Program(fx.GraphModule(modules | constants, graph), program.input_shape)


@needs_runtime
@pytest.mark.parametrize("tail", TAILS)
def test_float_operators_behind_the_layers_agree_to_rounding(tail: str, tmp_path: Path) -> None:
    chain = integer_convolutions((3, 8, 8), [square(8, 3, padding=1), square(5, 3)])
    program = with_tail(chain, TAILS[tail])
    x = inputs(program, 50)
    expected = program(x).numpy()
    found = run(emit(program, {}), x.numpy(), tmp_path)
    # at most 36 values of size 4, added in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=36 * 4 * 2.0**-23)


@needs_runtime
def test_compiled_model_equals_its_program(tmp_path: Path) -> None:
    compiled = compile(make_model(), make_inputs(), target="litert", recipe={"weight_bits": 4, "method": "gptq"})
    path = compiled.save(tmp_path / "model.tflite")
    x = make_inputs(500, seed=1)
    np.testing.assert_array_equal(RUNTIME.run(path, x.numpy()), compiled.program(x).numpy())
    assert (tmp_path / "model.manifest.json").is_file()
    assert compiled.manifest["target"] == "litert"
    assert not compiled.audit.problems


@needs_runtime
def test_operator_without_a_form_is_named() -> None:
    chain = integer_convolutions((3, 8, 8), [square(5, 3)])
    program = with_tail(chain, [(aten.elu.default, ())])
    with pytest.raises(KanCompileError, match=r"operator aten\.elu.* has no form here; .*target ort-cpu"):
        emit(program, {})


def test_float_layer_is_named_with_the_recipe_that_works() -> None:
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0'.*found Contraction; .*precision = \"int8\""):
        emit(float_program(), {})


@needs_runtime
def test_sums_beyond_32_bits_are_refused() -> None:
    program = integer_program((6, 5))
    contraction = program.module("layer0_contract")
    assert isinstance(contraction, IntegerContraction)
    huge = torch.full_like(contraction.bias, (1 << 31) - 10)
    replaced = contraction.replace(bias=huge)
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0': integer sums can reach 2\d+"):
        emit(program.replace_modules({"layer0_contract": replaced}), {})


def test_convolution_without_quantizer_is_refused() -> None:
    program = integer_convolutions((3, 8, 8), [square(4, 3)])
    contraction = program.module("layer0_convolve")
    assert isinstance(contraction, IntegerContraction)
    bare = program.replace_modules({"layer0_convolve": contraction.unrounded()})
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0': convolution has no output quantizer"):
        emit(bare, {})


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(KanCompileError, match=r"pip install 'kancompile\[litert\]'"):
        emit(integer_program(), {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'kancompile[litert]'" in str(RUNTIME.missing())


@needs_runtime
def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(KanCompileError, match=r"cannot run .*model\.tflite"):
        run(b"no model", np.zeros((1, 4), np.float32), tmp_path)
    with pytest.raises(KanCompileError, match=r"found inputs of shape \(7,\), expected \(6,\)"):
        run(emit(integer_program(), {}), np.zeros((1, 7), np.float32), tmp_path)


def test_latency_budget_needs_an_onnx_target() -> None:
    assert not TARGETS["litert"].loads_in_ort
    with pytest.raises(KanCompileError, match=r"max_latency_us with target 'litert'"):
        compile(make_model(), make_inputs(), target="litert", recipe={"max_latency_us": 100})
