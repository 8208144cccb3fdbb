"""Runtime ``litert``: the interpreter of ai-edge-litert, which phones run, on this machine's CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kancompile.errors import KanCompileError, reason
from kancompile.runtimes.contract import Array, InProcess, Runtime, bounded_rows, in_process
from kancompile.runtimes.machine import available_cores

_VALUES_AT_ONCE = 1 << 18


def missing() -> str | None:
    """Say what is missing and how to install it; ``None`` where nothing is."""
    if importlib.util.find_spec("ai_edge_litert") is None:
        return "no ai-edge-litert; install it: pip install 'kancompile[litert]'"
    return None


def load(model: Path, threads: int) -> InProcess:
    """Load a ``.tflite`` file; tensors are allocated anew only where the number of rows changes.

    Raises:
        KanCompileError: ai-edge-litert refuses the file; calls raise it too, where inputs do not fit.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(
            model_content=Path(model).read_bytes(), num_threads=threads if threads else available_cores()
        )
        source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        expected = tuple(int(size) for size in source["shape_signature"][1:])
    except Exception as error:  # whatever a damaged file breaks in the interpreter
        raise _refused(model, error) from error
    allocated: list[tuple[int, ...]] = []

    def call(x: Array) -> Array:
        if x.shape[1:] != expected:
            raise KanCompileError(
                f"runtime 'litert': found inputs of shape {x.shape[1:]!r}, expected {expected!r} as {model} reads them"
            )
        try:
            if allocated != [x.shape]:
                interpreter.resize_tensor_input(source["index"], x.shape)
                interpreter.allocate_tensors()
                allocated[:] = [x.shape]
            interpreter.set_tensor(source["index"], x)
            interpreter.invoke()
            outputs: Array = interpreter.get_tensor(result["index"])
        except Exception as error:
            raise _refused(model, error) from error
        return outputs

    return InProcess(call, bounded_rows(_VALUES_AT_ONCE))


def _refused(model: Path, error: Exception) -> KanCompileError:
    return KanCompileError(f"runtime 'litert': ai-edge-litert cannot run {model} ({reason(error)})")


RUNTIME = Runtime("litert", "litert", missing, in_process(load), tolerance_steps=0, has_threads=True)
