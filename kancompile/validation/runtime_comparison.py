"""Run one compiled model in every runtime that is installed, and compare what comes out with ONNX Runtime.

Two units say how far outputs lie off: *quanta*, the value of one unit of the last layer's integer sum, and *steps*, the value
of one code of an 8-bit quantizer over the range of ONNX Runtime's outputs. A row number that differs in a hidden layer is many
quanta and, as a rule, one step or two; runtimes with a tolerance are judged by steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError
from kancompile.progress import say
from kancompile.runtimes import ORT, RUNTIMES, Prepared, Runtime, RuntimeModel, bounded_rows, output_quantum
from kancompile.targets import TARGETS
from kancompile.validation.error_measures import plain_number

_TIMED_SAMPLES = 512
_TIMED_VALUES = 1 << 18
_TIMED_SECONDS = 0.1
_TIMED_RUNS = 3


@dataclass(frozen=True)
class RuntimeRow:
    """One runtime's outputs beside ONNX Runtime's.

    Attributes:
        runtime: its name.
        file: what it ran.
        outputs: values compared.
        differing: how many are not equal, bit for bit.
        quanta: largest difference in units of the last layer's sum, ``None`` where the file does not end in a layer.
        steps: largest difference in codes of an 8-bit output.
        tolerance: steps allowed; 0 allows no difference at all.
        speed: samples a second relative to ONNX Runtime, ``None`` where it is emulated.
        missing: why it did not run, ``None`` where it did.
    """

    runtime: str
    file: str
    outputs: int = 0
    differing: int = 0
    quanta: float | None = None
    steps: float | None = None
    tolerance: int = 0
    speed: float | None = None
    missing: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it agrees as far as it promises; what did not run is no failure."""
        if self.missing is not None or self.differing == 0:
            return True
        return self.tolerance > 0 and self.steps is not None and self.steps <= self.tolerance


@dataclass(frozen=True)
class RuntimeComparison:
    """The rows of all runtimes, the first being ONNX Runtime, which the others are compared with."""

    samples: int
    rows: tuple[RuntimeRow, ...]

    @property
    def reasons(self) -> list[str]:
        """What lies off by more than is allowed, in words."""
        return [
            f"{row.runtime}: {row.differing} of {row.outputs} outputs differ from ort, by up to {row.steps:.3g} steps, "
            f"allowed are {row.tolerance}"
            for row in self.rows
            if not row.passed
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows]
        return {"samples": self.samples, "rows": rows, "reasons": self.reasons}

    def table(self) -> str:
        """Print for people."""
        head = ("runtime", "file", "differing", "of", "max quanta", "max steps", "allowed", "speed / ort")
        cells = [head, *(_cells(row) for row in self.rows if row.missing is None)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = [f"runtimes, {self.samples} samples"]
        for first, second, *others in cells:
            aligned = [first.ljust(widths[0]), second.ljust(widths[1])]
            aligned += [cell.rjust(width) for cell, width in zip(others, widths[2:], strict=True)]
            lines.append("  " + "  ".join(aligned).rstrip())
        lines += [f"  {row.runtime}: not run, {row.missing}" for row in self.rows if row.missing is not None]
        return "\n".join(lines)


def runtimes_named(names: Sequence[str]) -> list[Runtime]:
    """Return runtimes by their names; ``"all"`` is all of them, and ``"ort-arm64"`` all whose names begin like that.

    Raises:
        KanCompileError: there is none of that name, or one that was asked for by name is missing.
    """
    found: dict[str, Runtime] = {}
    for name in names:
        family = [runtime for key, runtime in RUNTIMES.items() if name == "all" or key.startswith(f"{name}-")]
        matching = [RUNTIMES[name]] if name in RUNTIMES else family
        if not matching:
            raise KanCompileError(f"runtime {name!r} is unknown, expected 'all' or some of {list(RUNTIMES)!r}")
        for runtime in matching:
            lacking = runtime.missing() if name != "all" else None
            if lacking is not None:
                raise KanCompileError(f"runtime {runtime.name!r}: {lacking}")
            found[runtime.name] = runtime
    return list(found.values())


def compare_runtimes(
    model: Path, x: NDArray[np.float32], runtimes: Sequence[Runtime], timed: bool = True
) -> RuntimeComparison:
    """Run a model in several runtimes; each takes the file of its own target, beside the given one.

    Args:
        model: the ``.onnx`` file.
        x: inputs ``[n, ...]``.
        runtimes: which; ONNX Runtime itself always comes first.
        timed: whether to measure speed.

    Raises:
        KanCompileError: the model cannot be run by ONNX Runtime.
    """
    _ = RuntimeModel(model).input_shape  # of one input; runtimes are called with one array
    expected = ORT.run(model, x)
    quantum = output_quantum(model)
    rows = [RuntimeRow(ORT.name, model.name, expected.size, quanta=0.0, steps=0.0, speed=1.0)]
    for runtime in runtimes:
        if runtime.name == ORT.name:
            continue
        say(f"running in {runtime.name} ...")
        rows.append(_row(runtime, model, x, expected, quantum, timed))
    return RuntimeComparison(len(x), tuple(rows))


def artifact_of(runtime: Runtime, model: Path) -> Path:
    """Return where the file of a runtime's target stands beside the ``.onnx`` file of the same model."""
    return model if runtime.artifact == ORT.artifact else model.with_suffix(TARGETS[runtime.artifact].suffix)


def _row(
    runtime: Runtime,
    model: Path,
    x: NDArray[np.float32],
    expected: NDArray[np.float32],
    quantum: NDArray[np.float32] | None,
    timed: bool,
) -> RuntimeRow:
    file = artifact_of(runtime, model)
    lacking = lacking_for(runtime, model)
    if lacking is not None:
        return RuntimeRow(runtime.name, file.name, missing=lacking)
    row = judge(runtime, file, runtime.run(file, x), expected, quantum)
    if not timed or runtime.emulated:
        return row
    with ORT.prepare(model, 1) as reference, runtime.prepare(file, 1) as prepared:
        return replace(row, speed=_speed(prepared, reference, x))


def lacking_for(runtime: Runtime, model: Path) -> str | None:
    """Say why a runtime cannot run the file of its target beside a model: it is not installed, or there is no such file."""
    lacking = runtime.missing()
    file = artifact_of(runtime, model)
    if lacking is None and not file.is_file():
        return f"found no {file.name} beside {model.name}: compile the model with --target {runtime.artifact} as well"
    return lacking


def judge(
    runtime: Runtime,
    file: Path,
    y: NDArray[np.float32],
    expected: NDArray[np.float32],
    quantum: NDArray[np.float32] | None = None,
) -> RuntimeRow:
    """Compare what a runtime returned for a file with what ONNX Runtime returned.

    Args:
        runtime: which.
        file: what it ran.
        y, expected: outputs ``[n, ...]`` of both.
        quantum: value of one unit of the last layer's sum, where it is known.

    Raises:
        KanCompileError: the shapes differ.
    """
    if y.shape != expected.shape:
        raise KanCompileError(
            f"runtime {runtime.name!r}: {file.name} returned shape {y.shape!r}, expected {expected.shape!r} as in ONNX "
            "Runtime; compile both files from one model"
        )
    difference = np.abs(y.astype(np.float64) - expected)
    difference[np.isnan(difference)] = np.inf
    step = (float(expected.max()) - float(expected.min())) / 255 or 1.0
    return RuntimeRow(
        runtime.name,
        file.name,
        expected.size,
        int((y != expected).sum()),
        None if quantum is None else float((difference / quantum).max()),
        float(difference.max()) / step,
        runtime.tolerance_steps,
    )


def _speed(prepared: Prepared, reference: Prepared, x: NDArray[np.float32]) -> float:
    """Return the speed of one loaded file relative to another: the median of blocks of calls interleaved."""
    part = np.ascontiguousarray(x[: min(_TIMED_SAMPLES, bounded_rows(_TIMED_VALUES)(x))])
    blocks = [(one, _calls(one, part)) for one in (prepared, reference)]
    ratios = []
    for _ in range(_TIMED_RUNS):
        own, other = (statistics.median(one.seconds(part, calls)) for one, calls in blocks)
        ratios.append(other / max(own, 1e-9))
    return statistics.median(ratios)


def _calls(prepared: Prepared, x: NDArray[np.float32]) -> int:
    """Return how many calls take as long as a block shall; the first one, which may allocate, is not counted."""
    return max(1, round(_TIMED_SECONDS / max(min(prepared.seconds(x, 2)), 1e-9)))


def _plain(value: Any) -> Any:
    return plain_number(value) if isinstance(value, float) else value


def _cells(row: RuntimeRow) -> tuple[str, ...]:
    return (
        row.runtime,
        row.file,
        f"{row.differing:,}",
        f"{row.outputs:,}",
        "" if row.quanta is None else f"{row.quanta:.3g}",
        "" if row.steps is None else f"{row.steps:.3g}",
        str(row.tolerance),
        "" if row.speed is None else f"{row.speed:.2f}",
    )
