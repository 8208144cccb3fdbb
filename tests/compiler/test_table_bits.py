"""Entries of few bits: what ONNX Runtime and C look up is what the simulation does, and files store no more than that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kancompile.compiler.ladder import Rung, rungs
from kancompile.errors import KanCompileError
from kancompile.ir import Program, TableExpansion, joined, packing_saves
from kancompile.passes import lower
from kancompile.recipe import LayerRecipe, read_recipe
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.onnx.export import emit
from tests.convolution_programs import float_convolutions, square
from tests.programs import float_program
from tests.targets.c_programs import build, evaluate, write

NETWORKS = {
    "one table for all inputs": lambda: float_program((6, 5, 3)),
    "a table for every input": lambda: float_program((20, 4), same_functions=False),
    "padded convolutions": lambda: float_convolutions((2, 6, 6), [square(3, 3, padding=1), square(2, 3, padding=1)]),
}


def lowered(network: str, **recipe: object) -> tuple[Program, Program, torch.Tensor]:
    exact = NETWORKS[network]()
    x = torch.randn(100, *exact.input_shape, generator=torch.Generator().manual_seed(2))
    return exact, lower(exact, x, read_recipe(method="uniform", levels=64, drift="off", **recipe)), x


def tables_of(program: Program) -> list[TableExpansion]:
    return [table for _, table in program.nodes(TableExpansion)]


@pytest.mark.needs("gcc")
@pytest.mark.parametrize("network", NETWORKS)
def test_all_runtimes_look_up_the_same_entries(network: str, tmp_path: Path) -> None:
    _, program, x = lowered(network, table_bits=3)
    assert all(int(table.table.max()) == 7 and table.bits == 3 for table in tables_of(program))
    expected = program(x)
    assert torch.equal(joined(RuntimeModel(emit(program, {}))(x)), expected)
    write(program, tmp_path)
    np.testing.assert_array_equal(evaluate(build(tmp_path, ["-std=c99", "-O1"]), x), expected.numpy())


@pytest.mark.parametrize(("bits", "packs"), [(2, True), (7, False)])
def test_entries_are_packed_where_that_is_smaller(bits: int, packs: bool) -> None:
    """Oracle: the largest constant of the file has as many bytes as the entries have bits, and files shrink by no more."""
    _, program, x = lowered("a table for every input", table_bits=bits)
    (table,) = tables_of(program)
    entries = table.table.numel()
    assert (table.packs, packing_saves(entries, bits)) == (packs, packs)
    files = [emit(program, {}, storage) for storage in ("smallest", "fastest")]
    stored = max(len(value.raw_data) for value in onnx.load_from_string(files[0]).graph.initializer)
    assert stored == table.stored_bytes() == (entries * bits // 8 if packs else entries)
    assert (0 < len(files[1]) - len(files[0]) < entries) is packs
    assert any(f"of {bits} bits are stored in bytes" in note for note in program.notes) is not packs
    assert torch.equal(joined(RuntimeModel(files[0])(x)), program(x))


def test_more_bits_err_less() -> None:
    errors = []
    for bits in (2, 4, 6):
        exact, program, x = lowered("one table for all inputs", table_bits=bits)
        errors.append(float((program(x) - exact(x)).square().mean()))
    assert all(4 * after < before for before, after in zip(errors, errors[1:], strict=False)), errors


def test_joint_look_ups_take_8_bits() -> None:
    assert LayerRecipe(table_bits=7).joint_error == 0.0
    with pytest.raises(KanCompileError, match=r"lookup 'joint' with table_bits 4.*set lookup = 'each'"):
        LayerRecipe(lookup="joint", table_bits=4)
    with pytest.raises(KanCompileError, match="table_bits is 1, expected an integer 2 to 8"):
        read_recipe(table_bits=1)


def test_an_error_gate_offers_8_bits() -> None:
    assert Rung("table_bits", 8) in rungs(LayerRecipe(table_bits=4), 100, 64, 256, False)
    assert all(rung.key != "table_bits" for rung in rungs(LayerRecipe(), 100, 64, 256, False))


def test_recipes_without_the_key_keep_their_hash() -> None:
    assert "table_bits" not in read_recipe().to_dict()
    assert read_recipe(read_recipe(table_bits=4).to_dict()).table_bits == 4
