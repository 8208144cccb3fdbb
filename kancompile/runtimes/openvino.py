"""Runtime ``openvino``: Intel's OpenVINO on the CPU, an independent reading of the ONNX file.

It turns QuantizeLinear into its own FakeQuantize and multiplies dequantized values in float, so outputs differ from integer
kernels in the last bits, and an input exactly between two table rows may get the other row.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Runtime

_VALUES_AT_ONCE = 1 << 18


def missing() -> str | None:
    """Say what is missing and how to install it; ``None`` where nothing is."""
    if importlib.util.find_spec("openvino") is None:
        return "no openvino; install it: pip install 'kancompile[openvino]'"
    return None


def run(model: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evaluate an ONNX file on ``x`` ``[n, ...]`` in one thread, in float32 (no bfloat16, whatever the processor has).

    Raises:
        KanCompileError: openvino is missing, or refuses the file or the inputs.
    """
    reason = missing()
    if reason is not None:
        raise KanCompileError(f"runtime 'openvino': {reason}")
    if not len(x):
        raise KanCompileError(f"runtime 'openvino': found inputs of shape {x.shape!r}, expected at least one row")
    import openvino

    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    rows_at_once = max(1, _VALUES_AT_ONCE // math.prod(x.shape[1:]))
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(model)), "CPU", properties)
        parts = [x[first : first + rows_at_once] for first in range(0, len(x), rows_at_once)]
        outputs = [np.array(compiled([np.ascontiguousarray(part, np.float32)])[0]) for part in parts]
    except RuntimeError as error:
        raise KanCompileError(f"runtime 'openvino': cannot run {model} ({_reason(error)})") from error
    return np.concatenate(outputs)


def _reason(error: Exception) -> str:
    """Pick the last line that says something; the first name places in OpenVINO's sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


RUNTIME = Runtime("openvino", "ort-cpu", missing, run, tolerance_steps=5)
