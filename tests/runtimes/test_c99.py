"""The C file through the interface that validation uses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kancompile.errors import KanCompileError
from kancompile.runtimes import c99
from kancompile.targets.c99 import emit
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program
from tests.targets.test_ort_cpu import inputs


@pytest.fixture(autouse=True)
def compiler() -> None:
    problem = c99.missing()
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("convolutional", [False, True])
def test_outputs_have_the_shape_and_the_bits_of_the_simulation(convolutional: bool, tmp_path: Path) -> None:
    program = integer_convolutions((3, 6, 6), [square(4, 3)]) if convolutional else integer_program()
    model, x = tmp_path / "model.c", inputs(program, 50)
    model.write_bytes(emit(program, {}))
    np.testing.assert_array_equal(c99.RUNTIME.run(model, x.numpy()), program(x).numpy())
    assert c99.RUNTIME.tolerance_steps == 0


def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.c"
    x = np.zeros((2, 6), np.float32)
    with pytest.raises(KanCompileError, match="cannot be read"):
        c99.run(model, x)
    model.write_text("int main(void) { return 0; }")
    with pytest.raises(KanCompileError, match=r"expected a \.c file that kancompile wrote"):
        c99.run(model, x)
    model.write_bytes(emit(integer_program(), {}))
    with pytest.raises(KanCompileError, match="found samples of 7 values, expected 6"):
        c99.run(model, np.zeros((2, 7), np.float32))
    model.write_bytes(emit(integer_program(), {}) + b"\nnonsense\n")
    with pytest.raises(KanCompileError, match="refuses it: "):
        c99.run(model, x)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "apt-get install gcc" in (c99.missing() or "")
    with pytest.raises(KanCompileError, match="no C compiler"):
        c99.run(model, x)
