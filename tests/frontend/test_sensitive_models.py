"""Capture of networks that enlarge what float32 leaves, until two evaluations that are equal by algebra give other outputs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend import capture
from kancompile.ir import Contraction, Program
from tests.frontend.capturing import draw


class RandomCosines(nn.Module):
    """``y[o] = sum over i of scale[o] w[o, i] cos(a x[i] + b[o, i])``: a small change of an input turns the phase of all."""

    def __init__(self, n_in: int, n_out: int, frequency: float, seed: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(n_out, n_in, seed=seed) * (2 / n_in) ** 0.5)
        self.scale = nn.Parameter(1 + 0.3 * draw(n_out, 1, seed=seed + 1))
        self.phase = nn.Parameter(3 * draw(n_out, n_in, seed=seed + 2))
        self.frequency, self.dtype = frequency, dtype

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.full((1,), self.frequency, dtype=self.dtype or x.dtype)
        return (self.scale * self.weight * torch.cos(factors * x.unsqueeze(1) + self.phase)).sum(-1)


class Jumps(nn.Module):
    """Steps and signs of features, a sum of several functions of them."""

    def __init__(self, n_in: int, n_out: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(n_out, n_in, seed=seed))
        self.scale = nn.Parameter(1 + 0.3 * draw(n_out, seed=seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        functions = torch.floor(x * 1e6) % 7 - 3 + torch.sign(x - 0.1) + (x > 0.3)
        return self.scale * (functions @ self.weight.t()) / 10


def _chain(depth: int = 16, frequency: float = 6.0, dtype: torch.dtype | None = None) -> nn.Sequential:
    return nn.Sequential(*(RandomCosines(16, 16, frequency, 10 * n, dtype) for n in range(depth)))


def _break(monkeypatch: pytest.MonkeyPatch, number: int, share: float) -> None:
    """Let the last step before the comparison hand over a program one of whose weights is wrong."""

    def broken(program: Program, _: object) -> Program:
        target = program.layers()[number].contraction
        layer = program.node(target, Contraction)
        weight = layer.weight.clone()
        weight[0, 0] += share * weight.abs().max()
        return program.replace_modules({target: layer.with_weight(weight, layer.bias)})

    monkeypatch.setattr(import_module("kancompile.frontend.capture"), "share_uses", broken)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["any type", "float32 in the code"])
def test_layers_decide_where_float32_does_not_determine_the_outputs(dtype: torch.dtype | None) -> None:
    program = capture(_chain(dtype=dtype), draw(8, 16))
    assert len(program.layers()) == 16
    (note,) = program.notes
    assert "float32 does not determine the outputs" in note


def test_networks_with_jumps() -> None:
    model = nn.Sequential(*(Jumps(24, 24, 10 * n) for n in range(8)))
    program = capture(model, draw(8, 24))
    assert len(program.layers()) == 8
    assert "float32 does not determine the outputs" in program.notes[0]


def test_ordinary_networks_have_no_note() -> None:
    assert not capture(_chain(depth=2, frequency=1.0), draw(8, 16)).notes


@pytest.mark.parametrize("depth", [2, 16])
@pytest.mark.parametrize("number", [0, -1])
def test_a_wrong_layer_is_found(monkeypatch: pytest.MonkeyPatch, depth: int, number: int) -> None:
    _break(monkeypatch, number, 0.02)
    with pytest.raises(KanCompileError, match="differ from the model at batch 2"):
        capture(_chain(depth=depth, frequency=6.0), draw(8, 16))


def test_layers_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(program: Program, _: object) -> Program:
        first, second = (layer.contraction for layer in program.layers()[4:6])
        return program.replace_modules({first: program.module(second), second: program.module(first)})

    monkeypatch.setattr(import_module("kancompile.frontend.capture"), "share_uses", swapped)
    with pytest.raises(KanCompileError, match="differ from the model at batch 2"):
        capture(_chain(), draw(8, 16))
