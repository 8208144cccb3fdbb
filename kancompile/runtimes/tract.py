"""Runtime ``tract``: an inference engine in Rust, an independent reading of the ONNX file.

It multiplies dequantized values in float, so outputs differ from integer kernels in the last bits. It knows no 4-bit tensors and
no 16-bit QuantizeLinear, which :func:`run` says together with the recipe that avoids them.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Runtime

_VALUES_AT_ONCE = 1 << 18


def missing() -> str | None:
    """Say what is missing and how to install it; ``None`` where nothing is."""
    if importlib.util.find_spec("tract") is None:
        return "no tract; install it: pip install 'kancompile[tract]'"
    return None


def run(model: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evaluate an ONNX file on ``x`` ``[n, ...]``.

    Raises:
        KanCompileError: tract is missing, or refuses the file or the inputs.
    """
    reason = missing()
    if reason is not None:
        raise KanCompileError(f"runtime 'tract': {reason}")
    if not len(x):
        raise KanCompileError(f"runtime 'tract': found inputs of shape {x.shape!r}, expected at least one row")
    import tract

    rows_at_once = max(1, _VALUES_AT_ONCE // math.prod(x.shape[1:]))
    try:
        runnable = tract.onnx().load(str(model)).into_model().into_runnable()
        parts = [x[first : first + rows_at_once] for first in range(0, len(x), rows_at_once)]
        outputs = [runnable.run([np.ascontiguousarray(part, np.float32)])[0].to_numpy() for part in parts]
    except tract.TractError as error:
        raise KanCompileError(f"runtime 'tract': cannot run {model} ({_reason(str(error))})") from error
    return np.concatenate(outputs)


def _reason(text: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no text")
    if "Int4" in text:
        return f'{first}; it has no 4-bit tensors: compile with storage = "fastest"'
    if '"QuantizeLinear"' in first:
        return f"{first}; it has no 16-bit QuantizeLinear: compile with levels = 256 or fewer in the first layer"
    return first


RUNTIME = Runtime("tract", "ort-cpu", missing, run, tolerance_steps=2)
