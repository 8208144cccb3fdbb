"""The form for Qualcomm's HTP: exact in ONNX Runtime's CPU session, and whole on the HTP simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kancompile.compiler.compile import compile
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import IntegerContraction, Program, check
from kancompile.passes.quantize_outputs import QuantizeOutputs
from kancompile.targets.qnn import emit
from kancompile.validation.kernel_audit import audit_kernels
from tests.compiled_kan import make_inputs, make_model
from tests.convolution_programs import integer_convolutions, square
from tests.programs import float_program, integer_program
from tests.runtimes.test_float_readers import inputs_of, smooth
from tests.targets.test_ort_cpu import run

SIMULATOR = Path(__file__).with_name("htp_simulator.py")
PROGRAMS = {
    "MLP": lambda: integer_program((24, 16, 10), (17, 200), k=5),
    "many inputs": lambda: integer_program((512, 8), (200,), weight_bits=4),
    "several tables": lambda: integer_program((24, 10), (64,), tables=3),
    "conv": lambda: integer_convolutions((3, 8, 8), [square(6, 3, padding=1), square(5, 3, stride=2)], zero_point=90),
}


def quantized(case: str) -> tuple[Program, np.ndarray]:
    program = smooth(PROGRAMS[case]())
    x = inputs_of(program, 40, ties=False)
    return QuantizeOutputs()(program, torch.from_numpy(x)), x


def output_step(program: Program) -> float:
    last = program.module(program.layers()[-1].contraction)
    assert isinstance(last, IntegerContraction)
    assert last.output is not None
    return last.output.scale


@pytest.mark.parametrize("case", PROGRAMS)
def test_cpu_session_equals_simulation_bit_for_bit(case: str) -> None:
    program, x = quantized(case)
    check(program)
    model = emit(program, {})
    assert not audit_kernels(model).problems
    found = np.concatenate([run(model, torch.from_numpy(row[None])) for row in x])
    np.testing.assert_array_equal(found, program(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("case", PROGRAMS)
def test_form_is_pure_qdq_of_static_batch(case: str) -> None:
    graph = onnx.load_from_string(emit(quantized(case)[0], {})).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_value == 1
    made_by = {output: node for node in graph.node for output in node.output}
    readers = {source: [node.op_type for node in graph.node if source in node.input] for source in made_by}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Cast", "Add"):
            assert made_by[node.input[0]].op_type == "DequantizeLinear", node.op_type
            assert readers[node.output[0]] == ["QuantizeLinear"], node.op_type
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    assert not {"Clip", "MatMulInteger"} & {node.op_type for node in graph.node}
    assert all(types[name] != onnx.TensorProto.UINT16 for name in types)


@pytest.mark.needs("qnn")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "MLP" else [pytest.mark.slow]) for case in PROGRAMS]
)
def test_htp_simulator_runs_every_node_within_two_steps(case: str, tmp_path: Path) -> None:
    program, x = quantized(case)
    model, source, result = tmp_path / "model.onnx", tmp_path / "x.npy", tmp_path / "y.npy"
    model.write_bytes(emit(program, {}))
    np.save(source, x)
    command = [sys.executable, str(SIMULATOR), str(model), str(source), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.with_suffix(".done").exists(), done.stderr[-2000:]
    expected = program(torch.from_numpy(x)).numpy()
    assert np.unique(expected).size > 20
    assert np.abs(np.load(result) - expected).max() / output_step(program) <= 2.001


def test_outputs_are_rounded_to_their_8_bits() -> None:
    program = smooth(integer_program((6, 5, 4)))
    x = torch.from_numpy(inputs_of(program, 200, ties=False))
    rounded = QuantizeOutputs()(program, x)
    assert QuantizeOutputs()(rounded, x) is rounded
    assert program.module("layer1_contract").output is None  # the input is left as it was
    error = (rounded(x) - program(x)).abs().max()
    assert 0 < error <= output_step(rounded) * 0.501


def test_table_of_many_rows_is_refused_with_the_recipe_that_works() -> None:
    with pytest.raises(KanCompileError, match=r"layer 'layers\.1': found a table of 512 rows, .*use levels = 256"):
        emit(integer_program(levels=(256, 512)), {})


def test_layers_that_hand_over_real_values_are_refused() -> None:
    with pytest.raises(KanCompileError, match=r"layer 'layers\.1': hands over real values"):
        emit(integer_program(), {})
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0': .*integer layers only, found Contraction"):
        emit(float_program(), {})


def test_compiled_model_equals_its_program() -> None:
    compiled = compile(make_model(), make_inputs(), target="qnn", recipe={"levels": 256})
    x = make_inputs(50, seed=1)
    found = np.concatenate([run(compiled.model_bytes, row[None]) for row in x])
    np.testing.assert_array_equal(found, compiled.program(x).numpy())
    assert compiled.manifest["target"] == "qnn"
