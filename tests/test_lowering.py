"""One program lowered by several recipes: nothing but the recipe may matter, and what recipes share is done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kancompile.lowering import Lowering, lower
from kancompile.passes import choose_index, tabulate_convolutions
from kancompile.passes.mix_functions import MixFunctions
from kancompile.program import Program
from kancompile.recipe import read_recipe
from tests.convolution_programs import float_convolutions, square
from tests.programs import calibration_inputs, float_program

PROGRAMS: dict[str, Callable[[], Program]] = {
    "linear": float_program,
    "convolutions": lambda: float_convolutions((3, 8, 8), [square(6, 3, padding=1), square(4, 3, stride=2)]),
}
RECIPES: list[dict[str, Any]] = [
    {},
    {"weight_bits": 4},
    {"weight_bits": 2, "method": "gptq"},
    {"levels": 64},
    {"layers": {"layers.1": {"lowering": "keep"}}},
    {"layers": {"layers.1": {"weight_bits": 3}}},
    {"precision": "int16"},
    {},
]


def _prepared(name: str) -> tuple[Program, torch.Tensor]:
    program = PROGRAMS[name]()
    return program, calibration_inputs(program, 48)


def _same(one: Program, other: Program) -> bool:
    ours, theirs = one.graph_module.state_dict(), other.graph_module.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_was_lowered_before_does_not_matter(name: str) -> None:
    program, x = _prepared(name)
    lowering = Lowering(program, x)
    for values in RECIPES:
        recipe = read_recipe(values)
        again, alone = lowering(recipe), lower(program, x, recipe)
        assert _same(again, alone), values
        assert again.notes == alone.notes
        assert [change.name for change in again.history] == [change.name for change in alone.history]


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_bits_measure_no_quantizer_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = _prepared(name)
    lowering = Lowering(program, x)
    lowering(read_recipe({"levels": 64}))

    def refuse(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(choose_index.LookupCost, "_measure", refuse)
    monkeypatch.setattr(tabulate_convolutions.ConvLookupCost, "_measure", refuse)
    monkeypatch.setattr(MixFunctions, "__call__", refuse)
    lowering(read_recipe({"levels": 64, "weight_bits": 4}))
    with pytest.raises(AssertionError, match="measured again"):
        lowering(read_recipe({"levels": 65}))


def test_few_forms_of_the_functions_are_kept() -> None:
    program, x = _prepared("linear")
    lowering = Lowering(program, x)
    for error in (1e-3, 1e-4, 1e-5, 1e-6):
        lowering(read_recipe({"function_error": error}))
    assert len(lowering._forms) == 2
