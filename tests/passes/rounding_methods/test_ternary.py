"""Weights of three values: scales are the best there are, and files store five codes in a byte."""

from __future__ import annotations

import itertools

import onnx
import pytest
import torch

from kancompile.cli.main import main
from kancompile.errors import KanCompileError
from kancompile.ir import IntegerContraction, Program, joined
from kancompile.passes import lower
from kancompile.passes.rounding_methods.quantizers import round_to_nearest, search_scale, ternary_scale
from kancompile.recipe import LayerRecipe, read_recipe
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.onnx.export import emit
from tests.programs import calibration_inputs, float_program


def test_scales_are_the_best_of_all_codes() -> None:
    """Oracle: every one of the 3^6 code vectors with its least-squares scale."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=generator)
    cost = torch.rand(6, generator=generator) + 0.05
    codes = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))[:, None]  # [729, 1, 6]
    slope = (cost * codes * weight).sum(2)
    best_scale = slope / (cost * codes.square()).sum(2).clamp(min=1e-9)
    least = (cost * (weight - best_scale[..., None] * codes).square()).sum(2).amin(0)
    scale = ternary_scale(weight, cost)
    assert torch.equal(scale, search_scale(weight, "ternary", [6], "hessian", cost)[0])
    rounded = round_to_nearest(weight, scale[None], [6], "ternary").float() * scale[:, None]
    torch.testing.assert_close((cost * (weight - rounded).square()).sum(1), least, rtol=1e-5, atol=1e-6)


def test_scales_of_nothing_are_finite() -> None:
    assert torch.equal(ternary_scale(torch.zeros(2, 3), torch.ones(3)), torch.ones(2))
    assert torch.equal(ternary_scale(torch.ones(2, 3), torch.zeros(3)), torch.ones(2))


def rounded(widths: tuple[int, ...], **recipe: object) -> tuple[Program, Program, torch.Tensor]:
    exact = float_program(widths)
    x = calibration_inputs(exact, 300)
    keys = {"weight_bits": "ternary", "levels": 64, "lookup": "each", "drift": "off"} | recipe
    return exact, lower(exact, x, read_recipe(keys)), x


def test_compensation_helps_and_codes_have_three_values() -> None:
    errors = {}
    for method in ("uniform", "gptq", "awq+gptq"):
        exact, program, x = rounded((12, 8, 4), method=method)
        for _, contraction in program.nodes(IntegerContraction):
            assert contraction.is_ternary
            assert contraction.matrix.unique().tolist() == [-1, 0, 1]
        errors[method] = float((program(x) - exact(x)).square().mean())
    assert errors["gptq"] < 0.7 * errors["uniform"]
    assert errors["awq+gptq"] < 1.1 * errors["gptq"]
    assert any("ternary weights by" in note for note in program.notes)


@pytest.mark.parametrize(("widths", "trits"), [((60, 50, 3), True), ((12, 8), False)])
def test_files_store_five_codes_in_a_byte_where_that_is_smaller(widths: tuple[int, ...], trits: bool) -> None:
    _, program, x = rounded(widths, method="uniform")
    contraction = program.node("layer0_contract", IntegerContraction)
    count = widths[0] * 5 * widths[1]
    assert contraction.packs_trits is trits
    assert contraction.stored_bytes() == (count // 5 if trits else count // 4)
    data = emit(program, {})
    stored = [len(value.raw_data) for value in onnx.load_from_string(data).graph.initializer]
    assert any(count // 5 <= size < count // 4 for size in stored) is trits  # codes of both layers stand together
    assert torch.equal(joined(RuntimeModel(data)(x)), program(x))


@pytest.mark.slow
def test_groups_multiply_three_values() -> None:
    _, program, x = rounded((40, 30), method="gptq", granularity="group", group_size=10)
    contraction = program.node("layer0_contract", IntegerContraction)
    assert contraction.is_ternary
    assert contraction.multiplier is not None
    assert int(contraction.matrix.abs().max()) > 1
    assert torch.equal(joined(RuntimeModel(emit(program, {}))(x)), program(x))


@pytest.mark.parametrize("method", ["brecq", "hawq-v2"])
def test_methods_of_whole_bits_are_refused(method: str) -> None:
    with pytest.raises(KanCompileError, match=f"weight_bits 'ternary' with method '{method}'.*or weight_bits = 2"):
        LayerRecipe(weight_bits="ternary", method=method)


def test_recipes_name_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--weight-bits", "ternary", "--layer", "a", "weight_bits=8"]) == 0
    shown = capsys.readouterr().out
    assert 'weight_bits = "ternary"' in shown
    recipe = read_recipe({"weight_bits": "ternary"})
    assert (recipe.bits, recipe.is_ternary, recipe.rounding_method) == (2, True, "awq+gptq")
    assert read_recipe(recipe.to_dict()) == recipe
    with pytest.raises(KanCompileError, match="weight_bits is 'binary', expected an integer 2 to 8 or ternary"):
        read_recipe({"weight_bits": "binary"})
