"""Change a recipe step by step until the file is good enough, the cheapest useful change first.

Every step lists changes, each with what it is predicted to bring (``suspects``) and how many bytes of weights and tables it
costs. Those that are predicted to remove a tenth of the noise or more count as useful; they are measured from the cheapest on,
and the first that holds what it promises (a twentieth of the noise at least) is kept. 16-bit and then float layers come last,
since they are slower. Where the file may take so many bytes, and takes more or nothing else is left, bits and rows are searched
together (``budget_search``); where that finds no file either, weight bits are taken from the layers that lose least by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kancompile.compiler import Rung
from kancompile.data import float32_by_default, opened
from kancompile.diagnosis.anatomy import Anatomy, dissect
from kancompile.diagnosis.budget_search import BudgetSearch
from kancompile.diagnosis.cause import PRECISION, Change
from kancompile.diagnosis.diagnosing import layer_suspects, open_laboratory, samples_for
from kancompile.diagnosis.laboratory import Laboratory, Outcome
from kancompile.diagnosis.measurement_key import depends_on
from kancompile.diagnosis.tune_cache import TuneCache
from kancompile.errors import KanCompileError
from kancompile.ir import Program
from kancompile.progress import say
from kancompile.recipe import Recipe, SettledRecipe, read_recipe
from kancompile.validation import Printed, plain_number

CACHE_NAME = "tune-cache.jsonl"
_USEFUL = 0.9
_KEPT = 0.95
_MOST_STEPS = 64


@dataclass(frozen=True)
class Targets:
    """What is wanted.

    Attributes:
        max_drop: most points of accuracy or overlap, or hundredths of R2, that may be lost.
        min_sqnr: least SQNR in dB, about its mean, of every output.
        max_bytes: most bytes of the file.
    """

    max_drop: float | None = None
    min_sqnr: float | None = None
    max_bytes: int | None = None

    def missed(self, outcome: Outcome, file_bytes: int | None) -> list[str]:
        """Say what is missed and by how much; NaN misses everything."""
        reasons = []
        if self.max_drop is not None and (outcome.drop is None or not outcome.drop <= self.max_drop):
            found = math.nan if outcome.drop is None else outcome.drop
            reasons.append(
                f"{outcome.metric or 'accuracy'} drops by {found:.3f} points, allowed are {self.max_drop:g} "
                f"({found - self.max_drop:.3f} too many)"
            )
        if self.min_sqnr is not None and not outcome.worst_db >= self.min_sqnr:
            reasons.append(
                f"SQNR of the worst output is {outcome.worst_db:.2f} dB, wanted at least {self.min_sqnr:g} "
                f"({self.min_sqnr - outcome.worst_db:.2f} missing)"
            )
        if self.max_bytes is not None and file_bytes is not None and file_bytes > self.max_bytes:
            reasons.append(
                f"the file takes {file_bytes} bytes, allowed are {self.max_bytes} ({file_bytes - self.max_bytes} too many)"
            )
        return reasons


@dataclass(frozen=True)
class Step:
    """One change that was kept.

    Attributes:
        change: what was changed.
        predicted_db: gain of the output SQNR that was expected.
        before, after: outcomes.
    """

    change: Change
    predicted_db: float | None
    before: Outcome
    after: Outcome

    def text(self) -> str:
        """Say it in a line."""
        grown = self.after.constant_bytes - self.before.constant_bytes
        line = f"{self.change.text()}: SQNR {self.before.sqnr_db:.2f} -> {self.after.sqnr_db:.2f} dB"
        if self.before.drop is not None and self.after.drop is not None:
            line += f", drop {self.before.drop:.2f} -> {self.after.drop:.2f} points"
        return f"{line}, free" if self.change.is_free and grown == 0 else f"{line}, {grown:+d} bytes"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "change": self.change.to_dict(),
            "predicted_db": plain_number(self.predicted_db),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }


@dataclass(frozen=True)
class Tuning(Printed):
    """How a recipe was tuned.

    Attributes:
        recipe: the recipe found, or the best one where the targets are missed.
        start, outcome: outcomes of the given recipe and of that one.
        steps: changes that were kept, in order.
        missed: what is missing and by how much; empty where all targets are met.
        measured, remembered: settings that were measured, and facts that the cache knew.
        judged_on: which samples judged, in words.
    """

    recipe: Recipe
    start: Outcome
    outcome: Outcome
    steps: tuple[Step, ...]
    missed: tuple[str, ...]
    measured: int
    remembered: int
    judged_on: str

    def __repr__(self) -> str:
        return self.text()

    @property
    def is_met(self) -> bool:
        """Whether all targets are met."""
        return not self.missed

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "met": self.is_met,
            "missed": list(self.missed),
            "judged_on": self.judged_on,
            "start": self.start.to_dict(),
            "outcome": self.outcome.to_dict(),
            "steps": [step.to_dict() for step in self.steps],
            "lowerings": self.measured,
            "remembered": self.remembered,
            "recipe": self.recipe.to_dict(),
        }

    def text(self) -> str:
        """Print for people."""
        lines = [f"measured on {self.judged_on}: {_outcome_text(self.start)}"]
        lines += [f"{number}. {step.text()}" for number, step in enumerate(self.steps, 1)]
        lines.append(f"{'met' if self.is_met else 'not met'}: {_outcome_text(self.outcome)}")
        lines += [f"  {reason}" for reason in self.missed]
        lines.append(f"{self.measured} settings lowered, {self.remembered} facts from the cache")
        return "\n".join(lines)


@float32_by_default()
def tune(
    model: Any,
    calibration: Any,
    data: Any = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    min_sqnr: float | None = None,
    max_bytes: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    judged_on: str | None = None,
    trust: bool = False,
) -> Tuning:
    """Look for the cheapest changes of a recipe that reach targets; compile with ``tuning.recipe`` afterwards.

    Args:
        model: as for :func:`kancompile.compile`.
        calibration: samples to calibrate with.
        data: samples to judge with, with labels for ``max_drop``; ``None`` holds out a part of the calibration samples.
        recipe: where to start.
        max_drop: most points of accuracy or R2 to lose.
        min_sqnr: lowest SQNR of an output in dB.
        max_bytes: most bytes of the file.
        cache: file of facts that makes an interrupted run resumable; ``None`` keeps none.
        held_out: share held out where there is no ``data``.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
        judged_on: which samples judge, in words, where the caller knows better.
        trust: as for :func:`kancompile.compile`.

    Raises:
        KanCompileError: bad input, no target at all, or ``max_drop`` without labels.
    """
    start = read_recipe(recipe)
    targets = Targets(max_drop, min_sqnr, max_bytes if max_bytes is not None else start.max_bytes)
    if targets == Targets():
        raise KanCompileError(
            "tune: found no target, expected max_drop, min_sqnr or max_bytes (--max-drop POINTS, --min-sqnr DB, --max-bytes N)"
        )
    # bits are found here, step by step, not allocated by a compilation
    start = replace(
        start, max_bytes=None, bits_average=None, method="auto" if start.method == "hawq-v2" else start.method
    )
    model = opened(model, trust)
    fitting, judging, judges = samples_for(calibration, data, start, held_out, seed, model=model)
    if max_drop is not None and judging.targets is None:
        raise KanCompileError(
            "max_drop: found data without labels, expected an array 'y' beside 'x' in an .npz, --target-column of a table, a "
            "folder with one subfolder for each class, or a loader of (samples, labels); or use min_sqnr"
        )
    laboratory = open_laboratory(model, fitting, judging, start, seed, device, trust=trust)
    if cache is not None:
        laboratory.memory = TuneCache(Path(cache), depends_on(laboratory))
        if len(laboratory.memory):
            say(f"tune: {len(laboratory.memory)} facts in {os.fspath(cache)!r}")
    return _search(laboratory, targets, judged_on or judges)


def _search(laboratory: Laboratory, targets: Targets, judged_on: str) -> Tuning:
    def size_of(recipe: SettledRecipe) -> int | None:
        return None if targets.max_bytes is None else laboratory.file_bytes(recipe)

    recipe = laboratory.recipe
    start = outcome = laboratory.outcome(recipe)
    size = size_of(recipe)
    steps: list[Step] = []
    has_searched = targets.max_bytes is None
    while targets.missed(outcome, size) and len(steps) < _MOST_STEPS:
        is_over = targets.max_bytes is not None and size is not None and size > targets.max_bytes
        found = None if is_over else _better(laboratory, recipe, outcome, targets)
        if found is None and targets.max_bytes is not None and not has_searched:
            has_searched = True
            found = _within(laboratory, recipe, outcome, targets.max_bytes)
        if found is None and is_over and targets.max_bytes is not None:
            found = _smaller(laboratory, recipe, outcome, targets.max_bytes)
        if found is None:
            break
        steps.append(found)
        say(f"tune: {found.text()}")
        recipe, outcome = found.change.applied(recipe), found.after
        size = size_of(recipe)
    remembered = laboratory.memory.hits if isinstance(laboratory.memory, TuneCache) else 0
    return Tuning(
        recipe.whole,
        start,
        outcome,
        tuple(steps),
        tuple(targets.missed(outcome, size)),
        laboratory.lowerings,
        remembered,
        judged_on,
    )


def _better(laboratory: Laboratory, recipe: SettledRecipe, outcome: Outcome, targets: Targets) -> Step | None:
    """Find the cheapest change that removes noise, ``None`` where none is left."""
    anatomies = [dissect(laboratory, recipe, name) for name in laboratory.integer_layers(recipe)]
    sizes = {anatomy.layer: anatomy for anatomy in anatomies}
    found = [
        (_extra_bytes(suspect.change, sizes, laboratory.program), suspect.predicted_noise, suspect.change)
        for suspect in layer_suspects(laboratory, recipe, outcome, anatomies)
        if suspect.kind != PRECISION and suspect.predicted_noise <= _USEFUL * outcome.noise
    ]
    # what costs nothing is measured whole, for the best of it
    free = [
        _tried(laboratory, recipe, outcome, targets, change, predicted)
        for extra, predicted, change in found
        if extra == 0 and change.is_free
    ]
    kept = [step for step in free if step is not None]
    if kept:
        return min(kept, key=lambda step: step.after.noise)
    for _, predicted, change in sorted(found, key=lambda entry: entry[:2]):
        step = _tried(laboratory, recipe, outcome, targets, change, predicted)
        if step is not None:
            return step
    # wider arithmetic for the layers that cost most
    noise = {
        name: laboratory.outcome(laboratory.alone(recipe, name)).noise
        for name in laboratory.names
        if recipe[name].wider
    }
    for name in sorted(noise, key=lambda name: -noise[name]):
        wider = Change({name: Rung("precision", recipe[name].wider[0]).change})
        left = max(outcome.noise - noise[name], 1e-9 * outcome.noise)
        step = _tried(laboratory, recipe, outcome, targets, wider, left)
        if step is not None:
            return step
    return None


def _tried(
    laboratory: Laboratory, recipe: SettledRecipe, outcome: Outcome, targets: Targets, change: Change, predicted: float
) -> Step | None:
    changed = change.applied(recipe)
    after = laboratory.outcome(changed)
    if not after.noise <= _KEPT * outcome.noise:
        return None
    if targets.max_bytes is not None and laboratory.file_bytes(changed) > targets.max_bytes:
        return None
    gain = 10 * math.log10(outcome.noise / predicted) if predicted > 0 and outcome.noise > 0 else None
    return Step(change, gain, outcome, after)


def _within(laboratory: Laboratory, recipe: SettledRecipe, outcome: Outcome, max_bytes: int) -> Step | None:
    """Search bits and rows together, ``None`` where no other recipe fits."""
    search = BudgetSearch(laboratory, recipe, max_bytes)
    search.run()
    if not search.changes or search.outcome is None:
        return None
    return Step(Change(search.changes), None, outcome, search.outcome)


def _smaller(laboratory: Laboratory, recipe: SettledRecipe, outcome: Outcome, max_bytes: int) -> Step | None:
    """Take weight bits from the layer that loses least by it, ``None`` where no file would be smaller.

    Widths with an ONNX type (4 and 2) are tried beside the next one: others need nodes that widen them, which in small files
    cost more than they save. What makes the file small enough comes first, by its noise; else noise for each byte decides.
    """
    size = laboratory.file_bytes(recipe)
    candidates = []
    for name in laboratory.integer_layers(recipe):
        bits = recipe[name].bits
        for fewer in {bits - 1, 4, 2}:
            if 2 <= fewer < bits:
                change = Change({name: {"weight_bits": fewer}})
                changed = change.applied(recipe)
                after, left = laboratory.outcome(changed), laboratory.file_bytes(changed)
                if left < size:
                    price = after.noise if left <= max_bytes else (after.noise - outcome.noise) / (size - left)
                    candidates.append((left > max_bytes, price, name, fewer, change, after))
    if not candidates:
        return None
    *_, change, after = min(candidates, key=lambda entry: entry[:4])
    return Step(change, None, outcome, after)


def _extra_bytes(change: Change, anatomies: Mapping[str, Anatomy], program: Program) -> int:
    """Predict how much weights and tables grow by a change."""
    extra = 0
    for name, keys in change.layers.items():
        anatomy = anatomies[name]
        layer = program.layer(name)
        weights = program.module(layer.contraction).weight.numel()  # type: ignore[union-attr, operator]
        if "weight_bits" in keys:
            extra += int(weights) * (int(keys["weight_bits"]) - anatomy.weight_bits) // 8
        if "levels" in keys:
            functions = sum(int(program.module(target).k) for target in layer.expansions)  # type: ignore[arg-type, misc]
            extra += functions * (int(keys["levels"]) - anatomy.rows)
        if "function_error" in keys or "lookup" in keys:
            extra += 1  # how many functions come back is known afterwards; what is free comes before
    return extra


def _outcome_text(outcome: Outcome) -> str:
    text = f"SQNR {outcome.sqnr_db:.2f} dB, worst output {outcome.worst_db:.2f} dB"
    if outcome.drop is not None:
        text += f", {outcome.score_text}, drop {outcome.drop:.2f} points"
    return f"{text}, {outcome.constant_bytes} bytes of weights and tables"
