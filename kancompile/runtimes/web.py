"""Runtime ``web``: onnxruntime-web, the WebAssembly build of ONNX Runtime that browsers run, under Node.

The npm package is looked for in the folder that ``KANCOMPILE_NODE_MODULES`` names, else in
``~/.cache/kancompile/node/node_modules``. A browser and Node load the same ``.wasm`` file, so what holds here holds there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from kancompile.errors import KanCompileError
from kancompile.runtimes.contract import Array, Prepared, Runtime, bounded_rows

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


@contextmanager
def prepare(model: Path, threads: int) -> Iterator[Prepared]:
    """Load an ONNX file into a Node process, which computes in one thread of WebAssembly and stays until the context ends.

    Raises:
        KanCompileError: the runtime refuses the file; calls raise it too, where it refuses the inputs or does not answer.
    """
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "stderr", "w+", encoding="utf-8") as said:
        command = ["node", str(_RUNNER), str(node_modules().resolve()), str(model)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            node = _Node(process, model, Path(folder), said)
            node.answer("loading")
            yield node
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True)
class _Node:
    """A file in a Node process that ``onnxruntime_web.mjs`` runs; inputs and outputs pass through files of a folder."""

    process: subprocess.Popen[str]
    model: Path
    folder: Path
    said: IO[str]

    def run(self, x: Array) -> Array:
        result = self.folder / "output.f32"
        rows_at_once = bounded_rows(_VALUES_AT_ONCE)(x)
        shape = self._ask(x, output=str(result), rows_at_once=rows_at_once)["shape"]
        return np.frombuffer(result.read_bytes(), "<f4").reshape(shape)

    def seconds(self, x: Array, calls: int) -> list[float]:
        seconds: list[float] = self._ask(x, calls=calls)["seconds"]
        return seconds

    def _ask(self, x: Array, **wanted: Any) -> dict[str, Any]:
        source = self.folder / "input.f32"
        source.write_bytes(np.ascontiguousarray(x, "<f4").tobytes())
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a process that has ended says why where its answer is read
            self.process.stdin.write(json.dumps({"input": str(source), "dimensions": x.shape} | wanted) + "\n")
            self.process.stdin.flush()
        return self.answer(f"{len(x)} inputs")

    def answer(self, what: str) -> dict[str, Any]:
        """Read the next line.

        Raises:
            KanCompileError: it is an error, there is none in time, or the process has ended.
        """
        assert self.process.stdout is not None
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            self.process.kill()

        late = threading.Timer(_SECONDS, stop)
        late.start()
        try:
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        if expired.is_set():
            raise KanCompileError(
                f"runtime 'web': {self.model}: no answer for {what} in {_SECONDS} s; give fewer inputs"
            )
        answered = json.loads(line) if line else {}
        if not line or "error" in answered:
            self.said.seek(0)
            reason = answered.get("error") or _error_line(self.said.read())
            raise KanCompileError(f"runtime 'web': {PACKAGE} cannot run {self.model} ({reason})")
        return dict(answered)


def _error_line(text: str) -> str:
    """Pick the line that names the error out of what Node prints around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "rror:" in line), lines[-1] if lines else "no text")


RUNTIME = Runtime("web", "ort-cpu", missing, prepare, tolerance_steps=0)
