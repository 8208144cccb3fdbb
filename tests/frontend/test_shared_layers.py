"""A layer that a model uses several times is one layer of the program; equal values alone make no layer the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from examples.zoo.efficient_kan import KANLinear
from kancompile.errors import KanCompileError
from kancompile.ir import Contraction, Expansion, Program, check, nodes_of, show
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


@pytest.fixture(scope="module")
def loop() -> Program:
    return captured(Loop(), (4,))


def test_uses_are_shown(loop: Program) -> None:
    assert "layer2_contract = layer0_contract, use 3 of 4: contract[20 -> 4: float](layer2_expand0)" in show(loop)


def test_inputs_of_all_uses_are_kept(loop: Program) -> None:
    x = draw(5, 4)
    cell = loop.layers()[0]
    expected = [x]
    for _ in range(3):
        features = (loop.module(target)(expected[-1]) for target in cell.expansions)
        expected.append(loop.contraction(cell)(*features))
    assert torch.equal(loop.inputs(x, cell.expansions)[cell.expansions[0]], torch.cat(expected))


def is_refused(program: Program, text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        check(program)


def test_uses_of_one_layer_call_the_same_modules(loop: Program) -> None:
    cell, head = loop.layers()
    heavier = loop.node(cell.contraction, Contraction)
    heavier = heavier.with_weight(2 * heavier.weight)
    other = loop.node(head.expansions[0], Expansion)
    is_refused(retargeted(loop, "layer2_contract", heavier), "layer 'cell': found a use of.*in 'layer2_contract'")
    is_refused(retargeted(loop, "layer2_expand0", other), "layer 'cell': found a use of.*in 'layer2_contract'")


def test_a_module_that_nothing_calls_has_no_nodes(loop: Program) -> None:
    assert [node.name for node in nodes_of(loop, "layer0_contract")] == [f"layer{n}_contract" for n in range(4)]
    with pytest.raises(KanCompileError, match="'none': found no node of the program that calls it"):
        nodes_of(loop, "none")


def retargeted(program: Program, name: str, module: nn.Module) -> Program:
    """Let one node call another module."""
    copy = program.replace_modules({})
    root, graph = copy.graph_module, copy.graph_module.graph
    root.add_module("other", module)
    for node in graph.nodes:
        if node.name == name:
            node.target = "other"
    return copy.with_graph(graph, root)
