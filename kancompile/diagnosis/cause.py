"""Causes of a large error, each with its evidence, what to change, and what the change was predicted and measured to bring."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kancompile.compiler import FREE, KIND_OF_KEY
from kancompile.diagnosis.laboratory import Outcome
from kancompile.recipe import SettledRecipe
from kancompile.validation import plain_number, points

PREPROCESSING = "preprocessing"
GRID = "inputs outside the grid"
OUTLIER = "outlier feature"
UNSEEN = "inputs outside the calibrated range"
SAMPLES = "too few samples"
RANGE = "table range"
HAND_OVER = "hand-over range"
LEVELS = "levels"
BITS = "weight bits"
METHOD = "rounding method"
FUNCTIONS = "functions looked up"
PRECISION = "precision"
SATURATION = "saturation"
KINDS = (
    PREPROCESSING,
    GRID,
    OUTLIER,
    UNSEEN,
    SAMPLES,
    RANGE,
    HAND_OVER,
    LEVELS,
    BITS,
    METHOD,
    FUNCTIONS,
    SATURATION,
    PRECISION,
)

TRIED = (RANGE, LEVELS, METHOD, FUNCTIONS, BITS, PRECISION)
"""Kinds that a diagnosis predicts for every layer, and measures where they are worth it."""

STANDS_OUT_DB = 3.0
"""What a single change must bring to stand out: half of the noise gone."""
WORTH_TRYING_DB = 0.5
"""What a change must be predicted to bring to be measured."""
GOOD_DB = 30.0
"""Ratio of the worst output from which on 16 bits, which always bring more, are no remedy of anything."""
STANDS_OUT_POINTS = 2.0
"""The same in points of accuracy or R2, for causes that spoil the task and not only the ratio."""


@dataclass(frozen=True)
class Change:
    """What to do: recipe keys for layers, recipe keys for the whole model, or something about the data.

    Attributes:
        layers: recipe keys and values by layer name.
        keys: recipe keys and values of the whole model.
        advice: what to do about the data, in words.
    """

    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    @property
    def is_free(self) -> bool:
        """Whether it costs neither bytes nor time: other rounding, ranges or column scales."""
        keys = {key for changed in self.layers.values() for key in changed} | set(self.keys)
        return bool(keys) and all(KIND_OF_KEY.get(key) == FREE for key in keys)

    def applied(self, recipe: SettledRecipe) -> SettledRecipe:
        """Return the recipe with this change."""
        changed = replace(recipe.whole, **self.keys).settled(recipe.layers) if self.keys else recipe
        return changed.with_overrides(self.layers) if self.layers else changed

    def text(self) -> str:
        """Say it as options of the command line, or in words."""
        parts = [f"--{key.replace('_', '-')} {value}" for key, value in self.keys.items()]
        parts += [
            f"--layer {name!r} " + " ".join(f"{key}={value}" for key, value in keys.items())
            for name, keys in self.layers.items()
        ]
        return "; ".join([*([self.advice] if self.advice else []), *([" ".join(parts)] if parts else [])])

    def toml(self) -> str:
        """Write the recipe part of it as lines of a recipe file, empty where there is none."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.keys.items()]
        for name, keys in self.layers.items():
            lines += [f"[layers.{json.dumps(name)}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        layers = {name: dict(keys) for name, keys in self.layers.items()}
        text = {"advice": self.advice, "text": self.text(), "is_free": self.is_free}
        return {"layers": layers, "keys": dict(self.keys), **text}


@dataclass(frozen=True)
class Effect:
    """What a change brings, as outcome before and after; ``None`` where it was not or cannot be measured.

    Attributes:
        predicted_db: gain of the output SQNR that the evidence lets expect, ``None`` where it says nothing.
        predicted_points: the same for accuracy or R2.
        before, after: outcomes on the same samples.
    """

    predicted_db: float | None = None
    predicted_points: float | None = None
    before: Outcome | None = None
    after: Outcome | None = None

    @property
    def gain_db(self) -> float | None:
        """Measured gain of the output SQNR."""
        if self.before is None or self.after is None:
            return None
        if math.isinf(self.after.sqnr_db) and math.isinf(self.before.sqnr_db):
            return 0.0
        return self.after.sqnr_db - self.before.sqnr_db

    @property
    def gain_points(self) -> float | None:
        """Measured gain of accuracy or overlap in percent, or hundredths of R2."""
        if self.before is None or self.after is None or self.before.metric is None:
            return None
        if self.before.score is None or self.after.score is None:
            return None
        return points(self.before.metric, self.after.score - self.before.score)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "predicted_db": plain_number(self.predicted_db),
            "predicted_points": plain_number(self.predicted_points),
            "measured_db": plain_number(self.gain_db),
            "measured_points": plain_number(self.gain_points),
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
        }


@dataclass(frozen=True)
class Cause:
    """One suspected or proven cause.

    Attributes:
        kind: one of ``KINDS``.
        layers: concerned layers, empty where it is about the data as a whole.
        title: what is wrong, in one line.
        evidence: numbers that say so, by name.
        change: what to do.
        effect: what that brings.
        spoils_measurement: whether the samples themselves are wrong, so that no other measurement on them says anything.
        is_evident: whether the evidence suffices, since without labels no measurement can tell.
    """

    kind: str
    layers: tuple[str, ...]
    title: str
    evidence: Mapping[str, Any]
    change: Change
    effect: Effect
    spoils_measurement: bool = False
    is_evident: bool = False

    @property
    def stands_out(self) -> bool:
        """Whether its change brings so much, or its evidence is such, that it explains a bad result."""
        if self.is_evident:
            return True
        before = self.effect.before
        if self.kind == PRECISION and before is not None and before.worst_db >= GOOD_DB:
            return False
        db, points = self.effect.gain_db, self.effect.gain_points
        return (db is not None and db >= STANDS_OUT_DB) or (points is not None and points >= STANDS_OUT_POINTS)

    @property
    def weight(self) -> tuple[bool, bool, bool, bool, float]:
        """What causes are ranked by: wrong samples, what is free, the gain in dB; then 16 bits and what was not measured."""
        gain = self.effect.gain_db
        stands_out = self.stands_out
        return (
            self.spoils_measurement and stands_out,
            stands_out,
            stands_out and self.change.is_free,
            self.kind != PRECISION,
            -math.inf if gain is None else gain,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "kind": self.kind,
            "layers": list(self.layers),
            "title": self.title,
            "evidence": {k: plain_number(v) if isinstance(v, float) else v for k, v in self.evidence.items()},
            "change": self.change.to_dict(),
            "effect": self.effect.to_dict(),
            "stands_out": self.stands_out,
        }


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """Sort causes, the largest first; ties keep their order."""
    return sorted(causes, key=lambda cause: cause.weight, reverse=True)
