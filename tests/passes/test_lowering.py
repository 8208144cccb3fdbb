"""One program lowered by several recipes: nothing but the recipe may matter, and what recipes share is done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from kancompile.ir import Contraction, Program, show
from kancompile.passes.lowering import Lowering, lower
from kancompile.passes.reduce_functions import ReduceFunctions
from kancompile.passes.tabulate_expansions import lookup_cost
from kancompile.recipe import read_recipe
from tests.convolution_programs import float_convolutions, square
from tests.programs import calibration_inputs, float_program


def _with_two_readers() -> Program:
    """Give a convolution that two others read, whose outputs are added: it hands its own quantizer to both."""
    program = float_convolutions((3, 8, 8), [square(4, 3, padding=1), square(3, 3)])
    other = float_convolutions((4, 8, 8), [square(3, 3)], seed=5)
    root = dict(program.graph_module.named_children())
    root["other_expand"], convolve = other.module("layer0_expand0"), other.module("layer0_convolve")
    assert isinstance(convolve, Contraction)
    root["other_convolve"] = convolve.replace(layer="layers.other")
    graph = fx.Graph()

    def layer(name: str, convolution: str, value: fx.Node) -> fx.Node:
        return graph.call_module(convolution, (graph.call_module(name, (value,)),))

    first = layer("layer0_expand0", "layer0_convolve", graph.placeholder("x"))
    second = layer("layer1_expand0", "layer1_convolve", first)
    third = layer("other_expand", "other_convolve", first)
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (second, third)))
    return Program(fx.GraphModule(root, graph), (3, 8, 8))


PROGRAMS: dict[str, Callable[[], Program]] = {
    "linear": float_program,
    "convolutions": lambda: float_convolutions((3, 8, 8), [square(6, 3, padding=1), square(4, 3, stride=2)]),
    "two readers": _with_two_readers,
}
RECIPES: list[dict[str, Any]] = [
    {},
    {"weight_bits": 4},
    {"weight_bits": 2, "method": "gptq"},
    {"levels": 64},
    {"range": "percentile", "percentile": 90},
    {"column_scaling": 0.0},
    {"granularity": "branch"},
    {"function_error": 0.0},
    {"function_error": 1e-2},
    {"layers": {"layers.0": {"lowering": "keep"}}},
    {"layers": {"layers.1": {"weight_bits": 3}}},
    {"precision": "int16"},
    {},
]


def _prepared(name: str) -> tuple[Program, torch.Tensor]:
    program = PROGRAMS[name]()
    return program, calibration_inputs(program, 48)


def _same(one: Program, other: Program, x: torch.Tensor) -> bool:
    """Whether buffers, what modules say of themselves (with their quantizers), and outputs are equal."""
    ours, theirs = one.graph_module.state_dict(), other.graph_module.state_dict()
    buffers = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return buffers and show(one) == show(other) and torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "convolutions" else []) for name in PROGRAMS]
)
def test_what_was_lowered_before_does_not_matter(name: str) -> None:
    program, x = _prepared(name)
    lowering = Lowering(program, x)
    for values in RECIPES:
        recipe = read_recipe(values)
        again, alone = lowering(lowering.settled(recipe)), lower(program, x, recipe)
        assert _same(again, alone, x), values
        assert again.notes == alone.notes
        assert [change.name for change in again.history] == [change.name for change in alone.history]


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_bits_measure_no_quantizer_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = _prepared(name)
    lowering = Lowering(program, x)
    lowering(lowering.settled(read_recipe({"levels": 64})))

    def refuse(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(lookup_cost.LookupCost, "_measure", refuse)
    monkeypatch.setattr(ReduceFunctions, "__call__", refuse)
    lowering(lowering.settled(read_recipe({"levels": 64, "weight_bits": 4})))
    with pytest.raises(AssertionError, match="measured again"):
        lowering(lowering.settled(read_recipe({"levels": 65})))


def test_few_forms_of_the_functions_are_kept() -> None:
    program, x = _prepared("linear")
    lowering = Lowering(program, x)
    for error in (1e-3, 1e-4, 1e-5, 1e-6):
        lowering(lowering.settled(read_recipe({"function_error": error})))
    assert len(list(lowering._forms)) == 2
