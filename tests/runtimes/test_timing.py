"""Other runtimes in the benchmark: only calls are timed, and only those of a runtime that computes the model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kancompile.cli.main import main
from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.contract import InProcess, Prepared, Runtime, available
from kancompile.targets import TARGETS
from kancompile.validation.benchmark import COMPILED, benchmark
from kancompile.validation.runtime_timing import TimedRuntimes, timed_runtimes
from tests.compiled_kan import FACTORY, FACTORY_ARGS, make_model
from tests.programs import integer_program

PROGRAM = integer_program((6, 5), (256,))
TIMED = [name for name, runtime in RUNTIMES.items() if not runtime.emulated and name != "ort"]
SLEEP = 0.02


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of ONNX Runtime."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    for name in ("ort", "ort-mobile"):
        file_of(RUNTIMES[name], path)
    return path


def file_of(runtime: Runtime, model: Path) -> Path:
    """Write what a runtime reads beside a model, and return its path."""
    target = TARGETS[runtime.artifact]
    path = model.with_suffix(target.suffix)
    path.write_bytes(target.emit(PROGRAM, {}, "smallest"))
    return path


def needing(name: str) -> Any:
    """Give a runtime's name as a parameter that needs it; what kancompile itself requires is never missing."""
    return pytest.param(name, marks=[] if RUNTIMES[name].missing is available else pytest.mark.needs(name))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).uniform(-3, 3, (40, 6)).astype(np.float32)


class Sleepy:
    """A runtime whose calls take a known time, whose loading takes long, and which remembers what was done to it."""

    def __init__(self, by: float = 0.0) -> None:
        self.by, self.done = by, list[str]()

    def runtime(self, has_threads: bool = True, missing: Callable[[], str | None] = available) -> Runtime:
        return Runtime("sleepy", "ort-cpu", missing, self.prepare, 1, has_threads=has_threads)

    @contextmanager
    def prepare(self, model: Path, threads: int) -> Iterator[Prepared]:
        self.done.append(f"load {threads}")
        time.sleep(10 * SLEEP)

        def call(inputs: np.ndarray) -> np.ndarray:
            time.sleep(SLEEP)
            return RUNTIMES["ort"].run(model, inputs) + np.float32(self.by)

        yield InProcess(call)
        self.done.append(f"drop {threads}")


@pytest.mark.parametrize("name", [needing(name) for name in TIMED])
def test_a_loaded_file_is_called_without_loading(name: str, model: Path, x: np.ndarray, tmp_path: Path) -> None:
    runtime = RUNTIMES[name]
    file = file_of(runtime, tmp_path / "model.onnx")
    start = time.perf_counter()
    with runtime.prepare(file, 1) as prepared:
        loading = time.perf_counter() - start
        first = prepared.run(x)
        seconds = prepared.seconds(x, 30)
        again = prepared.run(x[:7])
    assert len(seconds) == 30
    assert min(seconds) > 0
    assert np.median(seconds) < loading
    np.testing.assert_array_equal(again, first[:7])  # timing leaves nothing behind
    expected = RUNTIMES["ort"].run(model, x)
    step = float(np.ptp(expected)) / 255
    assert np.abs(first - expected).max() <= runtime.tolerance_steps * step


@pytest.mark.parametrize("name", [needing(name) for name in ("openvino", "litert", "ort-mobile")])
def test_the_number_of_threads_does_not_change_the_outputs(name: str, x: np.ndarray, tmp_path: Path) -> None:
    runtime = RUNTIMES[name]
    assert runtime.has_threads
    file, outputs = file_of(runtime, tmp_path / "model.onnx"), []
    for threads in (1, 2, 0):
        with runtime.prepare(file, threads) as prepared:
            outputs.append(prepared.run(x))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_calls_are_timed_and_loading_is_not(model: Path) -> None:
    sleepy = Sleepy()
    result = benchmark(model, nn.Linear(6, 5), (1, 4), (1, 2), repeats=3, warmup=1, runtimes=[sleepy.runtime()], seed=3)
    times = {(t.batch_size, t.threads): t for t in result.timings if t.candidate == "compiled, sleepy"}
    assert set(times) == {(1, 1), (4, 1), (1, 2), (4, 2)}
    assert all(SLEEP <= t.p10 <= t.median < 5 * SLEEP for t in times.values())
    assert sleepy.done == ["load 1", "load 2", "drop 2", "drop 1"]  # once for a number of threads
    assert result.ratio("compiled, sleepy", 4, 2) > 10
    assert "compiled, sleepy" in result.table()


def test_one_thread_is_all_that_some_runtimes_have(model: Path) -> None:
    sleepy = Sleepy()
    result = benchmark(
        model, nn.Linear(6, 5), (1,), (1, 0), repeats=3, warmup=1, runtimes=[sleepy.runtime(has_threads=False)]
    )
    assert [t.threads for t in result.timings if t.candidate == "compiled, sleepy"] == [1]
    assert [t.threads for t in result.timings if t.candidate == COMPILED] == [1, 0]
    assert "in more than one thread" in result.unavailable["compiled, sleepy"]
    assert sleepy.done == ["load 1", "drop 1"]


def test_a_runtime_that_computes_something_else_is_not_timed(model: Path) -> None:
    result = benchmark(model, nn.Linear(6, 5), (1,), (1,), repeats=3, warmup=1, runtimes=[Sleepy(by=100.0).runtime()])
    assert "compiled, sleepy" not in {t.candidate for t in result.timings}
    reason = result.unavailable["compiled, sleepy"]
    assert "steps off ONNX Runtime's, 1 are allowed" in reason
    assert "compile both files from one model" in reason


def test_what_is_missing_is_listed_with_the_command(model: Path, x: np.ndarray, tmp_path: Path) -> None:
    absent = Sleepy().runtime(missing=lambda: "no sleepy; install it: pip install sleepy")
    alone = tmp_path / "model.onnx"
    alone.write_bytes(model.read_bytes())
    with TimedRuntimes(alone, [absent, RUNTIMES["ort-mobile"]], x) as timed:
        assert timed.clocks(x, 1) == {}
    assert timed.unavailable["compiled, sleepy"] == "no sleepy; install it: pip install sleepy"
    assert "compile the model with --target ort-mobile" in timed.unavailable["compiled, ort-mobile"]


def test_a_file_that_a_runtime_refuses_is_listed(model: Path, x: np.ndarray, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(model.read_bytes())
    broken.with_suffix(".ort").write_bytes(b"nothing")
    with TimedRuntimes(broken, [RUNTIMES["ort-mobile"]], x) as timed:
        assert timed.clocks(x, 1) == {}
        assert timed.clocks(x, 2) == {}
    assert "cannot load it" in timed.unavailable["compiled, ort-mobile"]


def test_names() -> None:
    assert [runtime.name for runtime in timed_runtimes(["all"])] == TIMED
    assert [runtime.name for runtime in timed_runtimes(["ort", "tract", "tract"])] == ["tract"]
    assert timed_runtimes([]) == []
    for name in ("ort-arm64", "ort-x86-haswell"):
        with pytest.raises(KanCompileError, match=f"runtime '{name}' is emulated, so its speed says nothing"):
            timed_runtimes([name])
    with pytest.raises(KanCompileError, match="runtime 'tpu' is unknown, expected 'all' or some of"):
        timed_runtimes(["tpu"])


def test_emulated_runtimes_and_bytes_are_refused(model: Path, x: np.ndarray) -> None:
    emulated = RUNTIMES["ort-x86-haswell"]
    with pytest.raises(KanCompileError, match="is emulated"):
        TimedRuntimes(model, [emulated], x)
    with pytest.raises(KanCompileError, match="found bytes, expected a path"):
        TimedRuntimes(model.read_bytes(), [RUNTIMES["ort-mobile"]], x)
    with emulated.prepare(model, 1) as prepared, pytest.raises(KanCompileError, match="its speed says nothing"):
        prepared.seconds(x, 1)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    float_model = make_model()
    save_file(float_model.state_dict(), tmp_path / "kan.safetensors")
    generator = torch.Generator().manual_seed(0)
    named = [FACTORY, "--factory-arg", FACTORY_ARGS, "--checkpoint", str(tmp_path / "kan.safetensors")]
    np.save(tmp_path / "x.npy", torch.randn(60, 6, generator=generator).numpy())
    out = tmp_path / "built"
    arguments = ["compile", *named, "--calibration", str(tmp_path / "x.npy"), "--out", str(out), "--method", "uniform"]
    assert main([*arguments, "--quiet", "--target", "ort-cpu", "--target", "ort-mobile"]) == 0
    arguments = ["benchmark", str(out / "model.onnx"), "--against", *named, "--data", str(tmp_path / "x.npy")]
    arguments += ["--batch-sizes", "2", "--threads", "1", "--repeats", "3", "--json"]
    assert main([*arguments, "--runtime", "ort-mobile", "--runtime", "litert"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "compiled, ort-mobile" in {timing["candidate"] for timing in result["timings"]}
    assert "compiled, litert" in result["unavailable"]
    assert main([*arguments, "--runtime", "ort-arm64"]) == 2
    assert "its speed says nothing" in capsys.readouterr().err
