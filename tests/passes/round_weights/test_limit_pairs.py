"""Weights taken back until pairs of products fit int16."""

from __future__ import annotations

import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import Program
from kancompile.passes.lowering import check_pairs, lower
from kancompile.passes.round_weights import RoundWeights
from kancompile.passes.round_weights import limit_pairs as limit_pairs_module
from kancompile.passes.round_weights.limit_pairs import Limited, cost_of_pairs, limit_pairs
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.pair_products import layer_pairs, prove_layer
from kancompile.passes.rounding_methods import METHODS
from kancompile.passes.rounding_methods.brecq import Brecq
from kancompile.passes.rounding_methods.problem import FeatureSource, RoundingProblem, objective
from kancompile.passes.rounding_methods.uniform import Uniform
from kancompile.passes.tabulate_expansions import TabulateExpansions
from kancompile.passes.tabulate_expansions.options import TableOptions
from kancompile.recipe import read_recipe
from tests.convolution_programs import float_convolutions, square
from tests.passes.rounding_methods.rounding_problems import table_codes
from tests.programs import calibration_inputs, float_program


def tabulated(program: Program) -> tuple[Program, torch.Tensor]:
    x = calibration_inputs(program, 200)
    return TabulateExpansions(lambda name: TableOptions(64))(program, x), x


def rounded(
    program: Program, x: torch.Tensor, method: object, int16_pairs: bool, granularity: str = "channel"
) -> Program:
    options = RoundingOptions(method, "a method", 8, granularity, int16_pairs=int16_pairs)  # type: ignore[arg-type]
    return RoundWeights(lambda name: options)(program, x)


PROGRAMS = {
    "linear": lambda: float_program((8, 30, 20)),
    "own tables": lambda: float_program((8, 30), same_functions=False),
    "padded": lambda: float_convolutions((3, 6, 6), [square(12, 3, padding=1)]),
    "grouped": lambda: float_convolutions((4, 6, 6), [square(12, 3, groups=2)], split=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("method", ["uniform", "gptq", "awq+gptq"])
def test_all_pairs_fit_and_cost_little(name: str, method: str) -> None:
    program, x = tabulated(PROGRAMS[name]())
    free = rounded(program, x, METHODS[method], int16_pairs=False)
    safe = rounded(program, x, METHODS[method], int16_pairs=True)
    proofs = [prove_layer(free, layer) for layer in free.layers()]
    for layer in safe.layers():
        proof = prove_layer(safe, layer)
        assert proof is not None
        assert proof.holds
    if all(proof is not None and proof.holds for proof in proofs):
        pytest.skip("nothing overflowed with these weights")
    assert any("int16" in note for note in safe.notes)
    check_pairs(safe)
    with pytest.raises(KanCompileError, match=r"layer 'layers\.\d': \d+ sums .* use 7 weight bits"):
        check_pairs(free)
    seven = RoundWeights(lambda name: RoundingOptions(METHODS[method], "a method", 7))(program, x)
    exact = program(x)
    sizes = [float((lowered(x) - exact).square().mean()) for lowered in (free, safe, seven)]
    assert sizes[1] < 1.05 * sizes[2], "taking pairs back must not cost more than 7 bits for all weights"


def test_only_outputs_with_such_pairs_change() -> None:
    program, x = tabulated(float_program((8, 30)))
    layer = program.layers()[0]
    free = rounded(program, x, Uniform(), int16_pairs=False)
    safe = rounded(program, x, Uniform(), int16_pairs=True)
    contraction = free.module(layer.contraction)
    pairs = layer_pairs(contraction, [free.module(target) for target in layer.expansions])[0]  # type: ignore
    touched = pairs.overflows(contraction.weights[0].T)[0].unique()  # type: ignore
    same = torch.ones(30, dtype=torch.bool)
    same[touched] = False
    assert 0 < len(touched) < 30
    changed = (safe.module(layer.contraction).weights[0] != contraction.weights[0]).any(0)  # type: ignore
    assert torch.equal(changed, ~same)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_polishing_makes_up_for_weights_taken_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = tabulated(float_program((8, 30)))
    polished = rounded(program, x, METHODS[method], int16_pairs=True)
    monkeypatch.setattr(limit_pairs_module, "_polished", lambda problem, part, pairs, polishing: part)
    plain = rounded(program, x, METHODS[method], int16_pairs=True)
    exact = program(x)
    errors = [float((lowered(x) - exact).square().mean()) for lowered in (polished, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_a_problem_that_fits_is_returned_as_it_is() -> None:
    program, x = tabulated(float_program((4, 3)))
    layer = program.layers()[0]
    problem = RoundingProblem(
        "layers.0", torch.randn(3, 20) * 1e-3, FeatureSource.from_tensor(table_codes(50, 20, seed=0)), 7
    )
    solved = Uniform()(problem, torch.Generator())
    safe = rounded(program, x, Uniform(), int16_pairs=True)
    pairs = layer_pairs(safe.module(layer.contraction), [safe.module(t) for t in layer.expansions])[0]  # type: ignore
    result, count = limit_pairs(problem, solved, pairs)
    assert result is solved
    assert count == 0
    assert objective(problem, result) >= 0


@pytest.mark.parametrize("method", ["uniform", "awq", "brecq"])
@pytest.mark.parametrize("granularity", ["channel", "branch"])
def test_every_method_is_proved_in_the_pipeline(method: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "brecq", Brecq(iterations=40))
    captured = float_program((8, 20, 3))
    x = calibration_inputs(captured, 200)
    program = lower(captured, x, read_recipe({"method": method, "granularity": granularity}))
    for layer in program.layers():
        proof = prove_layer(program, layer)
        assert proof is not None
        assert proof.holds


def test_presets_without_that_need_keep_all_weights() -> None:
    captured = float_program((8, 30, 20))
    x = calibration_inputs(captured, 200)
    notes = {}
    for cpu in ("portable", "x86-avx2", "x86-vnni", "arm64"):
        notes[cpu] = [note for note in lower(captured, x, read_recipe({"cpu": cpu})).notes if "int16" in note]
    assert notes["portable"] == notes["x86-avx2"] != []
    assert notes["x86-vnni"] == notes["arm64"] == []


def test_the_last_note_of_a_layer_says_what_pairs_cost() -> None:
    def note(layer: str, after: float) -> str:
        limited = Limited([], 8, 3, 1e-6, after)
        return f"layer {layer!r}: {limited.note()}"

    notes = [note("a", 5e-6), note("b", 2e-6), "layer 'a': something else", note("a", 1.1e-6)]
    assert cost_of_pairs(notes, "a") == pytest.approx(1.1)
    assert cost_of_pairs(notes, "b") == pytest.approx(2.0)
    assert cost_of_pairs(notes, "c") == 1.0
