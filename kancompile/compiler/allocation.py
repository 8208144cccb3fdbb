"""Choose bits, rows and functions of every layer together: within ``max_bytes`` and ``max_latency_us``, or as ``optimize`` says.

``layer_options`` measures what every layer may get, ``option_choice`` chooses among it, exactly for errors, bytes and times that
add up. The model is not exact, so chosen points, their neighbors on the front and, where the error is what counts, the best point
that has the same bits and rows in all layers, are lowered and written, and the measured errors and bytes decide. Of times the
costs of the profile decide, no clock; what a clock found is said beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kancompile.compiler.allocated_point import Changes, Point
from kancompile.compiler.layer_options import BITS, layer_options, with_finer_rows
from kancompile.compiler.layer_trials import LayerTrials
from kancompile.compiler.option_choice import (
    Choice,
    Option,
    best_uniform,
    bytes_of,
    choose_options,
    least,
    nanoseconds_of,
    neighbors,
    noise_of,
    predicted_front,
    worst_db,
)
from kancompile.errors import KanCompileError
from kancompile.ir import Program
from kancompile.passes import in_one_thread
from kancompile.progress import say
from kancompile.recipe import WEIGHT_ONLY, SettledRecipe
from kancompile.validation import plain_number

_MOST_POINTS, _MOST_ROUNDS, _MARGIN_DB = 5, 20, 0.2
_ANY_DB = -1000.0
"""A goal that everything reaches."""
_BELOW_BEST_DB = 0.5
"""How much less than the most precise point is aimed at where a goal is out of reach."""


class Allocator:
    """Measures the options of every layer once, and chooses among them.

    Attributes:
        points: that were lowered and measured, in order.
        chosen: the one whose recipe was taken.
        front: predicted points, plain data, the fewest bytes first.
        missed: what to say where no point reaches the goal.
    """

    def __init__(
        self,
        captured: Program,
        trials: LayerTrials,
        file_bytes: Callable[[SettledRecipe, Program], int],
        microseconds: Callable[[SettledRecipe, Program], float] | None = None,
        other_nanoseconds: float = 0.0,
        float_bytes: int | None = None,
    ) -> None:
        """Take what is compared.

        Args:
            captured: the float program.
            trials: that lower its layers.
            file_bytes: gives the bytes of a file.
            microseconds: measures a call of a file on this machine, ``None`` where it cannot run here.
            other_nanoseconds: estimated of a call beside its integer layers.
            float_bytes: of the model's parameters, ``None`` where layers may not compute in float.
        """
        self.captured, self.trials, self.file_bytes = captured, trials, file_bytes
        self.microseconds, self.other_nanoseconds = microseconds, other_nanoseconds
        self.float_bytes = float_bytes
        self.points: list[Point] = []
        self.chosen: Point | None = None
        self.front: list[dict[str, Any]] = []
        self.missed: str | None = None

    @in_one_thread()
    def choose(self, recipe: SettledRecipe) -> SettledRecipe:
        """Return the recipe with bits and rows for every integer layer; as it is where no point reaches what is wanted.

        Raises:
            KanCompileError: no point fits ``max_bytes`` or ``max_latency_us``; the message says the smallest that was found.
        """
        names = [name for name in self.trials.names if recipe[name].arithmetic == "int8"]
        options = layer_options(self.captured, self.trials, recipe, names)
        if not options:
            return recipe
        whole, power = recipe.whole, self.trials.measure(self.captured).allowed
        limit, time = whole.max_bytes, self._time_budget(recipe, options)
        wants_accuracy = whole.optimize in ("accuracy", "balanced")
        goal = max(whole.goal_sqnr or 0.0, whole.min_sqnr or 0.0)
        aimed, budget = goal + _MARGIN_DB, np.inf if limit is None else float(limit)
        if not wants_accuracy and choose_options(options, power, aimed, budget, time) is None:
            options = with_finer_rows(self.captured, self.trials, recipe, options)
            if choose_options(options, power, aimed, np.inf, time) is None:
                reached = self._most_precise(recipe, options, power, time)
                self.missed = (
                    f"allocation: no bits and rows reach {goal:.1f} dB; the most precise file has {reached:.1f} dB"
                )
                say(self.missed)
                aimed = goal = reached - _BELOW_BEST_DB
        last: Choice | None = None
        for _ in range(_MOST_ROUNDS):
            chosen = choose_options(options, power, None if wants_accuracy else aimed, budget, time)
            if chosen is None or len(self.points) == _MOST_POINTS:
                break
            last = chosen
            point, is_new = self._measured(recipe, chosen, power)
            if limit is not None and (wants_accuracy or point.bytes > limit):
                if not is_new and point.bytes <= limit:
                    break
                # what a file takes besides constants is known once one is written
                left = bytes_of(chosen) - (point.bytes - limit)
                budget = left if is_new and wants_accuracy else min(budget, left) - (0 if is_new else 16)
            elif wants_accuracy or (not is_new and point.measured_db >= goal):
                break
            else:  # as far as the model was wrong last time; where nothing else came of it, a little further
                aimed += goal - point.measured_db + _MARGIN_DB / 2 if is_new else _MARGIN_DB
        if wants_accuracy:
            uniform = best_uniform(options, power, budget, time)
            if uniform is not None:
                self._measured(recipe, uniform, power)
            if not np.isfinite(time):
                self._measure_widest(recipe, names, limit)
        if last is not None and self.microseconds is not None and (limit is not None or np.isfinite(time)):
            for neighbor in neighbors(options, power, last, budget, time):
                self._measured(recipe, neighbor, power)
        if limit is not None and all(point.bytes > limit for point in self.points):
            self._measure_smallest(recipe, options, power, time)
        if whole.optimize == "size" and not np.isfinite(time):
            self._measure_weight_only(recipe, names, goal)
        self.front = [self._predicted(one, power) for one in predicted_front(options, power)]
        self.chosen = self._best(recipe, goal, wants_accuracy)
        return recipe if self.chosen is None else recipe.with_overrides(_differing(recipe, self.chosen.changes))

    def _time_budget(self, recipe: SettledRecipe, options: Mapping[str, Sequence[Option]]) -> float:
        """Give the nanoseconds that all integer layers may take.

        Raises:
            KanCompileError: no choice takes as few.
        """
        whole = recipe.whole
        if whole.max_latency_us is None:
            return np.inf
        left = 1e3 * whole.max_latency_us - self.other_nanoseconds
        fewest = least(options)
        if fewest is None or fewest > left:
            smallest = (self.other_nanoseconds + (fewest or 0.0)) / 1e3
            raise KanCompileError(
                f"max_latency_us {whole.max_latency_us:g}: the smallest reachable latency is {smallest:.4g} us by the costs of "
                f"profile {whole.costs.name!r}, of which {self.other_nanoseconds / 1e3:.4g} are not of integer layers; allow "
                "more, use a narrower model, or measure this machine (kancompile profile --out FILE.toml, --profile FILE.toml)"
            )
        return left

    def _best(self, recipe: SettledRecipe, goal: float, wants_accuracy: bool) -> Point | None:
        """Give the best of the points that fit.

        Raises:
            KanCompileError: none does.
        """
        limit, most_us = recipe.whole.max_bytes, recipe.whole.max_latency_us
        fitting = [
            point
            for point in self.points
            if (limit is None or point.bytes <= limit)
            and (most_us is None or (point.predicted_us is not None and point.predicted_us <= most_us * (1 + 1e-9)))
        ]
        if limit is not None and not fitting:
            smallest = min(point.bytes for point in self.points)
            digits = 0 if recipe.whole.has_short_metadata else len(str(smallest)) - len(str(limit))
            within = "" if most_us is None else f" within {most_us:g} us"
            raise KanCompileError(
                f"max_bytes {limit}: the smallest reachable size is {smallest + max(0, digits)} bytes{within}, of which tables, "
                "scales and the graph take a part; raise the budget, use fewer table rows (levels) or a narrower model"
            )
        if wants_accuracy:
            return max(fitting, key=lambda point: point.measured_db, default=None)
        good = [point for point in fitting if point.measured_db >= goal]
        if most_us is not None and not good:  # no file in time reaches the goal, which a note of the gate says
            return max(fitting, key=lambda point: point.measured_db, default=None)
        return min(good, key=lambda point: point.bytes, default=None)

    def notes(self) -> list[str]:
        """Return lines for the report."""
        said = [] if self.missed is None else [self.missed]
        return said + [f"allocation: {point.text()}" for point in self.points]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest: predicted beside measured points, the one taken, and the front."""
        return {
            "points": [point.to_dict() | {"chosen": point is self.chosen} for point in self.points],
            "front": self.front,
        }

    def _predicted(self, chosen: Choice, power: Tensor) -> dict[str, Any]:
        return {
            "layers": {name: dict(option.change) for name, option in chosen.items()},
            "constant_bytes": bytes_of(chosen),
            "us": self._microseconds_of(chosen),
            "db": plain_number(worst_db(power, noise_of(chosen))),
        }

    def _microseconds_of(self, chosen: Choice) -> float | None:
        """Give what a call is predicted to take, ``None`` where trials tell no times."""
        time = nanoseconds_of(chosen)
        return (self.other_nanoseconds + time) / 1e3 if time else None

    def _most_precise(
        self, recipe: SettledRecipe, options: Mapping[str, Sequence[Option]], power: Tensor, time: float
    ) -> float:
        """Measure the point of least predicted error; give its worst output in dB."""
        chosen = choose_options(options, power, None, np.inf, time)
        return -np.inf if chosen is None else self._measured(recipe, chosen, power)[0].measured_db

    def _measure_smallest(
        self, recipe: SettledRecipe, options: Mapping[str, Sequence[Option]], power: Tensor, time: float
    ) -> None:
        """Measure the fewest constants, and the fewest of 8-bit weights, which need no nodes that unpack them."""
        for widest in (False, True):
            few = {
                name: [one for one in own if not widest or one.change["weight_bits"] in (8, "ternary")]
                for name, own in options.items()
            }
            chosen = choose_options(few, power, _ANY_DB, np.inf, time) if all(few.values()) else None
            if chosen is not None:
                self._measured(recipe, chosen, power)

    def _measure_widest(self, recipe: SettledRecipe, names: Sequence[str], limit: int | None) -> None:
        """Measure the file of most bits that fits where all layers have the same and choose their own rows."""
        if limit is None or any(recipe[name].is_ternary for name in names):
            return
        first, last = 0, len(BITS)  # those before the first are too wide, the last one fits
        while first < last:
            middle = (first + last) // 2
            changes = {name: {"weight_bits": BITS[middle]} for name in names}
            point = self._written(recipe, changes, None)
            first, last = (first, middle) if point.bytes <= limit else (middle + 1, last)

    def _measure_weight_only(self, recipe: SettledRecipe, names: Sequence[str], goal: float) -> None:
        """Measure float arithmetic on weights of 8 bits, where integers take more than half the bytes of the parameters.

        Tables of so small a model are most of its file, and where steep ones need many rows, all of it. Exact integers are given
        up for a file below the parameters only.
        """
        integers = self._best(recipe, goal, False) if recipe.whole.max_bytes is None else None
        if self.float_bytes is None or not names or any(recipe[name].is_ternary for name in names):
            return
        if integers is not None and 2 * integers.bytes <= self.float_bytes:
            return
        with contextlib.suppress(KanCompileError):  # convolutions, and functions without such a form
            point = self._written(recipe, {name: {"precision": WEIGHT_ONLY} for name in names}, None)
            if point.bytes >= self.float_bytes:
                self.points.remove(point)

    def _measured(self, recipe: SettledRecipe, chosen: Choice, power: Tensor) -> tuple[Point, bool]:
        """Lower and write a point; give what was measured, and whether it is measured for the first time."""
        changes = {name: option.change for name, option in chosen.items()}
        known = next((point for point in self.points if point.changes == changes), None)
        if known is not None:
            return known, False
        return self._written(recipe, changes, chosen, power), True

    def _written(
        self, recipe: SettledRecipe, changes: Changes, chosen: Choice | None, power: Tensor | None = None
    ) -> Point:
        refined = recipe.with_overrides(_differing(recipe, changes))
        program = self.trials.lower(refined)
        measured = self.trials.measure(program).worst_db
        size = self.file_bytes(refined, program)
        point = Point(
            changes,
            None if chosen is None or power is None else worst_db(power, noise_of(chosen)),
            measured,
            size,
            None if chosen is None else self._microseconds_of(chosen),
            None if self.microseconds is None else self.microseconds(refined, program),
            None if chosen is None else bytes_of(chosen),
        )
        say(f"allocation: {point.measured_text()}")
        self.points.append(point)
        return point


def _differing(recipe: SettledRecipe, changes: Changes) -> Changes:
    """Leave out what a recipe says already: the file holds what is left."""
    found = {
        name: {key: value for key, value in change.items() if getattr(recipe[name], key) != value}
        for name, change in changes.items()
    }
    return {name: change for name, change in found.items() if change}
