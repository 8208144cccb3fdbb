"""Compile emitted C with the compilers of this machine, strictly, and run it: what the mark ``needs`` has to name."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kancompile.ir import Program
from kancompile.runtimes.c99 import output_shape
from kancompile.targets.c99 import companions, emit

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wshadow", "-Wmissing-prototypes")
UNDEFINED = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
WORDS = ("-DKAN_WORD_BITS=16", "-DKAN_WORD_BITS=32")

# maps samples on standard input to outputs on standard output
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


def write(program: Program, folder: Path) -> Path:
    """Write ``model.c`` and ``model.h``, and a program around them."""
    source = emit(program, {"kancompile.version": "0"})
    (folder / "model.c").write_bytes(source)
    (folder / "model.h").write_bytes(companions(source)[".h"])
    (folder / "program.c").write_text('#include "model.h"\n' + READ_AND_WRITE)
    return folder


def build(folder: Path, flags: Sequence[str], name: str = "gcc") -> Path:
    command = [name, *flags, "model.c", "program.c", "-o", "program"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def evaluate(binary: Path, x: torch.Tensor | np.ndarray) -> np.ndarray:
    """Give float32 ``[n, ...]`` of the outputs of every sample."""
    done = subprocess.run(
        [binary], input=np.ascontiguousarray(np.asarray(x), np.float32).tobytes(), capture_output=True
    )
    assert done.returncode == 0, f"ended with {done.returncode}"
    shape = output_shape((binary.parent / "model.c").read_text())
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), *shape)


def macro(source: str, name: str) -> int:
    found = re.search(rf"#define KAN_MODEL_{name} (\d+)", source)
    assert found is not None
    return int(found.group(1))
