"""The emitted file against the simulation, in the real runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx.reference.op_run import OpRun
from torch import nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend import capture
from kancompile.ir import Program, check
from kancompile.targets.onnx.export import emit
from kancompile.validation.kernel_audit import audit_kernels
from tests.frontend.odd_models import DegreeMajor
from tests.programs import integer_program


def run(model: bytes, x: torch.Tensor, **entries: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


def inputs(program: Program, n: int = 333, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *program.input_shape, generator=generator) * 6 - 3  # beyond the tables at both ends
    x[:100] = torch.round(x[:100] * 255 / 4 * 2) / 2 * (4 / 255)  # ties between two rows of a 256-level table
    return x


CASES = [
    {},
    {"levels": (256, 64)},
    {"levels": (16, 256)},
    {"levels": (1024, 4096)},
    {"levels": (1024, 256)},
    {"levels": (256, 256), "fused": False},
    {"groups": 2},
    {"groups": 3, "levels": (256, 32)},
    {"tables": 3, "levels": (64, 100)},
    {"tables": 2, "levels": (512, 256)},
    {"weight_bits": 4},
    {"weight_bits": 2, "groups": 2},
    {"weight_bits": 3},
    {"widths": (40, 33, 17, 5), "levels": (256, 1024, 128), "k": 9},
    {"widths": (512, 5, 4), "levels": (200, 256)},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()) or "plain")
def test_simulation_equals_runtime_bit_for_bit(case: dict) -> None:
    program = integer_program(**case)
    check(program)
    model = emit(program, {})
    audit = audit_kernels(model)
    assert not audit.problems, audit.table()
    assert len(audit.rows) == (len(case.get("widths", (1, 1, 1))) - 1) * case.get("groups", 1)
    x = inputs(program)
    np.testing.assert_array_equal(run(model, x), program(x).numpy())


def test_every_batch_size_runs() -> None:
    program = integer_program()
    model = emit(program, {})
    for batch in (1, 2, 7):
        assert run(model, inputs(program, batch)).shape == (batch, 4)


class GatherElements(OpRun):
    """As ONNX defines it; that of the reference evaluator takes matrices of few rows only."""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


def test_unfused_graph_and_reference_evaluator_stay_within_one_step() -> None:
    # The unfused graph multiplies dequantized values in float, so a row number may differ by one.
    program = integer_program(widths=(6, 5), levels=(256,))
    model = emit(program, {})
    x = inputs(program)
    step = float(max(scale.abs().max() for scale in program.module("layer0_contract").scales))
    fused = program(x).numpy()
    unfused = run(model, x, session__disable_quant_qdq="1")
    reference = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model), new_ops=[GatherElements]).run(
        None, {"input": x.numpy()}
    )[0]
    assert np.abs(unfused - fused).max() <= step
    assert np.abs(reference - fused).max() <= step


def test_row_numbers_of_unfused_graph_stay_within_one_step() -> None:
    program = integer_program(widths=(6, 5, 4))
    index = program.module("layer0_contract").output
    graph = program.graph_module.graph
    assert index is not None
    cut = [node for node in graph.nodes if node.op == "call_module"][1]
    one_layer = program.replace_modules({})
    new_graph = one_layer.graph_module.graph
    output = next(node for node in new_graph.nodes if node.op == "output")
    output.args = (next(node for node in new_graph.nodes if node.target == cut.target),)
    new_graph.eliminate_dead_code()
    one_layer.graph_module.recompile()
    model = emit(one_layer, {})
    x = inputs(program, 2000)
    codes = one_layer(x).numpy().astype(int)
    assert np.array_equal(run(model, x).astype(int), codes)
    assert np.abs(run(model, x, session__disable_quant_qdq="1").astype(int) - codes).max() <= 1
    reference = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model), new_ops=[GatherElements]).run(
        None, {"input": x.numpy()}
    )[0]
    assert np.abs(reference.astype(int) - codes).max() <= 1


def test_file_form() -> None:
    model = onnx.load_from_string(emit(integer_program(), {"kancompile.seed": "0"}))
    assert model.ir_version == 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"kancompile.seed": "0"}
    assert model.graph.input[0].name == "input"
    assert model.graph.output[0].name == "output"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert all(node.domain == "" for node in model.graph.node)
    assert sum(node.name == "layers.0/Gemm" for node in model.graph.node) == 1


def test_equal_programs_give_equal_bytes() -> None:
    first, second = (emit(integer_program(seed=3), {"a": "b"}) for _ in range(2))
    assert first == second
    assert emit(integer_program(seed=4), {"a": "b"}) != first


def test_narrow_weights_take_as_many_bytes_as_their_bits_need() -> None:
    widths = (64, 64, 10)
    weights = 64 * 9 * (64 + 10)
    full = size = len(emit(integer_program(widths, k=9), {}))
    for bits in (4, 3, 2):
        program, more = integer_program(widths, k=9, weight_bits=bits), size
        size = len(emit(program, {}))
        assert size < more
        if bits == 4:
            assert size <= 1.02 * len(emit(program, {}, "native"))
        assert full - size == pytest.approx(weights * (8 - bits) / 8, abs=4000)  # the nodes that widen them
    assert len(emit(integer_program(widths, k=9, weight_bits=2), {}, "fastest")) == pytest.approx(full, abs=200)


@pytest.mark.parametrize("bits", range(2, 8))
def test_narrow_weights_compute_the_same(bits: int) -> None:
    program = integer_program((7, 5), levels=(256,), weight_bits=bits)  # 105 codes: no plane is full
    model = emit(program, {})
    assert not audit_kernels(model).problems
    x = inputs(program)
    np.testing.assert_array_equal(run(model, x), program(x).numpy())
    for storage in ("native", "fastest"):
        stored = emit(program, {}, storage)
        assert not audit_kernels(stored).problems
        np.testing.assert_array_equal(run(stored, x), program(x).numpy())


@pytest.mark.parametrize(
    ("bits", "kind", "opset"), [(2, "INT2", 25), (3, "INT4", 21), (4, "INT4", 21), (5, "INT8", 21), (8, "INT8", 21)]
)
def test_native_storage_uses_the_narrowest_type(bits: int, kind: str, opset: int) -> None:
    model = onnx.load_from_string(emit(integer_program(weight_bits=bits), {}, "native"))
    weights = [tensor for tensor in model.graph.initializer if ".weight" in tensor.name]
    assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in weights} == {kind}
    assert [entry.version for entry in model.opset_import] == [opset]


def test_a_file_too_new_for_the_runtime_is_an_error_that_says_what_works() -> None:
    model = onnx.load_from_string(emit(integer_program(weight_bits=2), {}, "native"))
    model.opset_import[0].version = 99
    with pytest.raises(KanCompileError, match=r"opset 99.*onnxruntime 1\.24.*'smallest' loads from 1\.20"):
        audit_kernels(model.SerializeToString())


class SqueezedBatch(nn.Module):
    """Squeezes the batch dimension of a stack, which leaves an operator that the exporter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = DegreeMajor(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.kan(x)
        both = torch.stack([h, 2 * h])
        return both[0, :, :].squeeze(0) * both[1, :, :].squeeze(0)


def test_squeezed_batch_between_layers() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
    model = SqueezedBatch().eval()
    program = capture(model, (4,))
    assert np.allclose(run(emit(program, {}), x), model(x).detach().numpy(), rtol=0, atol=1e-5)
