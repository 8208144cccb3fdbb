"""Runtime ``litert``: the interpreter of ai-edge-litert, which phones run, on this machine's CPU."""

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
    if importlib.util.find_spec("ai_edge_litert") is None:
        return "no ai-edge-litert; install it: pip install 'kancompile[litert]'"
    return None


def run(model: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evaluate a ``.tflite`` file on ``x`` ``[n, ...]`` in one thread.

    Raises:
        KanCompileError: ai-edge-litert is missing, or refuses the file or the inputs.
    """
    reason = missing()
    if reason is not None:
        raise KanCompileError(f"runtime 'litert': {reason}")
    if not len(x):
        raise KanCompileError(f"runtime 'litert': found inputs of shape {x.shape!r}, expected at least one row")
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=Path(model).read_bytes(), num_threads=1)
        source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        expected = tuple(int(size) for size in source["shape_signature"][1:])
        if expected != x.shape[1:]:
            raise KanCompileError(
                f"runtime 'litert': found inputs of shape {x.shape[1:]!r}, expected {expected!r} as {model} reads them"
            )
        rows_at_once = max(1, _VALUES_AT_ONCE // math.prod(x.shape[1:]))
        outputs = []
        for first in range(0, len(x), rows_at_once):
            part = np.ascontiguousarray(x[first : first + rows_at_once], np.float32)
            interpreter.resize_tensor_input(source["index"], part.shape)
            interpreter.allocate_tensors()
            interpreter.set_tensor(source["index"], part)
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(result["index"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise KanCompileError(f"runtime 'litert': ai-edge-litert cannot run {model} ({reason})") from error
    return np.concatenate(outputs)


RUNTIME = Runtime("litert", "litert", missing, run, tolerance_steps=0)
