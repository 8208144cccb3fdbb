"""Runtime ``c99``: the file of target ``c99``, compiled to a shared library by the C compiler of this machine."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kancompile.errors import KanCompileError, foreign
from kancompile.runtimes.contract import Array, InProcess, Prepared, Runtime

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c99", "-O2", "-shared", "-fPIC")

RUN_ALL = r"""
void kan_model_run_all(const float *x, float *y, long n);

void kan_model_run_all(const float *x, float *y, long n)
{
    static kan_model_state state;
    for (; n > 0; n--, x += KAN_MODEL_INPUTS, y += KAN_MODEL_OUTPUTS) {
        kan_model_quantize(&state, x);
        kan_model_run(&state);
        kan_model_output(&state, y);
    }
}
"""
"""A function behind a model that maps samples to outputs, one after the other, as firmware does."""


def find_compiler() -> str | None:
    """Return the C compiler of this machine, ``$CC`` first."""
    candidates = [os.environ.get("CC", ""), *COMPILERS]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def missing() -> str | None:
    """Say what is missing."""
    if find_compiler() is not None:
        return None
    return "no C compiler among $CC, cc, gcc, clang; install one, on Debian and Ubuntu by: apt-get install gcc"


def output_shape(source: str) -> tuple[int, ...]:
    """Read the shape of one output from the interface of a file."""
    found = re.search(r"#define KAN_MODEL_OUTPUT_SHAPE \{([0-9, ]*)\}", source)
    if found is None:
        raise KanCompileError(
            "model: found no KAN_MODEL_OUTPUT_SHAPE, expected a .c file that kancompile wrote with target 'c99'"
        )
    with foreign("model", "give a .c file that kancompile wrote with target 'c99'"):
        return tuple(int(size) for size in found.group(1).split(",") if size.strip())


@contextmanager
def prepare(model: Path, threads: int) -> Iterator[Prepared]:
    """Compile a ``.c`` file and load it; it computes in one thread.

    Raises:
        KanCompileError: no compiler, no such file, or a file that does not compile; calls raise it for samples of another size.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KanCompileError(f"runtime 'c99': {missing()}")
    with foreign(f"model {str(model)!r}", "give a .c file of target 'c99'"):
        source = model.read_text(encoding="ascii")
        shape = output_shape(source)
        inputs = re.search(r"#define KAN_MODEL_INPUTS (\d{1,9})\b", source)
    # Windows does not delete a library that is loaded
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "program.c"
        program.write_text(source + RUN_ALL, encoding="ascii")
        library = Path(folder) / "program.so"
        built = subprocess.run([compiler, *FLAGS, str(program), "-o", str(library)], capture_output=True, text=True)
        if built.returncode:
            raise KanCompileError(
                f"model {str(model)!r}: {compiler} refuses it: {built.stderr.strip()[:500]}; compile the model again"
            )
        run_all = ctypes.CDLL(str(library)).kan_model_run_all
        run_all.restype, run_all.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)

        def call(x: Array) -> Array:
            found = int(np.prod(x.shape[1:]))
            if inputs is None or int(inputs.group(1)) != found:
                wanted = inputs.group(1) if inputs else "unknown"
                raise KanCompileError(f"model {str(model)!r}: found samples of {found} values, expected {wanted}")
            if x.dtype != np.float32 or not x.flags.c_contiguous:
                raise KanCompileError(f"model {str(model)!r}: found samples of {x.dtype}, expected contiguous float32")
            y = np.empty((len(x), *shape), np.float32)
            run_all(x.ctypes.data, y.ctypes.data, len(x))
            return y

        yield InProcess(call)


RUNTIME = Runtime("c99", "c99", missing, prepare, 0)
