"""Unmodified models of the PyPI package pykan, trained on real measurements, compiled and run in ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import kancompile
from examples.pykan_regression import main
from kancompile.cli import main as command_line
from kancompile.data.model import load_model
from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend.capture import capture
from kancompile.runtimes.session import RuntimeModel

pytestmark = pytest.mark.needs("pykan")

FEATURES = (2, 3, 8)  # body mass, blood pressure, a blood value


def diabetes() -> tuple[Tensor, Tensor]:
    """Give 442 patients: three measurements and the progression of the disease a year later, standardised."""
    data = load_diabetes()
    x = torch.tensor(data.data[:, FEATURES], dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.float32)[:, None]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


X, Y = diabetes()


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Keep pykan's progress bars and messages out of the test's output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def trained(folder: Path, width: list[Any], steps: int = 3, **options: Any) -> Any:
    """Train for a few steps; grids adapt to the data on the way."""
    import kan

    model = kan.KAN(width=width, seed=0, ckpt_path=str(folder), **({"grid": 4, "k": 3} | options))
    data = {"train_input": X, "train_label": Y, "test_input": X, "test_label": Y}
    model.fit(data, steps=steps)
    return model


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, kancompile.CompiledModel]]:
    """Run the example: it trains, prunes, compiles and validates."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(tmp_path_factory.mktemp("example"))


def relative_error(model: nn.Module, compute: Any, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
    return float((compute(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
def test_int8_reaches_35_db_in_every_layer(
    example: tuple[nn.Module, dict[str, kancompile.CompiledModel]],
) -> None:
    model, compiled = example
    gaps = model.act_fun[0].grid.diff(dim=1)
    assert float(gaps.max()) > 1.5 * float(gaps.min())  # grids adapted to the data
    result = kancompile.validate(
        compiled["int8"].model_bytes,
        model,
        X,
        Y,
        program=compiled["int8"].program,
        float_program=compiled["int8"].captured,
        max_drop=0.5,
    )
    # the gate measured 256 of these patients
    assert all(layer.sqnr_db >= 34.5 for layer in result.layers)
    assert result.compiled.sqnr_db >= 34.5
    assert result.passed, result.reasons


def test_int16_is_within_a_ten_thousandth_of_the_range(
    example: tuple[nn.Module, dict[str, kancompile.CompiledModel]],
) -> None:
    model, compiled = example
    for x in (X, 4 * X):  # inside and outside of the grid
        with torch.no_grad():
            expected = model(x)
        error = RuntimeModel(compiled["int16"].model_bytes)(x) - expected
        assert float(error.square().mean().sqrt()) < 1e-4 * float(expected.max() - expected.min())


@pytest.mark.slow
def test_every_kind_of_node_is_captured_exactly(tmp_path: Path) -> None:
    model = trained(tmp_path, [3, [1, 1], 1], affine_trainable=True)
    model.fix_symbolic(0, 0, 0, "sin", log_history=False, verbose=False)
    model.fix_symbolic(1, 0, 0, "x^2", log_history=False, verbose=False)
    model.remove_edge(0, 1, 1, log_history=False)
    model.eval()
    compiled = kancompile.compile(model, X, recipe={"precision": "float"})
    assert [layer["name"] for layer in compiled.manifest["layers"]] == ["layer0", "layer1"]
    for x in (X, 4 * X):  # inside and outside of the grid
        assert relative_error(model, compiled.captured, x) < 1e-5
        assert relative_error(model, RuntimeModel(compiled.model_bytes), x) < 1e-5
    # the square grows without bound, so a table needs its range from data
    assert any("mul" in part["operator"] for part in compiled.manifest["unrecognized"])


@pytest.mark.slow
def test_pruned_and_sparse_models(tmp_path: Path) -> None:
    import kan

    model = trained(tmp_path, [3, 4, 1], steps=2)
    model(X)
    pruned = model.prune(node_th=0.3, edge_th=0.1).speed().eval()
    program = capture(pruned, X[:2])
    assert relative_error(pruned, program, torch.cat([X, 4 * X])) < 1e-5
    # one edge into every node: the network is univariate, and still a layer
    sparse = kan.KAN([2, 3, 3, 2], grid=4, k=2, sparse_init=True, auto_save=False).speed().eval()
    program = capture(sparse, X[:2, :2].contiguous())
    assert relative_error(sparse, program, torch.cat([X, 4 * X])[:, :2]) < 1e-5


def test_narrow_knots_are_lowered(tmp_path: Path) -> None:
    import kan

    model = kan.KAN([2, 2, 1], grid=8, k=3, auto_save=False).speed().eval()
    with torch.no_grad():
        model.act_fun[0].grid[:, 7] = model.act_fun[0].grid[:, 6] + 1e-4
    compiled = kancompile.compile(model, X[:, :2], recipe={"precision": "float"})
    x = torch.cat([X[:, :2], model.act_fun[0].grid[0, 6] + torch.linspace(-3e-4, 3e-4, 60)[:, None].expand(-1, 2)])
    assert relative_error(model, RuntimeModel(compiled.model_bytes), x) < 1e-5


def test_checkpoints_are_rebuilt_without_unpickling(tmp_path: Path) -> None:
    import kan

    for options in ({"width": [3, 2, 1]}, {"width": [3, [1, 2], 1], "mult_arity": [[], [2, 3], []]}):
        model = kan.KAN(grid=4, k=2, seed=3, auto_save=False, **options)
        model.fix_symbolic(0, 1, 0, "sin", fit_params_bool=False, log_history=False)
        with torch.no_grad():
            model.subnode_bias_0 += 0.1
        model(X)
        model.saveckpt(str(tmp_path / "saved"))
        config = tmp_path / "saved_config.yml"
        # what an older NumPy wrote, which pykan's own loader refuses
        config.write_text(config.read_text() + "extra: !!python/object/apply:numpy.core.multiarray.scalar [1, 2]\n")
        state = torch.get_rng_state()
        loaded = load_model("pykan", tmp_path / "saved")
        assert torch.equal(torch.get_rng_state(), state)
        assert isinstance(loaded, nn.Module)
        assert torch.equal(loaded(X), model(X))
    config.unlink()
    with pytest.raises(KanCompileError, match=r"layer 0 has symbolic functions.*_config\.yml|keep the _config\.yml"):
        load_model("pykan", tmp_path / "saved")
    with pytest.raises(KanCompileError, match=r"expected --checkpoint"):
        load_model("pykan")


def test_a_base_function_that_has_no_name_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import kan

    saved, data, out = str(tmp_path / "saved"), str(tmp_path / "x.npy"), str(tmp_path / "out")
    np.save(data, X.numpy())
    (tmp_path / "functions.py").write_text("import torch\ndef base(x):\n    return torch.sin(x)\n")

    def checkpoint(base: Any) -> nn.Module:
        model = kan.KAN([3, 1], grid=3, k=2, seed=0, base_fun=base, auto_save=False, save_act=False)
        model.saveckpt(saved)
        return model  # type: ignore[no-any-return]

    model = checkpoint(lambda x: torch.sin(x))
    found = (
        r"found the Python object '.*<lambda>' as base function, .*--factory-arg base_fun=silu \(in Python base_fun=\)"
    )
    with pytest.raises(KanCompileError, match=found):
        load_model("pykan", saved)
    for name in ("sin", "torch:sin", f"{tmp_path / 'functions.py'}:base"):
        loaded = load_model("pykan", saved, {"base_fun": name})
        assert torch.equal(loaded(X), model(X))  # type: ignore[operator]
    for name in ("sinus", "torch:pi", ["sin"]):
        with pytest.raises(KanCompileError, match="base_fun"):
            load_model("pykan", saved, {"base_fun": name})
    with pytest.raises(KanCompileError, match="no factory arguments but base_fun"):
        load_model("pykan", saved, {"grid": 3})
    spec = ["pykan", "--checkpoint", saved, "--calibration", data, "--out", out, "--no-timing", "--quiet"]
    assert command_line(["compile", *spec, "--factory-arg", "base_fun=sin"]) == 0
    assert command_line(["compile", *spec, "--force"]) == 2
    assert "--factory-arg base_fun=silu" in capsys.readouterr().err
    model = checkpoint(nn.SiLU())  # an object that is as good as a name
    assert torch.equal(load_model("pykan", saved)(X), model(X))  # type: ignore[operator]
    with pytest.raises(KanCompileError, match="found base function 'silu', and 'sin' as base_fun"):
        load_model("pykan", saved, {"base_fun": "sin"})
