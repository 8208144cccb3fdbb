"""Prove what a compiled file computes: float PyTorch, the simulation and the real runtime side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kancompile.data import (
    ModelInputs,
    Reference,
    evaluating,
    float32_by_default,
    in_float32,
    model_inputs,
    stream_batches,
)
from kancompile.errors import KanCompileError, reason
from kancompile.ir import Program, Values, by_name, tensors_of
from kancompile.progress import track
from kancompile.runtimes import ModelFile, RuntimeModel, name_of
from kancompile.validation.error_measures import ErrorMeasure, plain_number
from kancompile.validation.layer_errors import LayerError, LayerErrors
from kancompile.validation.paired_decisions import PairedDecisions
from kancompile.validation.task_metrics import TaskMetric, number_of, points, title
from kancompile.validation.text_table import Printed, aligned

RUINED_DB = 12.0
"""Ratio below which an output counts as ruined: a quarter of its spread is error."""
NOTICEABLE_OUTSIDE = 0.01
LAYER_SAMPLES = 2048
"""Samples on which the layers are measured; more say the same and take most of the time."""


@dataclass(frozen=True)
class Validation(Printed):
    """What a validation measured.

    Attributes:
        model: which file.
        n_samples: samples compared.
        compiled: error of the file in ONNX Runtime against float PyTorch.
        simulated: error of the simulated program against float PyTorch, where one was given.
        runtime: ONNX Runtime against the simulation; ``differing`` is 0 where they agree bit for bit.
        metrics: task measures by name for ``"float"``, ``"compiled"`` and ``"simulated"``; empty without labels.
        drop: points of the first task measure lost from float to compiled, ``None`` without labels or where it has no meaning.
        paired: decisions of float and compiled model on the same samples, where labels are classes.
        is_classifier: whether the largest output is a decision.
        layers: error of every contraction output, with the errors of the layers before it and without, on the first
            :data:`LAYER_SAMPLES` samples.
        outside: share of the input values outside what the file was calibrated with, ``None`` where it does not say.
        notes: what a reader should know, such as how labels were read.
        reasons: why it did not pass.
        is_limited: whether any limit was set; without one, nothing but ruined outputs fails.
    """

    model: str
    n_samples: int
    compiled: ErrorMeasure
    simulated: ErrorMeasure | None
    runtime: ErrorMeasure | None
    metrics: dict[str, dict[str, float]]
    drop: float | None
    paired: PairedDecisions | None
    is_classifier: bool
    layers: tuple[LayerError, ...]
    outside: float | None
    notes: tuple[str, ...]
    reasons: tuple[str, ...]
    is_limited: bool

    def __repr__(self) -> str:
        return self.table()

    @property
    def passed(self) -> bool:
        """Whether every threshold was met and every output was finite."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; infinity and NaN become text."""
        return {
            "model": self.model,
            "n_samples": self.n_samples,
            "passed": self.passed,
            "reasons": list(self.reasons),
            "compiled": self.compiled.to_dict(),
            "simulated": None if self.simulated is None else self.simulated.to_dict(),
            "runtime_against_simulation": None if self.runtime is None else self.runtime.to_dict(),
            "metrics": {kind: {k: plain_number(v) for k, v in values.items()} for kind, values in self.metrics.items()},
            "drop": plain_number(self.drop),
            "paired": None if self.paired is None else self.paired.to_dict(),
            "is_classifier": self.is_classifier,
            "outside_calibrated_range": plain_number(self.outside),
            "notes": list(self.notes),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def table(self) -> str:
        """Print for people."""
        names = list(self.metrics.get("float", {}))
        agreement = ["top-1 agreement"] if self.is_classifier else []
        head = ["", "SQNR dB", "worst output dB", "rms error", "largest error", *agreement, *map(title, names)]
        blank = [""] * (len(head) - 1 - len(names))
        rows = [head, ["float PyTorch", *blank, *self._metric_cells("float", names)]]
        if self.simulated is not None:
            rows.append(["simulation", *self._cells(self.simulated), *self._metric_cells("simulated", names)])
        rows.append(["ONNX Runtime", *self._cells(self.compiled), *self._metric_cells("compiled", names)])
        no_task = [""] * len(names)
        rows += [[f"  output {name}", *self._cells(part), *no_task] for name, part in self.compiled.parts.items()]
        lines = [f"{self.model}, {self.n_samples:,} samples", *aligned(rows)]
        lines += [text for text in (worst_text(self.compiled), *self._decisions()) if text]
        if self.runtime is not None:
            lines.append(
                f"simulation and ONNX Runtime: {self.runtime.differing} of {self.runtime.count} outputs differ, "
                f"by at most {self.runtime.largest:.3g}"
            )
        if self.layers:
            head = ["layer", "SQNR dB", "worst dB", "own dB", "max error"]
            lines += aligned([head, *(layer.cells() for layer in self.layers)])
        lines += [f"note: {note}" for note in self.notes]
        passed = "passed" if self.is_limited else "no limit was set (min_sqnr, max_drop); no output is ruined"
        lines.append(passed if self.passed else "not passed: " + "; ".join(self.reasons))
        return "\n".join(lines)

    def _decisions(self) -> list[str]:
        if self.paired is None:
            return []
        _, before, after, _ = self.paired.interval_row()
        return [f"decisions: {self.paired.text()}", f"accuracy, 95 % intervals: {after} (float model: {before})"]

    def _cells(self, measure: ErrorMeasure) -> list[str]:
        worst = measure.worst
        assert worst is not None
        shares = ["" if worst.is_constant else f"{100 * worst.rms_share:.2g} % of spread"]
        largest = measure.largest_share
        shares.append("" if largest is None else f"{100 * largest:.2g} % of range")
        agreement = "" if measure.agreement is None else f"{measure.agreement:.2f} %"
        return [
            f"{measure.sqnr_db:.2f}",
            f"{measure.worst_db:.2f}",
            *shares,
            *([agreement] if self.is_classifier else []),
        ]

    def _metric_cells(self, kind: str, names: list[str]) -> list[str]:
        return [number_of(name, self.metrics[kind][name]) for name in names]


def worst_text(measure: ErrorMeasure) -> str:
    """Name the worst output and its error; empty where there is only one."""
    worst = measure.worst
    if worst is None or measure.n_outputs == 1:
        return ""
    among = "" if measure.parts else f" of 0 ... {measure.n_outputs - 1}"
    return f"worst output: {worst.called}{among}, {worst.text()}"


@float32_by_default()
def validate(
    model: ModelFile,
    reference: Reference,
    data: Any,
    labels: Any = None,
    *,
    key: str | None = None,
    program: Program | None = None,
    float_program: Program | None = None,
    min_sqnr: float | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    is_classifier: bool | None = None,
    threads: int = 1,
    batch_size: int = 256,
) -> Validation:
    """Compare a compiled file with the float model it came from, on data, in the real runtime.

    Args:
        model: path or bytes of the ONNX file.
        reference: float model; evaluated in evaluation mode, without gradients, and in float32.
        data: samples, in every form that :func:`kancompile.data.calibration.stream_batches` reads.
        labels: labels, if ``data`` carries none.
        key: array of an ``.npz`` file that holds the samples, ``x`` if ``None``.
        program: the lowered program, whose simulation is compared too.
        float_program: the captured float program, for the error of every layer; needs ``program``.
        min_sqnr: least SQNR in dB, about its mean, of every output.
        max_drop: most points that accuracy or the overlap of masks may lose, or hundredths of R2; needs labels.
        min_agreement: least percentage of samples on which both have the same largest output.
        is_classifier: whether the largest output is a decision; ``None``: where labels are classes or ``min_agreement`` asks.
        threads: of ONNX Runtime, 0 for all.
        batch_size: samples evaluated at a time; memory holds one batch, whatever the data's size.

    Raises:
        KanCompileError: unreadable file or data, shapes that do not fit, or a threshold on something not measurable.
    """
    if float_program is not None and program is None:
        raise KanCompileError("validate: found float_program without program, expected both for the layers' errors")
    runtime_model = RuntimeModel(model, threads)
    compiled, simulated, runtime = ErrorMeasure(), ErrorMeasure(), ErrorMeasure()
    tasks = {kind: TaskMetric() for kind in ("float", "compiled", *(["simulated"] if program is not None else []))}
    layers = None
    if float_program is not None and program is not None:
        layers = LayerErrors(float_program, program, own=True)
    calibrated = runtime_model.calibrated_ranges
    outside = n_values = 0
    unusable = dict.fromkeys(tasks, 0)
    n_samples = n_labelled = 0
    reference = in_float32(reference, runtime_model.zeros())
    inputs = model_inputs(reference) or ModelInputs(tuple(runtime_model.input_shapes))
    batches = stream_batches(data, labels=labels, key=key, batch_size=batch_size, model=inputs, keep_integers=True)
    labelled = ""
    with evaluating(reference) as float_model, torch.no_grad():
        for read, y in track(batches, "validating batches"):
            x = runtime_model.as_read(read, "data")
            outputs = {"float": _evaluate(float_model, x, "reference"), "compiled": runtime_model(x)}
            compiled.add(outputs["float"], outputs["compiled"], name_of(model))
            if program is not None:
                outputs["simulated"] = _evaluate(program, x, "program")
                simulated.add(outputs["float"], outputs["simulated"], "program")
                runtime.add(outputs["simulated"], outputs["compiled"], name_of(model))
            if layers is not None and n_samples < LAYER_SAMPLES:
                layers.add(x)
            for kind, output in outputs.items():
                unusable[kind] += sum(int((~torch.isfinite(value)).sum()) for value in tensors_of(output))
                if y is not None:
                    labelled, judged = next(iter(by_name(output, [""]).items()))
                    tasks[kind].add(y, judged, "data")
            for name, value in by_name(x, list(calibrated)[:1]).items() if calibrated else ():
                if name in calibrated:
                    low, high = calibrated[name]
                    outside += int(((value < low) | (value > high)).sum())
                    n_values += value.numel()
            n_samples += len(x)
            n_labelled += 0 if y is None else len(x)
    if n_labelled not in (0, n_samples):
        raise KanCompileError(f"data: found labels for {n_labelled} of {n_samples} samples, expected all or none")
    metrics = {kind: task.values() for kind, task in tasks.items()} if n_labelled else {}
    first, second = (tasks[kind].decisions if n_labelled else None for kind in ("float", "compiled"))
    paired = None if first is None or second is None else PairedDecisions.of(first, second)
    drop = drop_of(metrics)
    reasons = [f"{count} {kind} outputs are NaN or infinite" for kind, count in unusable.items() if count]
    reasons += _missed(compiled, metrics, min_sqnr, max_drop, min_agreement)
    if min_sqnr is None and not (paired is not None and paired.is_within_chance):
        reasons += _ruined(compiled)
    share = outside / n_values if n_values else None
    notes = list(tasks["float"].notes) if n_labelled else []
    if labelled:
        notes.append(f"labels are compared with the first output, {labelled!r}")
    if share is not None and share >= NOTICEABLE_OUTSIDE:
        bounds = [f"{low:.4g} ... {high:.4g}" for low, high in calibrated.values()]
        notes.append(
            f"{100 * share:.2g} % of the inputs lie outside the range {', '.join(bounds)} of the "
            "calibration data, where tables end; scale the data as those, or calibrate with such data"
        )
    return Validation(
        name_of(model),
        n_samples,
        compiled,
        None if program is None else simulated,
        None if program is None else runtime,
        metrics,
        drop,
        paired,
        (paired is not None or min_agreement is not None) if is_classifier is None else is_classifier,
        () if layers is None else layers.result(),
        share,
        tuple(notes),
        tuple(reasons),
        any(limit is not None for limit in (min_sqnr, max_drop, min_agreement)),
    )


def _evaluate(model: Callable[[Values], Values], x: Values, what: str) -> Values:
    try:
        return model(x.clone())
    except KanCompileError:
        raise
    except Exception as error:  # user code may raise anything
        shapes = [tuple(value.shape) for value in tensors_of(x)]
        shown = f"an input of shape {shapes[0]!r}" if len(shapes) == 1 else f"inputs of shapes {shapes!r}"
        raise KanCompileError(
            f"{what}: raised {type(error).__name__} on {shown} ({reason(error)}); "
            "compare a file with the model it was compiled from"
        ) from error


def drop_of(metrics: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return by how many points the first measure falls from float to compiled, ``None`` where it has no meaning."""
    name = next(iter(metrics.get("float", {})), None)
    if name is None or name not in metrics["compiled"] or name == "rmse":
        return None
    return points(name, metrics["float"][name] - metrics["compiled"][name])


def _ruined(compiled: ErrorMeasure) -> list[str]:
    """Say which output is lost: a result that nobody set a limit for does not pass whatever it is."""
    worst = compiled.worst
    if worst is None or compiled.noise == 0 or worst.sqnr_db >= RUINED_DB:
        return []
    which = "the output" if compiled.n_outputs == 1 else f"output {worst.called}"
    return [f"{which} is ruined: {worst.text()}; min_sqnr allows less"]


def _missed(
    compiled: ErrorMeasure,
    metrics: Mapping[str, Mapping[str, float]],
    min_sqnr: float | None,
    max_drop: float | None,
    min_agreement: float | None,
) -> list[str]:
    """List the thresholds that are missed; written so that NaN misses every threshold."""
    reasons = []
    if min_sqnr is not None and not compiled.worst_db >= min_sqnr:
        worst = compiled.worst
        which = "" if worst is None or compiled.n_outputs == 1 else f" of output {worst.called}"
        reasons.append(f"SQNR{which} is {compiled.worst_db:.2f} dB about its mean, wanted at least {min_sqnr:g}")
    if max_drop is not None:
        drop = drop_of(metrics)
        if not metrics:
            raise KanCompileError(
                "max_drop: found data without labels, expected an array 'y' beside 'x' in an .npz, --target-column of a table, a "
                "folder with one subfolder for each class, or a loader of (samples, labels); in Python labels= or such pairs"
            )
        if drop is None:
            raise KanCompileError(
                "max_drop: found labels that do not vary in these samples, so that R2 has no meaning, expected labels that do; "
                "give more samples, or use min_sqnr"
            )
        name = next(iter(metrics["float"]))
        if not drop <= max_drop:
            of = "hundredths" if name == "r2" else "points"
            reasons.append(f"{name} drops by {drop:.3f} {of}, allowed are {max_drop:g}")
    if min_agreement is not None:
        if compiled.agreement is None:
            raise KanCompileError("min_agreement: found outputs that are no class scores [b, classes]; use min_sqnr")
        if not compiled.agreement >= min_agreement:
            reasons.append(f"top-1 agreement is {compiled.agreement:.2f} %, wanted at least {min_agreement:g}")
    return reasons
