"""The list of wrong or odd inputs: each ends in one KanCompileError that says what to do, or simply works."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.cli.main import main
from kancompile.data.calibration import load_calibration
from kancompile.data.trial_run import check_fits
from kancompile.errors.exceptions import KanCompileError
from kancompile.validation.validate import validate
from tests.compiled_kan import FACTORY, FACTORY_ARGS, N_IN, compiled_kan, make_inputs, make_model


class OnlySoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, 1)


class DependsOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # MARK
            return self.inner(x)
        return self.inner(-x)


def _with_weight(value: float) -> nn.Module:
    model = make_model()
    first = next(model.parameters())
    first.data[0, 0] = value
    return model


def _with_input(value: float) -> Tensor:
    x = make_inputs()
    x[7, 3] = value
    return x


MARKED_LINE = 1 + Path(__file__).read_text().splitlines().index("        if x.sum() > 0:  # MARK")

REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "no KAN layer": (OnlySoftmax, make_inputs, r"found no KAN layer, looked at .*softmax"),
    "only linear layers": (
        lambda: nn.Linear(N_IN, 2),
        make_inputs,
        r"found no KAN layer, looked at .*plain linear layer",
    ),
    "data-dependent control flow": (DependsOnData, make_inputs, rf"test_bad_input.py:{MARKED_LINE}:"),
    "NaN in the weights": (lambda: _with_weight(float("nan")), make_inputs, r"base_weight.*found 1 .*of 30 values"),
    "infinity in the weights": (
        lambda: _with_weight(float("inf")),
        make_inputs,
        r"base_weight.*found 1 .*of 30 values",
    ),
    "NaN in the data": (make_model, lambda: _with_input(float("nan")), r"found nan at sample 7, feature 3"),
    "infinity in the data": (make_model, lambda: _with_input(float("inf")), r"found inf at sample 7, feature 3"),
    "too few features": (make_model, lambda: make_inputs()[:, :4], r"calibration: found samples of shape \(4,\)"),
    "half the features": (make_model, lambda: make_inputs()[:, :3], r"calibration: found samples of shape \(3,\)"),
    "more dimensions": (make_model, lambda: torch.rand(9, 2, 4), r"calibration: found samples of shape \(2, 4\)"),
    "raw images": (make_model, lambda: np.zeros((9, N_IN), np.uint8), "found uint8"),
    "text": (make_model, lambda: np.array([["a"] * N_IN] * 4), "found dtype"),
    "no samples": (make_model, lambda: make_inputs()[:0], "found 0 samples, expected at least 2"),
    "one sample": (make_model, lambda: make_inputs()[:1], "found 1 sample, expected at least 2"),
    "an empty iterable": (make_model, lambda: iter(()), "found no batches"),
    "no model": (lambda: 3, make_inputs, "found int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_with_one_kind_of_error(case: str) -> None:
    model, data, text = REFUSED[case]
    with pytest.raises(KanCompileError, match=text):
        kancompile.compile(model(), data())


def test_object_arrays_and_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", x=np.array([[1, None]] * 4, dtype=object))
    with pytest.raises(KanCompileError, match="array of Python objects"):
        kancompile.compile(make_model(), tmp_path / "o.npz")


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"weigth_bits": 4}, "did you mean 'weight_bits'"),
        ({"layers": {"nothing": {"levels": 64}}}, "pattern 'nothing' matches no layer"),
    ],
)
def test_wrong_recipes_are_refused(recipe: dict[str, Any], text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        kancompile.compile(make_model(), make_inputs(), recipe=recipe)


@pytest.mark.slow
def test_a_ragged_last_batch_works() -> None:
    x = make_inputs(37)
    recipe = {"levels": 64, "goal_sqnr": None}
    ragged = kancompile.compile(make_model(), list(x.split(8)), recipe=recipe)
    whole = kancompile.compile(make_model(), x, recipe=recipe)
    assert ragged.model_bytes == whole.model_bytes
    assert validate(whole.model_bytes, make_model(), make_inputs(13, seed=4), batch_size=5, min_sqnr=10).passed


def test_constant_features_work() -> None:
    x = make_inputs()
    x[:, 0], x[:, 4] = 0.0, 0.7
    compiled = kancompile.compile(make_model(), x, recipe={"weight_bits": 4, "method": "gptq"})
    assert "calibration: 2 of 6 features are constant" in compiled.manifest["calibration"]["notes"]
    result = validate(compiled.model_bytes, make_model(), x, program=compiled.program)
    assert result.runtime is not None
    assert result.runtime.differing == 0
    assert result.compiled.sqnr_db > 10
    # never seen in calibration, so worth little, but finite and equal in simulation and runtime
    x = make_inputs(seed=8)
    elsewhere = validate(compiled.model_bytes, make_model(), x, program=compiled.program, min_sqnr=3)
    assert elsewhere.passed
    assert elsewhere.runtime is not None
    assert elsewhere.runtime.differing == 0


def test_data_that_is_constant_altogether_works() -> None:
    x = make_inputs()[:1].expand(30, -1)
    compiled = kancompile.compile(make_model(), x)
    assert validate(compiled.model_bytes, make_model(), x, min_sqnr=15).passed


def test_shapes_that_the_model_refuses_are_found_before_tracing() -> None:
    samples = load_calibration(make_inputs()[:, :4])
    with pytest.raises(KanCompileError, match=r"calibration: found samples of shape \(4,\), on which the model raises"):
        check_fits(make_model(), samples)
    with pytest.raises(KanCompileError, match=r"shape \(3,\), for 2 of which the model returns shape \(1, 3\)"):
        check_fits(lambda x: x.reshape(-1, N_IN)[:, :3], load_calibration(make_inputs()[:, :3]))
    check_fits(make_model(), load_calibration(make_inputs()))


@pytest.mark.slow
def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    compiled = compiled_kan(256)
    compiled.save(tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(KanCompileError, match="file exists"):
        compiled_kan(64).save(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == before
    compiled_kan(64).save(tmp_path / "model.onnx", force=True)
    assert (tmp_path / "model.onnx").read_bytes() != before
    with pytest.raises(KanCompileError, match="cannot write in '/proc'"):
        compiled.save("/proc/kancompile/model.onnx")


@pytest.mark.slow
def test_importing_and_failing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    kancompile.compile(make_model(), make_inputs(), recipe={"levels": 32})
    assert torch.equal(torch.rand(3), expected)


NETS = """
import torch
from torch import nn
from tests.compiled_kan import make_model

class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model()
    def forward(self, x):
        if x.sum() > 0:
            return self.inner(x)
        return self.inner(-x)

def softmax():
    return nn.Softmax(1)
"""


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        ("nets.py:softmax", "good.npz", "found no KAN layer"),
        ("nets.py:Flow", "good.npz", "nets.py:11:"),
        ("KAN", "nan.npz", "found nan at sample 7, feature 3"),
        ("KAN", "one.npz", "found 1 sample"),
        ("KAN", "narrow.npz", "calibration: found samples of shape (4,)"),
        ("KAN", "objects.npz", "array of Python objects"),
        ("KAN", "uint8.npz", "found uint8"),
    ],
)
def test_the_command_line_says_the_same(
    model: str, data: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    x = make_inputs(20).numpy()
    arrays = {
        "good.npz": x,
        "nan.npz": _with_input(float("nan"))[:20].numpy(),
        "one.npz": x[:1],
        "narrow.npz": x[:, :4],
        "objects.npz": np.array([[1, None]] * 4, dtype=object),
        "uint8.npz": np.zeros((20, N_IN), np.uint8),
    }
    np.savez(tmp_path / data, x=arrays[data])
    spec = [FACTORY, "--factory-arg", FACTORY_ARGS] if model == "KAN" else [str(tmp_path / model)]
    arguments = ["compile", *spec, "--calibration", str(tmp_path / data), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.err.count("kancompile: error: ") == 1
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


class Pixels(nn.Module):
    """Reads images with three channels first, as convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).flatten(1)


@pytest.mark.parametrize(
    ("model", "shape", "hint"),
    [
        (Pixels(), (8, 9, 3), r"channels first: pass x.transpose\(0, 3, 1, 2\)"),
        (nn.Linear(24, 2), (2, 3, 4), r"flat: pass x.reshape\(len\(x\), -1\)"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(1)), (8, 9), r"channel of their own: pass x\[:, None\]"),
        (Pixels(), (8, 9, 4), r"it takes samples of shape \(3, 9, 4\)$"),
        (nn.Linear(24, 2), (23,), r"it takes samples of shape \(24,\)$"),
        (Pixels(), (3, 2, 2), r"model 'Pixels': raises RuntimeError .* on every other shape that was tried"),
    ],
)
def test_another_layout_is_named_if_the_model_takes_it(model: nn.Module, shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(KanCompileError, match=hint):
        check_fits(model, load_calibration(np.zeros((4, *shape), np.float32)))


def test_a_file_names_the_layout_that_it_reads() -> None:
    from kancompile.validation.float_export import export_float

    content = export_float(Pixels(), (3, 8, 9))
    with pytest.raises(KanCompileError, match=r"data: found samples of shape \(8, 9, 3\).*transpose\(0, 3, 1, 2\)"):
        validate(content, Pixels(), np.zeros((4, 8, 9, 3), np.float32))


@pytest.mark.parametrize("command", ["compile", "validate", "diagnose", "report"])
def test_arrays_are_chosen_with_the_option_of_the_data_they_are_in(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = make_inputs(30).numpy()
    np.savez(tmp_path / "odd.npz", a=x, b=x)
    np.save(tmp_path / "train.npy", x)
    model = tmp_path / "model.onnx"
    model.write_bytes(compiled_kan().model_bytes)
    odd, good = str(tmp_path / "odd.npz"), str(tmp_path / "train.npy")
    named, factory = ["--factory-arg", FACTORY_ARGS], [FACTORY, "--factory-arg", FACTORY_ARGS]
    commands = {
        "compile": (["compile", *factory, "--calibration", odd, "--out", str(tmp_path / "o")], "--calibration-key"),
        "validate": (["validate", str(model), "--against", FACTORY, *named, "--data", odd], "--data-key"),
        "diagnose": (["diagnose", *factory, "--calibration", good, "--data", odd], "--data-key"),
        "report": (["report", str(model), "--against", FACTORY, *named, "--data", odd], "--data-key"),
    }
    arguments, option = commands[command]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert f"name it with {option} NAME" in printed
    assert not any(other in printed for other in {"--calibration-key", "--data-key"} - {option})
