"""A layer and the same layer written as a convolution of one tap get the same tables."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from kancompile.ir import Branch, Contraction, Expansion, Geometry, IndexQuantizer, Program, TableExpansion, check
from kancompile.passes.tabulate_expansions import TableOptions, TabulateExpansions
from kancompile.passes.tabulate_expansions.choose_index import row_inputs, row_inputs_of_groups
from kancompile.passes.tabulate_expansions.codes import TableDraft, choose_codes
from tests.programs import calibration_inputs, float_program


def as_convolution(program: Program) -> Program:
    """Write a layer of one linear map as a convolution over an image of one pixel."""
    expansion, contraction = program.node("layer0_expand", Expansion), program.node("layer0_contract", Contraction)
    n_in = expansion.n_in
    branches = [
        Branch(branch.name, branch.region, branch.position.reshape(1, 1, n_in, -1))  # type: ignore[union-attr, operator, arg-type]
        for branch in expansion.branches
    ]
    graph = fx.Graph()
    value = graph.call_module("layer0_expand", (graph.placeholder("x"),))
    graph.output(graph.call_module("layer0_contract", (value,)))
    root = {
        "layer0_expand": _Flat((n_in, 1, 1), branches, channels_first=True),
        "layer0_contract": Contraction(
            contraction.layer,
            contraction.weight[..., None, None],
            contraction.bias,
            (contraction.n_out, 1, 1),
            Geometry((1, 1), (0, 0), (1, 1)),
        ),
    }
    return Program(fx.GraphModule(root, graph), (n_in, 1, 1))


class _Flat(Expansion):
    """An expansion whose regions read ``[b, n_in]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1))


@pytest.mark.parametrize("same_functions", [True, False])
@pytest.mark.parametrize("options", [TableOptions(), TableOptions(levels=32, weight_bits=4)])
def test_a_convolution_of_one_tap_gets_the_tables_of_its_layer(same_functions: bool, options: TableOptions) -> None:
    linear = float_program((6, 5), same_functions=same_functions)
    convolution, x = as_convolution(linear), calibration_inputs(linear, 200)
    image = x[..., None, None]
    torch.testing.assert_close(convolution(image).flatten(1), linear(x))
    tabulate = TabulateExpansions(lambda name: options)
    ours, theirs = tabulate(linear, x), tabulate(convolution, image)
    check(ours)
    check(theirs)
    one, other = ours.node("layer0_expand", TableExpansion), theirs.node("layer0_expand", TableExpansion)
    assert one.index == other.index
    assert int((one.table.int() - other.table.int()).abs().max()) <= 1  # sums over rows in another order
    assert float((one.table != other.table).float().mean()) < 0.01
    torch.testing.assert_close(theirs(image).flatten(1), ours(x), rtol=1e-4, atol=1e-4)


def test_the_mean_error_of_the_look_ups_is_in_the_bias() -> None:
    program = float_program((6, 5))
    x = calibration_inputs(program, 200)
    tabulated = TabulateExpansions(lambda name: TableOptions(levels=16))(program, x)
    error = (tabulated(x) - program(x)).double()
    assert float(error.mean(0).abs().max()) < 0.3 * float(error.square().mean().sqrt())
    bare = tabulated.node("layer0_contract", Contraction)
    table = tabulated.node("layer0_expand", TableExpansion)
    exact = program.node("layer0_contract", Contraction)
    moved = bare.bias - exact.bias - exact.weight @ table.column_offset().flatten()
    assert float(moved.abs().max()) > 0


@pytest.mark.parametrize("levels", [255, 256, 60])
def test_rows_of_an_ordinary_layer_are_their_own_codes(levels: int) -> None:
    """A second rounding of what a convolution has rounded already would cost as much again."""
    expansion = Expansion((4,), [Branch("x", None, torch.arange(4)[:, None])])
    index = IndexQuantizer(0.01, 40, levels)
    contraction = Contraction("plain", torch.ones(2, 4), torch.zeros(2), (2,))
    values = index.rows().float().reshape(1, -1, 1)
    shared = torch.zeros(4, dtype=torch.int64)
    draft = TableDraft(
        expansion, index, values, shared, contraction.weight, torch.ones(4, 1), lambda functions: functions
    )
    (scale,), (offset,), zero_point = choose_codes([draft], contraction, TableOptions())
    table = draft.table(scale, offset, zero_point)
    assert torch.equal(table.table.flatten(), torch.arange(levels).to(torch.uint8))
    torch.testing.assert_close(table.table * table.scale + table.offset, values[0])


def test_centroids_of_all_tables_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    x, group = torch.randn(50, 6, generator=generator), torch.tensor([0, 1, 0, 2, 1, 2])
    index = IndexQuantizer(0.1, 16, 32)
    found = row_inputs_of_groups(index, x, group, 0.0)
    for number in range(3):
        torch.testing.assert_close(found[number], row_inputs(index, x[:, group == number]))
