"""Recurrent layers stay one operator, with PyTorch's values and derivatives, at every length."""

from __future__ import annotations

import itertools
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kancompile.frontend.capture import capture
from kancompile.frontend.trace import export, open_sizes
from kancompile.frontend.trace.recurrence import WholeRecurrences
from kancompile.ir import RECURRENCES
from tests.interfaces import Rbf

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
OPTIONS = list(itertools.product((1, 2), (False, True), (False, True), (False, True)))
"""Layers, bidirectional, batch_first, bias."""


def layer(kind: str, n: int, h: int, *options: Any) -> Any:
    layers, bidirectional, batch_first, bias = options or (1, False, True, True)
    torch.manual_seed(0)
    given: dict[str, Any] = {"nonlinearity": kind.removeprefix("rnn_")} if kind.startswith("rnn") else {}
    given |= {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    return KINDS[kind](n, h, layers, **given).eval()


def first_states(kind: str, layers: int, directions: int, b: int, h: int) -> Any:
    one, two = torch.randn(2, layers * directions, b, h, generator=torch.Generator().manual_seed(1))
    return (one, two) if kind == "lstm" else one


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def called(program: Any) -> list[str]:
    """Recurrent operators that a graph calls."""
    names = {operator: kind for kind, operator in RECURRENCES.items()}
    return [names[node.target] for node in program.graph.nodes if node.target in names]


class Head(nn.Module):
    """A KAN layer on the last state of a sequence, or on all."""

    def __init__(self, recurrent: Any, h: int, everywhere: bool = False) -> None:
        super().__init__()
        self.recurrent, self.kan, self.everywhere = recurrent, Rbf(h, 3), everywhere
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(x)[0]
        result: Tensor = self.kan(y if self.everywhere else y[:, -1])
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_pytorch(kind: str) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    for options in OPTIONS:
        layers, bidirectional, batch_first, _ = options
        model = layer(kind, 4, 6, *options)
        given = first_states(kind, layers, 1 + bidirectional, 3 if batch_first else 5, 6)
        for states in ((), (given,)):
            with torch.no_grad():
                expected = flat(model(x, *states))
                with WholeRecurrences():
                    found = flat(model(x, *states))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_pytorch(kind: str) -> None:
    model = layer(kind, 3, 4, 2, True, True, True)
    given = first_states(kind, 2, 2, 2, 4)
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(3), requires_grad=True)
    found: list[Any] = []
    for mode in (WholeRecurrences(), nullcontext()):
        with mode:
            value = sum(part.square().sum() for part in flat(model(x, given)))
            inputs = [x, *model.parameters()]
            first = torch.autograd.grad(value, inputs, create_graph=True)
            second = torch.autograd.grad(sum(part.square().sum() for part in first), inputs)
            found.append([*first, *second])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_zero_states_are_left_out_and_others_stay() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.first, self.kan = layer("gru", 4, 6), nn.Linear(4, 6), Rbf(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.kan(self.recurrent(x, self.first(x[:, 0])[None])[1][0])
            return result

    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(4))
    for model, states in ((Head(layer("lstm", 4, 6, 2, True, True, True), 12), 0), (Started(), 1)):
        graph = capture(model, x).graph_module.graph
        assert {len(node.args[4]) for node in graph.nodes if node.target in RECURRENCES.values()} == {states}


def test_exported_programs_keep_them_too() -> None:
    model = Head(layer("lstm", 4, 6, 2, True, True, True), 12)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(5))
    with warnings.catch_warnings():  # of PyTorch about the weights of its own layer
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert called(capture(program, x).graph_module) == ["lstm", "lstm"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_their_length_may_be_dynamic(everywhere: bool) -> None:
    model = Head(layer("gru", 4, 6, 2, True, True, True), 12, everywhere)
    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(6))
    assert open_sizes(model, x) == [{"input": {1: "input_1"}}]
    program = capture(model, x, dynamic={"input": {1: "time"}})
    assert called(program.graph_module) == ["gru", "gru"]
    assert len(program.layers()) == 1
    longer = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(program(longer), model(longer), rtol=1e-4, atol=1e-5)


def test_a_kan_layer_on_the_last_step_of_a_dynamic_length() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Rbf(4, 6), Rbf(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x)[:, -1])
            return result

    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(8))
    program = capture(Last().eval(), x, dynamic={"input": {1: "time"}})
    assert [layer.name for layer in program.layers()] == ["a", "b"]


def test_projections_are_written_step_by_step() -> None:
    torch.manual_seed(0)
    model = Head(nn.LSTM(4, 6, proj_size=5, batch_first=True), 5)
    x = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(9))
    assert called(export(model, x)) == []
