"""Prove what a compiled file computes: float PyTorch, the simulation and the real runtime side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.data import Reference, evaluating, stream_batches
from kancompile.errors import KanCompileError, reason
from kancompile.ir import Program
from kancompile.progress import track
from kancompile.runtimes import ModelFile, RuntimeModel, name_of
from kancompile.validation.error_measures import ErrorMeasure, TaskMetric, plain_number
from kancompile.validation.layer_errors import LayerError, LayerErrors
from kancompile.validation.text_table import aligned


@dataclass(frozen=True)
class Validation:
    """What a validation measured.

    Attributes:
        model: which file.
        n_samples: samples compared.
        compiled: error of the file in ONNX Runtime against float PyTorch.
        simulated: error of the simulated program against float PyTorch, where one was given.
        runtime: ONNX Runtime against the simulation; ``differing`` is 0 where they agree bit for bit.
        metrics: task measures by name for ``"float"``, ``"compiled"`` and ``"simulated"``; empty without labels.
        drop: points of the first task measure lost from float to compiled, ``None`` without labels.
        layers: error of every contraction output, with the errors of the layers before it and without.
        reasons: why it did not pass.
    """

    model: str
    n_samples: int
    compiled: ErrorMeasure
    simulated: ErrorMeasure | None
    runtime: ErrorMeasure | None
    metrics: dict[str, dict[str, float]]
    drop: float | None
    layers: tuple[LayerError, ...]
    reasons: tuple[str, ...]

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
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def table(self) -> str:
        """Print for people."""
        names = list(self.metrics.get("float", {}))
        head = ["", "SQNR dB", "max error", "mean error", "argmax equal", *names]
        rows = [head, ["float PyTorch", "", "", "", "", *self._metric_cells("float", names)]]
        if self.simulated is not None:
            rows.append(["simulation", *_cells(self.simulated), *self._metric_cells("simulated", names)])
        rows.append(["ONNX Runtime", *_cells(self.compiled), *self._metric_cells("compiled", names)])
        lines = [f"{self.model}, {self.n_samples} samples", *aligned(rows)]
        if self.runtime is not None:
            lines.append(
                f"simulation and ONNX Runtime: {self.runtime.differing} of {self.runtime.count} outputs differ, "
                f"by at most {self.runtime.largest:.3g}"
            )
        if self.layers:
            lines += aligned([["layer", "SQNR dB", "own dB", "max error"], *(layer.cells() for layer in self.layers)])
        lines.append("passed" if self.passed else "not passed: " + "; ".join(self.reasons))
        return "\n".join(lines)

    def _metric_cells(self, kind: str, names: list[str]) -> list[str]:
        return [f"{self.metrics[kind][name]:.4g}" for name in names]


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
    threads: int = 1,
    batch_size: int = 256,
) -> Validation:
    """Compare a compiled file with the float model it came from, on data, in the real runtime.

    Args:
        model: path or bytes of the ONNX file.
        reference: float model; evaluated in evaluation mode, without gradients.
        data: samples, in every form that :func:`kancompile.data.calibration.stream_batches` reads.
        labels: labels, if ``data`` carries none.
        key: array of an ``.npz`` file that holds the samples, ``x`` if ``None``.
        program: the lowered program, whose simulation is compared too.
        float_program: the captured float program, for the error of every layer; needs ``program``.
        min_sqnr: least SQNR of the output in dB.
        max_drop: most points that accuracy (or R2, in percent) may lose; needs labels.
        min_agreement: least percentage of samples with the same argmax.
        threads: threads of ONNX Runtime.
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
    unusable = dict.fromkeys(tasks, 0)
    n_samples = n_labelled = 0
    batches = stream_batches(data, labels=labels, key=key, batch_size=batch_size)
    with evaluating(reference) as float_model, torch.no_grad():
        for x, y in track(batches, "validating batches"):
            runtime_model.check_input(tuple(x.shape[1:]), "data")
            outputs = {"float": _evaluate(float_model, x, "reference"), "compiled": runtime_model(x)}
            compiled.add(outputs["float"], outputs["compiled"], name_of(model))
            if program is not None:
                outputs["simulated"] = _evaluate(program, x, "program")
                simulated.add(outputs["float"], outputs["simulated"], "program")
                runtime.add(outputs["simulated"], outputs["compiled"], name_of(model))
            if layers is not None:
                layers.add(x)
            for kind, output in outputs.items():
                unusable[kind] += int((~torch.isfinite(output)).sum())
                if y is not None:
                    tasks[kind].add(y, output, "data")
            n_samples += len(x)
            n_labelled += 0 if y is None else len(x)
    if n_labelled not in (0, n_samples):
        raise KanCompileError(f"data: found labels for {n_labelled} of {n_samples} samples, expected all or none")
    metrics = {kind: task.values() for kind, task in tasks.items()} if n_labelled else {}
    drop = _drop(metrics)
    reasons = [f"{count} {kind} outputs are NaN or infinite" for kind, count in unusable.items() if count]
    reasons += _missed(compiled, metrics, min_sqnr, max_drop, min_agreement)
    return Validation(
        name_of(model),
        n_samples,
        compiled,
        None if program is None else simulated,
        None if program is None else runtime,
        metrics,
        drop,
        () if layers is None else layers.result(),
        tuple(reasons),
    )


def _evaluate(model: Callable[[Tensor], Any], x: Tensor, what: str) -> Tensor:
    try:
        output = model(x.clone())
    except KanCompileError:
        raise
    except Exception as error:  # user code may raise anything
        raise KanCompileError(
            f"{what}: raised {type(error).__name__} on an input of shape {tuple(x.shape)!r} ({reason(error)}); "
            "compare a file with the model it was compiled from"
        ) from error
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor):
        found = f"{len(output)} outputs" if isinstance(output, tuple | list) else type(output).__name__
        raise KanCompileError(f"{what}: found {found}, expected one tensor; wrap the model to return one")
    return output.detach()


def _drop(metrics: dict[str, dict[str, float]]) -> float | None:
    if not metrics:
        return None
    first = next(iter(metrics["float"]))
    return metrics["float"][first] - metrics["compiled"][first]


def _missed(
    compiled: ErrorMeasure,
    metrics: dict[str, dict[str, float]],
    min_sqnr: float | None,
    max_drop: float | None,
    min_agreement: float | None,
) -> list[str]:
    """List the thresholds that are missed; written so that NaN misses every threshold."""
    reasons = []
    if min_sqnr is not None and not compiled.sqnr_db >= min_sqnr:
        reasons.append(f"SQNR is {compiled.sqnr_db:.2f} dB, wanted at least {min_sqnr:g}")
    if max_drop is not None:
        drop = _drop(metrics)
        if drop is None:
            raise KanCompileError(
                "max_drop: found data without labels, expected an array 'y' beside 'x' in an .npz, a folder with one subfolder "
                "for each class, or a loader of (samples, labels); in Python labels= or such pairs"
            )
        if not drop <= max_drop:
            reasons.append(f"{next(iter(metrics['float']))} drops by {drop:.3f} points, allowed are {max_drop:g}")
    if min_agreement is not None:
        if compiled.agreement is None:
            raise KanCompileError("min_agreement: found outputs that are no class scores [b, classes]; use min_sqnr")
        if not compiled.agreement >= min_agreement:
            reasons.append(f"argmax agrees on {compiled.agreement:.2f} % of samples, wanted at least {min_agreement:g}")
    return reasons


def _cells(measure: ErrorMeasure) -> list[str]:
    agreement = "" if measure.agreement is None else f"{measure.agreement:.2f} %"
    return [f"{measure.sqnr_db:.2f}", f"{measure.largest:.4g}", f"{measure.mean_abs:.4g}", agreement]
