"""A compiled file beside the float export of its model: bytes, and times in ONNX Runtime on this machine, interleaved.

Nothing is chosen by these times, so that files stay reproducible; only their ratio means something elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kancompile.data import evaluating, in_float32, in_order
from kancompile.errors import KanCompileError, reason
from kancompile.ir import NamedTensors, Values, arrays_of
from kancompile.runtimes import RuntimeModel, describe_machine
from kancompile.validation.benchmark import COMPILED, EAGER, FLOAT_EXPORT, take_turns, torch_threads
from kancompile.validation.float_export import FloatExport

BATCHES = (1, 64)
_REPEATS, _WARMUP = 7, 2
_LONGEST_CALL = 0.5  # seconds, of the float model, beyond which a larger batch is not tried
_NOTICEABLE = 0.97


@dataclass(frozen=True)
class BatchTime:
    """Seconds of one call in one thread.

    Attributes:
        batch: samples in the call.
        float_seconds: of the float model.
        compiled_seconds: of the compiled file.
    """

    batch: int
    float_seconds: float
    compiled_seconds: float

    @property
    def ratio(self) -> float:
        """How many times longer the float model takes."""
        return self.float_seconds / self.compiled_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "batch_size": self.batch,
            "threads": 1,
            "float_seconds": self.float_seconds,
            "compiled_seconds": self.compiled_seconds,
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class BesideFloat:
    """What was measured.

    Attributes:
        float_bytes: of the float export, ``None`` where there is none.
        compiled_bytes: of the file.
        timed: which float model the times are of, ``""`` where none was measured.
        times: one for each batch size.
        notes: why something was not measured, or against what.
    """

    float_bytes: int | None
    compiled_bytes: int
    timed: str
    times: tuple[BatchTime, ...]
    notes: tuple[str, ...]

    @property
    def is_larger(self) -> bool:
        """Whether the file takes more bytes than the float export."""
        return self.float_bytes is not None and self.compiled_bytes > self.float_bytes

    @property
    def slower(self) -> tuple[BatchTime, ...]:
        """Batch sizes at which the file takes noticeably longer."""
        return tuple(time for time in self.times if time.ratio < _NOTICEABLE)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "float_export_bytes": self.float_bytes,
            "compiled_bytes": self.compiled_bytes,
            "timed": self.timed,
            "latency": [time.to_dict() for time in self.times],
            "notes": list(self.notes),
            "machine": {key: value for key, value in describe_machine().items() if key != "load"} if self.times else {},
        }


def measure_beside_float(
    reference: nn.Module | ExportedProgram,
    export: FloatExport,
    session: bytes,
    compiled_bytes: int,
    x: Values,
    timing: bool = True,
) -> BesideFloat:
    """Measure a compiled file beside its float model.

    Args:
        reference: the float model.
        export: its export.
        session: the compiled file, as ONNX Runtime loads it.
        compiled_bytes: bytes that its target stores.
        x: samples ``[n, ...]`` to time with.
        timing: whether times are measured.
    """
    notes = []
    try:
        exported: bytes | None = export.result()
    except KanCompileError as error:
        exported = None
        notes.append(f"the float model cannot be exported ({error}); times are compared with PyTorch")
    size = None if exported is None else len(exported)
    if not timing:
        return BesideFloat(size, compiled_bytes, "", (), tuple(notes))
    if exported is not None:
        try:
            times = _beside_export(exported, session, in_order(reference, x))
            return BesideFloat(size, compiled_bytes, FLOAT_EXPORT, times, tuple(notes))
        except Exception as error:  # kernels of a foreign runtime
            said = f"{type(error).__name__}: {reason(error)}"
            notes.append(f"ONNX Runtime does not run the float export ({said}); times are compared with PyTorch")
    try:
        with evaluating(in_float32(reference, x)) as eager, torch_threads(1), torch.no_grad():
            compiled = RuntimeModel(session, threads=1)
            times = _times(x, EAGER, lambda array: eager(_tensors(array)), compiled)
        return BesideFloat(size, compiled_bytes, EAGER, times, tuple(notes))
    except Exception as error:
        notes.append(f"no times: the float model does not run, {type(error).__name__}: {reason(error)}")
        return BesideFloat(size, compiled_bytes, "", (), tuple(notes))


def _beside_export(exported: bytes, session: bytes, x: Values) -> tuple[BatchTime, ...]:
    float_model = RuntimeModel(exported, threads=1)

    def run(arrays: Any) -> Any:
        return float_model.run(float_model.renamed(arrays))

    return _times(x, FLOAT_EXPORT, run, RuntimeModel(session, threads=1))


def _tensors(arrays: Any) -> Values:
    if not isinstance(arrays, dict):
        return torch.from_numpy(arrays)
    return NamedTensors({name: torch.from_numpy(array) for name, array in arrays.items()})


def _times(x: Values, name: str, run: Callable[[Any], Any], compiled: RuntimeModel) -> tuple[BatchTime, ...]:
    found: list[BatchTime] = []
    for batch in BATCHES if compiled.batch is None else (compiled.batch,):
        if found and found[-1].float_seconds / found[-1].batch * batch > _LONGEST_CALL:
            break
        array = arrays_of(x[torch.arange(batch) % len(x)])
        failed: dict[str, str] = {}
        turns = {COMPILED: partial(compiled.run, array), name: partial(run, array)}
        timings = {timing.candidate: timing.median for timing in take_turns(turns, batch, 1, _REPEATS, _WARMUP, failed)}
        if name in failed:
            raise KanCompileError(failed[name])
        found.append(BatchTime(batch, timings[name], timings[COMPILED]))
    return tuple(found)
