"""Bits and rows of all layers are chosen together, and the file that comes of it is what was promised."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch

import kancompile
from examples.zoo import efficient_kan
from kancompile.compiler.allocation import Allocator
from kancompile.compiler.file_parts import file_parts
from kancompile.compiler.latency_estimate import layer_nanoseconds
from kancompile.compiler.layer_options import with_widths_between
from kancompile.compiler.layer_trials import LayerTrials, Trial
from kancompile.compiler.option_choice import Option, choose_options, least, neighbors, predicted_front
from kancompile.ir import Program
from kancompile.recipe import LayerRecipe, SettledRecipe, package_profile, read_recipe
from kancompile.reporting import recipe_and_seed
from kancompile.runtimes import RuntimeModel
from tests.programs import integer_program

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
            Option(
                {"weight_bits": bits},
                int(generator.integers(10, 99)),
                torch.from_numpy(generator.random(OUTPUTS)),
                float(generator.integers(100, 999)),
            )
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
    times = [sum(option.nanoseconds for option in point) for point in points]
    most = float(np.quantile(times, 0.3))
    chosen = choose_options(options, power, None, budget, most)
    fitting = [share for share, size, time in zip(shares, sizes, times, strict=True) if size <= budget and time <= most]
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert sum(option.nanoseconds for option in chosen.values()) <= most
        found = float((torch.stack([option.noise for option in chosen.values()]).sum(0) / power).max())
        assert found == pytest.approx(min(fitting), rel=1e-5)
    assert least(options) == min(times)
    assert least(options, budget) == min(time for time, size in zip(times, sizes, strict=True) if size <= budget)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_beats_a_point_of_the_front_and_neighbors_are_the_next_ones(seed: int) -> None:
    generator = np.random.default_rng(seed)
    options, power = _options(generator), torch.from_numpy(generator.random(OUTPUTS) + 0.5)

    def measures(point: Iterable[Option]) -> tuple[float, float, float]:
        few = list(point)
        share = float((torch.stack([option.noise for option in few]).sum(0) / power).max())
        return sum(option.bytes for option in few), sum(option.nanoseconds for option in few), share

    every = [measures(point) for point in itertools.product(*options.values())]
    front = predicted_front(options, power)
    assert len(front) > 2
    for chosen in front:
        size, time, share = measures(chosen.values())
        # the front is exact to a thousandth of the error
        assert not any(s <= size and t <= time and e < share * 0.99 for s, t, e in every)
    budget, most = float(np.median([size for size, _, _ in every])), float(np.median([time for _, time, _ in every]))
    chosen = choose_options(options, power, None, budget, most)
    assert chosen is not None
    size, time, share = measures(chosen.values())
    near = [measures(one.values()) for one in neighbors(options, power, chosen, budget, most)]
    smaller = [(e, s) for s, t, e in every if s < size and t <= most]
    faster = [(e, t) for s, t, e in every if t < time and s <= budget]
    better = [s for s, t, e in every if e < share * 0.997 and t <= most]
    assert not smaller or any(s < size and e == pytest.approx(min(smaller)[0], rel=1e-5) for s, _, e in near)
    assert not faster or any(t < time and e == pytest.approx(min(faster)[0], rel=1e-5) for _, t, e in near)
    assert not better or any(s == min(better) and e < share for s, _, e in near)


def test_the_least_error_within_a_budget_of_time(two_layers: Program) -> None:
    trials = _Formula(two_layers)
    # a row takes a nanosecond, 500 us are not of layers
    allocator = Allocator(
        two_layers, cast("LayerTrials", trials), cast("Any", trials.file_bytes), lambda recipe, program: 500.0, 5e5
    )
    recipe = read_recipe(max_latency_us=500.6, goal_sqnr=None)
    found = allocator.choose(recipe.settled(trials.names))
    assert sorted(found[name].levels or 0 for name in trials.names) == [256, 256]
    assert all(found[name].bits == 8 for name in trials.names)
    data = allocator.to_dict()
    (taken,) = [point for point in data["points"] if point["chosen"]]
    assert taken["predicted_us"] == pytest.approx(500.512)
    assert taken["predicted_db"] == pytest.approx(taken["measured_db"], abs=0.01)
    assert len(data["points"]) > 2
    assert all(point["db"] >= 0 and point["us"] >= 500 for point in data["front"])
    with pytest.raises(
        kancompile.KanCompileError, match=r"smallest reachable latency is 500\.1 us by the costs of profile"
    ):
        allocator.choose(read_recipe(max_latency_us=500).settled(trials.names))


@pytest.mark.parametrize("measured", [(8, 4, 3), (8, 4), (8,)])
def test_widths_between_measured_ones_bring_a_quarter_of_the_noise_for_every_bit(measured: tuple[int, ...]) -> None:
    def trial(bits: int) -> Trial:
        return Trial(torch.tensor([2.0, 0.0]) + torch.tensor([300.0, 5.0]) * 4.0**-bits, 1000 * bits)

    found = with_widths_between({bits: trial(bits) for bits in measured})
    assert [bits for bits, one in found.items() if one is not None] == list(range(8, min(measured) - 1, -1))
    for bits, one in found.items():
        if one is not None:
            torch.testing.assert_close(one.noise, trial(bits).noise)
            assert one.extra_bytes == 1000 * bits


def test_times_of_layers_are_those_of_the_profile() -> None:
    program, costs = integer_program((3, 4, 2), k=9), package_profile("x86-vnni").look_up
    first, second = (layer_nanoseconds(program, layer, costs) for layer in program.layers())
    assert first == pytest.approx(
        6 * costs.node + 3 * (costs.quantize + costs.gather) + 4 * 27 * (costs.load + costs.product)
    )
    batch = layer_nanoseconds(program, program.layers()[1], costs, 10)
    assert batch - second == pytest.approx(9 * (4 * (costs.quantize + costs.gather) + 2 * 36 * costs.product))


class _Formula:
    """Trials of layers whose errors follow a formula: twice the rows, a quarter of the noise; a bit more, a quarter as well."""

    samples = 1024

    def __init__(self, captured: Program) -> None:
        self.names, self.left, self.captured = [layer.name for layer in captured.layers()], 48, captured

    def trial(self, recipe: SettledRecipe, name: str, change: dict[str, Any]) -> Trial:
        if change.get("lookup") == "joint":
            bits, share = change["weight_bits"], float(change["function_error"])
            noise = torch.tensor([0.01 * 4.0**-bits + share], dtype=torch.float64)
            return Trial(noise, int(400 + 10 * bits - 1e4 * share), 1)
        bits, rows = change["weight_bits"], change["levels"]
        noise = torch.tensor([0.01 * 4.0**-bits + (16 / rows) ** 2], dtype=torch.float64)
        return Trial(noise, 9 * rows + 40 * bits, 4, float(rows))

    def lower(self, recipe: SettledRecipe) -> SettledRecipe:
        return recipe

    def measure(self, program: Program | SettledRecipe) -> SimpleNamespace:
        allowed = torch.ones(1, dtype=torch.float64)
        if isinstance(program, Program):
            return SimpleNamespace(allowed=allowed)
        layers = [program[name] for name in self.names]
        noise = sum(
            0.01 * 4.0**-layer.bits
            + (layer.joint_error if layer.lookup == "joint" else (16 / (layer.levels or 128)) ** 2)
            for layer in layers
        )
        return SimpleNamespace(worst_db=-10 * math.log10(noise))

    def file_bytes(self, recipe: SettledRecipe, program: object) -> int:
        return 1000 + sum(9 * (recipe[name].levels or 128) + 40 * recipe[name].bits for name in self.names)


@pytest.fixture(scope="module")
def two_layers() -> Program:
    return integer_program((3, 4, 2))


def _chosen(captured: Program, **recipe: object) -> tuple[Allocator, list[LayerRecipe], float]:
    trials = _Formula(captured)
    allocator = Allocator(captured, cast("LayerTrials", trials), cast("Any", trials.file_bytes))
    found = allocator.choose(read_recipe(recipe).settled(trials.names))
    return allocator, [found[name] for name in trials.names], trials.measure(found).worst_db


def test_rows_go_on_where_a_goal_needs_more_and_a_goal_out_of_reach_is_said(two_layers: Program) -> None:
    allocator, layers, reached = _chosen(two_layers, optimize="size", goal_sqnr=44.0)
    assert allocator.missed is None
    assert [layer.levels for layer in layers] == [4096, 4096]
    assert reached >= 44
    allocator, layers, reached = _chosen(two_layers, optimize="size", goal_sqnr=90.0)
    assert allocator.missed == "allocation: no bits and rows reach 90.0 dB; the most precise file has 51.0 dB"
    assert allocator.notes()[0] == allocator.missed
    assert reached >= 50.4
    assert max(layer.bits for layer in layers) < 8  # the smallest of those that come near


@pytest.mark.parametrize(("goal", "share"), [(22.0, 5e-3), (27.0, 1.2e-3), (40.0, None)])
def test_functions_are_chosen_with_bits_and_rows(goal: float, share: float | None) -> None:
    allocator, (layer,), reached = _chosen(integer_program((128, 4), k=9), optimize="size", goal_sqnr=goal)
    assert reached >= goal
    assert (layer.function_error, layer.lookup) == ((None, "auto") if share is None else (share, "joint"))
    assert (layer.levels is None) == (share is not None)
    assert any("joint functions within" in note for note in allocator.notes()) == (share is not None)


def test_no_file_of_equal_bits_that_fits_is_better(two_layers: Program) -> None:
    # all choose 128 rows where none are said
    budget = 1000 + 2 * (9 * 128 + 40 * 5)
    allocator, _, reached = _chosen(two_layers, optimize="accuracy", max_bytes=budget)
    uniform = next(point for point in allocator.points if point.predicted_db is None and point.bytes == budget)
    assert reached >= uniform.measured_db
    assert all(point.bytes <= budget or point.measured_db > reached for point in allocator.points)


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
    with pytest.raises(kancompile.KanCompileError, match=r"max_bytes 900: the smallest reachable size is \d+ bytes"):
        kancompile.compile(efficient_kan.build((3, 2), seed=1), x, recipe=recipe)
