"""Layers are divided into blocks, every one in exactly one, whatever their number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import kancompile
from examples.zoo.efficient_kan import build
from kancompile.ir import Layer
from kancompile.passes.lowering import lower
from kancompile.passes.round_weights.reconstruct_blocks import blocks_of, with_one_end
from kancompile.passes.rounding_methods import METHODS
from kancompile.passes.rounding_methods.brecq import Block, Brecq
from kancompile.passes.rounding_methods.problem import FeatureSource, RoundingProblem
from kancompile.passes.rounding_methods.uniform import Uniform
from kancompile.recipe import read_recipe


def layers(count: int) -> list[Layer]:
    return [Layer(str(number), f"contract{number}", (f"expand{number}",)) for number in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", range(10))
def test_every_layer_is_in_exactly_one_block(count: int, size: int) -> None:
    blocks = blocks_of(layers(count), size)
    assert list(itertools.chain(*blocks)) == layers(count)
    assert all(len(block) in (size, size + 1) for block in blocks[:-1])
    assert all(len(block) > 1 for block in blocks) or size == 1 or count == 1


def test_three_layers_are_one_block_and_the_last_of_five_joins() -> None:
    three, five = blocks_of(layers(3), 2), blocks_of(layers(5), 2)
    assert [[layer.name for layer in block] for block in three] == [["0", "1", "2"]]
    assert [[layer.name for layer in block] for block in five] == [["0", "1"], ["2", "3", "4"]]


@pytest.mark.parametrize("widths", [(3, 4, 4, 2), (3, 4, 4, 4, 4, 2)])
def test_networks_of_odd_depth_are_reconstructed(monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]) -> None:
    monkeypatch.setitem(METHODS, "brecq", Brecq(iterations=200))
    x = torch.rand(256, widths[0], generator=torch.Generator().manual_seed(0)) * 2 - 1
    captured = kancompile.capture(build(widths), x[:2])
    reconstructed, rounded = (
        lower(captured, x, read_recipe({"method": method, "weight_bits": 3})) for method in ("brecq", "gptq")
    )
    blocks = [re.findall(r"'(.*?)'", note.split(":")[0]) for note in reconstructed.notes if note.startswith("block ")]
    assert list(itertools.chain(*blocks)) == [layer.name for layer in captured.layers()]
    noise = [float((program(x) - captured(x)).square().sum()) for program in (reconstructed, rounded)]
    assert noise[0] < noise[1]


class Branches(nn.Module):
    """Layers that follow each other in the order of evaluation, and of which the first two do not feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.behind = (build((3, 3), seed=seed) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.left(x)) * self.behind(self.right(x))


def test_layers_of_parallel_branches_are_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "brecq", Brecq(iterations=20))
    x = torch.rand(256, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captured = kancompile.capture(Branches(), x[:2])
    layers = captured.layers()
    ends = with_one_end(captured, layers)
    assert sorted(layer.name for block in ends for layer in block) == sorted(layer.name for layer in layers)
    assert [[layer.name for layer in block] for block in ends] == [
        ["left.layers.0"],
        ["right.layers.0", "behind.layers.0"],
    ]
    program = lower(captured, x, read_recipe({"method": "brecq", "weight_bits": 3}))
    assert sum(note.startswith("block ") for note in program.notes) == 2


class Normalised(nn.Module):
    """Layers with float operators between them, which read computed constants and fold tokens into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build((3, 3), seed=seed) for seed in range(4))
        self.size = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 3)
        for layer in self.layers:
            h = layer(tokens)
            tokens = h / (self.size.exp() + h.square().mean(-1, keepdim=True))
        return tokens.reshape(x.shape)


@pytest.mark.slow
def test_float_operators_between_layers_are_part_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "brecq", Brecq(iterations=20))
    x = torch.rand(128, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captured = kancompile.capture(Normalised(), x[:2])
    program = lower(captured, x, read_recipe({"method": "brecq", "weight_bits": 2}))
    blocks = [note for note in program.notes if note.startswith("block ")]
    assert len(captured.layers()) == 4
    assert len(blocks) == 2


@pytest.mark.parametrize("gradients", [None, torch.ones(64, 2)])
def test_a_block_without_error_keeps_its_rounding(gradients: Tensor | None) -> None:
    codes = torch.randint(0, 256, (64, 6), generator=torch.Generator().manual_seed(0)).float()
    problem = RoundingProblem("zero", torch.zeros(2, 6), FeatureSource.from_tensor(codes), 3)
    start = Uniform()(problem, torch.Generator())

    def forward(weights: Sequence[Tensor], offsets: Sequence[Tensor], x: Tensor) -> Tensor:
        return x @ weights[0].T + offsets[0]

    block = Block((problem,), forward, codes, torch.zeros(64, 2), gradients)
    (kept,) = Brecq(iterations=20).reconstruct(block, [start], torch.Generator().manual_seed(0))
    assert torch.equal(kept.codes, start.codes)
    assert torch.equal(kept.scale, start.scale)
