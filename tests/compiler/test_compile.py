"""Every method and width, from a captured program to a file that runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kancompile
from examples.zoo.efficient_kan import build
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import Program
from kancompile.passes.lowering import lower
from kancompile.passes.rounding_methods import METHODS, method_named
from kancompile.passes.rounding_methods.brecq import Brecq
from kancompile.recipe import read_recipe
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS

WIDTHS = (8, 6, 3)
WRITTEN = [pytest.param(name, marks=pytest.mark.needs(name)) if name == "litert" else name for name in TARGETS]


def inputs(n: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, WIDTHS[0], generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def captured() -> Program:
    return kancompile.capture(build(WIDTHS), inputs(2))


def signal_to_noise(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


@pytest.fixture(autouse=True)
def short_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let block reconstruction take 150 steps instead of 1,500."""
    brecq = METHODS["brecq"]
    assert isinstance(brecq, Brecq)
    monkeypatch.setitem(METHODS, "brecq", replace(brecq, iterations=150))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_rounds_to_every_width_and_runs(captured: Program, method: str) -> None:
    x, test = inputs(), inputs(200, seed=1)
    quality = []
    for bits in (2, 4, 8):
        program = lower(captured, x, read_recipe({"method": method, "weight_bits": bits}))
        quality.append(signal_to_noise(captured(test), program(test)))
        if bits == 4:
            model = TARGETS["ort-cpu"].emit(program, {}, "smallest")
            np.testing.assert_array_equal(RuntimeModel(model).run(test.numpy())[0], program(test).numpy())
    assert quality == sorted(quality)
    assert quality[-1] > 35


@pytest.mark.parametrize("method", [method for method in METHODS if method != "uniform"])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_method_loses_to_nearest_rounding(captured: Program, method: str, bits: int) -> None:
    x, test = inputs(1000), inputs(1000, seed=1)
    ours, nearest = (
        signal_to_noise(captured(test), lower(captured, x, read_recipe({"method": name, "weight_bits": bits}))(test))
        for name in (method, "uniform")
    )
    assert ours > nearest - 0.5


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_activations_of_four_bits_and_fewer_run(captured: Program, levels: int) -> None:
    program = lower(captured, inputs(), read_recipe({"weight_bits": 4, "levels": levels}))
    test = inputs(200, seed=1)
    model = TARGETS["ort-cpu"].emit(program, {}, "smallest")
    np.testing.assert_array_equal(RuntimeModel(model).run(test.numpy())[0], program(test).numpy())
    assert signal_to_noise(captured(test), program(test)) > {4: 0, 8: 5, 16: 10}[levels]


@pytest.mark.parametrize("granularity", [{"granularity": "branch"}, {"granularity": "group", "group_size": 3}])
def test_scale_groups_run_as_integers(granularity: dict) -> None:
    compiled = kancompile.compile(build(WIDTHS), inputs(), recipe={"weight_bits": 4, "method": "gptq", **granularity})
    assert not compiled.audit.problems
    test = inputs(200, seed=1)
    np.testing.assert_array_equal(
        RuntimeModel(compiled.model_bytes).run(test.numpy())[0], compiled.program(test).numpy()
    )
    groups = [layer["scale_groups"] for layer in compiled.manifest["layers"]]
    assert groups == ([2, 2] if granularity["granularity"] == "branch" else [3, 2])


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    recipe = {"method": "adaround", "weight_bits": 3}
    first, again, other = (kancompile.compile(build(WIDTHS), inputs(), recipe=recipe, seed=seed) for seed in (5, 5, 6))
    assert first.model_bytes == again.model_bytes
    assert json.dumps(first.manifest) == json.dumps(again.manifest)
    assert first.model_bytes != other.model_bytes


@pytest.mark.parametrize("levels", [16, 32, 256, 4096])
def test_few_and_many_levels_run(captured: Program, levels: int) -> None:
    program = lower(captured, inputs(), read_recipe({"levels": levels}))
    test = inputs(200, seed=1) * 1.5
    model = TARGETS["ort-cpu"].emit(program, {}, "smallest")
    np.testing.assert_array_equal(RuntimeModel(model).run(test.numpy())[0], program(test).numpy())


def test_kept_layers_stay_float(captured: Program) -> None:
    recipe = read_recipe({"layers": {"layers.1": {"lowering": "keep"}}})
    program = lower(captured, inputs(), recipe)
    test = inputs(200, seed=1)
    assert signal_to_noise(captured(test), program(test)) > 40
    model = TARGETS["ort-cpu"].emit(program, {}, "smallest")
    np.testing.assert_allclose(RuntimeModel(model).run(test.numpy())[0], program(test).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [{"bits_average": 4.0, "method": "gptq"}, {"weight_bits": 4, "method": "hawq-v2"}])
def test_average_bits_are_allocated(recipe: dict) -> None:
    compiled = kancompile.compile(build(WIDTHS), inputs(), recipe=recipe)
    weights = {
        layer["name"]: (layer["columns"] * layer["n_out"], layer["weight_bits"])
        for layer in compiled.manifest["layers"]
    }
    total = sum(count for count, _ in weights.values())
    assert sum(count * bits for count, bits in weights.values()) <= 4 * total + 8 * len(weights)
    front = compiled.manifest["bit_allocation"]["pareto_front"]
    costs = [entry["sensitivity"] for entry in front]
    assert costs == sorted(costs, reverse=True)
    assert [entry["weight_bytes"] for entry in front] == sorted(entry["weight_bytes"] for entry in front)


@pytest.mark.slow
def test_byte_budget_is_kept_or_refused() -> None:
    recipe: dict[str, object] = {"method": "uniform"}
    free = kancompile.compile(build(WIDTHS), inputs(), recipe=recipe)
    budget = len(free.model_bytes) - 250
    compiled = kancompile.compile(build(WIDTHS), inputs(), recipe=recipe | {"max_bytes": budget})
    assert len(compiled.model_bytes) <= budget
    points = compiled.manifest["allocation"]["points"]
    (taken,) = [point for point in points if point["chosen"]]
    assert taken["bytes"] <= budget
    assert all(point["measured_us"] > 0 for point in points)
    assert taken["measured_db"] == max(point["measured_db"] for point in points if point["bytes"] <= budget)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "recipe", "below_weights"),
    [
        (WIDTHS, {"method": "gptq", "levels": 64}, True),  # so small that 8 bits take less than unpacking fewer
        ((8, 64, 32), {"method": "uniform"}, True),
        ((8, 64, 32), {"method": "uniform"}, False),
    ],
)
def test_the_smallest_size_that_is_named_is_reachable(
    widths: tuple[int, ...], recipe: dict[str, object], below_weights: bool
) -> None:
    model, x = build(widths), inputs()
    free = kancompile.compile(model, x, recipe=recipe)
    weights = sum(layer["columns"] * layer["n_out"] for layer in free.manifest["layers"]) // 4
    # less than 2-bit weights take, and enough for those but not for what the file holds beside them
    budget = 100 if below_weights else weights + 300
    with pytest.raises(KanCompileError, match=r"smallest reachable size is \d+ bytes") as refused:
        kancompile.compile(model, x, recipe=recipe | {"max_bytes": budget})
    named = int(re.search(r"size is (\d+) bytes", str(refused.value))[1])  # type: ignore[index]
    assert budget < named <= len(free.model_bytes) + 20  # the recipe in the file says the budget
    assert len(kancompile.compile(model, x, recipe=recipe | {"max_bytes": named}).model_bytes) <= named
    with pytest.raises(KanCompileError, match=f"smallest reachable size is {named} bytes"):
        kancompile.compile(model, x, recipe=recipe | {"max_bytes": named - 1})


def test_latency_budget_is_measured() -> None:
    with pytest.raises(KanCompileError, match="smallest reachable latency"):
        kancompile.compile(build(WIDTHS), inputs(), recipe={"max_latency_us": 0.001})


def test_float_precision_is_exact() -> None:
    model = build(WIDTHS)
    compiled = kancompile.compile(model, inputs(), recipe={"precision": "float"})
    test = inputs(500, seed=1) * 3  # inside and outside of the grid
    with torch.no_grad():
        expected = model(test).numpy()
    found = RuntimeModel(compiled.model_bytes).run(test.numpy())[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_unknown_method_and_device_are_named() -> None:
    with pytest.raises(KanCompileError, match="'magic' is unknown, expected one of"):
        method_named("magic")
    if not torch.cuda.is_available():
        with pytest.raises(KanCompileError, match="finds no CUDA device"):
            method_named("gptq", "cuda")
    with pytest.raises(KanCompileError, match="target 'toaster' is unknown"):
        kancompile.compile(build(WIDTHS), inputs(), target="toaster")


def compiled_for(target: str) -> kancompile.CompiledModel:
    return kancompile.compile(
        build(WIDTHS), inputs(), target=target, recipe={"levels": 256}
    )  # which every target takes


@pytest.fixture(scope="module")
def compiled_first() -> dict[str, kancompile.CompiledModel]:
    return {name: compiled_for(name) for name in ("ort-cpu", "c99", "qnn")}


@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.slow
def test_a_target_gets_the_same_file_whichever_was_compiled_first(
    target: str, compiled_first: dict[str, kancompile.CompiledModel]
) -> None:
    """One asked for later, as ``--target all`` does, says the same about layers and passes as one compiled alone."""
    alone = compiled_for(target)
    assert (alone.program.history[-1].name == "quantize-outputs") == TARGETS[target].quantized_outputs
    path = Path(f"model{TARGETS[target].suffix}")
    for first in compiled_first.values():
        later = first.for_target(target)
        if target == "ort-mobile":  # whose lists are in the order of a hash that changes from call to call
            assert len(later.model_bytes) == len(alone.model_bytes)
            changing = {"model_sha256", "deflated_bytes"}
            assert {key for key in alone.manifest if later.manifest[key] != alone.manifest[key]} <= changing
        else:
            assert later.files(path) == alone.files(path)
            assert later.session_bytes == alone.session_bytes
        assert later.program.history == alone.program.history
        assert later.audit == alone.audit


def test_a_layer_used_twice_is_one_layer_of_the_file() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = build((8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(self.cell(x))  # type: ignore[no-any-return]

    compiled = kancompile.compile(Twice(), inputs())
    assert [(layer["name"], layer["uses"]) for layer in compiled.manifest["layers"]] == [("cell.layers.0", 2)]
