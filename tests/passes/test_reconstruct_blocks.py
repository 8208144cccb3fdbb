"""Layers are divided into blocks, every one in exactly one, whatever their number."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import kancompile
from examples.zoo.efficient_kan import build
from kancompile.lowering import lower
from kancompile.passes.brecq import Brecq
from kancompile.passes.methods import METHODS
from kancompile.passes.reconstruct_blocks import blocks_of
from kancompile.program import Layer
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
