"""Runtime ``c99``: the file of target ``c99``, compiled by the C compiler of this machine and run over all samples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Runtime

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c99", "-O2")

READ_AND_WRITE = r"""
#include <stdio.h>

int main(void)
{
    static kan_model_state state;
    static float x[KAN_MODEL_INPUTS], y[KAN_MODEL_OUTPUTS];
    while (fread(x, sizeof x, 1, stdin) == 1) {
        kan_model_quantize(&state, x);
        kan_model_run(&state);
        kan_model_output(&state, y);
        if (fwrite(y, sizeof y, 1, stdout) != 1)
            return 1;
    }
    return 0;
}
"""
"""A program behind a model that maps samples on its standard input to outputs on its standard output."""


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
    return tuple(int(size) for size in found.group(1).split(",") if size.strip())


def run(model: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compile a file and run it.

    Args:
        model: the ``.c`` file.
        inputs: ``[n, ...]``.

    Returns:
        ``[n, ...]``.

    Raises:
        KanCompileError: no compiler, no such file, a file that does not compile, or samples of another size.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KanCompileError(f"runtime 'c99': found {missing()}")
    try:
        source = model.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise KanCompileError(
            f"model {str(model)!r}: cannot be read ({error}); give a .c file of target 'c99'"
        ) from error
    shape = output_shape(source)
    expected = re.search(r"#define KAN_MODEL_INPUTS (\d+)", source)
    found = int(np.prod(inputs.shape[1:]))
    if expected is None or int(expected.group(1)) != found:
        wanted = expected.group(1) if expected else "unknown"
        raise KanCompileError(f"model {str(model)!r}: found samples of {found} values, expected {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.c"
        program.write_text(source + READ_AND_WRITE, encoding="ascii")
        binary = Path(folder) / "program"
        built = subprocess.run([compiler, *FLAGS, str(program), "-o", str(binary)], capture_output=True, text=True)
        if built.returncode:
            raise KanCompileError(
                f"model {str(model)!r}: {compiler} refuses it: {built.stderr.strip()[:500]}; compile the model again"
            )
        data = np.ascontiguousarray(inputs, np.float32).tobytes()
        done = subprocess.run([str(binary)], input=data, capture_output=True)
    size = int(np.prod(shape)) * len(inputs) * 4
    if done.returncode or len(done.stdout) != size:
        raise KanCompileError(
            f"model {str(model)!r}: the compiled program ended with {done.returncode} and {len(done.stdout)} bytes, "
            f"expected 0 and {size}; compile the model again"
        )
    return np.frombuffer(done.stdout, np.float32).reshape(len(inputs), *shape)


RUNTIME = Runtime("c99", "c99", missing, run, 0)
