"""A layer that a model uses several times is one layer of the program; equal values alone make no layer the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from examples.zoo.efficient_kan import KANLinear
from kancompile.errors import KanCompileError
from kancompile.ir import Branch, Contraction, Expansion, Program, check, node_of, separate_uses, show
from tests.frontend.capturing import captured, draw


def layer(n_in: int = 4, n_out: int = 4) -> KANLinear:
    return KANLinear(n_in, n_out, 3, 1, generator=torch.Generator().manual_seed(0))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = layer(), layer(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.cell(x)
        return self.head(x)  # type: ignore[no-any-return]


class Arms(nn.Module):
    """Two branches that share a layer, each on half of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.arm, self.head = layer(4, 5), layer(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.arm(x[:, :4]), self.arm(x[:, 4:])], dim=1))  # type: ignore[no-any-return]


class TwoLayers(nn.Module):
    """Two modules of equal values, whose parameters are the same where they are tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = layer(), layer(), layer(4, 2)
        if tied:
            for name in list(self.first._parameters):
                setattr(self.second, name, getattr(self.first, name))
            self.second.grid = self.first.grid

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))  # type: ignore[no-any-return]


class Solver(nn.Module):
    """Steps of one length share the right-hand side; the step of another length has other weights."""

    def __init__(self, *steps: float) -> None:
        super().__init__()
        self.hidden, self.slope, self.steps = layer(4, 6), layer(6, 4), steps

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = x + step * self.slope(self.hidden(x))
        return x


class Literals(nn.Module):
    """A function that the code writes anew in every use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def cell(self, x: Tensor) -> Tensor:
        u = x.unsqueeze(-1) * torch.tensor([1.0, 2.0])
        return self.linear(torch.sin(u).flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.cell(self.cell(x)))


MODELS: list[tuple[Callable[[], nn.Module], int, dict[str, int]]] = [
    (Loop, 4, {"cell": 4, "head": 1}),
    (Arms, 8, {"arm": 2, "head": 1}),
    (lambda: TwoLayers(tied=True), 4, {"first": 2, "head": 1}),
    (lambda: TwoLayers(tied=False), 4, {"first": 1, "second": 1, "head": 1}),
    (lambda: Solver(0.1, 0.1, 0.1), 4, {"hidden": 3, "slope": 3}),
    (lambda: Solver(0.1, 0.2, 0.1), 4, {"hidden": 3, "slope": 2, "slope_1": 1}),
    (Literals, 4, {"layer0": 3}),
]


def uses(program: Program) -> dict[str, int]:
    return {layer.name: layer.uses for layer in program.layers()}


@pytest.mark.parametrize(("build", "n_in", "expected"), MODELS)
def test_uses_are_counted(build: Callable[[], nn.Module], n_in: int, expected: dict[str, int]) -> None:
    program = captured(build(), (n_in,))
    assert uses(program) == expected
    x = draw(16, n_in)
    separate = separate_uses(program)
    assert set(uses(separate).values()) == {1}
    assert len(separate.layers()) == sum(expected.values())
    assert torch.equal(separate(x), program(x))
    assert separate_uses(separate) is separate


@pytest.fixture(scope="module")
def loop() -> Program:
    return captured(Loop(), (4,))


def test_uses_are_shown_and_get_their_names_back(loop: Program) -> None:
    program = loop
    assert "layer2_contract = layer0_contract, use 3 of 4: contract[20 -> 4: float](layer2_expand0)" in show(program)
    separate = separate_uses(program)
    assert [layer.name for layer in separate.layers()] == ["cell", "cell_1", "cell_2", "cell_3", "head"]
    assert [layer.contraction for layer in separate.layers()] == [f"layer{number}_contract" for number in range(5)]
    assert ", use " not in show(separate)
    assert separate.history[-1].name == "separate-uses"


def test_inputs_of_all_uses_are_kept(loop: Program) -> None:
    program, x = loop, draw(5, 4)
    (cell, _), separate = program.layers(), separate_uses(program)
    own = [layer.expansions[0] for layer in separate.layers()[:4]]
    expected = separate.inputs(x, own)
    found = program.inputs(x, cell.expansions)[cell.expansions[0]]
    assert torch.equal(found, torch.cat([expected[target] for target in own]))


def is_refused(program: Program, text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        check(program)


def test_uses_of_one_layer_have_the_same_weights(loop: Program) -> None:
    cell = loop.layers()[0]
    heavier = loop.node(cell.contraction, Contraction)
    heavier = heavier.with_weight(2 * heavier.weight)
    is_refused(loop.replace_modules({cell.contraction: heavier}), "layer0_contract.*other weights or functions")
    is_refused(retargeted(loop, "layer2_contract", heavier), "layer 'cell': found a use of.*in 'layer2_contract'")


def test_uses_of_one_layer_have_the_same_functions(loop: Program) -> None:
    cell, head = loop.layers()
    other = loop.node(head.expansions[0], Expansion)
    identity = Branch("x", None, torch.arange(4)[:, None].repeat(1, other.k))
    is_refused(loop.replace_modules({cell.expansions[0]: Expansion((4,), [identity])}), "layer0_expand0.*other weights")
    is_refused(retargeted(loop, "layer2_expand0", other), "layer 'cell': found a use of.*in 'layer2_contract'")


def test_a_use_that_is_not_recorded_is_refused(loop: Program) -> None:
    separate = separate_uses(loop)
    is_refused(replace(loop, uses={}), r"found the nodes \['layer0_contract'")
    is_refused(replace(separate, uses=loop.uses), r"found the nodes \[\]")


def test_the_node_of_a_layer_used_several_times_is_not_one(loop: Program) -> None:
    with pytest.raises(KanCompileError, match="found 4 nodes of the program that call it, expected one"):
        node_of(loop, loop.layers()[0].contraction)


def retargeted(program: Program, name: str, module: nn.Module) -> Program:
    """Let one node call another module."""
    copy = program.replace_modules({})
    root, graph = copy.graph_module, copy.graph_module.graph
    root.add_module("other", module)
    for node in graph.nodes:
        if node.name == name:
            node.target = "other"
    return copy.with_graph(graph, root)
