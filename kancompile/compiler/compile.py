"""From a trained model to a file, and everything that is known about the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from kancompile.compiler.allocation import Allocator
from kancompile.compiler.compiled_model import ABOUT_THE_CHOICES, CompiledModel
from kancompile.compiler.emission import check_file_size, check_target, for_target, target_named, with_rows_of, write
from kancompile.compiler.error_gate import ErrorGate
from kancompile.compiler.file_parts import why_larger
from kancompile.compiler.fresh_data import fresh_data_error
from kancompile.compiler.latency_estimate import layer_nanoseconds, other_nanoseconds
from kancompile.compiler.layer_trials import LayerTrials
from kancompile.compiler.manifest import describe, describe_file_bytes, smallest_bytes
from kancompile.compiler.measured_latency import call_seconds, check_latency
from kancompile.compiler.preparation import prepare_model
from kancompile.compiler.sampled_inputs import for_sampled_inputs, sampled_inputs
from kancompile.data import float32_by_default, load_calibration, model_inputs, opened, parameter_bytes
from kancompile.errors import KanCompileError
from kancompile.ir import ModelWithExternalData, Program, Values
from kancompile.ir import file_bytes as content_bytes
from kancompile.progress import Timings, say
from kancompile.recipe import WEIGHT_ONLY, Recipe, SettledRecipe, read_recipe
from kancompile.targets import TARGETS
from kancompile.validation import audit_kernels, outside_grid


@float32_by_default()
def compile(
    model: Any,
    calibration: Any,
    *misplaced: Any,
    target: str = "ort-cpu",
    also_for: Sequence[str] = (),
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
    dynamic: Any = None,
) -> CompiledModel:
    """Compile a trained KAN to the file of a target, ONNX for ONNX Runtime unless another is named.

    Args:
        model: ``nn.Module``, ``ExportedProgram`` or path of a ``.pt2`` file. Of a module in another precision than float32 a
            copy is compiled; the module itself stays as it is.
        calibration: ``None`` to draw inputs from the grid of the first layer (see ``sampled_inputs``); better, samples of the
            model's input as an array or tensor ``[n, ...]``, an ``.npz`` or ``.npy`` path, or
            an iterable of batches; ``(samples, labels)`` where there are labels.
        misplaced: none; labels belong to the samples.
        target: name of a target.
        also_for: names of further targets that the result shall be written for (``CompiledModel.for_target``): layers are not
            refined to what those cannot hold, such as 16 bits, unless an output is ruined or ``min_sqnr`` missed.
        recipe: ``Recipe``, mapping, or path of a TOML or JSON file; ``None`` for 8-bit integers.
        seed: of every random choice.
        device: ``"cpu"`` or ``"cuda"``, where rounding methods keep their matrices.
        trust: whether a ``.pt2`` file may be opened: loading one can run any code that it holds.
        dynamic: dimensions beside the batch that the file leaves open, such as the length of a sequence: ``"x: batch, time, 8"``,
            or ``{"x": {1: Dim("time")}}`` as ``torch.export`` takes it. All others have the sizes of the samples.
            ``"auto"`` leaves open what can be without losing a layer.

    Raises:
        KanCompileError: bad input of any kind; nothing is written.
        ThresholdMissedError: no lowering reaches the recipe's ``min_sqnr``.
    """
    if misplaced:
        raise KanCompileError(
            f"compile: found {len(misplaced)} more positional argument{'s' if len(misplaced) > 1 else ''} "
            f"({', '.join(type(value).__name__ for value in misplaced)}), expected options by name; labels go with the samples: "
            "compile(model, (x, y))"
        )
    timings = Timings()
    chosen_target, further = target_named(target), [target_named(name) for name in also_for]
    whole = read_recipe(recipe)
    if whole.max_latency_us is not None and not chosen_target.loads_in_ort:
        raise KanCompileError(
            f"recipe: found max_latency_us with target {target!r}, expected an ONNX target, whose time this machine can "
            "measure; leave it out, and measure on the device"
        )
    check_target(chosen_target, whole)
    model = opened(model, trust)
    if calibration is None:
        calibration = sampled_inputs(model, seed)
    samples = load_calibration(
        calibration,
        max_samples=whole.calibration_samples,
        seed=seed,
        model=model_inputs(model),
        keep_integers=True,
    )
    if samples.is_sampled:
        whole = for_sampled_inputs(whole)
    takes_trials = not chosen_target.quantized_outputs  # whose tables have rows that are bytes
    prepared = prepare_model(
        model, samples, whole, seed, device, trust=trust, timings=timings, dynamic=dynamic, by_trials=takes_trials
    )
    captured, x, budget, front = prepared.program, prepared.x, prepared.budget, prepared.front
    samples = prepared.samples
    chosen, used = prepared.recipe, prepared.model
    check_file_size(chosen_target, captured)
    outside = outside_grid(captured, x)
    about_inputs = None if outside is None else outside.note()

    def lowering_with(part: Values) -> Callable[[SettledRecipe], Program]:
        known = whole_lowering if part is x else prepared.lowering(part)
        return lambda refined: known(refined, timings)

    whole_lowering = prepared.lowering(x)
    lowering = lowering_with(x)
    chosen = with_rows_of(chosen_target, chosen, lambda recipe: whole_lowering.tabulated(recipe, timings))
    float_bytes = parameter_bytes(used)

    last: tuple[Program, Recipe, bytes] | None = None

    def content_of(recipe: SettledRecipe, lowered: Program) -> bytes:
        nonlocal last
        if last is None or last[0] is not lowered or last[1] != recipe.whole:
            program = for_target(chosen_target, lowered, x, timings, recipe.whole)
            facts = describe(program, samples, recipe.whole, target, seed)
            last = lowered, recipe.whole, write(chosen_target, program, facts, recipe.whole)
        return last[2]

    def file_bytes(recipe: SettledRecipe, lowered: Program) -> int:
        content = content_of(recipe, lowered)
        return int(chosen_target.facts(content).get("stored_bytes", content_bytes(content)))

    at_once, costs = whole.batch or whole.for_batch or 1, whole.costs.look_up

    def microseconds(recipe: SettledRecipe, lowered: Program) -> float:
        return 1e6 * call_seconds(content_of(recipe, lowered), x, at_once)

    def layer_time(program: Program, name: str) -> float:
        return layer_nanoseconds(program, program.layer(name), costs, at_once)

    def allocator() -> Allocator:
        trials = LayerTrials(
            captured,
            x,
            lowering,
            smallest_bytes,
            layer_time if chosen_target.loads_in_ort else None,
        )
        outside = other_nanoseconds(captured, x[:2], costs, at_once)
        measured = microseconds if chosen_target.loads_in_ort else None
        holds_float = all(one.holds({"precision": WEIGHT_ONLY}) for one in (chosen_target, *further))
        return Allocator(captured, trials, file_bytes, measured, outside, float_bytes if holds_float else None)

    has_budget = whole.max_bytes is not None or whole.max_latency_us is not None
    allocates = whole.optimize != "balanced" or (has_budget and takes_trials and budget is None)

    def build() -> tuple[Recipe, Program, Program, dict[str, Any], bytes]:
        most_bytes = whole.max_bytes if allocates else None
        gate = ErrorGate(captured, samples, lowering, float_bytes, file_bytes, most_bytes, (chosen_target, *further))
        said: list[str] = []
        allocated: dict[str, Any] = {}
        if allocates:
            own = allocator()
            held, lowered = gate.hold(timings.measure("allocation", lambda: own.choose(chosen)))
            said, allocated = own.notes(), {"allocation": own.to_dict()}
        else:
            held, lowered = gate.hold(chosen)
        fresh = fresh_data_error(captured, x, held, lowering_with, seed)
        notes = [f"inputs: {line}" for line in samples.remarks if samples.is_sampled]
        notes += [] if about_inputs is None else [f"inputs: {about_inputs}"]
        notes += [] if fresh is None else [fresh.note()]
        lowered = replace(lowered, notes=(*lowered.notes, *said, *gate.notes(), *notes))
        program = for_target(chosen_target, lowered, x, timings, held.whole)
        choices = (front, gate.to_dict(held.whole), None if fresh is None else fresh.to_dict())
        about = dict(zip(ABOUT_THE_CHOICES, choices, strict=True)) | allocated
        facts, data = timings.measure("emit", lambda: emitted(held.whole, program, about))
        return held.whole, lowered, program, facts, data

    def emitted(held: Recipe, program: Program, about: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        facts = describe(program, samples, held, target, seed) | about
        return facts, write(chosen_target, program, facts, held)

    effective, lowered, program, facts, data = build()
    for note in lowered.notes:
        if note.startswith(("inputs:", "fresh data:")):
            say(note)

    def stored_bytes(content: bytes | None = None) -> int:
        content = data if content is None else content
        return int(chosen_target.facts(content).get("stored_bytes", content_bytes(content)))

    def stored_with(max_bytes: int) -> int:
        """Size of the same file with another budget in the recipe that it holds."""
        about = {key: facts[key] for key in ABOUT_THE_CHOICES}
        return stored_bytes(emitted(replace(effective, max_bytes=max_bytes), program, about)[1])

    while budget is not None and whole.max_bytes is not None and stored_bytes() > whole.max_bytes:
        allocated, front = budget.again(stored_bytes(), stored_with)
        chosen = allocated.settled(chosen.layers)
        effective, lowered, program, facts, data = build()
    if allocates and whole.max_bytes is not None and stored_bytes() > whole.max_bytes:
        raise KanCompileError(
            f"max_bytes {whole.max_bytes}: the file takes {stored_bytes()} bytes with what it says of itself; allow as many"
        )
    is_split = isinstance(data, ModelWithExternalData)  # at that size no count of constants is of use
    if chosen_target.suffix == ".onnx" and not is_split and float_bytes is not None and len(data) > float_bytes:
        facts["notes"].append(why_larger(data, float_bytes, whole.optimize == "size"))
    session = data if chosen_target.loads_in_ort else write(TARGETS["ort-cpu"], program, facts, effective)
    audit = timings.measure("kernel audit", lambda: audit_kernels(session))
    check_latency(lambda: call_seconds(session, x, at_once), effective)
    return CompiledModel(
        data,
        program,
        lowered,
        captured,
        used if isinstance(used, nn.Module) or captured.declared is not None else captured.graph_module,
        facts | describe_file_bytes(data) | chosen_target.facts(data),
        audit,
        samples,
        effective,
        session,
        chosen_target.companions(data) if chosen_target.companions is not None else {},
        timings.seconds,
    )
