"""Weight bits against accuracy: measure a few assignments of bits, so that a reader sees what more or fewer would bring.

Where the compilation allocated bits to layers, the assignments are entries of its Pareto front; otherwise all integer layers
get the same width. Every assignment is lowered with a part of the calibration data and nearest rounding, so that other
methods can only do better, and evaluated in the simulation, which computes what a file computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.compiler import describe_layer
from kancompile.data import Calibration
from kancompile.ir import Program, Values, first_of
from kancompile.passes import Lowering
from kancompile.progress import quiet, track
from kancompile.recipe import SettledRecipe
from kancompile.reporting.facts.source import ReportSource
from kancompile.validation import ErrorMeasure, PairedDecisions, TaskMetric, plain_number

WIDTHS = (2, 3, 4, 6, 8)
_SAMPLES = 256
_JUDGED = 512
_JUDGED_ELEMENTS = 1 << 19
_FRONT_ENTRIES = 6


@dataclass(frozen=True)
class FrontPoint:
    """One assignment of bits, measured.

    Attributes:
        bits: of every layer that has integer weights.
        weight_bytes: of all layers.
        sqnr_db: of the output on the judging data.
        metric: task measure (accuracy or overlap in percent, or R2), ``None`` without labels.
        interval: 95 % interval of the accuracy in percent, ``None`` where labels are no classes.
        shipped: whether these are the bits of the compiled file.
        sensitivity: what the allocation predicted, ``None`` without one.
    """

    bits: Mapping[str, int]
    weight_bytes: int
    sqnr_db: float
    metric: float | None
    shipped: bool
    sensitivity: float | None = None
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "bits": dict(self.bits),
            "weight_bytes": self.weight_bytes,
            "sqnr_db": plain_number(self.sqnr_db),
            "metric": plain_number(self.metric),
            "interval": None if self.interval is None else list(self.interval),
            "shipped": self.shipped,
            "sensitivity": self.sensitivity,
        }


def measure_front(source: ReportSource) -> dict[str, Any]:
    """Measure the front of a compiled model as plain data, smallest weights first."""
    bits = shipped_bits(source.program)
    allocation = source.manifest.get("bit_allocation") or {}
    entries = allocation.get("pareto_front", [])
    candidates: list[tuple[Mapping[str, int], float | None]]
    if entries:
        thinned = [
            entries[i]
            for i in sorted({round(p * (len(entries) - 1) / (_FRONT_ENTRIES - 1)) for p in range(_FRONT_ENTRIES)})
        ]
        candidates = [
            ({name: e["bits"][name] for name in bits if name in e["bits"]}, e["sensitivity"]) for e in thinned
        ]
    else:
        candidates = [(dict.fromkeys(bits, width), None) for width in WIDTHS]
    if not bits:
        return no_front("none")
    judge = _Judge(source)
    points = [judge.measure(source.program, bits, True, _predicted(entries, bits))]
    lowering = _with_few_samples(source)
    shipped = lowering.settled(source.recipe)
    for assignment, sensitivity in track([c for c in candidates if dict(c[0]) != bits], "trying other bits"):
        recipe = _with_bits(shipped, assignment)
        with quiet():
            program = lowering(recipe)
        points.append(judge.measure(program, assignment, False, sensitivity))
    points.sort(key=lambda point: (point.weight_bytes, point.sqnr_db))
    origin = "bit allocation" if entries else "one width for all layers"
    return {
        "origin": origin,
        "samples": judge.samples,
        "float_metric": plain_number(judge.float_metric),
        "points": [point.to_dict() for point in points],
    }


def no_front(origin: str) -> dict[str, Any]:
    """Give what stands in a report where nothing was measured: ``"off"``, or ``"none"`` without integer weights."""
    return {"origin": origin, "samples": 0, "float_metric": None, "points": []}


def _with_few_samples(source: ReportSource) -> Lowering:
    x = source.calibration.samples
    if len(x) <= _SAMPLES:
        return source.lowering
    return Lowering(source.captured, x[torch.linspace(0, len(x) - 1, _SAMPLES).long()], source.seed)


def shipped_bits(program: Program) -> dict[str, int]:
    """Return the weight bits of every integer layer."""
    found = {}
    for layer in program.layers():
        bits = describe_layer_bits(program, layer.name)
        if bits is not None and bits <= 8:
            found[layer.name] = bits
    return found


def describe_layer_bits(program: Program, name: str) -> int | None:
    """Return the weight bits of one layer, ``None`` where it has none of its own."""
    layer = program.layer(name)
    bits = getattr(program.module(layer.contraction), "weight_bits", None)
    return None if bits is None else int(bits)


def _with_bits(recipe: SettledRecipe, bits: Mapping[str, int]) -> SettledRecipe:
    # nearest rounding takes a second where gptq takes six (784-64-10), and says where accuracy begins to fall
    return recipe.with_overrides({name: {"weight_bits": width, "method": "uniform"} for name, width in bits.items()})


def _predicted(entries: Sequence[Mapping[str, Any]], bits: Mapping[str, int]) -> float | None:
    return next((e["sensitivity"] for e in entries if all(e["bits"].get(n) == b for n, b in bits.items())), None)


class _Judge:
    """Measures programs on the judging data, with float outputs computed once."""

    def __init__(self, source: ReportSource) -> None:
        data: Calibration = source.judging
        self.samples = min(len(data), max(64, min(_JUDGED, _JUDGED_ELEMENTS // data.samples[0].numel())))
        rows = torch.linspace(0, len(data) - 1, self.samples).long()
        self.x = data.samples[rows]
        self.labels: Tensor | None = None if data.labels is None else data.labels[rows]
        self.expected = [source.captured(part) for part in self.x.split(64)]
        task = self._task(self.expected)
        self.float_metric, self._float_decisions = _value(task), None if task is None else task.decisions

    def measure(
        self, program: Program, bits: Mapping[str, int], shipped: bool, sensitivity: float | None
    ) -> FrontPoint:
        error, outputs = ErrorMeasure(), [program(part) for part in self.x.split(64)]
        for expected, output in zip(self.expected, outputs, strict=True):
            error.add(expected, output, "model output")
        total = sum(describe_layer(program, layer)["weight_bytes"] for layer in program.layers())
        task, interval = self._task(outputs), None
        if task is not None and task.decisions is not None and self._float_decisions is not None:
            interval = PairedDecisions.of(self._float_decisions, task.decisions).accuracy_interval
        return FrontPoint(bits, total, error.sqnr_db, _value(task), shipped, sensitivity, interval)

    def _task(self, outputs: Sequence[Values]) -> TaskMetric | None:
        """Measure the task on outputs of all samples, ``None`` without labels."""
        if self.labels is None:
            return None
        task = TaskMetric()
        for labels, output in zip(self.labels.split(64), outputs, strict=True):
            task.add(labels, first_of(output), "data")
        return task


def _value(task: TaskMetric | None) -> float | None:
    return None if task is None or task.score is None else task.score.value
