"""Loops and choices of ``torch.while_loop`` and ``torch.cond``: what they compute, with the KAN layers inside found."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile import Recipe
from kancompile.errors import KanCompileError
from kancompile.frontend.capture import capture
from kancompile.frontend.trace.control_flow import inline_control_flow
from tests.interfaces import Rbf

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Loop(nn.Module):
    """A cell called by a counter."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.cell, self.head, self.steps = Rbf(4, 4), Rbf(4, 2), steps

    def forward(self, x: Tensor) -> Tensor:
        def body(step: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return step + 1, h + 0.1 * self.cell(h)

        _, h = torch.while_loop(lambda step, h: step < self.steps, body, (torch.tensor(1), x))  # type: ignore[no-untyped-call, unused-ignore]
        return self.head(h)  # type: ignore[no-any-return]


class WrittenLoop(Loop):
    """The same with ``for``."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1, self.steps):
            x = x + 0.1 * self.cell(x)
        return self.head(x)  # type: ignore[no-any-return]


class LoopInLoop(Loop):
    """The result of the outer loop, whose counter takes part, is that of the model."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(step: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return step + 1, h + 0.1 * self.cell(h)

        def outer(step: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            _, h = torch.while_loop(lambda step, h: step < 2, inner, (torch.zeros((), dtype=torch.int64), h))
            return step + 1, h / (1 + step)

        _, h = torch.while_loop(lambda step, h: step < 2, outer, (torch.tensor(0), self.head(torch.cat([x, x], 1))))
        return h  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.head = Rbf(8, 4)


class Choice(nn.Module):
    """Two layers, of which a tensor chooses: one of the samples, or one of the state."""

    def __init__(self, by_state: bool) -> None:
        super().__init__()
        self.before, self.yes, self.no, self.by_state = Rbf(4, 4), Rbf(4, 2), Rbf(4, 2), by_state
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        flag = self.flag if self.by_state else h.abs().amax() > 0.5
        return torch.cond(flag, lambda h: self.yes(h), lambda h: self.no(h) + h[:, :2], (h,))  # type: ignore[no-any-return]


class UntilSmall(nn.Module):
    """Shrinks samples until all are small; large ones alone, or all of a batch."""

    def __init__(self, keeps_finished: bool = True) -> None:
        super().__init__()
        self.cell, self.inner, self.head = Rbf(4, 4), Rbf(4, 4), Rbf(4, 2)
        self.keeps_finished = keeps_finished

    def forward(self, x: Tensor) -> Tensor:
        def large(h: Tensor) -> Tensor:
            return h.abs().amax(1, keepdim=True) > 0.5

        def body(step: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            smaller = h * 0.9 + 0.001 * self.inner(h)
            smaller = torch.cond(step > 1, lambda h: h * 0.99, lambda h: h * 0.98, (smaller,))
            return step + 1, torch.where(large(h), smaller, h) if self.keeps_finished else smaller

        first = (torch.tensor(0), self.cell(x))
        _, h = torch.while_loop(lambda step, h: (step < 50) & large(h).any(), body, first)  # type: ignore[no-untyped-call, unused-ignore]
        return self.head(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Loop(), ["cell", "head"]),
        (LoopInLoop(), ["head", "cell"]),
        (Choice(by_state=False), ["before", "yes", "no"]),
        (Choice(by_state=True), ["before", "yes"]),
    ],
)
def test_layers_inside_are_found_and_the_program_computes_the_same(model: nn.Module, names: Sequence[str]) -> None:
    program = capture(model, X)
    assert [layer.name for layer in program.layers()] == names
    with torch.no_grad():
        for x in (X, X[:5] * 0.01):
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_loop_is_captured_as_if_it_were_written_with_for() -> None:
    programs = [capture(model, X) for model in (Loop(5), WrittenLoop(5))]
    assert [[(layer.name, layer.uses) for layer in program.layers()] for program in programs] == [
        [("cell", 4), ("head", 1)]
    ] * 2
    torch.testing.assert_close(programs[0](X), programs[1](X), rtol=0, atol=0)


def test_an_exported_program_stays_as_it_is() -> None:
    exported = torch.export.export(Loop(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    before = str(exported.graph)
    assert [layer.name for layer in capture(exported, X).layers()] == ["cell", "head"]
    assert str(exported.graph) == before
    inlined = exported.run_decompositions()
    inline_control_flow(inlined)
    with torch.no_grad():  # its signature holds, too
        torch.testing.assert_close(inlined.module()(X), Loop()(X))


def test_a_loop_that_the_samples_end_stays_one_operator_in_float() -> None:
    model = UntilSmall().eval()
    program = capture(model, X)
    assert [layer.name for layer in program.layers()] == ["cell", "head"]
    (left,) = [part for part in program.unrecognized if part.operator == "while_loop"]
    assert "layers inside as well" in left.reason
    compiled = kancompile.compile(model, X, recipe=Recipe(goal_sqnr=None))
    assert [node.op_type for node in onnx.load_from_string(compiled.model_bytes).graph.node].count("Loop") == 1
    session = ort.InferenceSession(compiled.model_bytes)
    for x in (X, X[:1], X[:7] * 0.01, X[:5] * 10):  # of other numbers of steps
        (found,) = session.run(None, {"input": x.numpy()})
        with torch.no_grad():
            expected, largest = model(x), float(model(X).abs().max())
        # a step of a table where the runtime's float operators leave other last bits
        torch.testing.assert_close(torch.from_numpy(found), compiled.program(x), rtol=0, atol=0.02 * largest)
        assert float((torch.from_numpy(found) - expected).abs().max()) < 0.2 * largest  # some take a step more or less


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            UntilSmall(keeps_finished=False),
            r"test_control_flow.py:\d+: found node 'while_loop' .*, where a sample's values depend on the other .* keep what is",
        ),
        (Loop(2000), "of more than 1024 steps, expected fewer"),
    ],
)
def test_loops_without_such_a_form_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(KanCompileError, match=message):
        capture(model, X)
