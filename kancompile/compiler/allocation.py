"""Choose bits, rows and functions of every layer together: ``optimize = "size"``, ``"speed"`` or ``"accuracy"``.

Each layer is lowered alone, all others in float, once for every width of its weights, once for every number of rows and once for
every share of its variance that fewer functions may lose. Errors of
different origin add up in variance, and so do those of layers, as second-order sensitivities have it (Dong et al., *HAWQ-V2*,
2020, section 3.1): with ``x[l, o]`` 1 for the option that layer ``l`` gets,

    size, speed:  min  sum x bytes        where  sum x noise[m] <= goal[m]  for every output m
    accuracy:     min  t                  where  sum x noise[m] <= t power[m],  sum x bytes <= budget

This integer program is solved exactly. The model is not exact, so chosen points, and for accuracy the best one that has the
same bits and rows in all layers, are lowered and written, and the measured errors and bytes decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from kancompile.compiler.ladder import chooses_rows
from kancompile.compiler.layer_trials import LayerTrials
from kancompile.compiler.manifest import constant_bytes
from kancompile.errors import KanCompileError
from kancompile.ir import Program
from kancompile.passes import in_one_thread
from kancompile.progress import say
from kancompile.recipe import LayerRecipe, SettledRecipe
from kancompile.validation import decibel

BITS: tuple[int, ...] = (8, 7, 6, 5, 4, 3)
ROWS: tuple[int, ...] = (32, 48, 64, 96, 128, 192, 256, 512, 1024)
_FEW_BITS: tuple[int, ...] = (8, 6, 4)
_FEW_ROWS: tuple[int, ...] = (64, 256)
_FINEST, _MOST_POINTS, _MOST_ROUNDS, _MARGIN_DB = 2048, 5, 20, 0.2
_CHANNEL_SHARES, _JOINT_SHARES = (5e-5, 1e-3, 4e-3), (3e-4, 1.2e-3, 5e-3)
"""Shares of variance that fewer functions of channels, and of inputs that are looked up jointly, may lose."""
_JOINT_FROM, _JOINT_SAMPLES = 512, 1024
"""Columns and samples from which on inputs are looked up jointly on trial."""
_FINER_ROWS: tuple[int, ...] = (4096, 8192)
"""Rows that are measured where those above do not reach a goal."""
_BELOW_BEST_DB = 0.5
"""How much less than the most precise point is aimed at where a goal is out of reach."""
_FUSED_ROWS = 256
"""Rows that one kernel hands over as bytes; more take a Cast and a Clip."""


@dataclass(frozen=True)
class Option:
    """What one layer may get.

    Attributes:
        change: keys of its recipe.
        bytes: of its constants.
        noise: it brings to each output, float64 ``[m]``.
    """

    change: Mapping[str, Any]
    bytes: int
    noise: Tensor


@dataclass(frozen=True)
class Point:
    """Bits and rows of all layers, lowered and measured.

    Attributes:
        changes: keys of the recipe by layer.
        predicted_db, measured_db: SQNR of the worst output, added up, ``None`` where that was not done, and measured.
        bytes: of the file.
    """

    changes: Mapping[str, Mapping[str, Any]]
    predicted_db: float | None
    measured_db: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        layers = {name: dict(change) for name, change in self.changes.items()}
        return {
            "layers": layers,
            "predicted_db": self.predicted_db,
            "measured_db": self.measured_db,
            "bytes": self.bytes,
        }

    def text(self) -> str:
        """Say it in a line."""
        layers = ", ".join(f"{name} {_text(change)}" for name, change in self.changes.items())
        predicted = "" if self.predicted_db is None else f"{self.predicted_db:.1f} dB predicted, "
        errors = f"worst output {predicted}{self.measured_db:.1f}{'' if predicted else ' dB'} measured"
        return f"{self.bytes:,} bytes, {errors}: {layers}"


class Allocator:
    """Measures the options of every layer once, and chooses among them.

    Attributes:
        points: that were lowered and measured, in order.
        missed: what to say where no point reaches the goal.
    """

    def __init__(
        self,
        captured: Program,
        trials: LayerTrials,
        file_bytes: Callable[[SettledRecipe, Program], int],
    ) -> None:
        """Take the float program, what lowers its layers on trial, and what gives the bytes of a file."""
        self.captured, self.trials, self.file_bytes = captured, trials, file_bytes
        self.points: list[Point] = []
        self.missed: str | None = None

    @in_one_thread()
    def choose(self, recipe: SettledRecipe) -> SettledRecipe:
        """Return the recipe with bits and rows for every integer layer; as it is where no point reaches what is wanted.

        Raises:
            KanCompileError: no point fits ``max_bytes``; the message says the smallest that was found.
        """
        names = [name for name in self.trials.names if recipe[name].arithmetic == "int8"]
        options = self._options(recipe, names)
        if not options:
            return recipe
        limit, whole = recipe.whole.max_bytes, recipe.whole
        power = self.trials.measure(self.captured).allowed
        wants_accuracy = whole.optimize == "accuracy"
        goal = max(whole.goal_sqnr or 0.0, whole.min_sqnr or 0.0)
        aimed, budget = goal + _MARGIN_DB, np.inf if limit is None else float(limit)
        if not wants_accuracy and choose_options(options, power, aimed, budget) is None:
            options = self._with_finer_rows(recipe, options)
            if choose_options(options, power, aimed, np.inf) is None:
                reached = self._most_precise(recipe, options, power)
                self.missed = (
                    f"allocation: no bits and rows reach {goal:.1f} dB; the most precise file has {reached:.1f} dB"
                )
                say(self.missed)
                aimed = goal = reached - _BELOW_BEST_DB
        for _ in range(_MOST_ROUNDS):
            chosen = choose_options(options, power, None if wants_accuracy else aimed, budget)
            if chosen is None or len(self.points) == _MOST_POINTS:
                break
            point, is_new = self._measured(recipe, chosen, power)
            if limit is not None and (wants_accuracy or point.bytes > limit):
                if not is_new and point.bytes <= limit:
                    break
                # what a file takes besides constants is known once one is written
                left = sum(option.bytes for option in chosen.values()) - (point.bytes - limit)
                budget = left if is_new and wants_accuracy else min(budget, left) - (0 if is_new else 16)
            elif wants_accuracy or (not is_new and point.measured_db >= goal):
                break
            else:  # as far as the model was wrong last time; where nothing else came of it, a little further
                aimed += goal - point.measured_db + _MARGIN_DB / 2 if is_new else _MARGIN_DB
        if wants_accuracy:
            uniform = _best_uniform(options, power, budget)
            if uniform is not None:
                self._measured(recipe, uniform, power)
            self._measure_widest(recipe, names, limit)
        fitting = [point for point in self.points if limit is None or point.bytes <= limit]
        if limit is not None and not fitting:
            found = f", the smallest found takes {min(p.bytes for p in self.points):,}" if self.points else ""
            raise KanCompileError(
                f'recipe: optimize = "{whole.optimize}" found no file of at most {limit:,} bytes{found}; raise max_bytes, or '
                "lower goal_sqnr"
            )
        if wants_accuracy:
            best = max(fitting, key=lambda point: point.measured_db, default=None)
        else:
            good = [point for point in fitting if point.measured_db >= goal]
            best = min(good, key=lambda point: point.bytes, default=None)
        return recipe if best is None else recipe.with_overrides(best.changes)

    def notes(self) -> list[str]:
        """Return lines for the report."""
        said = [] if self.missed is None else [self.missed]
        return said + [f"allocation: {point.text()}" for point in self.points]

    def _options(self, recipe: SettledRecipe, names: Sequence[str]) -> dict[str, list[Option]]:
        """Measure widths and rows of every layer; their errors add up."""
        bits, rows = (
            (BITS, ROWS) if len(names) * (len(BITS) + len(ROWS)) <= self.trials.left else (_FEW_BITS, _FEW_ROWS)
        )
        if recipe.whole.optimize == "speed":
            rows = tuple(count for count in rows if count <= _FUSED_ROWS)
        found: dict[str, list[Option]] = {}
        for name in names:
            say(f"allocation: measuring layer {name} ...")
            layer, has_rows = recipe[name], chooses_rows(self.captured, name)
            finest = {"levels": layer.levels or _FINEST} if has_rows else {}
            widths = [layer.weight_bits] if layer.is_ternary else bits
            by_bits = {width: self.trials.trial(recipe, name, {"weight_bits": width, **finest}) for width in widths}
            others = [
                (way, self.trials.trial(recipe, name, {"weight_bits": widths[0], **way}))
                for way in ([{"levels": count} for count in rows] if has_rows and layer.levels is None else [])
                + _functions_of(self.captured, name, layer, self.trials.samples)
            ]
            in_float = constant_bytes(self.captured, name)
            known = by_bits[widths[0]]
            if known is None:
                return {}
            found[name] = [
                Option({"weight_bits": width, **finest}, in_float + one.extra_bytes, one.noise)
                for width, one in by_bits.items()
                if one is not None and (recipe.whole.optimize != "speed" or not others)
            ] + [
                Option(
                    {"weight_bits": width, **way},
                    # fewer functions have fewer weights, of which each takes fewer bits
                    in_float
                    + other.extra_bytes
                    + (one.extra_bytes - known.extra_bytes) * other.weights // max(1, known.weights),
                    one.noise + (other.noise - known.noise).clamp(min=0),
                )
                for width, one in by_bits.items()
                for way, other in others
                if one is not None and other is not None
            ]
        return found

    def _with_finer_rows(
        self, recipe: SettledRecipe, options: Mapping[str, Sequence[Option]]
    ) -> dict[str, list[Option]]:
        """Add tables of more rows, which functions that are steep between knots may need."""
        if recipe.whole.optimize == "speed":
            return {name: list(few) for name, few in options.items()}
        found: dict[str, list[Option]] = {}
        for name, few in options.items():
            finest = [option for option in few if option.change.get("levels") == _FINEST]
            found[name] = list(few)
            for count in _FINER_ROWS if finest else ():
                known = finest[0]
                one = self.trials.trial(recipe, name, {**known.change, "levels": count})
                if one is None:
                    break
                extra = constant_bytes(self.captured, name) + one.extra_bytes - known.bytes
                found[name] += [
                    Option(
                        {**option.change, "levels": count},
                        option.bytes + extra,
                        one.noise + (option.noise - known.noise).clamp(min=0),
                    )
                    for option in finest
                ]
        return found

    def _most_precise(self, recipe: SettledRecipe, options: Mapping[str, Sequence[Option]], power: Tensor) -> float:
        """Measure the point of least predicted error; give its worst output in dB."""
        chosen = choose_options(options, power, None, np.inf)
        return -np.inf if chosen is None else self._measured(recipe, chosen, power)[0].measured_db

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

    def _measured(self, recipe: SettledRecipe, chosen: Mapping[str, Option], power: Tensor) -> tuple[Point, bool]:
        """Lower and write a point; give what was measured, and whether it is measured for the first time."""
        changes = {name: option.change for name, option in chosen.items()}
        known = next((point for point in self.points if point.changes == changes), None)
        if known is not None:
            return known, False
        noise = torch.stack([option.noise for option in chosen.values()]).sum(0)
        return self._written(recipe, changes, _worst_db(power, noise)), True

    def _written(
        self, recipe: SettledRecipe, changes: Mapping[str, Mapping[str, Any]], predicted_db: float | None
    ) -> Point:
        refined = recipe.with_overrides(changes)
        program = self.trials.lower(refined)
        measured = self.trials.measure(program).worst_db
        point = Point(changes, predicted_db, measured, self.file_bytes(refined, program))
        say(f"allocation: {point.text()}")
        self.points.append(point)
        return point


def _functions_of(captured: Program, name: str, layer: LayerRecipe, samples: int) -> list[dict[str, Any]]:
    """List the shares of variance that fewer functions of a layer may lose: of channels, or of inputs looked up jointly.

    The latter are fitted to samples: with 256 of them, digits 64-64-10 kept 25.0 dB on these and
    20.5 on others, with 1,024 25.1 and 23.3.
    """
    if captured.kinds.get(name) is not None or layer.function_error is not None:
        return []
    if not chooses_rows(captured, name):
        return [{"function_error": share} for share in _CHANNEL_SHARES]
    is_free = (
        layer.lookup == "auto" and layer.granularity == "channel" and layer.table_bits == 8 and layer.levels is None
    )
    wide = captured.contraction(captured.layer(name)).products >= _JOINT_FROM and samples >= _JOINT_SAMPLES
    return [{"lookup": "joint", "function_error": share} for share in (_JOINT_SHARES if is_free and wide else ())]


def choose_options(
    options: Mapping[str, Sequence[Option]], power: Tensor, goal_db: float | None, max_bytes: float
) -> dict[str, Option] | None:
    """Choose one option for each layer: fewest bytes at a goal, or least share of noise within ``max_bytes`` without one.

    Args:
        options: by layer.
        power: of each output about its mean, float64 ``[m]``.
        goal_db: SQNR that every output must have.
        max_bytes: of all constants together.
    """
    flat = [(name, option) for name, few in options.items() for option in few]
    varies = power > 0
    share = np.stack([(option.noise / power)[varies].numpy() for _, option in flat], axis=1)  # [m, options]
    size = np.array([float(option.bytes) for _, option in flat])
    owner = np.array([[float(name == own) for own, _ in flat] for name in options])
    finite = np.isfinite(share).all(0)
    # the solver's tolerances are absolute: shares of noise are brought to order 1
    unit = 10 ** (-goal_db / 10) if goal_db is not None else float(np.median(share[:, finite].max(0))) or 1.0
    share = np.where(np.isfinite(share), share / unit, 0.0)
    limits = [LinearConstraint(np.c_[owner, np.zeros(len(owner))], 1, 1)]
    if np.isfinite(max_bytes):
        limits.append(LinearConstraint(np.r_[size, 0][None], -np.inf, max_bytes))
    limits.append(LinearConstraint(np.c_[share, -np.ones(len(share))], -np.inf, 0))
    whole = np.r_[np.ones(len(flat)), 0.0]
    most = np.r_[finite.astype(float), np.inf if goal_db is None else 1.0]
    # of equal points the smaller one, and of as small ones the more precise one
    aim = np.r_[size, 1e-3] if goal_db is not None else np.r_[size * 1e-9 / max(1.0, float(np.abs(size).max())), 1.0]
    result = milp(aim, integrality=whole, bounds=Bounds(0, most), constraints=limits, options={"mip_rel_gap": 0.0})
    if result.x is None:
        return None
    return {name: option for (name, option), taken in zip(flat, result.x, strict=False) if taken > 0.5}


def _best_uniform(options: Mapping[str, Sequence[Option]], power: Tensor, max_bytes: float) -> dict[str, Option] | None:
    """Choose the best point at which all layers have the same width and, where they have a choice, the same rows."""
    best: tuple[float, dict[str, Option]] | None = None
    for option in next(iter(options.values())):
        width = option.change["weight_bits"]
        for rows in dict.fromkeys(one.change.get("levels") for few in options.values() for one in few):
            chosen = {
                name: next((one for one in few if _is_of(one, width, rows)), None) for name, few in options.items()
            }
            point = {name: one for name, one in chosen.items() if one is not None}
            if len(point) < len(options) or sum(one.bytes for one in point.values()) > max_bytes:
                continue
            worst = _worst_db(power, torch.stack([one.noise for one in point.values()]).sum(0))
            if best is None or worst > best[0]:
                best = worst, point
    return None if best is None else best[1]


def _is_of(option: Option, width: Any, rows: int | None) -> bool:
    return bool(option.change["weight_bits"] == width) and option.change.get("levels", rows) == rows


def _worst_db(power: Tensor, noise: Tensor) -> float:
    return min(decibel(float(a), float(b)) for a, b in zip(power, noise, strict=True) if a > 0)


def _text(change: Mapping[str, Any]) -> str:
    rows = f" and {change['levels']} rows" if "levels" in change else ""
    lost = (
        f", {'joint ' if 'lookup' in change else ''}functions within {change['function_error']:g}"
        if "function_error" in change
        else ""
    )
    return f"{change['weight_bits']} bits{rows}{lost}"
