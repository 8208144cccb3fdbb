"""From a trained model to a file, and everything that is known about the result."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.atomic_write import check_destinations, write_atomically
from kancompile.bit_budget import BitBudget, check_latency
from kancompile.data.calibration import Calibration, load_calibration
from kancompile.data.model import check_fits
from kancompile.emission import check_target, target_named, write
from kancompile.error_gate import ErrorGate
from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend.capture import capture
from kancompile.ir.program import Program
from kancompile.ir.show import with_history
from kancompile.manifest import describe, describe_file_bytes
from kancompile.passes.lowering import Lowering, check_patterns, prepare
from kancompile.passes.quantize_outputs import QuantizeOutputs
from kancompile.progress import Timings
from kancompile.recipe import Recipe, read_recipe
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS
from kancompile.targets.contract import Target
from kancompile.validation.kernel_audit import KernelAudit, audit_kernels
from kancompile.validation.validate import Validation, validate

MANIFEST_SUFFIX = ".manifest.json"
_ABOUT_THE_CHOICES = ("bit_allocation", "error_gate")
"""What a manifest says about how the recipe came about; files of all targets share it."""


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model and how it came about.

    Attributes:
        model_bytes: the file.
        companions: further files of the target, by suffix.
        session_bytes: a file of the same program that ONNX Runtime loads: the file itself where it does.
        program: the lowered program, whose evaluation in PyTorch is what the file computes.
        lowered: the program as every target gets it, before what this one asks for, such as outputs of 8 bits.
        captured: the float program it was lowered from.
        reference: the user's model (an ``nn.Module`` in eval mode), for validation.
        manifest: what was compiled from what, as plain data for JSON.
        audit: which kernels ONNX Runtime uses.
        calibration: the samples that were used.
        recipe: the effective recipe.
    """

    model_bytes: bytes
    program: Program
    lowered: Program
    captured: Program
    reference: nn.Module
    manifest: dict[str, Any]
    audit: KernelAudit
    calibration: Calibration
    recipe: Recipe
    session_bytes: bytes
    companions: Mapping[str, bytes] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def report(self) -> dict[str, Any]:
        """Everything known without running the model again, as plain data for JSON."""
        return self.manifest | {"kernels": self.audit.to_dict(), "seconds": self.timings}

    def validate(self, data: Any, *, min_sqnr: float | None = None, max_drop: float | None = None) -> Validation:
        """Compare the file with the float model and the simulation, output by output and layer by layer.

        Args:
            data: samples, with labels or without (see :func:`kancompile.validate`).
            min_sqnr: least SQNR of the output in dB.
            max_drop: most points that accuracy (or R2, in percent) may lose; needs labels.

        Raises:
            KanCompileError: data that does not fit, or a threshold on something not measurable.
        """
        return validate(
            self.session_bytes,
            self.reference,
            data,
            program=self.program,
            float_program=self.captured,
            min_sqnr=min_sqnr,
            max_drop=max_drop,
        )

    def save(self, path: str | os.PathLike[str], force: bool = False, shared: bool = False) -> Path:
        """Write the model to ``path``, and beside it its manifest and what else its target needs: all of them or none.

        Args:
            path: the file.
            force: whether existing files are replaced.
            shared: see :func:`manifest_path`.

        Raises:
            KanCompileError: a file exists and ``force`` is not set, or the folder cannot be written.
        """
        model = Path(path)
        contents = self.files(model, shared)
        check_destinations(contents, force)
        write_atomically(contents, force)
        return model

    def files(self, model: Path, shared: bool = False) -> dict[Path, bytes]:
        """Give the content of every file that :meth:`save` writes for a model file (``shared``: see :func:`manifest_path`)."""
        text = json.dumps(self.manifest, indent=2, sort_keys=True) + "\n"
        companions = {model.with_name(model.stem + suffix): content for suffix, content in self.companions.items()}
        return {model: self.model_bytes, **companions, manifest_path(model, shared): text.encode()}

    def for_target(self, name: str) -> CompiledModel:
        """Write the same program for another target; nothing is rounded again.

        Raises:
            KanCompileError: no such target, or it cannot express the program.
        """
        target = target_named(name)
        timings = Timings()
        program = _for_target(target, self.lowered, self.calibration.samples, timings)
        about = {key: self.manifest[key] for key in _ABOUT_THE_CHOICES}
        facts = describe(program, self.calibration, self.recipe, name, self.manifest["seed"]) | about
        data = timings.measure("emit", lambda: write(target, program, facts, self.recipe))
        session = data if target.loads_in_ort else write(TARGETS["ort-cpu"], program, facts, self.recipe)
        audit = audit_kernels(session)
        return replace(
            self,
            model_bytes=data,
            program=program,
            companions=target.companions(data) if target.companions is not None else {},
            session_bytes=session,
            manifest=facts | describe_file_bytes(data) | target.facts(data),
            audit=audit,
            timings=timings.seconds,
        )


def manifest_path(model: Path, shared: bool = False) -> Path:
    """Return where the manifest of a model file stands: ``model.onnx`` -> ``model.manifest.json``.

    Args:
        model: the file.
        shared: whether files of other targets stand beside it; then ``model.ort`` -> ``model.ort.manifest.json``.
    """
    return model.with_name((model.name if shared and model.suffix != ".onnx" else model.stem) + MANIFEST_SUFFIX)


def compile(
    model: Any,
    calibration: Any,
    *,
    target: str = "ort-cpu",
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> CompiledModel:
    """Compile a trained KAN to the file of a target, ONNX for ONNX Runtime unless another is named.

    Args:
        model: ``nn.Module``, ``ExportedProgram`` or path of a ``.pt2`` file.
        calibration: samples of the model's input as an array or tensor ``[n, ...]``, an ``.npz`` or ``.npy`` path, or
            an iterable of batches.
        target: name of a target.
        recipe: ``Recipe``, mapping, or path of a TOML or JSON file; ``None`` for 8-bit integers.
        seed: of every random choice.
        device: ``"cpu"`` or ``"cuda"``, where rounding methods keep their matrices.
        trust: whether a ``.pt2`` file may be opened: loading one can run any code that it holds.

    Raises:
        KanCompileError: bad input of any kind; nothing is written.
        ThresholdMissedError: no lowering reaches the recipe's ``min_sqnr``.
    """
    timings = Timings()
    chosen_target = target_named(target)
    chosen = read_recipe(recipe)
    if chosen.max_latency_us is not None and not chosen_target.loads_in_ort:
        raise KanCompileError(
            f"recipe: found max_latency_us with target {target!r}, expected an ONNX target, whose time this machine can "
            "measure; leave it out, and measure on the device"
        )
    check_target(chosen_target, chosen)
    samples = load_calibration(calibration, max_samples=chosen.calibration_samples, seed=seed)
    if isinstance(model, nn.Module):
        check_fits(model, samples)
    captured = timings.measure("capture", lambda: capture(model, samples.samples[:2], trust=trust))
    x = samples.samples
    check_patterns(captured, x, chosen)
    captured = timings.measure("prepare", lambda: prepare(captured, x, chosen))
    _check_activations(captured, x)
    if chosen.max_bytes is not None or chosen.allocated_bits is not None:
        budget = timings.measure("sensitivities", lambda: BitBudget(captured, x, chosen, seed))
        chosen, front = budget.allocated()
    else:
        budget, front = None, {}

    lowering = Lowering(captured, x, seed, device)

    def build() -> tuple[Recipe, Program, Program, dict[str, Any], bytes]:
        gate = ErrorGate(captured, x, lambda refined: lowering(refined, timings))
        held, lowered = gate.hold(chosen)
        lowered = replace(lowered, notes=(*lowered.notes, *gate.notes(held)))
        program = _for_target(chosen_target, lowered, x, timings)
        about = dict(zip(_ABOUT_THE_CHOICES, (front, gate.to_dict(held)), strict=True))
        facts, data = timings.measure("emit", lambda: emitted(held, program, about))
        return held, lowered, program, facts, data

    def emitted(held: Recipe, program: Program, about: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        facts = describe(program, samples, held, target, seed) | about
        return facts, write(chosen_target, program, facts, held)

    effective, lowered, program, facts, data = build()

    def stored_bytes(content: bytes | None = None) -> int:
        content = data if content is None else content
        return int(chosen_target.facts(content).get("stored_bytes", len(content)))

    def stored_with(max_bytes: int) -> int:
        """Size of the same file with another budget in the recipe that it holds."""
        about = {key: facts[key] for key in _ABOUT_THE_CHOICES}
        return stored_bytes(emitted(replace(effective, max_bytes=max_bytes), program, about)[1])

    while budget is not None and chosen.max_bytes is not None and stored_bytes() > chosen.max_bytes:
        chosen, front = budget.again(stored_bytes(), stored_with)
        effective, lowered, program, facts, data = build()
    session = data if chosen_target.loads_in_ort else write(TARGETS["ort-cpu"], program, facts, effective)
    audit = timings.measure("kernel audit", lambda: audit_kernels(session))
    check_latency(lambda: one_sample_seconds(session, x[:1]), effective)
    return CompiledModel(
        data,
        program,
        lowered,
        captured,
        model.eval() if isinstance(model, nn.Module) else captured.graph_module,
        facts | describe_file_bytes(data) | chosen_target.facts(data),
        audit,
        samples,
        effective,
        session,
        chosen_target.companions(data) if chosen_target.companions is not None else {},
        timings.seconds,
    )


def _for_target(target: Target, lowered: Program, x: Tensor, timings: Timings) -> Program:
    """Rewrite a lowered program as its target asks for."""
    if not target.quantized_outputs:
        return lowered
    quantized = timings.measure(QuantizeOutputs.name, lambda: QuantizeOutputs()(lowered, x))
    return with_history(QuantizeOutputs.name, lowered, quantized)


def one_sample_seconds(model: bytes, x: Tensor, runs: int = 200) -> float:
    """Measure the median time of one sample in one thread of ONNX Runtime, in seconds."""
    session = RuntimeModel(model, threads=1)
    array = x.numpy()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(array)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _check_activations(program: Program, x: Tensor) -> None:
    """Refuse calibration data that drives an activation to NaN or infinity, naming the layer."""
    layers = program.layers()
    for part in x.split(512):
        traced = program.trace(part, [layer.contraction for layer in layers])
        for layer in layers:
            if not bool(torch.isfinite(traced[layer.contraction][1]).all()):
                raise KanCompileError(
                    f"layer {layer.name!r}: outputs are NaN or infinite on the calibration data; check its scaling"
                )


__all__ = ["CompiledModel", "compile", "manifest_path"]
