"""The C file through the interface that validation uses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from kancompile.cli.main import main
from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes import c99
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.c99 import emit
from tests.compiled_kan import FACTORY, FACTORY_ARGS, make_inputs, make_model
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program
from tests.targets.test_ort_cpu import inputs

pytestmark = pytest.mark.needs("c99")


@pytest.mark.parametrize("convolutional", [False, True])
def test_outputs_have_the_shape_and_the_bits_of_the_simulation(convolutional: bool, tmp_path: Path) -> None:
    program = integer_convolutions((3, 6, 6), [square(4, 3)]) if convolutional else integer_program()
    model, x = tmp_path / "model.c", inputs(program, 50)
    model.write_bytes(emit(program, {}))
    np.testing.assert_array_equal(c99.RUNTIME.run(model, x.numpy()), program(x).numpy())
    assert c99.RUNTIME.tolerance_steps == 0


@pytest.mark.slow
def test_from_the_command_line_to_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = make_model(), make_inputs(100)
    save_file(model.state_dict(), tmp_path / "kan.safetensors")
    np.savez(tmp_path / "train.npz", x=x.numpy(), y=model(x).argmax(1).numpy())
    out = tmp_path / "built"
    arguments = ["compile", FACTORY, "--factory-arg", FACTORY_ARGS, "--checkpoint", str(tmp_path / "kan.safetensors")]
    arguments += ["--calibration", str(tmp_path / "train.npz"), "--out", str(out), "--weight-bits", "4"]
    assert main([*arguments, "--target", "c99", "--method", "uniform"]) == 0
    assert {path.suffix for path in out.iterdir()} == {".c", ".h", ".json"}
    printed = capsys.readouterr().out
    assert "flash bytes of constants" in printed
    assert "ram bytes" in printed
    assert main([*arguments, "--target", "ort-cpu", "--method", "uniform", "--force"]) == 0
    test = make_inputs(200, seed=3) * 3
    expected = RuntimeModel(out / "model.onnx")(test).numpy()
    np.testing.assert_array_equal(c99.RUNTIME.run(out / "model.c", test.numpy()), expected)


def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.c"
    x = np.zeros((2, 6), np.float32)
    with pytest.raises(KanCompileError, match="cannot be read"):
        c99.RUNTIME.run(model, x)
    model.write_text("int main(void) { return 0; }")
    with pytest.raises(KanCompileError, match=r"expected a \.c file that kancompile wrote"):
        c99.RUNTIME.run(model, x)
    model.write_bytes(emit(integer_program(), {}))
    with pytest.raises(KanCompileError, match="found samples of 7 values, expected 6"):
        c99.RUNTIME.run(model, np.zeros((2, 7), np.float32))
    model.write_bytes(emit(integer_program(), {}) + b"\nnonsense\n")
    with pytest.raises(KanCompileError, match="refuses it: "):
        c99.RUNTIME.run(model, x)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "apt-get install gcc" in (c99.missing() or "")
    with pytest.raises(KanCompileError, match="no C compiler"):
        c99.RUNTIME.run(model, x)
