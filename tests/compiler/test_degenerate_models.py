"""Models and data of the smallest sizes and of odd scales, from the model to a file that computes what the program does."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.data.calibration import load_calibration
from kancompile.errors import KanCompileError
from kancompile.passes.lowering import lower
from kancompile.passes.rounding_methods import METHODS
from kancompile.passes.rounding_methods.brecq import Brecq
from kancompile.progress import quiet
from kancompile.recipe import read_recipe
from kancompile.reporting.facts.collect import ReportOptions, collect
from kancompile.reporting.facts.source import of_compiled
from kancompile.reporting.render.html import render
from kancompile.reporting.schema import report_schema


def weights(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


class Waves(nn.Module):
    """``k`` cosines of every input, in units of ``unit``; a single one is a sine."""

    def __init__(self, n_in: int, n_out: int, k: int = 4, unit: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.weight = weights(n_out, n_in * k, seed=seed)
        self.frequencies = nn.Buffer(torch.arange(k).float() if k > 1 else torch.tensor([3.0]))
        self.unit, self.function = unit, torch.cos if k > 1 else torch.sin

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.unsqueeze(-1) / self.unit * self.frequencies).flatten(-2) @ self.weight.T


class ConvWave(nn.Module):
    """A sine of every pixel, and a convolution."""

    def __init__(self, n_in: int, n_out: int, side: int, padding: int = 0) -> None:
        super().__init__()
        self.weight, self.padding = weights(n_out, n_in, side, side), padding

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(torch.sin(3 * x), self.weight, padding=self.padding)


def compiled(model: nn.Module, x: np.ndarray, target: str = "ort-cpu", **recipe: Any) -> CompiledModel:
    """Compile a model and check that ONNX Runtime computes what the program does, inside the range and beyond."""
    with quiet():
        made = kancompile.compile(model.eval(), x, recipe=recipe, target=target)
        found = made.validate(np.concatenate([x, 1.5 * x, -x]).astype(np.float32))
    assert found.runtime is not None
    if recipe.get("precision", "int8") == "int8":
        assert found.runtime.differing == 0
    return made


def normal(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)


SINGLE = {
    "1 -> 3": lambda: Waves(1, 3, k=1),
    "1 -> 1": lambda: Waves(1, 1, k=1),
    "1 -> 1 -> 1": lambda: nn.Sequential(Waves(1, 1, k=1), Waves(1, 1, k=1)),
    "1 -> 3 -> 2": lambda: nn.Sequential(Waves(1, 3, k=1), Waves(3, 2)),
    "2 -> 1 -> 3": lambda: nn.Sequential(Waves(2, 1, k=1), Waves(1, 3, k=1)),
}


@pytest.mark.parametrize("recipe", [{}, {"weight_bits": 2}, {"weight_bits": 4, "method": "gptq"}], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_weight_column_compiles(name: str, recipe: dict[str, Any]) -> None:
    made = compiled(SINGLE[name](), normal(64, int(name[0])), goal_sqnr=None, **recipe)
    assert all(layer["int16_pairs"]["exact"] for layer in made.manifest["layers"])


@pytest.mark.parametrize(("channels", "side", "padding"), [(1, 1, 0), (1, 3, 1), (2, 1, 0)])
def test_one_channel_and_one_pixel_compile(channels: int, side: int, padding: int) -> None:
    compiled(ConvWave(channels, 3, side, padding), normal(40, channels, 1, 1), goal_sqnr=None)


@pytest.mark.parametrize("target", ["c99", "qnn"])
def test_a_single_weight_column_compiles_for_other_targets(target: str) -> None:
    compiled(nn.Sequential(Waves(1, 1, k=1), Waves(1, 1, k=1)), normal(64, 1), target, levels=256, goal_sqnr=None)


LARGE = {
    "large throughout": lambda rng: rng.uniform(20000, 60000, (256, 2)),
    "on both sides": lambda rng: rng.uniform(-60000, 60000, (256, 2)),
    "huge": lambda rng: rng.uniform(1e8, 2e8, (256, 2)),
    "one feature": lambda rng: np.stack([rng.standard_normal(256), rng.uniform(20000, 60000, 256)], 1),
    "from 0 on": lambda rng: rng.uniform(0, 60000, (256, 2)),
    "constant": lambda rng: np.full((256, 2), 30000.0),
    "tiny": lambda rng: rng.standard_normal((256, 2)) * 1e-6,
}


@pytest.mark.parametrize("data", LARGE)
def test_inputs_of_any_size_compile(data: str) -> None:
    x = LARGE[data](np.random.default_rng(0)).astype(np.float32)
    model = nn.Sequential(Waves(2, 3, unit=float(np.abs(x).max()) / 2), Waves(3, 2))
    captured = kancompile.capture(model, torch.from_numpy(x[:2]))
    for precision, least in (("int8", 20.0), ("int16", 75.0), ("float", 100.0)):
        lowered = lower(captured, torch.from_numpy(x), read_recipe({"precision": precision}))
        exact = captured(torch.from_numpy(x))
        noise = float((lowered(torch.from_numpy(x)) - exact).square().sum() / exact.square().sum())
        assert noise < 10 ** (-least / 10)


def test_a_file_comes_out_for_inputs_that_are_large_throughout() -> None:
    x = LARGE["large throughout"](np.random.default_rng(0)).astype(np.float32)
    made = compiled(Waves(2, 3, unit=2e4), x, precision="int16")
    assert made.validate(x).compiled.sqnr_db > 75


class Bends(nn.Module):
    """Rectifiers that bend at the given places, in units that the model divides by."""

    def __init__(self, places: tuple[float, ...], unit: float) -> None:
        super().__init__()
        self.weight = weights(3, 2 * len(places))
        self.places, self.unit = nn.Buffer(torch.tensor(places)), unit

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.unsqueeze(-1) / self.unit - self.places).square().flatten(1) @ self.weight.T


@pytest.mark.parametrize(
    ("unit", "low", "high"), [(1e4, 0, 40000), (1e4, 20000, 60000), (2e5, 0, 1e6), (1e-5, 0, 4e-5)]
)
def test_functions_are_looked_at_where_the_data_are(unit: float, low: float, high: float) -> None:
    x = np.random.default_rng(0).uniform(low, high, (200, 2)).astype(np.float32)
    made = compiled(Bends((1.0, 2.0, 3.0, 3.5), unit), x, precision="float")
    assert made.validate(x).compiled.sqnr_db > 75


class Loop(nn.Module):
    """A layer that is called three times, with skip connections around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = Waves(6, 5), Waves(5, 5, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(3):
            h = h + 0.3 * self.again(h)
        return h


class Chain(nn.Module):
    """A layer that reads itself, so that nothing but layers is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = Waves(6, 5), Waves(5, 5, seed=1), Waves(5, 3, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.again(self.first(x))))


class Zeros(nn.Module):
    """Layers whose weights are all zero, and therefore equal, one of them beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.plain = Waves(6, 6), Waves(6, 6), Waves(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            for layer in (self.left, self.right, self.plain):
                layer.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.left(h) + self.plain(h) + h + self.right(torch.tanh(h))


@pytest.mark.parametrize("storage", ["smallest", "native", "fastest"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_called_several_times_is_stored_and_named(bits: int, storage: str) -> None:
    made = compiled(Loop(), normal(100, 6), weight_bits=bits, storage=storage, goal_sqnr=None)
    assert {row.node.split("/")[0] for row in made.audit.rows} == {"first", "again"}
    assert not made.audit.problems


@pytest.mark.parametrize(
    "recipe",
    [
        {"weight_bits": 2, "granularity": "group", "group_size": 1},
        {"weight_bits": 4, "granularity": "group", "group_size": 1},
        {"weight_bits": 3, "granularity": "branch", "method": "gptq"},
        {"weight_bits": 3, "method": "brecq"},
        {"weight_bits": 4, "method": "hawq-v2"},
        {"max_bytes": 20000},
        {"precision": "int16"},
        {"precision": "float"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [Loop, Zeros])
def test_equal_layers_compile_by_every_recipe(
    model: type[nn.Module], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "brecq", Brecq(iterations=20))
    made = compiled(model(), normal(100, 6), goal_sqnr=None, **recipe)
    assert recipe.get("precision", "int8") != "int8" or not made.audit.problems


@pytest.mark.parametrize("target", ["c99", "ort-mobile"])
def test_a_layer_called_twice_compiles_for_other_targets(target: str) -> None:
    compiled(Chain(), normal(100, 6), target, weight_bits=4, levels=256, goal_sqnr=None)


def test_a_target_of_8_bits_says_that_uses_of_a_layer_hand_real_values_over() -> None:
    with pytest.raises(
        KanCompileError, match=r"'first': .*'again' is used 2 times.*a copy of its module for every use"
    ):
        compiled(Chain(), normal(100, 6), "qnn", weight_bits=4, levels=256, goal_sqnr=None)


class Normed(nn.Module):
    """Two layers whose second one reads the first both as it is and normalised, as FastKAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.spline, self.base = Waves(6, 5), nn.LayerNorm(5), Waves(5, 3), Waves(5, 3, k=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.spline(self.norm(h)) + self.base(h)


class Pooled(nn.Module):
    """Two layers, the second one of the larger of each two outputs of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Waves(6, 6), Waves(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.max_pool1d(self.first(x).unsqueeze(1), 2).squeeze(1))


@pytest.mark.parametrize("levels", [64, 256, 512])
@pytest.mark.parametrize("model", [Loop, Normed, Pooled])
def test_products_with_several_readers_or_behind_moves_stay_integer(model: type[nn.Module], levels: int) -> None:
    made = compiled(model(), normal(100, 6), levels=levels, goal_sqnr=None)
    assert all(row.is_integer for row in made.audit.rows)
    assert not made.audit.problems


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_a_layer_called_several_times_is_reported_and_diagnosed() -> None:
    x = normal(100, 6)
    made = compiled(Loop(), x, weight_bits=4, goal_sqnr=None)
    judging = load_calibration(x)
    options = ReportOptions(edge_count=2, float_export=False, latency=False, diagnose=True)
    report = collect(of_compiled(made, judging, "100 samples", made.validate(judging)), options)
    jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), report_schema())
    names = [layer["name"] for layer in report["layers"]]
    assert names == ["first", "again"]
    assert all(layer["kernels"] for layer in report["layers"])
    assert [layer["layer"] for layer in report["diagnosis"]["layers"]] == names
    assert render(report)
