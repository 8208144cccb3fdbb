"""Hold every output of a compilation to a goal, first by what costs nothing at run time.

The lowered program, whose evaluation is what the file computes, is compared with the float one on calibration samples, every
output about its mean. Where an output misses the goal, the float program is replayed with one lowered layer at a time, which
says how much noise each of them brings there. Those above an equal share of what is allowed go up the ladder (``ladder``): other
rounding, ranges and column scales, then rows, then functions. Sixteen bits are taken only where an output would stay below
:data:`RUINED_DB`, or where the constants stay no larger than the float model's or than they are, which happens where inputs have
tables of their own: integers are what the file is for. Rows of such tables are not taken where they would exceed that and 16
bits would not. No layer gets what files of the target do not hold, and what files of further targets do not hold only where an
output is ruined or a limit missed. What is left is said, with the next step.

A goal leaves what a recipe chose, a key whose value is not its default, as it is, unless an output is ruined. ``min_sqnr`` is a
limit, not a goal: for it every key may change and layers go on to 16 bits and float; where that does not suffice it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kancompile.compiler.ladder import BITS, FREE, PRECISION, ROWS, Rung, gate_rungs, has_own_tables
from kancompile.compiler.layer_trials import LayerTrials, Trial
from kancompile.compiler.manifest import constant_bytes
from kancompile.compiler.refinement import NextStep, Refinement
from kancompile.data import Calibration
from kancompile.errors import KanCompileError, ThresholdMissedError
from kancompile.ir import Program, first_of
from kancompile.passes import ObserveRegion
from kancompile.progress import quiet, say
from kancompile.recipe import LayerRecipe, Recipe, SettledRecipe
from kancompile.targets import Target
from kancompile.validation import CLASSES, RUINED_DB, ErrorMeasure, OutputError, PairedDecisions, TaskMetric, decibel

FEW_BITS_DB = 20.0
"""The goal with fewer than 8 bits, whose error a user has chosen."""
_UNLIKE = 100.0
_MOST_ROUNDS = 6
_FREE_GAIN_DB, _COSTLY_GAIN_DB = 0.5, 3.0


class ErrorGate:
    """Refines a recipe until every output of the program that it makes reaches its goal.

    Attributes:
        refinements: what was refined, in order.
        worst: the worst output in the end; ``None`` where nothing was measured.
        next_step: what would help where an output stays below its goal.
        paired: decisions on labeled calibration samples, where labels are classes.
    """

    def __init__(
        self,
        captured: Program,
        samples: Calibration,
        lower: Callable[[SettledRecipe], Program],
        float_bytes: int | None = None,
        file_bytes: Callable[[SettledRecipe, Program], int] | None = None,
        most_bytes: int | None = None,
        targets: Sequence[Target] = (),
    ) -> None:
        """Take what is compared.

        Args:
            captured: the float program.
            samples: calibration samples.
            lower: lowers by a recipe.
            float_bytes: bytes of the float model's parameters, where they are known.
            file_bytes: bytes of the file that a program makes; of its constants alone where it is not given.
            most_bytes: of a file that fits, whose recipe is refined no further than that allows.
            targets: of the file, and of further files of the same program; none where all is held.
        """
        self.captured, self.samples, self.lower, self.float_bytes = captured, samples, lower, float_bytes
        self.file_bytes = file_bytes or (lambda _, program: constant_bytes(program))
        self.most_bytes, self.targets = most_bytes, targets
        self.trials = LayerTrials(captured, samples.samples, lower)
        self.refinements: list[Refinement] = []
        self.worst: OutputError | None = None
        self.next_step: NextStep | None = None
        self.paired: PairedDecisions | None = None
        self.wanted = 0.0
        self.outputs_differ_in_scale = False
        self._chosen: dict[str, frozenset[str]] = {}
        self._left: dict[str, list[LayerRecipe]] = {}  # what each layer was refined from, which it does not go back to

    def hold(self, recipe: SettledRecipe) -> tuple[SettledRecipe, Program]:
        """Return the recipe, refined where needed, and the program that it makes.

        Raises:
            ThresholdMissedError: ``min_sqnr`` cannot be reached.
        """
        program = self.lower(recipe)
        if recipe.whole.goal_sqnr is None and recipe.whole.min_sqnr is None:
            return recipe, program
        self._chosen = {name: _not_default(recipe[name]) for name in self.trials.names}
        measured = self._measure(program)
        best = recipe, program, measured, 0
        for _ in range(_MOST_ROUNDS):
            known = len(self.refinements)
            if measured.worst_db >= best[2].worst_db:
                best = recipe, program, measured, known
            if not self._misses(recipe, program, measured):
                break
            refined = self._refined(recipe, program, measured)
            if refined is recipe:
                break
            try:
                recipe, program = refined, self.lower(refined)
            except KanCompileError:  # 16 bits that were taken without a trial, for functions without such a form
                if _misses_limit(recipe, measured):
                    raise
                del self.refinements[known:]
                break
            if self.most_bytes is not None and self.file_bytes(recipe, program) > self.most_bytes:
                recipe, program, measured, known = best  # what a recipe says more takes bytes of the file, too
                del self.refinements[known:]
                break
            measured = self._measure(program)
        if best[2].worst_db > measured.worst_db:  # layers that each did better alone need not do so together
            recipe, program, measured, known = best
            del self.refinements[known:]
        self.worst = measured.worst
        if recipe.whole.min_sqnr is not None and not measured.worst_db >= recipe.whole.min_sqnr:
            raise ThresholdMissedError(self._failure(recipe, measured))
        if self._misses(recipe, program, measured):
            self.next_step = self._next_step(recipe, program)
        return recipe, program

    def to_dict(self, recipe: Recipe) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {
            "min_sqnr": recipe.min_sqnr,
            "goal_sqnr": recipe.goal_sqnr,
            "wanted": self.wanted,
            "refinements": [step.to_dict() for step in self.refinements],
            "worst": None if self.worst is None else self.worst.to_dict(),
            "outputs_differ_in_scale": self.outputs_differ_in_scale,
            "next_step": None if self.next_step is None else self.next_step.to_dict(),
        }

    def notes(self) -> list[str]:
        """Return lines for the report."""
        found = [step.note(self.wanted) for step in self.refinements]
        if found and self.worst is not None:
            found.append(
                f"error gate: after that the worst output is at {self.worst.sqnr_db:.1f} dB on the calibration samples"
            )
        return found

    def _misses(self, recipe: SettledRecipe, program: Program, measured: ErrorMeasure) -> bool:
        """Whether an output misses what is wanted of it; sets what that is."""
        goals = [] if recipe.whole.goal_sqnr is None else [self._goal(recipe)]
        limits = [] if recipe.whole.min_sqnr is None else [recipe.whole.min_sqnr]
        self.wanted = max([*goals, *limits])
        if measured.noise == 0 or measured.worst_db >= self.wanted:
            return False
        if limits and not measured.worst_db >= limits[0]:
            return True
        return not self._decides_alike(program)

    def _goal(self, recipe: SettledRecipe) -> float:
        assert recipe.whole.goal_sqnr is not None
        integer = [recipe[name] for name in self.trials.names if recipe[name].arithmetic == "int8"]
        bits = [min(layer.bits, layer.table_bits) for layer in integer]
        return min(recipe.whole.goal_sqnr, FEW_BITS_DB) if bits and min(bits) < 8 else recipe.whole.goal_sqnr

    def _decides_alike(self, program: Program) -> bool:
        """Whether labels are classes and no more decisions change than chance explains: then the error does not matter."""
        if self.samples.targets is None:
            return False
        before, after = TaskMetric(), TaskMetric()
        try:
            for x, y in self.samples.batches():
                assert y is not None
                before.add(y, first_of(self.captured(x)), "calibration")
                after.add(y, first_of(program(x)), "calibration")
        except KanCompileError:  # labels of calibration samples need not be those of this model
            return False
        first, second = before.decisions, after.decisions
        if before.kind != CLASSES or first is None or second is None:
            return False
        self.paired = PairedDecisions.of(first, second)
        return self.paired.is_within_chance

    def _measure(self, program: Program) -> ErrorMeasure:
        measure = self.trials.measure(program)
        spreads = (measure.allowed / max(1, measure.rows)).sqrt()[~measure.is_constant]
        self.outputs_differ_in_scale = len(spreads) > 1 and float(spreads.max()) > _UNLIKE * float(spreads.min())
        return measure

    def _refined(self, recipe: SettledRecipe, program: Program, measured: ErrorMeasure) -> SettledRecipe:
        """Take the layers that bring most of the noise a step up the ladder; the same recipe where no step helps."""
        suspects = [name for name in self.trials.names if recipe[name].wider]
        if not suspects:
            return recipe
        allowed = (measured.allowed * 10 ** (-self.wanted / 10) / len(suspects)).clamp(min=1e-300)
        noise = self.trials.noise_now(program, suspects)
        excess = {name: float((noise[name] / allowed).max()) for name in suspects}
        missed = measured.worst
        assert missed is not None
        say(
            f"error gate: output {missed.called} at {missed.sqnr_db:.1f} dB, goal {self.wanted:g} dB; trying finer layers ..."
        )
        # where every layer stays below its share but all together do not, the worst one is refined
        chosen = [name for name in suspects if excess[name] > 1] or [max(suspects, key=lambda n: excess[n])]
        chosen.sort(key=lambda name: -excess[name])
        before = recipe
        for may_widen in (False, True):
            for name in chosen:
                found = self._best(recipe, program, name, measured, allowed, may_widen)
                if found is not None and _is_worth_it(found[0], found[2], excess[name]):
                    rung, trial, _ = found
                    recipe = self._taken(recipe, name, rung, measured, noise[name], allowed, trial)
            if recipe is not before:
                return recipe
        if self._must_widen(recipe, measured):  # and no trial is left to tell where that is worth it
            for name in chosen:
                rung = Rung("precision", recipe[name].wider[0])
                is_unasked = rung.value == "float" and not _misses_limit(recipe, measured)
                if is_unasked or not self._is_held(rung):
                    continue
                recipe = self._taken(recipe, name, rung, measured, noise[name], allowed, None)
        return recipe

    def _best(
        self,
        recipe: SettledRecipe,
        program: Program,
        name: str,
        measured: ErrorMeasure,
        allowed: Tensor,
        may_widen: bool,
    ) -> tuple[Rung, Trial, float] | None:
        """Try steps until one suffices; give the best with its share of the noise that is allowed."""
        best: tuple[Rung, Trial, float] | None = None
        affordable = self._affordable(recipe, program, name, measured)
        wider = next((rung for rung in affordable if rung.kind == PRECISION), None)
        for rung in affordable:
            been_there = replace(recipe[name], **rung.change) in self._left.get(name, ())
            if (rung.kind == PRECISION) != may_widen or been_there:
                continue
            trial = self.trials.trial(recipe, name, rung.change)
            if trial is None:
                break
            if (
                rung.kind == ROWS
                and wider is not None
                and has_own_tables(program, name)
                and not self._stays_small(recipe, program, name, trial)
                and (other := self.trials.trial(recipe, name, wider.change)) is not None
                and self._stays_small(recipe, program, name, other)
            ):
                continue
            if (
                rung.kind == PRECISION
                and not self._must_widen(recipe, measured)
                and not self._stays_small(recipe, program, name, trial)
            ):
                continue
            share = float((trial.noise / allowed).max())
            if best is None or share < best[2]:
                best = rung, trial, share
            if share <= 1:
                break
        return best

    def _taken(
        self,
        recipe: SettledRecipe,
        name: str,
        rung: Rung,
        measured: ErrorMeasure,
        noise: Tensor,
        allowed: Tensor,
        trial: Trial | None,
    ) -> SettledRecipe:
        """Change the recipe and note why."""
        output = int((noise / allowed).argmax())
        signal = float(measured.allowed[output])
        step = Refinement(
            name,
            output,
            measured.output(output).sqnr_db,
            decibel(signal, float(noise[output])),
            None if trial is None else decibel(signal, float(trial.noise[output])),
            rung.kind,
            rung.change,
        )
        say(step.note(self.wanted))
        self.refinements.append(step)
        self._left.setdefault(name, []).append(recipe[name])
        return recipe.with_overrides({name: rung.change})

    def _affordable(self, recipe: SettledRecipe, program: Program, name: str, measured: ErrorMeasure) -> list[Rung]:
        """List the steps that may be taken unasked: what recipe and budget leave open, 16 bits but float only for a limit."""
        by_all = not self._must_widen(recipe, measured)
        steps = gate_rungs(recipe[name], self.captured, program, name)
        steps = [step for step in steps if step.kind != BITS and self._is_held(step, by_all)]
        if _misses_limit(recipe, measured):
            return steps
        if not _is_ruined(measured):
            steps = [step for step in steps if step.key not in self._chosen[name]]
        if recipe.whole.max_bytes is not None or recipe.whole.max_latency_us is not None:
            return [step for step in steps if step.kind == FREE]
        return [step for step in steps if step != Rung("precision", "float")]

    def _is_held(self, rung: Rung, by_all: bool = False) -> bool:
        """Whether the file, or by all also further files of the same program, can hold a layer that is lowered so."""
        return all(target.holds(rung.change) for target in (self.targets if by_all else self.targets[:1]))

    def _must_widen(self, recipe: SettledRecipe, measured: ErrorMeasure) -> bool:
        """Whether 16 bits are worth what they cost: for a limit, or for a ruined output that no budget of bytes forbids."""
        return _misses_limit(recipe, measured) or (_is_ruined(measured) and recipe.whole.max_bytes is None)

    def _stays_small(self, recipe: SettledRecipe, program: Program, name: str, trial: Trial) -> bool:
        """Whether all constants take no more than the float model's parameters, or than now, with one layer in 16 bits.

        Its functions take no longer then: those that PyTorch's operators compute faster stay as they are
        (``lower_to_polynomials``). Where a user chose fewer bits, those are kept.
        """
        now = self.trials.trial(recipe, name, {})
        if self.float_bytes is None or now is None or min(recipe[name].bits, recipe[name].table_bits) < 8:
            return False
        constants = constant_bytes(program)
        return constants - now.extra_bytes + trial.extra_bytes <= max(self.float_bytes, constants)

    def _next_step(self, recipe: SettledRecipe, program: Program) -> NextStep | None:
        """Measure what the recipe's own choices cost, then what 16 bits would bring, in the fewest layers that suffice."""
        integer = [name for name in self.trials.names if recipe[name].arithmetic == "int8"]
        if not integer:
            return None
        noise = self.trials.noise_now(program, integer)
        order = sorted(integer, key=lambda name: -float(noise[name].sum()))
        now = self.file_bytes(recipe, program)
        best: NextStep | None = None
        for change in self._proposed(recipe, program, order[0]):
            for count in dict.fromkeys((1, len(order)) if self.trials.left > 0 else (len(order),)):
                try:
                    with quiet():
                        changed = recipe.with_overrides(dict.fromkeys(order[:count], change))
                        better = self.lower(changed)
                        more = self.file_bytes(changed, better) - now
                except KanCompileError:  # functions, or a target, without such a form
                    continue
                lacking = tuple(one.name for one in self.targets[1:] if not one.holds(change))
                step = NextStep(tuple(order[:count]), change, self._measure(better).worst_db, more, lacking)
                if step.worst_db >= self.wanted:
                    return step
                best = step if best is None or step.worst_db > best.worst_db else best
        return best

    def _proposed(self, recipe: SettledRecipe, program: Program, name: str) -> list[Mapping[str, Any]]:
        """List changes of a layer: those that cost no time where its recipe decided otherwise, all bits, the next precision."""
        steps = gate_rungs(recipe[name], self.captured, program, name)
        withheld = [step for step in steps if step.kind in (FREE, ROWS) and step.key in self._chosen[name]]
        bits, wider = ([step for step in steps if step.kind == kind][:1] for kind in (BITS, PRECISION))
        proposed = (*(withheld if self.trials.left > 0 else ()), *bits, *wider)
        return [step.change for step in proposed if self._is_held(step)]

    def _failure(self, recipe: SettledRecipe, measured: ErrorMeasure) -> str:
        kept = [name for name in self.trials.names if recipe[name].lowering == "keep"]
        worst = measured.worst
        assert worst is not None
        text = f"output {worst.called}: SQNR is {worst.sqnr_db:.2f} dB about its mean on the calibration data, expected at least "
        finest = self.targets[0].precisions[-1] if self.targets else "float"
        text += f"{recipe.whole.min_sqnr:g} (min_sqnr), with every layer in {finest} already"
        text += (
            "" if finest == "float" else f", the finest that target {self.targets[0].name!r} holds: try target ort-cpu"
        )
        text += f" ({kept!r} kept by the recipe)" if kept else ""
        floor = self._float32_rounding()
        if floor is not None:
            text += f"; float32 rounding of the model itself leaves {floor:.1f} dB against float64"
        return text + "; lower min_sqnr, or retrain with wider knots and smaller weights"

    def _float32_rounding(self) -> float | None:
        """Measure the model's outputs in float32 against the same graph in float64, ``None`` where that does not run."""
        try:
            with ObserveRegion(double=True), torch.no_grad():
                exact = self.captured.by_name(self.captured.graph_module(*self.captured.arguments(self.trials.x)))
        except (RuntimeError, TypeError):  # an operator without a float64 kernel, or of mixed types
            return None
        measure = ErrorMeasure()
        measure.add(exact, self.captured(self.trials.x), "model output")
        return measure.worst_db


def _misses_limit(recipe: SettledRecipe, measured: ErrorMeasure) -> bool:
    return recipe.whole.min_sqnr is not None and not measured.worst_db >= recipe.whole.min_sqnr


def _is_ruined(measured: ErrorMeasure) -> bool:
    return not measured.worst_db >= RUINED_DB


def _is_worth_it(rung: Rung, now: float, before: float) -> bool:
    """Whether a step is to be taken: one that costs nothing where it helps, others where they suffice or help much."""
    gain = decibel(before, now)
    return gain >= _FREE_GAIN_DB if rung.kind == FREE else (now <= 1 < before) or gain >= _COSTLY_GAIN_DB


def _not_default(chosen: LayerRecipe) -> frozenset[str]:
    return frozenset(key.name for key in fields(LayerRecipe) if getattr(chosen, key.name) != key.default)
