"""Few functions of an input are looked up column by column, with the bits of the program."""

from collections import Counter

import onnx
import pytest
import torch

from kancompile.ir import IntegerContraction
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.onnx import build_model, emit
from tests.programs import integer_program


def nodes(content: bytes) -> Counter:
    return Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


@pytest.mark.parametrize(("k", "tables"), [(1, 1), (3, 1), (2, 2), (1, 7), (3, 7)])
def test_columns_give_the_bits_of_the_program(k: int, tables: int) -> None:
    program = integer_program((7, 7, 3), levels=(40, 1024), k=k, tables=tables, weight_bits=7)
    x = torch.randn(33, 7, generator=torch.Generator().manual_seed(1)) * 2
    content = emit(program, {})
    assert nodes(content)["GatherElements"] == 2
    # of two tables that inputs take turns to read, ONNX Runtime picks when it loads the file
    assert nodes(content)["Gather"] == (0 if tables != 2 else 2)
    assert torch.equal(RuntimeModel(content)(x), program(x))


def test_tables_of_more_functions_or_in_files_without_tables_made_at_load_are_gathered() -> None:
    assert nodes(emit(integer_program(k=4), {}))["Gather"] == 2
    assert nodes(emit(integer_program(k=2, groups=2), {}))["Gather"] == 2
    small = build_model(integer_program(k=2), {}, "fastest", pairs=False)
    assert "GatherElements" not in {node.op_type for node in small.graph}


def test_codes_of_several_functions_stand_functions_major_in_the_file_alone() -> None:
    program = integer_program((5, 4), levels=(64,), k=2, weight_bits=7)
    layer = program.layers()[0]
    contraction = program.node(layer.contraction, IntegerContraction)
    stored = [
        onnx.numpy_helper.to_array(one) for one in onnx.load_from_string(emit(program, {}, "fastest")).graph.initializer
    ]
    weight = next(one for one in stored if one.shape == (10, 4))
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert torch.equal(torch.from_numpy(weight.copy()), contraction.matrix.T[order])
