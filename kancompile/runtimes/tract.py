"""Runtime ``tract``: an inference engine in Rust, an independent reading of the ONNX file.

It multiplies dequantized values in float, so outputs differ from integer kernels in the last bits. It knows no 4-bit tensors and
no 16-bit QuantizeLinear, which :func:`load` says together with the recipe that avoids them. Its Python package runs one thread.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Array, InProcess, Runtime, bounded_rows, in_process

_VALUES_AT_ONCE = 1 << 18


def missing() -> str | None:
    """Say what is missing and how to install it; ``None`` where nothing is."""
    if importlib.util.find_spec("tract") is None:
        return "no tract; install it: pip install 'kancompile[tract]'"
    return None


def load(model: Path, threads: int) -> InProcess:
    """Load an ONNX file.

    Raises:
        KanCompileError: tract refuses the file; calls raise it too, where tract refuses the inputs.
    """
    import tract

    def refused(error: Exception) -> KanCompileError:
        return KanCompileError(f"runtime 'tract': cannot run {model} ({_reason(str(error))})")

    try:
        runnable = tract.onnx().load(str(model)).into_model().into_runnable()
    except Exception as error:  # whatever a damaged file breaks in its readers
        raise refused(error) from error

    def call(x: Array) -> Array:
        try:
            outputs: Array = runnable.run([x])[0].to_numpy()
        except Exception as error:
            raise refused(error) from error
        return outputs

    return InProcess(call, bounded_rows(_VALUES_AT_ONCE))


def _reason(text: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no text")
    if "Int4" in text:
        return f'{first}; it has no 4-bit tensors: compile with storage = "fastest"'
    if re.search(r"\bQuantizeLinear\b", first):  # the operator, or a node that has no name of its own
        return f"{first}; it has no 16-bit QuantizeLinear: compile with levels = 256 or fewer in the first layer"
    return first


RUNTIME = Runtime("tract", "ort-cpu", missing, in_process(load), tolerance_steps=3)
