"""Real ONNX Runtime on emulated processors gives the bits of the simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes import RUNTIMES, emulation
from kancompile.runtimes.emulation import ARM64, X86, missing, run_emulated
from kancompile.targets.onnx.export import emit
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program

EMULATED = [name for name, runtime in RUNTIMES.items() if runtime.emulated]
SMOKE = "ort-arm64-dotprod"


def tied_inputs(shape: tuple[int, ...], n: int = 200) -> np.ndarray:
    """Draw inputs on exact ties of a 256-level table over -2 ... 2, and beyond it."""
    generator = np.random.default_rng(0)
    x = generator.uniform(-3, 3, (n, *shape)).astype(np.float32)
    step = np.float32(4.0 / 255)
    x[: n // 2] = (np.round(x[: n // 2] / step) + np.float32(0.5)) * step
    return x


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.needs(name), *[pytest.mark.slow] * (name != SMOKE)]) for name in EMULATED],
)
def test_emulated_processor_is_bit_identical(name: str, tmp_path: Path) -> None:
    runtime = RUNTIMES[name]
    # 4 bits always fit int16; the second layer hands real values on to a large table
    program = integer_program(widths=(16, 24, 40, 10), levels=(256, 1024, 200), k=5, weight_bits=4)
    x = tied_inputs((16,))
    (tmp_path / "model.onnx").write_bytes(emit(program, {}))
    y = runtime.run(tmp_path / "model.onnx", x)
    np.testing.assert_array_equal(y, program(torch.from_numpy(x)).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in EMULATED])
def test_emulated_convolution_is_bit_identical(name: str, tmp_path: Path) -> None:
    runtime = RUNTIMES[name]
    layers = [square(16, 3, padding=1), square(16, 3, stride=2, groups=4), square(8, 1)]
    program = integer_convolutions((4, 9, 9), layers, weight_bits=7, zero_point=30)
    x = tied_inputs((4, 9, 9), 40)
    (tmp_path / "model.onnx").write_bytes(emit(program, {}))
    y = runtime.run(tmp_path / "model.onnx", x)
    np.testing.assert_array_equal(y, program(torch.from_numpy(x)).numpy())


def test_what_is_missing_comes_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KANCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(emulation.shutil, "which", lambda name: None)
    for processor in (X86["haswell"], ARM64["neon"]):
        lacking = missing(processor)
        assert lacking is not None
        if emulation.platform.machine() == processor.machine or processor.machine == "aarch64":
            assert lacking.endswith("is not installed: python -m kancompile.runtimes.emulation")
        with pytest.raises(KanCompileError, match=r"processor '(haswell|neon)'"):
            run_emulated(processor, tmp_path / "model.onnx", np.zeros((1, 1), np.float32))
    with pytest.raises(KanCompileError, match="found no apt-get, expected a Debian"):
        emulation.install()


def test_emulated_arm_wants_its_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KANCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(emulation, "qemu", lambda machine: tmp_path / "qemu")
    lacking = missing(ARM64["sve"])
    assert lacking is not None
    assert "arm64-onnxruntime-" in lacking
