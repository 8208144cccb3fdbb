"""From a trained model to a file: the passes in their order, and everything that is known about the result."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.atomic_write import check_destinations, write_atomically
from kancompile.bit_budget import BitBudget, check_latency
from kancompile.calibration import Calibration, load_calibration
from kancompile.cpu_presets import CPU_PRESETS
from kancompile.emission import check_target, target_named, write
from kancompile.error_gate import ErrorGate
from kancompile.errors import KanCompileError
from kancompile.execution import RuntimeModel
from kancompile.frontend.capture import capture
from kancompile.manifest import ABOUT_THE_FILE, describe, describe_file_bytes, describe_layer
from kancompile.pair_products import prove_layer
from kancompile.passes.absorb_plain_layers import AbsorbPlainLayers
from kancompile.passes.factorize_edges import FactorizeEdges
from kancompile.passes.factorize_expansions import FactorizeExpansions
from kancompile.passes.fuse_index import FuseIndex
from kancompile.passes.lower_exactly import lower_exactly
from kancompile.passes.lower_to_polynomials import LowerToPolynomials
from kancompile.passes.methods import method_named
from kancompile.passes.mix_functions import MixFunctions
from kancompile.passes.quantize_outputs import QuantizeOutputs
from kancompile.passes.round_to_16_bits import RoundTo16Bits
from kancompile.passes.round_weights import RoundingOptions, RoundWeights
from kancompile.passes.split_branches import SplitBranches
from kancompile.passes.tabulate_expansions import TableOptions, TabulateExpansions
from kancompile.program import Program, check, with_history
from kancompile.progress import say
from kancompile.recipe import LayerRecipe, Recipe, read_recipe
from kancompile.targets import TARGETS
from kancompile.targets.kernel_audit import KernelAudit, audit_kernels
from kancompile.validation import check_fits

MANIFEST_SUFFIX = ".manifest.json"
WIDE_TOLERANCE = 2.0**-17
"""Relative error of the functions of a 16-bit layer: half a step of its codes."""


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model and how it came about.

    Attributes:
        model_bytes: the file.
        companions: further files of the target, by suffix.
        session_bytes: a file of the same program that ONNX Runtime loads: the file itself where it does.
        program: the lowered program, whose evaluation in PyTorch is what the file computes.
        captured: the float program it was lowered from.
        reference: the user's model (an ``nn.Module`` in eval mode), for validation.
        manifest: what was compiled from what, as plain data for JSON.
        audit: which kernels ONNX Runtime uses.
        calibration: the samples that were used.
        recipe: the effective recipe.
    """

    model_bytes: bytes
    program: Program
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
        about = (*ABOUT_THE_FILE, *target_named(self.manifest["target"]).facts(self.model_bytes))
        facts = {key: value for key, value in self.manifest.items() if key not in about} | {"target": name}
        timings = _Timings()
        program = self.program
        if target.quantized_outputs:
            program = QuantizeOutputs()(program, self.calibration.samples)
        data = timings.measure("emit", lambda: write(target, program, facts, self.recipe))
        session = data if target.loads_in_ort else self.session_bytes
        audit = audit_kernels(data) if target.loads_in_ort else self.audit
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

    Raises:
        KanCompileError: bad input of any kind; nothing is written.
        ThresholdMissedError: no lowering reaches the recipe's ``min_sqnr``.
    """
    timings = _Timings()
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
    captured = timings.measure("capture", lambda: capture(model, samples.samples[:2]))
    x = samples.samples
    check_patterns(captured, x, chosen)
    captured = timings.measure("prepare", lambda: prepare(captured, x, chosen))
    _check_activations(captured, x)
    if chosen.max_bytes is not None or chosen.allocated_bits is not None:
        budget = timings.measure("sensitivities", lambda: BitBudget(captured, x, chosen, seed))
        chosen, front = budget.allocated()
    else:
        budget, front = None, {}

    def build() -> tuple[Recipe, Program, dict[str, Any], bytes]:
        gate = ErrorGate(captured, x, lambda refined: lower(captured, x, refined, seed, device, timings))
        held, lowered = gate.hold(chosen)
        if chosen_target.quantized_outputs:
            quantized = timings.measure(QuantizeOutputs.name, lambda: QuantizeOutputs()(lowered, x))
            lowered = with_history(QuantizeOutputs.name, lowered, quantized)
        lowered = replace(lowered, notes=(*lowered.notes, *gate.notes(held)))
        about = {"bit_allocation": front, "error_gate": gate.to_dict(held)}
        facts, data = timings.measure("emit", lambda: emitted(held, lowered, about))
        return held, lowered, facts, data

    def emitted(held: Recipe, lowered: Program, about: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        facts = describe(lowered, samples, held, target, seed) | about
        return facts, write(chosen_target, lowered, facts, held)

    effective, lowered, facts, data = build()

    def stored_bytes(content: bytes | None = None) -> int:
        content = data if content is None else content
        return int(chosen_target.facts(content).get("stored_bytes", len(content)))

    def stored_with(max_bytes: int) -> int:
        """Size of the same file with another budget in the recipe that it holds."""
        about = {key: facts[key] for key in ("bit_allocation", "error_gate")}
        return stored_bytes(emitted(replace(effective, max_bytes=max_bytes), lowered, about)[1])

    while budget is not None and chosen.max_bytes is not None and stored_bytes() > chosen.max_bytes:
        chosen, front = budget.again(stored_bytes(), stored_with)
        effective, lowered, facts, data = build()
    session = data if chosen_target.loads_in_ort else write(TARGETS["ort-cpu"], lowered, facts, effective)
    audit = timings.measure("kernel audit", lambda: audit_kernels(session))
    check_latency(lambda: one_sample_seconds(session, x[:1]), effective)
    return CompiledModel(
        data,
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


def check_patterns(program: Program, x: Tensor, recipe: Recipe) -> None:
    """Make sure that every pattern of a recipe names a layer, ordinary layers that can be absorbed included.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        recipe: the choices.

    Raises:
        KanCompileError: a pattern fits no layer.
    """
    recipe.check_layers(layer.name for layer in AbsorbPlainLayers()(program, x).layers())


def prepare(program: Program, x: Tensor, recipe: Recipe) -> Program:
    """Bring a captured program into the form that integer lowering starts from; its values stay the same up to rounding.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        recipe: the choices; ordinary layers of another precision stay as they are.
    """
    with torch.no_grad():
        absorbed = AbsorbPlainLayers(lambda name: recipe.for_layer(name).arithmetic == "int8")(program, x)
    check(absorbed)
    return with_history(AbsorbPlainLayers.name, program, absorbed)


def lower(
    program: Program,
    x: Tensor,
    recipe: Recipe,
    seed: int = 0,
    device: str = "cpu",
    timings: _Timings | None = None,
) -> Program:
    """Run the passes of a recipe over a captured program.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        recipe: the choices.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
        timings: collects the seconds of every pass.
    """
    timings = timings or _Timings()
    preset = CPU_PRESETS[recipe.cpu]

    precisions = {layer.name: recipe.for_layer(layer.name).arithmetic for layer in program.layers()}

    def has(*wanted: str) -> Callable[[str], bool]:
        return lambda name: precisions[name] in wanted

    def table_options(name: str) -> TableOptions | None:
        layer = recipe.for_layer(name)
        if precisions[name] != "int8":
            return None
        # methods that compensate their errors leave about as much as nearest rounding with two bits more
        bits = layer.weight_bits if layer.rounding_method == "uniform" else min(8, layer.weight_bits + 2)
        return TableOptions(layer.levels, layer.range, layer.percentile, bits, layer.column_scaling)  # type: ignore[arg-type]

    def rounding_options(name: str) -> RoundingOptions:
        layer: LayerRecipe = recipe.for_layer(name)
        method = method_named(layer.rounding_method, device)
        return RoundingOptions(
            method, layer.rounding_method, layer.weight_bits, layer.granularity, layer.group_size, preset.int16_pairs
        )

    def function_error(name: str) -> float:
        layer = recipe.for_layer(name)
        return layer.function_error if precisions[name] == "int8" and layer.granularity != "branch" else 0.0

    wide = LowerToPolynomials(WIDE_TOLERANCE, applies=has("int16"))
    in_branches = SplitBranches(lambda name: recipe.for_layer(name).granularity == "branch")
    stages: list[tuple[str, tuple[str, ...], Callable[[Program], Program]]] = [
        (LowerToPolynomials.name, ("float",), lambda stage: lower_exactly(stage, x, has("float"))),
        (LowerToPolynomials.name, ("int16",), lambda stage: wide(stage, x)),
        (RoundTo16Bits.name, ("int16",), RoundTo16Bits(has("int16"))),
        (FactorizeEdges.name, ("int8",), lambda stage: FactorizeEdges(has("int8"))(stage, x)),
        (FactorizeExpansions.name, ("int8",), lambda stage: FactorizeExpansions(has("int8"))(stage, x)),
        (MixFunctions.name, ("int8",), lambda stage: MixFunctions(function_error)(stage, x)),
        (SplitBranches.name, ("int8",), in_branches),
        (TabulateExpansions.name, ("int8",), lambda stage: TabulateExpansions(table_options)(stage, x)),
        (RoundWeights.name, ("int8",), lambda stage: RoundWeights(rounding_options, seed)(stage, x)),
        (FuseIndex.name, ("int8",), FuseIndex()),
    ]
    for name, needed, run in stages:
        if not any(precision in needed for precision in precisions.values()):
            continue
        say(f"{name} ...")
        with torch.no_grad():
            passed = timings.measure(name, lambda: run(program))  # noqa: B023 (called at once)
        check(passed)
        program = with_history(name, program, passed)
    if preset.int16_pairs:
        check_pairs(program)
    return program


def check_pairs(program: Program) -> None:
    """Refuse a program that processors without VNNI would compute otherwise.

    Raises:
        KanCompileError: sums of two neighbouring products of a layer can leave int16.
    """
    for layer in program.layers():
        proof = prove_layer(program, layer)
        if proof is not None and not proof.holds:
            raise KanCompileError(
                f"layer {layer.name!r}: {proof.overflowing} sums of two neighbouring products can leave int16 (up to "
                f"{proof.largest}), expected none for processors without VNNI; use 7 weight bits for this layer, or a recipe "
                'with cpu = "x86-vnni" or "arm64"'
            )


class _Timings:
    """Seconds of every stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


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


__all__ = ["CompiledModel", "compile", "describe_layer", "lower", "manifest_path"]
