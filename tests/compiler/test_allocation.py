"""Bits and rows of all layers are chosen together, and the file that comes of it is what was promised."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import kancompile
from examples.zoo import efficient_kan
from kancompile.compiler.allocation import Option, choose_options
from kancompile.compiler.file_parts import file_parts
from kancompile.reporting import recipe_and_seed
from kancompile.runtimes import RuntimeModel

GOAL = 24.0
OUTPUTS = 3


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(256, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def small(x: torch.Tensor) -> kancompile.CompiledModel:
    model = efficient_kan.build((3, 4), seed=1)
    return kancompile.compile(model, x, recipe={"optimize": "size", "goal_sqnr": GOAL, "method": "uniform"})


def _options(generator: np.random.Generator) -> dict[str, list[Option]]:
    return {
        name: [
            Option({"weight_bits": bits}, int(generator.integers(10, 99)), torch.from_numpy(generator.random(OUTPUTS)))
            for bits in range(2, 2 + count)
        ]
        for name, count in (("a", 4), ("b", 3), ("c", 5))
    }


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_those_of_exhaustive_search(seed: int) -> None:
    generator = np.random.default_rng(seed)
    options, power = _options(generator), torch.from_numpy(generator.random(OUTPUTS) + 0.5)
    points = list(itertools.product(*options.values()))
    sizes = [sum(option.bytes for option in point) for point in points]
    shares = [float((torch.stack([option.noise for option in point]).sum(0) / power).max()) for point in points]
    limit = float(np.median(shares))
    chosen = choose_options(options, power, -10 * np.log10(limit * 1.0001), np.inf)
    assert chosen is not None
    wanted = min(size for size, share in zip(sizes, shares, strict=True) if share <= limit * 1.0001)
    assert sum(option.bytes for option in chosen.values()) == wanted
    budget = int(np.median(sizes))
    chosen = choose_options(options, power, None, budget)
    assert chosen is not None
    found = float((torch.stack([option.noise for option in chosen.values()]).sum(0) / power).max())
    assert sum(option.bytes for option in chosen.values()) <= budget
    assert found == pytest.approx(
        min(share for size, share in zip(sizes, shares, strict=True) if size <= budget), rel=1e-5
    )
    assert choose_options(options, power, None, min(sizes) - 1) is None
    assert choose_options(options, power, 100.0, np.inf) is None


def test_the_smallest_file_holds_its_goal(small: kancompile.CompiledModel, x: torch.Tensor) -> None:
    with torch.no_grad():
        simulated = small.program(x)
    found = RuntimeModel(small.model_bytes).run(x.numpy())[0]
    np.testing.assert_array_equal(found, simulated.numpy())
    expected = small.captured(x)
    error = (simulated - expected).square().sum(0) / (expected - expected.mean(0)).square().sum(0)
    assert (
        float(-10 * torch.log10(error.max())) >= GOAL - 0.3
    )  # the goal holds on the samples measured, these and others
    assert not small.audit.problems
    layers = {layer["name"]: layer for layer in small.manifest["layers"]}
    assert any(layer["weight_bits"] < 8 or layer["expansions"][0]["levels"] < 256 for layer in layers.values())
    said = [note for note in small.manifest["notes"] if note.startswith("allocation:")]
    assert said
    for note in said:
        predicted, measured = (float(note.split(" dB ")[0].split()[-1]), float(note.split(", ")[2].split()[0]))
        assert abs(predicted - measured) < 3


def test_where_the_bytes_go(small: kancompile.CompiledModel) -> None:
    parts = file_parts(small.model_bytes)
    assert sum(parts.values()) == len(small.model_bytes)
    (note,) = [note for note in small.manifest["notes"] if note.startswith("size:")]
    assert f"{len(small.model_bytes):,} bytes" in note
    model = onnx.load_from_string(small.model_bytes)
    assert not model.graph.value_info
    assert {entry.key for entry in model.metadata_props} == {"kancompile.calibrated_range", "kancompile.metadata"}
    low, high = json.loads(next(e.value for e in model.metadata_props if e.key == "kancompile.calibrated_range"))
    assert low <= small.manifest["calibrated_range"][0] < small.manifest["calibrated_range"][1] <= high
    defaults = [
        (node.op_type, attribute.name)
        for node in model.graph.node
        for attribute in node.attribute
        if onnx.defs.get_schema(node.op_type, 21).attributes[attribute.name].default_value.type
        and onnx.helper.get_attribute_value(attribute)
        == onnx.helper.get_attribute_value(
            onnx.defs.get_schema(node.op_type, 21).attributes[attribute.name].default_value
        )
    ]
    assert not defaults
    constants = [one.SerializeToString() for one in model.graph.initializer if not one.ClearField("name")]
    assert len(set(constants)) == len(constants)


def test_short_metadata_leaves_the_rest_to_the_manifest(small: kancompile.CompiledModel, tmp_path: Path) -> None:
    path = small.save(tmp_path / "model.onnx")
    recipe, seed = recipe_and_seed(path)
    assert (recipe, seed) == (small.recipe, 0)
    (tmp_path / "model.manifest.json").unlink()
    with pytest.raises(kancompile.KanCompileError, match=r"short, and no model\.manifest\.json"):
        recipe_and_seed(path)


@pytest.mark.slow
def test_a_budget_that_nothing_fits(x: torch.Tensor) -> None:
    recipe = {"optimize": "accuracy", "max_bytes": 900, "method": "uniform", "levels": 64, "goal_sqnr": None}
    with pytest.raises(kancompile.KanCompileError, match=r"found no file of at most 900 bytes"):
        kancompile.compile(efficient_kan.build((3, 2), seed=1), x, recipe=recipe)
