"""Look-ups of pairs in every target: bit for bit in the simulation, ONNX Runtime, C and LiteRT."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kancompile.ir import IntegerContraction, JointTable, Program, TableExpansion, check, show
from kancompile.passes import LookUpMembers, QuantizeOutputs
from kancompile.passes.round_weights import prove_layer
from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.emulation import X86, run_emulated
from kancompile.targets import TARGETS, ort_mobile
from kancompile.targets.onnx.export import emit
from kancompile.validation.kernel_audit import audit_kernels
from tests.programs import joint_program, joint_table

LEVELS = onnxruntime.GraphOptimizationLevel
CASES = {
    "plain": {},
    "hidden": {"hidden": True},
    "2 bits": {"weight_bits": 2},
    "4 bits, hidden": {"weight_bits": 4, "hidden": True},
    "one plane": {"table": joint_table(planes=1, words=5)},
    "two planes, one word": {"table": joint_table(planes=2, words=1, levels=64)},
    "three members": {"table": joint_table(members=3, n_in=7, words=9, levels=5)},
    "one member": {"table": joint_table(members=1, levels=300, words=4)},
    "one input": {"table": joint_table(n_in=1, words=2)},
    "made of functions": {"table": joint_table(levels=64, functions=5)},
    "many rows": {"table": joint_table(levels=256, words=2)},
}


STORED = {"parts", "basis", "mix", "bias", "shift"}
FEW = ["hidden", "2 bits", "three members"]


@lru_cache
def emitted(case: str) -> bytes:
    return emit(joint_program(**CASES[case]), {})


def inputs(program: Program, n: int = 101) -> torch.Tensor:
    """Draw inputs beyond the tables at both ends, and some on ties between rows."""
    x = torch.rand(n, *program.input_shape, generator=torch.Generator().manual_seed(2)) * 8 - 4
    x[:40] = torch.round(x[:40] * 16) / 16
    x[0], x[1], x[2], x[3, 0] = torch.inf, -torch.inf, torch.nan, torch.nan
    return x


def run(model: bytes, x: torch.Tensor, batch: int, level: LEVELS = LEVELS.ORT_ENABLE_ALL) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": part.numpy()})[0] for part in x.split(batch)])


@pytest.mark.parametrize("case", CASES)
def test_file_equals_simulation_bit_for_bit(case: str) -> None:
    program = joint_program(**CASES[case])
    check(program)
    model, x = emitted(case), inputs(program)
    expected = program(x).numpy()
    assert np.unique(expected).size > 20
    for batch in (1, 3, 17, 101):
        np.testing.assert_array_equal(run(model, x, batch), expected)
    assert not audit_kernels(model).problems


def test_tables_are_made_without_integer_products() -> None:
    """Processors without VNNI saturate pairs of them, and the mixtures of functions may be of any size."""
    model = onnx.load_from_string(emitted("made of functions"))
    (product,) = (node for node in model.graph.node if node.op_type in ("MatMulInteger", "QLinearMatMul"))
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    assert constants[product.input[0]].tolist() == [[64, 1]], "that which joins row numbers"


@pytest.mark.needs("ort-x86-haswell")
def test_made_tables_on_a_processor_without_vnni(tmp_path: Path) -> None:
    program = joint_program(weight_bits=4, table=joint_table(levels=64, functions=5))
    x = inputs(program, 20)
    (tmp_path / "model.onnx").write_bytes(emit(program, {}))
    found = run_emulated(X86["haswell"], tmp_path / "model.onnx", x.numpy())
    np.testing.assert_array_equal(found, program(x).numpy())


@pytest.mark.parametrize("level", [LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_DISABLE_ALL])
@pytest.mark.parametrize("case", [case for case in CASES if "hidden" not in case])
def test_without_fused_kernels_only_float_sums_differ(case: str, level: LEVELS) -> None:
    """Below the extended level products of a file stay in float, as they do behind look-ups of single inputs."""
    program = joint_program(**CASES[case])
    contraction = program.node(program.layers()[0].contraction, IntegerContraction)
    x = inputs(program)
    expected = program(x).numpy()
    weight = contraction.real_weight(torch.float64).abs()
    terms = weight.sum(1) * 255 + contraction.real_bias().abs()
    # each of c products and of c sums is rounded to float32
    allowed = (2 * weight.shape[1] + 2) * 2.0**-24 * terms.numpy()
    for batch in (1, 17):
        found = run(emitted(case), x, batch, level)
        assert bool((np.abs(found - expected) <= allowed).all())


@pytest.mark.parametrize("case", CASES)
def test_files_hold_standard_operators_and_parts_only(case: str) -> None:
    program = joint_program(**CASES[case])
    model = onnx.load_from_string(emitted(case))
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    ((_, table),) = program.nodes(JointTable)
    made = [t for t in model.graph.initializer if ".lookup." in t.name]
    stored = sum(onnx.numpy_helper.to_array(t).nbytes for t in made if t.name.rsplit(".")[-1] in STORED)
    assert stored == table.stored_bytes()
    named = [t.name for t in model.graph.initializer]
    assert len(named) == len(set(named))
    used = {name for node in model.graph.node for name in node.input}
    assert set(named) <= used


def test_files_of_one_batch_size() -> None:
    program, target = joint_program(hidden=True), TARGETS["ort-cpu"]
    assert target.takes_batch
    x = inputs(program, 30)
    model = target.emit(program, {}, "smallest", 5)
    np.testing.assert_array_equal(run(model, x, 5), program(x).numpy())


@pytest.mark.parametrize("case", CASES)
def test_members_looked_up_one_by_one_add_up_to_the_same(case: str) -> None:
    program = joint_program(**CASES[case])
    members = LookUpMembers("c99")(program)
    check(members)
    assert not list(members.nodes(JointTable))
    assert LookUpMembers("c99")(members) is members
    assert list(program.nodes(JointTable))  # the input is untouched
    x = inputs(program)
    assert torch.equal(members(x), program(x))
    ((_, table),) = program.nodes(JointTable)
    looked_up = sum(t.stored_bytes() for _, t in members.nodes(TableExpansion) if t.picks is not None)
    assert looked_up == table.parts.numel()
    said = [note for note in members.notes if "'c99' looks up single inputs only" in note]
    assert len(said) == (1 if len(table.members) > 1 else 0)
    assert "words" not in show(members)


@pytest.mark.needs("c99")
@pytest.mark.parametrize("case", FEW)
def test_c99_equals_simulation(case: str, tmp_path: Path) -> None:
    equals_simulation("c99", ".c", case, tmp_path)


@pytest.mark.needs("litert")
@pytest.mark.parametrize("case", CASES)
def test_litert_equals_simulation(case: str, tmp_path: Path) -> None:
    equals_simulation("litert", ".tflite", case, tmp_path)


def equals_simulation(target: str, suffix: str, case: str, folder: Path) -> None:
    program = joint_program(**CASES[case])
    x, file = inputs(program), folder / f"model{suffix}"
    x = x[4:] if target == "litert" else x  # which refuses NaN, also for single inputs
    file.write_bytes(TARGETS[target].emit(LookUpMembers(target)(program), {}, "smallest"))
    np.testing.assert_array_equal(RUNTIMES[target].run(file, x.numpy()), program(x).numpy())


@pytest.mark.parametrize("case", FEW)
def test_qnn_form_equals_simulation(case: str) -> None:
    program = joint_program(**CASES[case])
    x = inputs(program)
    members = QuantizeOutputs()(LookUpMembers("qnn")(program), x)
    check(members)
    model = TARGETS["qnn"].emit(members, {}, "smallest")
    np.testing.assert_array_equal(run(model, x, 1), members(x).numpy())


@pytest.mark.parametrize("case", FEW)
def test_ort_mobile_equals_simulation(case: str) -> None:
    program = joint_program(**CASES[case])
    x = inputs(program)
    # tables of all combinations of rows would stand in the file
    assert not TARGETS["ort-mobile"].joint_tables
    model = ort_mobile.emit(LookUpMembers("ort-mobile")(program), {})
    for batch in (1, 17):
        np.testing.assert_array_equal(run(model, x, batch), program(x).numpy())


@pytest.mark.parametrize("case", ["plain", "2 bits", "three members", "one plane"])
def test_pairs_of_products_are_bounded_by_what_columns_reach(case: str) -> None:
    program = joint_program(**CASES[case])
    proof = prove_layer(program, program.layers()[0])
    assert proof is not None
    ((_, table),) = program.nodes(JointTable)
    weight = program.node(program.layers()[0].contraction, IntegerContraction).matrix.numpy().astype(int)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3000, *program.input_shape, generator=generator) * 8 - 4
    codes = table(x)[..., 0].numpy().astype(int)
    seen = most = 0
    for column in range(0, codes.shape[1] - 1, 2):
        ends = codes[:, column : column + 2]
        seen = max(seen, int(np.abs(ends @ weight[:, column : column + 2].T).max()))
        reach = table.table.reshape(table.n_in, -1)[column : column + 2].numpy().max(1).astype(int)
        products = weight[:, column : column + 2] * reach
        most = max(most, int(products.clip(min=0).sum(1).max()), int(-products.clip(max=0).sum(1).min()))
    assert seen <= proof.largest
    assert proof.largest <= most
    assert proof.holds == (proof.largest <= 32767)
