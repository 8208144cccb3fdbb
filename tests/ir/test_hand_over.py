"""Both ends of a hand-over agree: what a contraction yields is what every reader takes it for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from kancompile.errors import KanCompileError
from kancompile.ir import HandOver, IndexQuantizer, IntegerContraction, Program, TableExpansion, check, rows_of
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program


def _table(program: Program, name: str = "layer1_expand") -> TableExpansion:
    return program.node(name, TableExpansion)


def _contraction(program: Program, name: str = "layer0_contract") -> IntegerContraction:
    return program.node(name, IntegerContraction)


def _other(index: IndexQuantizer) -> IndexQuantizer:
    return replace(index, scale=index.scale * 1.5)


def _rows_of_another_quantizer(program: Program) -> Program:
    contraction, index = _contraction(program), _table(program).index
    return program.replace_modules({"layer0_contract": contraction.replace(hands_over=rows_of(_other(index)))})


def _scaled_expected_behind_rows(program: Program) -> Program:
    return program.replace_modules({"layer1_expand": _table(program).replace(input="scaled")})


def _rows_expected_behind_real(program: Program) -> Program:
    return program.replace_modules({"layer0_contract": _contraction(program).unrounded()})


def _scaled_by_another_quantizer(program: Program) -> Program:
    contraction, table = _contraction(program), _table(program)
    return program.replace_modules(
        {
            "layer0_contract": contraction.replace(hands_over=HandOver("scaled", _other(table.index))),
            "layer1_expand": table.replace(input="scaled"),
        }
    )


def _real_expected_behind_rows(program: Program) -> Program:
    return program.replace_modules({"layer1_expand": _table(program).reading_real()})


def _rows_expected_of_the_input(program: Program) -> Program:
    return program.replace_modules({"layer0_expand": _table(program, "layer0_expand").replace(input="index")})


WRONG = {
    "rows of another quantizer": (_rows_of_another_quantizer, r"rows of \d+ handed over to 'layer1_expand'.*one index"),
    "scaled values behind rows": (_scaled_expected_behind_rows, r"rows of \d+ handed over .*reads scaled"),
    "rows behind real values": (_rows_expected_behind_real, r"found real handed over .*reads index"),
    "scaled by another quantizer": (_scaled_by_another_quantizer, r"scaled of \d+ handed over .*reads scaled"),
    "real values behind rows": (_real_expected_behind_rows, r"rows of \d+ handed over .*reads real"),
    "rows of the model's input": (_rows_expected_of_the_input, r"'layer0_expand': .*reads index.* behind 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ends_that_do_not_fit_are_refused(case: str) -> None:
    change, message = WRONG[case]
    program = integer_program((5, 6, 4), fused=True)
    check(program)
    with pytest.raises(KanCompileError, match=message):
        check(change(program))


def _moved(program: Program, move: Callable[[fx.Graph, fx.Node], fx.Node]) -> Program:
    """Put an operator between the first contraction and what reads it."""
    copy = program.replace_modules({})
    graph = copy.graph_module.graph
    node = next(node for node in graph.nodes if node.op == "call_module" and str(node.target).startswith("layer1_exp"))
    with graph.inserting_before(node):
        node.replace_input_with(node.all_input_nodes[0], move(graph, node.all_input_nodes[0]))
    return copy.with_graph(graph, copy.graph_module)


def _clone(graph: fx.Graph, value: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.clone.default, (value,))


def _negate(graph: fx.Graph, value: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.neg.default, (value,))


def test_row_numbers_are_followed_through_operators_that_move_them_and_no_others() -> None:
    program = integer_program((5, 6, 4), fused=True)
    check(_moved(program, _clone))
    with pytest.raises(
        KanCompileError, match=r"layer 'layers\.0': found rows of \d+ handed over to 'neg_default', which is no table"
    ):
        check(_moved(program, _negate))
    with pytest.raises(KanCompileError, match=r"one index"):
        check(_moved(_rows_of_another_quantizer(program), _clone))


def test_convolutions_are_checked_alike() -> None:
    program = integer_convolutions((3, 8, 8), [square(4, 3), square(3, 3)], fused=True)
    check(program)
    contraction = _contraction(program, "layer0_convolve")
    index = contraction.hands_over.index
    assert index is not None
    wrong = contraction.replace(hands_over=rows_of(_other(index)))
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0': found rows of \d+ handed over to 'layer1_expand0'"):
        check(program.replace_modules({"layer0_convolve": wrong}))
    with pytest.raises(KanCompileError, match=r"found real of \d+ handed over .*reads index"):
        check(program.replace_modules({"layer0_convolve": contraction.handing_real()}))


def test_real_values_of_each_form_are_the_same() -> None:
    """Rows, values in units of rows and real values are one number, up to what rounding to rows takes away."""
    index = IndexQuantizer(0.25, 3, 9)
    y = torch.tensor([-0.6, 0.0, 0.3, 1.1])
    multiplier, offset = index.to_rows()
    assert torch.allclose(HandOver("scaled", index).real(y * multiplier + offset), y)
    assert torch.allclose(rows_of(index).real(index(y)), torch.tensor([-0.5, 0.0, 0.25, 1.0]))
    assert torch.equal(HandOver("real", index).real(y), y)
