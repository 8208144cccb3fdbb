"""Runtimes ``ort`` and ``ort-mobile``: ONNX Runtime as it is installed, on the two files that it loads."""

from __future__ import annotations

from pathlib import Path

from kancompile.runtimes.contract import Array, InProcess, Runtime, available, in_process
from kancompile.runtimes.session import RuntimeModel

BATCH = 256


def load(model: Path, threads: int) -> InProcess:
    """Create a session for a ``.onnx`` or ``.ort`` file.

    Raises:
        KanCompileError: it cannot be loaded; calls raise it too, where samples do not fit.
    """
    session = RuntimeModel(model, threads)

    def call(x: Array) -> Array:
        outputs: Array = session.run(x)[0]
        return outputs

    def rows_at_once(x: Array) -> int:
        session.check_input(x, "data")
        return session.batch or BATCH

    return InProcess(call, rows_at_once)


ORT = Runtime("ort", "ort-cpu", available, in_process(load), 0, has_threads=True)
ORT_MOBILE = Runtime("ort-mobile", "ort-mobile", available, in_process(load), 0, has_threads=True)
