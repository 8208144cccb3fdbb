"""Runtime ``openvino``: Intel's OpenVINO on the CPU, an independent reading of the ONNX file.

It turns QuantizeLinear into its own FakeQuantize and multiplies dequantized values in float, so outputs differ from integer
kernels in the last bits, and an input exactly between two table rows may get the other row.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Array, InProcess, Runtime, bounded_rows, in_process

_VALUES_AT_ONCE = 1 << 18


def missing() -> str | None:
    """Say what is missing and how to install it; ``None`` where nothing is."""
    if importlib.util.find_spec("openvino") is None:
        return "no openvino; install it: pip install 'kancompile[openvino]'"
    return None


def load(model: Path, threads: int) -> InProcess:
    """Compile an ONNX file in float32 (no bfloat16, whatever the processor has); 0 threads leave the choice to OpenVINO.

    Raises:
        KanCompileError: openvino refuses the file; calls raise it too, where it refuses the inputs.
    """
    import openvino

    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(model)), "CPU", properties)
    except Exception as error:  # whatever a damaged file breaks in its readers
        raise _refused(model, error) from error

    def call(x: Array) -> Array:
        try:
            return np.array(compiled([x])[0])
        except Exception as error:
            raise _refused(model, error) from error

    return InProcess(call, bounded_rows(_VALUES_AT_ONCE))


def _refused(model: Path, error: Exception) -> KanCompileError:
    """Quote the last line that says something; the first name places in OpenVINO's sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return KanCompileError(f"runtime 'openvino': cannot run {model} ({lines[-1] if lines else type(error).__name__})")


RUNTIME = Runtime("openvino", "ort-cpu", missing, in_process(load), tolerance_steps=5, has_threads=True)
