"""Time a model of target ``c99`` beside its ONNX file in one thread of ONNX Runtime, one sample at a time, in turns.

    python -m benchmarks.c_latency build/model.c build/model.onnx --inputs inputs.npy \
        --build "gcc -O3" "gcc -O3 -march=native" "clang -O3"

Each build is compared with ONNX Runtime alone, so that both meet the same caches. Both are called from Python and include
that: for a model of two numbers, which hardly computes, the three C functions took 1.1 us and ``InferenceSession.run`` 7.5 us.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.c99 import macro
from kancompile.validation.benchmark import take_turns

_RUNTIME = "ONNX Runtime"


def shared_library(model: Path, build: str, folder: Path) -> ctypes.CDLL:
    """Compile a model to a shared library."""
    library = folder / "model.so"
    command = [*shlex.split(build), "-std=c99", "-shared", "-fPIC", str(model), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def caller(
    library: ctypes.CDLL, source: bytes, x: np.ndarray[Any, Any]
) -> tuple[Callable[[], Any], np.ndarray[Any, Any]]:
    """Return a function that computes the outputs of ``x`` into the array that is returned beside it."""
    state = ctypes.create_string_buffer(macro(source, "RAM_BYTES") + 16)
    y = np.zeros(macro(source, "OUTPUTS"), np.float32)
    inputs, outputs = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data)
    quantize, run, output = library.kan_model_quantize, library.kan_model_run, library.kan_model_output

    def call() -> None:
        quantize(state, inputs)
        run(state)
        output(state, outputs)

    return call, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model.c")
    parser.add_argument("onnx", type=Path, help="the ONNX file of the same program")
    parser.add_argument("--inputs", type=Path, required=True, help=".npy, float32 [n, ...]; its first sample is timed")
    parser.add_argument("--build", nargs="+", default=["gcc -O3", "gcc -O3 -march=native"], help="compiler commands")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    source = options.model.read_bytes()
    x = np.ascontiguousarray(np.load(options.inputs, allow_pickle=False)[:1], np.float32)
    session = RuntimeModel(options.onnx, threads=1)
    for build in options.build:
        with tempfile.TemporaryDirectory() as folder:
            call, y = caller(shared_library(options.model, build, Path(folder)), source, x)
            call()
            differing = int((y != session.run(x)[0].reshape(-1)).sum())
            candidates = {_RUNTIME: lambda: session.run(x), build: call}
            runtime, compiled = take_turns(candidates, 1, 1, options.repeats, 3, {})
            print(
                f"{build:<28} {compiled.median * 1e6:8.2f} us, {_RUNTIME} {runtime.median * 1e6:8.2f} us, "
                f"ratio {compiled.median / runtime.median:.3f}, {differing} of {y.size} outputs differ"
            )


if __name__ == "__main__":
    main()
