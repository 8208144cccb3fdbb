"""Convolutions in the emitted file against the simulation, in the real runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import IntegerContraction, Program, TableExpansion, check, constant_block
from kancompile.ir.operators import accumulate_convolution
from kancompile.targets.onnx.export import emit
from kancompile.validation.kernel_audit import audit_kernels, optimized_graph
from tests.convolution_programs import Convolution, integer_convolutions, square
from tests.targets.test_ort_cpu import inputs, run

CASES = {
    "1x1": ((6, 5, 4), [square(5, 1)], {}),
    "3x3 stride 2 padding 1": ((5, 9, 8), [square(7, 3, stride=2, padding=1)], {"zero_point": 37}),
    "dilation": ((4, 9, 9), [square(6, 3, padding=2, dilation=2)], {"zero_point": 255}),
    "groups": ((8, 6, 6), [square(12, 3, padding=1, groups=4)], {"zero_point": 11}),
    "depthwise": ((6, 6, 6), [square(6, 3, padding=1, groups=6)], {"zero_point": 11}),
    "two features": ((4, 6, 6), [square(6, 3, padding=1, features=(1, 4))], {"zero_point": 60}),
    "two features, groups": ((4, 6, 6), [square(6, 3, padding=1, groups=2, features=(1, 4))], {"zero_point": 60}),
    "tables for each channel": ((5, 6, 6), [square(6, 3, padding=1)], {"tables": 3, "levels": 100, "zero_point": 9}),
    "chain": ((3, 12, 12), [square(16, 3, padding=1), square(8, 3, stride=2, padding=1), square(10, 3)], {}),
    "chain with zero point": ((3, 12, 12), [square(16, 3, padding=1), square(8, 3, padding=1)], {"zero_point": 90}),
    "unfused": ((3, 8, 8), [square(8, 3, padding=1), square(5, 3)], {"fused": False}),
    "few levels": ((3, 8, 8), [square(8, 3, padding=1), square(5, 3)], {"levels": 32, "zero_point": 3}),
    "many products": ((64, 6, 6), [square(9, 3, padding=1, features=(9,))], {"zero_point": 128}),
    "4 bit": ((5, 6, 6), [square(6, 3, padding=1)], {"weight_bits": 4}),
    "3 bit": ((5, 6, 6), [square(6, 3, padding=1)], {"weight_bits": 3, "zero_point": 40}),
    "pairs": ((8, 9, 9), [square(6, 3, padding=1, features=(6,))], {"levels": 255, "zero_point": 5}),
    "pairs, 1x1 and chain": ((16, 6, 6), [square(70, 1, features=(6,)), square(4, 3, features=(6,))], {"levels": 60}),
    "many functions, groups": ((6, 6, 6), [square(4, 3, padding=1, groups=2, features=(1, 7))], {"zero_point": 60}),
    "1d": ((4, 17), [Convolution(6, (5,), (2,), (2,), (1,))], {"zero_point": 20}),
    "3d": ((2, 5, 6, 4), [Convolution(3, (3, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1))], {"zero_point": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_simulation_equals_runtime_bit_for_bit(case: str) -> None:
    shape, layers, options = CASES[case]
    program = integer_convolutions(shape, layers, **options)
    check(program)
    model = emit(program, {})
    audit = audit_kernels(model)
    assert not audit.problems, audit.table()
    assert [row.operator for row in audit.rows] == ["QLinearConv"] * len(layers)
    for batch in (1, 2, 33):
        x = inputs(program, batch)
        expected = program(x).numpy()
        assert np.unique(expected).size > 20
        np.testing.assert_array_equal(run(model, x), expected)


def test_transpositions_cancel() -> None:
    layers = [square(16, 3, padding=1), square(8, 3, stride=2, padding=1), square(10, 3)]
    graph = optimized_graph(emit(integer_convolutions((3, 12, 12), layers, zero_point=7), {}))
    operators = [node.op_type for node in graph.node]
    # at the input, at the output, and none between: row numbers leave a convolution channels last, as they are needed
    assert operators.count("Transpose") == 2
    assert "Clip" not in operators


def test_pairs_of_rows_are_looked_up_together_and_built_at_load() -> None:
    program = integer_convolutions((8, 9, 9), [square(6, 3, padding=1, features=(6,))], levels=255)
    model = emit(program, {})
    assert len(model) < 40_000, "a table of all pairs alone takes 780 kB"
    graph = optimized_graph(model)
    operators = {node.op_type: node for node in graph.node}
    assert "MatMulInteger" in operators
    assert not {"Expand", "Concat"} & set(operators)
    sizes = {initializer.name: list(initializer.dims) for initializer in graph.initializer}
    assert sizes[operators["Gather"].input[0]] == [255 * 255, 12]


def test_unfused_graph_and_reference_evaluator_stay_within_one_step() -> None:
    program = integer_convolutions((3, 8, 8), [square(8, 3, padding=1, features=(6,))], zero_point=30)
    model = emit(program, {})
    x = inputs(program, 40)
    fused, step = program(x).numpy(), program.module("layer0_convolve").output.scale
    unfused = run(model, x, session__disable_quant_qdq="1")
    assert np.abs(unfused - fused).max() <= 1.001 * step
    # (the reference evaluator cannot gather more than 64 elements at a time, as planes do)
    reference = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model)).run(None, {"input": x.numpy()})[0]
    assert np.abs(reference - fused).max() <= 1.001 * step


@pytest.mark.parametrize("columns", [3, 300, 4000])
def test_integer_convolution_is_exact(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 5, 4, columns), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-128, 128, (3, columns, 3, 3), dtype=torch.int8, generator=generator)
    # all of one sign, so that sums are as large as they get
    x[0], weight[0] = 255, 127
    found = accumulate_convolution(x, weight, 3, [1, 2], [1, 0], [1, 1], 1)
    padded = torch.nn.functional.pad(x.movedim(-1, 1).long() - 3, (0, 0, 1, 1))
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 2)
    assert torch.equal(found, torch.einsum("bchwij,ocij->bohw", patches, weight.long()))


def test_output_without_quantizer_is_refused() -> None:
    program = integer_convolutions((3, 8, 8), [square(8, 3)])
    bare = program.replace_modules({"layer0_convolve": program.module("layer0_convolve").unrounded()})
    check(bare)
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0': convolution has no output quantizer"):
        emit(bare, {})


def test_equal_programs_give_equal_bytes() -> None:
    first, second = (emit(integer_convolutions((3, 8, 8), [square(8, 3)], seed=3), {"a": "b"}) for _ in range(2))
    assert first == second


def test_layers_have_their_names() -> None:
    program: Program = integer_convolutions((3, 8, 8), [square(8, 3), square(8, 3)])
    model = onnx.load_from_string(emit(program, {}))
    assert [node.name for node in model.graph.node if node.op_type == "Conv"] == ["layers.0/Conv", "layers.1/Conv"]


def with_constants(program: Program, functions: tuple[int, ...], codes: tuple[int, ...]) -> Program:
    """Give some functions of the first layer one code in all rows."""
    table = program.module("layer0_expand0")
    assert isinstance(table, TableExpansion)
    changed = table.table.clone()
    for function, code in zip(functions, codes, strict=True):
        changed[:, function] = code
    return program.replace_modules({"layer0_expand0": table.replace(table=changed)})


@pytest.mark.parametrize(("channels", "zero_point", "bits"), [(3, 37, 8), (9, 255, 4), (9, 0, 2)])
def test_constant_functions_become_few_columns(channels: int, zero_point: int, bits: int) -> None:
    layers = [square(6, 3, stride=2, padding=1, features=(5,))]
    plain = integer_convolutions((channels, 7, 7), layers, zero_point=zero_point, weight_bits=bits)
    program = with_constants(plain, (1, 4), (200, 11))
    graph = optimized_graph(emit(program, {}, "fastest"))
    sizes = {initializer.name: list(initializer.dims) for initializer in graph.initializer}
    columns = sizes["layers.0.weight"][1]
    assert columns % 4 == 0
    assert columns - 3 * channels < 5 * channels - 3 * channels or channels == 3
    operators = [node.op_type for node in graph.node]
    assert operators.count("GatherElements") == 1, "three functions share a number"
    assert operators.count("Expand") == 1, "tables are repeated at load, constants for each batch"
    x = inputs(program, 5)
    np.testing.assert_array_equal(run(emit(program, {}), x), program(x).numpy())


def test_planes_of_two_features_share_one_block_of_constants() -> None:
    layers = [square(6, 3, padding=1, features=(2, 3))]
    program = with_constants(integer_convolutions((5, 7, 7), layers, tables=2, zero_point=9), (0,), (77,))
    graph = optimized_graph(emit(program, {}))
    assert [node.op_type for node in graph.node].count("GatherElements") == 2, "one function, and three in a number"
    x = inputs(program, 4)
    np.testing.assert_array_equal(run(emit(program, {}), x), program(x).numpy())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [0, 1, 69, 127, 128, 255])
def test_constant_block_gives_the_same_sums(bits: int, zero_point: int) -> None:
    layers = [square(8, 3, padding=1, features=(3,))]
    program = integer_convolutions((40, 4, 4), layers, zero_point=zero_point, weight_bits=bits)
    program = with_constants(program, (0,), (240 if zero_point < 100 else 3,))
    contraction, table = program.module("layer0_convolve"), program.module("layer0_expand0")
    assert isinstance(contraction, IntegerContraction)
    assert isinstance(table, TableExpansion)
    block = constant_block(contraction, [table], 80)
    differences = torch.tensor(block.codes) - zero_point
    found = torch.einsum("omij,m->oij", block.weight.long(), differences)
    weight = contraction.matrix.long().reshape(8, 40, 3, 3, 3)[:, :, 0].sum(1)
    assert torch.equal(found, weight * (int(table.table[0, 0]) - zero_point))
    assert all(0 <= code <= 255 for code in block.codes)
    assert int(block.weight.abs().max()) <= min(64, 2 ** (bits - 1) - 1)
    assert (80 + len(block.codes)) % 4 == 0
    assert len(block.codes) <= 40
