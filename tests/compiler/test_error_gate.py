"""The error gate: what misses the ratio is lowered more finely, in the order of the ladder, or the compilation fails."""

from __future__ import annotations

import pytest
import torch

import kancompile
from kancompile.errors.exceptions import ThresholdMissedError
from kancompile.runtimes.session import RuntimeModel
from tests.compiled_kan import make_inputs, make_model


def sqnr(compiled: kancompile.CompiledModel, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = make_model()(x)
    noise = (RuntimeModel(compiled.model_bytes)(x) - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise))


def test_layers_that_miss_are_refined_and_it_is_said() -> None:
    x = make_inputs()
    plain = kancompile.compile(make_model(), x)
    assert plain.manifest["error_gate"]["refinements"] == []
    assert sqnr(plain, x) < 60
    held = kancompile.compile(make_model(), x, recipe={"min_sqnr": 70})
    assert sqnr(held, x) >= 70
    steps = held.manifest["error_gate"]["refinements"]
    assert {step["change"]["precision"] for step in steps} <= {"int16", "float"}
    assert all(step["refined_db"] > step["noise_db"] for step in steps)
    assert all(any(step["layer"] in note and "error gate" in note for note in held.manifest["notes"]) for step in steps)
    changed = {step["layer"] for step in steps}
    for layer in held.manifest["layers"]:
        assert (layer["weight_bits"] == 8) == (layer["name"] not in changed)
    assert held.recipe.for_layer(steps[-1]["layer"]).precision == steps[-1]["change"]["precision"]


def test_more_rows_come_first_where_they_suffice() -> None:
    recipe = {"levels": 32, "min_sqnr": 30}
    held = kancompile.compile(make_model(), make_inputs(), recipe=recipe)
    steps = held.manifest["error_gate"]["refinements"]
    assert steps
    assert {"levels": 128} in [step["change"] for step in steps]
    assert sqnr(held, make_inputs()) >= 30


def test_a_ratio_out_of_reach_fails_plainly() -> None:
    with pytest.raises(
        ThresholdMissedError, match=r"layer 'layers\.\d': SQNR is \d+\.\d+ dB .* at least 500 .*float32"
    ):
        kancompile.compile(make_model(), make_inputs(), recipe={"min_sqnr": 500})


def test_unset_measures_nothing() -> None:
    free = kancompile.compile(make_model(), make_inputs(), recipe={"min_sqnr": None, "levels": 16, "weight_bits": 2})
    assert free.manifest["error_gate"] == {"min_sqnr": None, "refinements": []}
