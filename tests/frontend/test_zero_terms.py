"""Terms that masks of zeros switch off, as pykan computes one for every edge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kancompile.frontend import capture
from kancompile.frontend.trace import export
from tests.frontend.capturing import captured, draw


class SymbolicBesideSplines(nn.Module):
    """Gaussians of features beside a function of every edge, computed one by one and multiplied by a mask."""

    def __init__(self, function: Callable[[Tensor], Tensor], n_in: int = 2, n_out: int = 2) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(-2, 2, 5))
        self.weight = nn.Parameter(draw(n_out, n_in, 5, seed=1))
        self.mask, self.affine = nn.Parameter(torch.zeros(n_out, n_in)), nn.Parameter(draw(n_out, n_in, 4, seed=2))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        edges = []
        for i in range(self.weight.shape[1]):
            for o in range(self.weight.shape[0]):
                a, b, c, d = (self.affine[o, i, place] for place in range(4))
                edges.append(self.mask[o][i] * (c * self.function(a * x[:, [i]] + b) + d))
        symbolic = torch.stack(edges)[:, :, 0].reshape(self.weight.shape[1], self.weight.shape[0], -1).sum(0).t()
        return torch.einsum("bik,oik->bo", torch.exp(-((x.unsqueeze(-1) - self.centers) ** 2)), self.weight) + symbolic


def _operators(model: nn.Module, n_in: int = 2) -> list[str]:
    return [str(node.target) for node in export(model.eval(), draw(3, n_in)).graph.nodes if node.op == "call_function"]


def test_masked_terms_are_left_out() -> None:
    model = SymbolicBesideSplines(torch.sin)
    assert "aten.sin.default" not in _operators(model)
    program = captured(model, (2,))
    assert [len(program.layers()), len(program.unrecognized)] == [1, 0]
    with torch.no_grad():
        model.mask[1, 0] = 1.0
    assert "aten.sin.default" in _operators(model)
    captured(model, (2,))


@pytest.mark.parametrize("function", [torch.log, torch.reciprocal, torch.exp])
def test_what_may_be_no_number_stays(function: Callable[[Tensor], Tensor]) -> None:
    assert _operators(SymbolicBesideSplines(function)).count(f"aten.{function.__name__}.default") >= 4


class ZeroBias(nn.Module):
    """A bias of zeros, and a mask that is written to."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.bias, self.mask, self.writes = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4)), writes

    def forward(self, x: Tensor) -> Tensor:
        if not self.writes:
            return x + self.bias
        term = self.mask * x
        y = x + term
        return y + term.add_(1)


def test_parameters_and_writes_are_no_masks() -> None:
    assert _operators(ZeroBias(False), 4).count("aten.add.Tensor") == 1
    assert _operators(ZeroBias(True), 4).count("aten.add.Tensor") == 3
    x = draw(3, 4)
    exported = export(ZeroBias(True), x)
    assert torch.equal(exported.module()(x), x + 1)


def test_programs_of_the_user_stay_as_they_are() -> None:
    model = SymbolicBesideSplines(torch.sin).eval()
    exported = torch.export.export(model, (draw(3, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    before = str(exported.graph)
    capture(exported, draw(3, 2))
    assert str(exported.graph) == before
