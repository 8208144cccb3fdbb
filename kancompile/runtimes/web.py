"""Runtime ``web``: onnxruntime-web, the WebAssembly build of ONNX Runtime that browsers run, under Node.

The npm package is looked for in the folder that ``KANCOMPILE_NODE_MODULES`` names, else in
``~/.cache/kancompile/node/node_modules``. A browser and Node load the same ``.wasm`` file, so what holds here holds there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Runtime

NODE_MODULES = "KANCOMPILE_NODE_MODULES"
PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
LEAST_NODE = 18

_RUNNER = Path(__file__).with_name("onnxruntime_web.mjs")
_VALUES_AT_ONCE = 1 << 18
_SECONDS = 600


def node_modules() -> Path:
    """Return the folder in which the npm package is looked for."""
    named = os.environ.get(NODE_MODULES)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "kancompile" / "node" / "node_modules"


def missing() -> str | None:
    """Say what is missing and how to install it; ``None`` where nothing is."""
    node = shutil.which("node")
    if node is None:
        return f"no Node.js on the PATH, expected version {LEAST_NODE} or newer; install it: apt-get install nodejs npm"
    found = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    major = found.removeprefix("v").partition(".")[0]
    if not major.isdigit() or int(major) < LEAST_NODE:
        return (
            f"found Node.js {found or 'of unknown version'}, expected {LEAST_NODE} or newer; install it from nodejs.org"
        )
    folder = node_modules()
    if not (folder / PACKAGE / "package.json").is_file():
        return f"no {PACKAGE} in {folder} ({NODE_MODULES} names another folder); install it: {install_command(folder)}"
    return None


def install_command(folder: Path) -> str:
    """Return the command that puts the npm package into a ``node_modules`` folder."""
    return f"npm install --prefix {folder.parent} {PACKAGE}@{VERSION}"


def run(model: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evaluate an ONNX file on ``x`` ``[n, ...]`` in one thread of WebAssembly.

    Raises:
        KanCompileError: Node or the package is missing, or the runtime refuses the file.
    """
    reason = missing()
    if reason is not None:
        raise KanCompileError(f"runtime 'web': {reason}")
    if not len(x):
        raise KanCompileError(f"runtime 'web': found inputs of shape {x.shape!r}, expected at least one row")
    rows_at_once = max(1, _VALUES_AT_ONCE // math.prod(x.shape[1:]))
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "input.f32", Path(folder) / "output.f32"
        source.write_bytes(np.ascontiguousarray(x, "<f4").tobytes())
        command = ["node", str(_RUNNER), str(node_modules().resolve()), str(model), str(source), str(result)]
        command += [str(rows_at_once), *map(str, x.shape)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise KanCompileError(
                f"runtime 'web': {model}: no answer for {len(x)} inputs in {_SECONDS} s; give fewer inputs"
            ) from error
        if done.returncode != 0:
            raise KanCompileError(f"runtime 'web': {PACKAGE} cannot run {model} ({_error_line(done.stderr)})")
        shape = json.loads(done.stdout.splitlines()[-1])["shape"]
        return np.frombuffer(result.read_bytes(), "<f4").reshape(shape)


def _error_line(text: str) -> str:
    """Pick the line that names the error out of what Node prints around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "rror:" in line), lines[-1] if lines else "no text")


RUNTIME = Runtime("web", "ort-cpu", missing, run, tolerance_steps=0)
