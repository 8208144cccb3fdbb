"""OpenVINO and tract against ONNX Runtime: they read the same file and compute in float."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import IntegerContraction, Program, TableExpansion
from kancompile.runtimes import openvino, tract
from kancompile.runtimes.contract import Runtime
from kancompile.targets.onnx.export import emit
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program
from tests.runtimes.exactness import onnxruntime_outputs

READERS = [
    pytest.param(runtime, id=runtime.name, marks=pytest.mark.needs(runtime.name))
    for runtime in (openvino.RUNTIME, tract.RUNTIME)
]
PROGRAMS = {
    "MLP": lambda: integer_program((24, 16, 10), (17, 200), k=5),
    "MLP W4": lambda: integer_program((24, 10), (256,), k=5, weight_bits=4),
    "scale groups and several tables": lambda: integer_program((24, 10), (64,), groups=2, tables=3, weight_bits=4),
    "conv": lambda: integer_convolutions((3, 8, 8), [square(6, 3, padding=1), square(5, 3, stride=2)], zero_point=90),
    "MLP W3": lambda: integer_program((24, 10), (256,), weight_bits=3),
    "MLP W7": lambda: integer_program((24, 10), (256,), weight_bits=7),
}


def smooth(program: Program) -> Program:
    """Exchange random tables for curves as trained networks have them, so that the next row is not another world."""
    modules = {}
    for layer in program.layers():
        for target in layer.expansions:
            table = program.module(target)
            assert isinstance(table, TableExpansion)
            place = torch.linspace(0, 1, table.index.levels)[:, None] * (1 + torch.arange(table.k))
            curve = ((torch.sin(3 * place) + 1) * 127).to(torch.uint8).repeat(table.n_tables, 1)
            modules[target] = table.replace(table=curve)
    return program.replace_modules(modules)


def inputs_of(program: Program, n: int, ties: bool) -> np.ndarray:
    """Draw inputs a tenth beyond the table; ``ties`` puts all of them between two rows, else none is near a tie."""
    rng = np.random.default_rng(2)
    index = program.module(program.layers()[0].expansions[0]).index
    rows = rng.uniform(-0.1, 1.1, (n, *program.input_shape)) * (index.levels - 1) - index.zero_point
    rows = np.floor(rows) + 0.5 if ties else np.rint(rows) + rng.uniform(-0.45, 0.45, rows.shape)
    return (rows * index.scale).astype(np.float32)


@lru_cache
def compiled(case: str, storage: str) -> tuple[Program, bytes]:
    program = smooth(PROGRAMS[case]())
    return program, emit(program, {}, storage)


def steps_off(runtime: Runtime, case: str, ties: bool, folder: Path) -> float:
    """Give the largest difference in steps: of the output's quantizer, or else 255ths of the range of the outputs."""
    program, model = compiled(case, "fastest" if runtime.name == "tract" and case == "MLP W4" else "smallest")
    path = folder / "model.onnx"
    path.write_bytes(model)
    x = inputs_of(program, 300, ties)
    expected = onnxruntime_outputs(model, x)
    found = runtime.run(path, x)
    assert found.shape == expected.shape
    last = program.module(program.layers()[-1].contraction)
    quantized = isinstance(last, IntegerContraction) and last.geometry is not None and last.output is not None
    step = last.output.scale if quantized else float(np.ptp(expected)) / 255
    return float(np.abs(found - expected).max()) / step


@pytest.mark.parametrize("runtime", READERS)
@pytest.mark.parametrize("case", PROGRAMS)
def test_outputs_stay_within_the_tolerance(runtime: Runtime, case: str, tmp_path: Path) -> None:
    assert steps_off(runtime, case, False, tmp_path) <= 1.001
    assert steps_off(runtime, case, True, tmp_path) <= runtime.tolerance_steps


@pytest.mark.parametrize("runtime", READERS)
def test_file_that_is_no_model_is_named(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(KanCompileError, match=rf"runtime '{runtime.name}': cannot run .*model\.onnx"):
        runtime.run(path, np.zeros((1, 4), np.float32))
    with pytest.raises(KanCompileError, match="at least one row"):
        runtime.run(path, np.zeros((0, 4), np.float32))


@pytest.mark.parametrize("runtime", READERS)
def test_inputs_of_another_shape_are_refused(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(emit(integer_program(), {}))
    with pytest.raises(KanCompileError, match=rf"runtime '{runtime.name}': cannot run"):
        runtime.run(path, np.zeros((2, 7), np.float32))


@pytest.mark.needs("tract")
def test_tract_says_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph = onnx.parser.parse_graph(
        "g (float[b, 6] input) => (float[b, 6] output) { w = Cast <to=1> (codes) output = Add (input, w) }"
    )
    graph.initializer.append(onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [6], [1, 2, 3, -4, 5, 6]))
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]).SerializeToString()
    )
    with pytest.raises(KanCompileError, match='4-bit tensors: compile with storage = "fastest"'):
        tract.RUNTIME.run(path, np.zeros((1, 6), np.float32))
    path.write_bytes(emit(integer_program((6, 5), (1024,)), {}))
    with pytest.raises(KanCompileError, match="levels = 256 or fewer in the first layer"):
        tract.RUNTIME.run(path, np.zeros((1, 6), np.float32))


@pytest.mark.parametrize("module", [openvino, tract], ids=["openvino", "tract"])
def test_missing_package_names_the_command(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = module.RUNTIME.name
    assert f"pip install 'kancompile[{name}]'" in str(module.RUNTIME.missing())
    with pytest.raises(KanCompileError, match=rf"runtime '{name}': no {name}; install it"):
        module.RUNTIME.run(Path("model.onnx"), np.zeros((1, 4), np.float32))
