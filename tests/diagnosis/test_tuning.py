"""Tuning undoes planted faults, cheapest change first, says what is missing, and goes on after an interruption."""

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor, nn

from examples.zoo.chebyshev_kan import ChebyKAN
from kancompile.cli.main import main
from kancompile.compiler.compile import compile
from kancompile.diagnosis.tune_cache import TuneCache
from kancompile.diagnosis.tuning import Tuning, tune
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import Program
from kancompile.passes.lowering import Lowering
from kancompile.recipe import Recipe, SettledRecipe, read_recipe
from tests.diagnosis.planted_faults import DIGITS, captured, samples, trained

FIRST, HIDDEN = "layers.0", "layers.1"
MODEL = [
    "examples.zoo.efficient_kan:build",
    "--factory-arg",
    "widths=[64,64,10]",
    "--checkpoint",
    str(DIGITS / "efficient_kan_digits.safetensors"),
    "--calibration",
    str(DIGITS / "digits_calibration.npz"),
    "--data",
    str(DIGITS / "digits_test.npz"),
]
PLANTED = ["--layer", FIRST, "weight_bits=2", "method=uniform", "--layer", HIDDEN, "range=percentile", "percentile=75"]


@dataclass(frozen=True)
class Noise:
    """A fact."""

    noise: float


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(model: nn.Module, x: Tensor, trust: bool = False, dynamic: None = None) -> Program:
        return captured("chebyshev_kan" if isinstance(model, ChebyKAN) else "efficient_kan")

    monkeypatch.setattr("kancompile.compiler.preparation.capture", again)


def tuned(out: Path, *more: str) -> int:
    return main(["tune", *MODEL, "--out", str(out), "--quiet", *more])


def planted() -> Recipe:
    return read_recipe(
        {
            "layers": {
                FIRST: {"weight_bits": 2, "method": "uniform"},
                HIDDEN: {"range": "percentile", "percentile": 75.0},
            }
        }
    )


@pytest.mark.slow
def test_tune_undoes_planted_faults_and_writes_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned(tmp_path, *PLANTED, "--max-drop", "0.3", "--min-sqnr", "35", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tuning"]["start"]["sqnr_db"] < 20
    assert report["validation"]["compiled"]["sqnr_db"] >= 35
    assert report["validation"]["drop"] <= 0.3
    # nothing had to be made finer than 8-bit integers, and the clipped range, which costs no byte, came before weight bits
    changes = [step["change"]["layers"] for step in report["tuning"]["steps"]]
    assert {HIDDEN: {"range": "mse"}} in changes
    bits = [number for number, change in enumerate(changes) if "weight_bits" in change.get(FIRST, {})]
    assert bits
    assert changes.index({HIDDEN: {"range": "mse"}}) < bits[0]
    assert not any("precision" in keys for change in changes for keys in change.values())
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["model.manifest.json", "model.onnx", "recipe.toml", "tune-cache.jsonl"]
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    # the recipe file is the recipe of the model
    recipe = read_recipe(tmp_path / "recipe.toml")
    manifest = json.loads((tmp_path / "model.manifest.json").read_text())
    assert recipe.sha256() == manifest["recipe_sha256"]
    tomllib.loads((tmp_path / "recipe.toml").read_text())


@pytest.mark.slow
def test_a_target_out_of_reach_writes_nothing_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--weight-bits", "2", "--method", "uniform", "--levels", "64"]
    assert tuned(tmp_path, "--min-sqnr", "30", "--max-bytes", "20000", *arguments) == 1
    said = capsys.readouterr().err
    assert "SQNR of the worst output is" in said
    assert "missing" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tune-cache.jsonl"]


@pytest.mark.slow
def test_a_size_budget_takes_bits_where_they_cost_least() -> None:
    given, data = samples("calibration"), samples("test")
    recipe = {"method": "uniform", "levels": 64}
    model = trained("chebyshev_kan")
    found = tune(model, given.x, data.x, recipe=recipe, max_bytes=12000, min_sqnr=25)
    assert found.is_met, found.missed
    compiled = compile(model, given.x, recipe=found.recipe)
    assert len(compiled.model_bytes) <= 12000
    assert found.outcome.constant_bytes < found.start.constant_bytes
    bits = [found.recipe.for_layer(name).weight_bits for name in (FIRST, HIDDEN)]
    assert min(bits) < 8


class Interrupted:
    """Raise KeyboardInterrupt once so many programs were lowered."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.original = Lowering.__call__

    def __call__(self, lowering: Lowering, recipe: SettledRecipe) -> Program:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.original(lowering, recipe)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(cache: Path | None) -> Tuning:
        given, data = samples("calibration"), samples("test")
        return tune(
            trained("chebyshev_kan"), given.x, data.pair, recipe=planted(), min_sqnr=38, max_drop=0.5, cache=cache
        )

    whole, cache = run(None), tmp_path / "folder" / "facts.jsonl"
    assert whole.is_met
    assert len(whole.steps) > 1
    with pytest.MonkeyPatch.context() as patch:
        stop = Interrupted(after=4)
        patch.setattr(Lowering, "__call__", lambda self, recipe: stop(self, recipe))
        with pytest.raises(KeyboardInterrupt):
            run(cache)
    known = cache.read_bytes().count(b"\n")
    assert known >= 2
    with cache.open("ab") as file:  # the power went while a line was written
        file.write(b'{"key": "0123", "fact": {"sig')
    resumed = run(cache)
    assert resumed.remembered >= known
    assert resumed.measured < whole.measured
    assert (resumed.recipe, resumed.steps, resumed.outcome) == (whole.recipe, whole.steps, whole.outcome)
    # a third run knows all, and lowers nothing
    assert run(cache).measured == 0


def test_ctrl_c_leaves_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Interrupted(after=2)
    monkeypatch.setattr(Lowering, "__call__", lambda self, recipe: stop(self, recipe))
    assert tuned(tmp_path, *PLANTED, "--min-sqnr", "35") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["tune-cache.jsonl"]


def test_a_cache_depends_on_everything_that_a_measurement_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    first = TuneCache(path, {"seed": 0})
    assert first.get({"recipe": "a"}, Noise) is None
    first.put({"recipe": "a"}, Noise(1.5))
    assert TuneCache(path, {"seed": 0}).get({"recipe": "a"}, Noise) == Noise(1.5)
    assert TuneCache(path, {"seed": 1}).get({"recipe": "a"}, Noise) is None
    assert TuneCache(path, {"seed": 0}).get({"recipe": "b"}, Noise) is None


@pytest.mark.parametrize("rest", [b"", b"{", b'{"key": "x"}', b"[1]", b"\xff\xfe", b"null"])
def test_a_cache_skips_lines_that_are_not_whole(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "facts.jsonl"
    TuneCache(path, {}).put({"recipe": "a"}, Noise(1.0))
    path.write_bytes(path.read_bytes() + rest)
    again = TuneCache(path, {})
    again.put({"recipe": "b"}, Noise(2.0))
    read = TuneCache(path, {})
    assert (read.get({"recipe": "a"}, Noise), read.get({"recipe": "b"}, Noise)) == (Noise(1.0), Noise(2.0))


def test_a_cache_goes_on_behind_a_line_that_the_disk_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, real = TuneCache(tmp_path / "facts.jsonl", {}), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[:20]))
        cache.put({"recipe": "a"}, Noise(1.0))
    cache.put({"recipe": "b"}, Noise(2.0))
    read = TuneCache(tmp_path / "facts.jsonl", {})
    assert (read.get({"recipe": "a"}, Noise), read.get({"recipe": "b"}, Noise)) == (None, Noise(2.0))


def test_tune_needs_a_target_and_labels_for_a_drop() -> None:
    with pytest.raises(KanCompileError, match="found no target, expected max_drop"):
        tune(None, samples("calibration").x)
    with pytest.raises(KanCompileError, match="max_drop: found data without labels"):
        tune(None, samples("calibration").x, max_drop=0.3)


def test_diagnose_prints_ranked_causes(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--layer", HIDDEN, "levels=16"]
    assert main(["diagnose", *MODEL, *recipe, "--quiet", "--json"]) == 0
    plain: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plain["causes"][0]["kind"] == "levels"
    assert main(["diagnose", *MODEL, *recipe]) == 0
    printed = capsys.readouterr().out
    assert "1. levels: layer 'layers.1': 16 table rows" in printed
    assert "change: --layer 'layers.1' levels=256" in printed
    assert "measured +" in printed


def test_wrong_input_to_diagnose_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "few.npz", x=np.zeros((4, 64), np.float32))
    arguments = [*MODEL[:5], "--calibration", str(tmp_path / "few.npz")]
    assert main(["diagnose", *arguments]) == 2
    assert "expected at least 16 to hold some out" in capsys.readouterr().err
