"""Where every use of a model begins: tried on its samples, captured, checked, prepared, and given its bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kancompile.compiler.bit_budget import BitBudget
from kancompile.compiler.layer_options import fewest_trials
from kancompile.compiler.layer_trials import trials_for
from kancompile.data import Calibration, check_fits, in_float32, opened, precision_note, read_dynamic
from kancompile.errors import KanCompileError
from kancompile.frontend import Dynamic, capture, open_sizes
from kancompile.ir import Program, Values
from kancompile.passes import Lowering, prepare, settle
from kancompile.processes import dealt
from kancompile.progress import Timings, say
from kancompile.recipe import Recipe, SettledRecipe

AUTO = "auto"
"""Every dimension that can be dynamic is."""
_PROBED = 64
"""Samples that the capture of a network may try it with."""


@dataclass(frozen=True)
class Preparation:
    """A model that is ready to be lowered.

    Attributes:
        program: the float program, ordinary layers absorbed.
        samples: what it is calibrated with.
        recipe: the choices, settled for every layer, with its bits where a budget or an average asks for them.
        budget: where those bits come from, ``None`` where the recipe says them.
        front: what to note of them in the manifest.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
        model: the user's model, or its float32 copy, with which everything is compared.
    """

    program: Program
    samples: Calibration
    recipe: SettledRecipe
    budget: BitBudget | None
    front: dict[str, Any]
    seed: int = 0
    device: str = "cpu"
    model: Any = None

    @property
    def x(self) -> Any:
        """Calibration inputs ``[n, *input_shape]``, several by name."""
        return self.samples.samples

    def lowering(self, x: Values | None = None) -> Lowering:
        """Return what lowers the program by any recipe, on the samples or on other inputs ``[n, *input_shape]``."""
        return Lowering(self.program, self.x if x is None else x, self.seed, self.device)


def prepare_model(
    model: Any,
    samples: Calibration,
    recipe: Recipe,
    seed: int = 0,
    device: str = "cpu",
    *,
    captured: Program | None = None,
    trust: bool = False,
    timings: Timings | None = None,
    dynamic: Any = None,
    by_trials: bool = False,
) -> Preparation:
    """Capture a model and prepare it for its recipe.

    Args:
        model: as for :func:`kancompile.compile`.
        samples: what to calibrate with.
        recipe: the choices; a recipe that says the bits of its layers, as that of a file does, is taken at its word.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
        captured: the captured model, where there is one already.
        trust: whether a ``.pt2`` file may be opened.
        timings: keeps the seconds of each stage.
        dynamic: dynamic dimensions beside the batch, as :func:`kancompile.data.read_dynamic` reads them; ``"auto"`` for all
            that can be.
        by_trials: whether the caller allocates bits, rows and functions to ``max_bytes`` by trials, where these suffice.

    Raises:
        KanCompileError: the model does not take such samples, cannot be captured, yields NaN or infinity on them, or a pattern
            of the recipe fits no layer.
    """
    timings = Timings() if timings is None else timings
    used = model
    if captured is None:
        model = opened(model, trust)
        used = in_float32(model, samples.first(2))
        samples = check_fits(used, samples)
        example = samples.first(_PROBED)
        say("capturing the model ...")
        if dynamic in (AUTO, [AUTO]):
            captured = timings.measure("capture", lambda: _capture_open(used, example, trust))
        else:
            sizes = None if dynamic is None else read_dynamic(dynamic, samples)
            captured = timings.measure("capture", lambda: capture(used, example, trust=trust, dynamic=sizes))
        count = len(captured.layers())
        say(f"captured: {count} KAN layer{'s' if count != 1 else ''} in {timings.seconds['capture']:.1f} s")
    x = samples.samples
    found = replace(captured, notes=(*captured.notes, *precision_note(model, used)))
    has_budget = recipe.max_bytes is not None or recipe.allocated_bits is not None
    allocates = recipe.optimize == "balanced" and has_budget
    if allocates and by_trials and recipe.allocated_bits is None and recipe.method != "hawq-v2":
        allocates = trials_for(found, x) < fewest_trials(len(found.layers()))
    if allocates and recipe.lookup == "auto":
        recipe = replace(recipe, lookup="each")  # bits are weighed by the columns of the captured layers
    chosen = settle(found, x, recipe)
    program = timings.measure("prepare", lambda: prepare(found, x, chosen))
    _check_activations(program, x)
    if not allocates:
        return Preparation(program, samples, chosen, None, {}, seed, device, used)
    budget = timings.measure("sensitivities", lambda: BitBudget(program, x, recipe, seed))
    allocated, front = budget.allocated()
    return Preparation(program, samples, allocated.settled(chosen.layers), budget, front, seed, device, used)


def _capture_open(model: Any, example: Values, trust: bool) -> Program:
    """Capture with every size open that the model takes of any value and with which every layer is found all the same."""
    captured = capture(model, example, trust=trust)
    wanted = [layer.name for layer in captured.layers()]
    kept: Dynamic = {}
    for size in open_sizes(model, example):
        tried = {name: {**kept.get(name, {}), **size.get(name, {})} for name in {**kept, **size}}
        try:
            found = capture(model, example, trust=trust, dynamic=tried)
        except KanCompileError:  # what torch.export keeps may be no size of rows
            continue
        if [layer.name for layer in found.layers()] == wanted:
            captured, kept = found, tried
    shown = ", ".join(entry.text() for entry in captured.interface.inputs)
    note = (
        f"dynamic: takes {shown}"
        if kept
        else "dynamic: no size beside the batch can be left open without losing a layer"
    )
    return replace(captured, notes=(*captured.notes, note))


def _check_activations(program: Program, x: Values) -> None:
    """Refuse calibration data that drives an activation to NaN or infinity, naming the layer."""
    layers = program.layers()

    def checked(part: Values) -> tuple[Tensor, ...]:
        traced = program.trace(part, [layer.contraction for layer in layers])
        for layer in layers:
            if not bool(torch.isfinite(traced[layer.contraction][1]).all()):
                raise KanCompileError(
                    f"layer {layer.name!r}: outputs are NaN or infinite on the calibration data; check its scaling"
                )
        return ()

    for _ in dealt(x.split(512), checked):
        pass
