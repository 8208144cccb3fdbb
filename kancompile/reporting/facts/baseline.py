"""What the model was before: its size as parameters and as a float ONNX file, and its time beside the compiled file's.

Times are medians of blocks in alternation on this machine, and only their ratio means something elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from kancompile.errors import reason
from kancompile.reporting.facts.source import ReportSource
from kancompile.runtimes import RuntimeModel, describe_machine
from kancompile.validation import COMPILED, FLOAT_EXPORT, export_float, take_turns

_BATCHES = (1, 64)
_REPEATS, _WARMUP = 7, 2
_LONGEST_CALL = 0.5  # seconds, of the float model, beyond which a larger batch is not tried


def parameter_bytes(model: Any) -> int | None:
    """Return what the parameters take as they are stored in a checkpoint; ``None`` where the model has none to count."""
    if not isinstance(model, nn.Module):
        return None
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) or None


def measure_baseline(source: ReportSource, float_export: bool, latency: bool) -> dict[str, Any]:
    """Measure float export and latencies as plain data.

    Args:
        source: the compiled model and its float twin.
        float_export: whether to export the float model, without which there is nothing to time.
        latency: whether to measure times, which differ from run to run.

    Returns:
        ``float_export_bytes`` (``None`` where the model cannot be exported), ``latency``: a list, empty where nothing was
        measured, ``latency_note``: why, and ``machine``.
    """
    shape = source.program.input_shape
    found: dict[str, Any] = {"float_export_bytes": None, "latency": [], "latency_note": "", "machine": {}}
    if not float_export:
        found["latency_note"] = "not measured"
        return found
    try:
        exported = export_float(source.reference, shape)
    except Exception as error:  # the exporter runs user code and raises what it likes
        found["latency_note"] = f"the float model cannot be exported: {type(error).__name__}: {reason(error)}"
        return found
    found["float_export_bytes"] = len(exported)
    if not latency:
        found["latency_note"] = "not measured"
        return found
    try:
        float_model = RuntimeModel(exported, threads=1)
        compiled = RuntimeModel(source.session_bytes, threads=1)
        found["latency"] = _times(source.judging.samples, compiled, float_model)
    except Exception as error:  # kernels of a foreign runtime
        found["latency_note"] = f"the float model does not run: {type(error).__name__}: {reason(error)}"
        return found
    found["machine"] = {key: value for key, value in describe_machine().items() if key != "load"}
    return found


def _times(x: Tensor, compiled: RuntimeModel, float_model: RuntimeModel) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in _BATCHES:
        if rows and rows[-1]["float_seconds"] / rows[-1]["batch_size"] * batch > _LONGEST_CALL:
            break
        array = np.ascontiguousarray(x.numpy()[np.arange(batch) % len(x)])
        runnable: dict[str, Callable[[], Any]] = {
            COMPILED: partial(compiled.run, array),
            FLOAT_EXPORT: partial(float_model.run, array),
        }
        timings = {t.candidate: t for t in take_turns(runnable, batch, 1, _REPEATS, _WARMUP, {})}
        before, after = timings[FLOAT_EXPORT].median, timings[COMPILED].median
        rows.append(
            {
                "batch_size": batch,
                "threads": 1,
                "float_seconds": before,
                "compiled_seconds": after,
                "ratio": before / after,
            }
        )
    return rows
