"""onnxruntime-web against ONNX Runtime, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes import web
from kancompile.runtimes.web import RUNTIME
from kancompile.targets.onnx.export import emit
from tests.programs import integer_program
from tests.runtimes.exactness import PROGRAMS, onnxruntime_outputs, probing_inputs

MODEST = ("MLP W8, values handed over", "MLP W4", "conv W8", "conv W4")  # each takes seconds to start

needs_runtime = pytest.mark.needs("web")


@needs_runtime
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in MODEST else [pytest.mark.slow]) for case in PROGRAMS]
)
def test_outputs_equal_onnxruntime_bit_for_bit(case: str, tmp_path: Path) -> None:
    program = PROGRAMS[case]()
    model = emit(program, {})
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    x = probing_inputs(program, 5000)
    expected = onnxruntime_outputs(model, x)
    assert np.unique(expected).size > 50
    np.testing.assert_array_equal(RUNTIME.run(path, x), expected)


@needs_runtime
def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(KanCompileError, match=r"model\.onnx.*protobuf"):
        RUNTIME.run(path, np.zeros((1, 4), np.float32))


@needs_runtime
def test_inputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(emit(integer_program(), {}))
    with pytest.raises(KanCompileError, match="invalid dimensions"):
        RUNTIME.run(path, np.zeros((2, 7), np.float32))
    with pytest.raises(KanCompileError, match="at least one row"):
        RUNTIME.run(path, np.zeros((0, 6), np.float32))


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(web.NODE_MODULES, str(tmp_path / "node_modules"))
    monkeypatch.setattr(web.shutil, "which", lambda name: "node")
    monkeypatch.setattr(web.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": "v20.1.0\n"}))
    assert f"npm install --prefix {tmp_path} onnxruntime-web@" in str(RUNTIME.missing())


def test_missing_node_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    assert "apt-get install nodejs npm" in str(RUNTIME.missing())
    with pytest.raises(KanCompileError, match="apt-get install nodejs npm"):
        RUNTIME.run(Path("model.onnx"), np.zeros((1, 4), np.float32))
