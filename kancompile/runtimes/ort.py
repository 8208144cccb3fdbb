"""Runtimes ``ort`` and ``ort-mobile``: ONNX Runtime as it is installed, on the two files that it loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kancompile.execution import RuntimeModel
from kancompile.runtimes.contract import Runtime, available

BATCH = 256


def run(model: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a ``.onnx`` or ``.ort`` file in one thread.

    Args:
        model: the file.
        inputs: ``[n, ...]``.

    Returns:
        ``[n, ...]``.

    Raises:
        KanCompileError: it cannot be loaded, or samples do not fit.
    """
    session = RuntimeModel(model)
    session.check_input(inputs.shape[1:], "data")
    batch = session.batch or BATCH
    parts = [
        session.run(np.ascontiguousarray(x, np.float32))[0] for x in np.split(inputs, range(batch, len(inputs), batch))
    ]
    outputs: NDArray[np.float32] = np.concatenate(parts)
    return outputs


ORT = Runtime("ort", "ort-cpu", available, run, 0)
ORT_MOBILE = Runtime("ort-mobile", "ort-mobile", available, run, 0)
