"""One table over all runtimes: who agrees, who is missing, and what is said of those that lie off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kancompile.cli.main import main
from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.contract import InProcess, Runtime, available, in_process
from kancompile.runtimes.output_quantum import output_quantum
from kancompile.targets import TARGETS, ort_mobile
from kancompile.targets.onnx.export import emit
from kancompile.validation import runtime_comparison as comparison
from kancompile.validation.runtime_comparison import compare_runtimes, runtimes_named
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program

PROGRAM = integer_program(weight_bits=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    path.write_bytes(emit(PROGRAM, {}))
    path.with_suffix(".ort").write_bytes(ort_mobile.emit(PROGRAM, {}))
    return path


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).uniform(-3, 3, (50, 6)).astype(np.float32)


def off(by: float, tolerance: int) -> Runtime:
    """Make a runtime that is off by a part of its output range, in one value."""

    def load(path: Path, threads: int) -> InProcess:
        def call(inputs: np.ndarray) -> np.ndarray:
            y = RUNTIMES["ort"].run(path, inputs).copy()
            y[0, 0] += by * (y.max() - y.min()) / 255
            return y

        return InProcess(call)

    return Runtime("other", "ort-cpu", available, in_process(load), tolerance)


def test_formats_agree_bit_for_bit(model: Path, x: np.ndarray) -> None:
    compared = compare_runtimes(model, x, [RUNTIMES["ort-mobile"]])
    ort, mobile = compared.rows
    assert (ort.outputs, mobile.outputs, mobile.differing, mobile.steps, mobile.quanta) == (200, 200, 0, 0.0, 0.0)
    assert mobile.file == "model.ort"
    assert mobile.speed is not None
    assert mobile.speed > 0
    assert compared.reasons == []


@pytest.mark.parametrize(
    ("by", "tolerance", "passes"), [(0.5, 0, False), (0.5, 1, True), (1.9, 1, False), (1.9, 2, True)]
)
def test_tolerance_is_in_steps_of_the_output(
    model: Path, x: np.ndarray, by: float, tolerance: int, passes: bool
) -> None:
    row = compare_runtimes(model, x, [off(by, tolerance)], timed=False).rows[1]
    assert row.differing == 1
    assert row.steps == pytest.approx(by, rel=1e-3)
    assert row.passed == passes
    quantum = output_quantum(model.read_bytes())
    assert quantum is not None
    y = RUNTIMES["ort"].run(model, x)
    assert row.quanta == pytest.approx(by * float(y.max() - y.min()) / 255 / float(quantum[0]), rel=1e-3)


def test_not_a_number_is_never_equal(model: Path, x: np.ndarray) -> None:
    row = compare_runtimes(model, x, [off(float("nan"), 2)], timed=False).rows[1]
    assert row.differing == 1
    assert not row.passed


def test_what_is_missing_is_listed(model: Path, x: np.ndarray, tmp_path: Path) -> None:
    absent = Runtime("absent", "ort-cpu", lambda: "absent is not installed: pip install absent", off(0, 0).prepare, 0)
    alone = tmp_path / "model.onnx"
    alone.write_bytes(model.read_bytes())
    compared = compare_runtimes(alone, x, [absent, RUNTIMES["ort-mobile"]], timed=False)
    assert compared.reasons == []
    table = compared.table()
    assert "absent: not run, absent is not installed: pip install absent" in table
    assert (
        "ort-mobile: not run, found no model.ort beside model.onnx: compile the model with --target ort-mobile" in table
    )


def test_names_and_families(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [runtime.name for runtime in runtimes_named(["all"])] == list(RUNTIMES)
    web = Runtime("web", "ort-cpu", lambda: "no node: npm i", off(0, 0).prepare, 0)
    monkeypatch.setattr(comparison, "RUNTIMES", {"ort": RUNTIMES["ort"], "web": web})
    assert [runtime.name for runtime in runtimes_named(["ort"])] == ["ort"]
    with pytest.raises(KanCompileError, match="runtime 'web': no node: npm i"):
        runtimes_named(["web"])
    with pytest.raises(KanCompileError, match="runtime 'tpu' is unknown, expected 'all' or some of"):
        runtimes_named(["tpu"])


def test_quantum_of_a_convolution_and_of_several_groups() -> None:
    program = integer_convolutions((3, 6, 6), [square(4, 3)])
    assert output_quantum(emit(program, {})) == pytest.approx([0.03])
    grouped = integer_program(widths=(6, 5), levels=(256,), groups=2)
    quantum = output_quantum(emit(grouped, {}))
    np.testing.assert_array_equal(quantum, grouped.module("layer0_contract").scales[0].numpy())  # type: ignore


def test_command_prints_the_table_and_fails_beyond_tolerance(
    model: Path, x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", x)
    arguments = ["validate", str(model), "--data", str(tmp_path / "x.npy")]
    assert main([*arguments, "--runtime", "ort-mobile", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runtimes"]["rows"]
    assert [(row["runtime"], row["differing"]) for row in rows] == [("ort", 0), ("ort-mobile", 0)]
    monkeypatch.setitem(RUNTIMES, "other", off(3, 1))
    assert main([*arguments, "--runtime", "other"]) == 1
    printed = capsys.readouterr()
    assert "other" in printed.out
    assert "1 of 200 outputs differ from ort, by up to 3 steps, allowed are 1" in printed.err
    assert main(arguments) == 2
    assert "found neither --against nor --runtime" in capsys.readouterr().err


def test_every_artifact_has_a_target() -> None:
    assert {runtime.artifact for runtime in RUNTIMES.values()} <= set(TARGETS)
