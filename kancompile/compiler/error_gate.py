"""Hold a compilation to a least signal-to-noise ratio, layer by layer.

The lowered program, whose evaluation is what the file computes, is compared with the float one on calibration samples. At
the first layer whose output misses the ratio (errors of earlier layers included), the layers up to it are lowered one at a
time, all others in float, which says how much noise each of them brings there. Those above an equal share of what is
allowed are lowered more finely: with more rows in their tables where that suffices, else in 16 bits, else in float. It
goes on until all layers and the model's output reach the ratio, or nothing is left to refine, which is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import ThresholdMissedError
from kancompile.ir import Contraction, Program, TableExpansion
from kancompile.passes import ObserveRegion
from kancompile.progress import say
from kancompile.recipe import Recipe
from kancompile.validation import ErrorMeasure, LayerErrors, decibel, plain_number

OUTPUT = "model output"
_ELEMENTS = 1 << 18
_FEW, _MANY = 32, 256
_MOST_LEVELS = 1 << 14
_MOST_TABLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Refinement:
    """One layer that was lowered more finely.

    Attributes:
        layer: its name.
        missed: the layer, or the model's output, that missed the ratio.
        sqnr_db: what was found there.
        noise_db: ratio that this layer alone allows there, before.
        refined_db: the same after.
        change: recipe keys and their new values.
    """

    layer: str
    missed: str
    sqnr_db: float
    noise_db: float
    refined_db: float
    change: Mapping[str, Any]

    def note(self, least: float) -> str:
        """Return a line for the report."""
        keys = ", ".join(f"{key} = {value}" for key, value in self.change.items())
        return (
            f"error gate: {self.missed} at {self.sqnr_db:.1f} dB, wanted {least:g}; layer {self.layer!r} alone at "
            f"{self.noise_db:.1f} dB, with {keys} at {self.refined_db:.1f} dB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        numbers = {key: plain_number(getattr(self, key)) for key in ("sqnr_db", "noise_db", "refined_db")}
        return {"layer": self.layer, "missed": self.missed, "change": dict(self.change)} | numbers


class ErrorGate:
    """Refines a recipe until the program that it makes reaches the recipe's ``min_sqnr``.

    Attributes:
        refinements: what was refined, in order.
    """

    def __init__(self, captured: Program, x: Tensor, lower: Callable[[Recipe], Program]) -> None:
        """Take the float program, calibration inputs ``[n, *input_shape]``, and what lowers by a recipe."""
        wanted = max(_FEW, min(_MANY, _ELEMENTS // x[0].numel()))
        self.captured = captured
        self.x = x[:: max(1, len(x) // wanted)][:wanted]
        self.lower = lower
        self.names = [layer.name for layer in captured.layers()]
        self.refinements: list[Refinement] = []
        self._alone: dict[tuple[str, str, tuple[tuple[str, Any], ...]], float] = {}

    def hold(self, recipe: Recipe) -> tuple[Recipe, Program]:
        """Return the recipe, refined where needed, and the program that it makes.

        Raises:
            ThresholdMissedError: the ratio cannot be reached.
        """
        program = self.lower(recipe)
        least = recipe.min_sqnr
        while least is not None and (missed := self._missed(program, least)) is not None:
            place, sqnr, signal = missed
            suspects = [name for name in self._up_to(place) if recipe.for_layer(name).arithmetic in ("int8", "int16")]
            if not suspects:
                raise ThresholdMissedError(self._failure(recipe, place, sqnr, least))
            share = signal * 10 ** (-least / 10) / len(suspects)
            noise = {name: self._noise(recipe, name, place, {}) for name in suspects}
            # where every single layer stays below its share but all together do not, the worst one is refined
            chosen = [name for name in suspects if noise[name] > share] or [max(suspects, key=lambda n: noise[n])]
            for name in chosen:
                change, refined = self._refine(recipe, program, name, place, share)
                step = Refinement(name, place, sqnr, decibel(signal, noise[name]), decibel(signal, refined), change)
                say(step.note(least))
                self.refinements.append(step)
                recipe = recipe.with_overrides({name: change})
            program = self.lower(recipe)
        return recipe, program

    def to_dict(self, recipe: Recipe) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {"min_sqnr": recipe.min_sqnr, "refinements": [step.to_dict() for step in self.refinements]}

    def notes(self, recipe: Recipe) -> list[str]:
        """Return lines for the report."""
        return [step.note(recipe.min_sqnr or 0.0) for step in self.refinements]

    def _up_to(self, place: str) -> list[str]:
        return self.names if place == OUTPUT else self.names[: self.names.index(place) + 1]

    def _measure(self, program: Program) -> dict[str, ErrorMeasure]:
        """Compare all layers and the output."""
        layers, output = LayerErrors(self.captured, program), ErrorMeasure()
        for part in self.x.split(64):
            layers.add(part)
            output.add(self.captured(part).flatten(1), program(part).flatten(1), OUTPUT)
        return dict(zip(self.names, layers.measures, strict=True)) | {OUTPUT: output}

    def _missed(self, program: Program, least: float) -> tuple[str, float, float] | None:
        """Find the first place that misses the ratio: its name, its ratio, and the power of its signal."""
        for place, measure in self._measure(program).items():
            if not measure.sqnr_db >= least and measure.noise != 0:
                return place, measure.sqnr_db, measure.signal
        return None

    def _noise(self, recipe: Recipe, name: str, place: str, change: Mapping[str, Any]) -> float:
        """Measure the noise that one layer alone brings to a place, with some recipe keys changed."""
        key = (name, place, tuple(sorted({**_settings(recipe, name), **change}.items())))
        if key not in self._alone:
            others = {other: {"lowering": "keep"} for other in self.names if other != name}
            program = self.lower(recipe.with_overrides(others | ({name: change} if change else {})))
            noise = self._measure(program)[place].noise
            self._alone[key] = noise if math.isfinite(noise) else math.inf
        return self._alone[key]

    def _refine(
        self, recipe: Recipe, program: Program, name: str, place: str, share: float
    ) -> tuple[Mapping[str, Any], float]:
        """Choose the first refinement that brings a layer below its share of the noise, else the last one."""
        changes: list[dict[str, Any]] = []
        if recipe.for_layer(name).arithmetic == "int8":
            levels = self._finer_levels(program, name)
            changes += [{"levels": levels}] if levels is not None else []
            changes.append({"precision": "int16"})
        for change in changes:
            noise = self._noise(recipe, name, place, change)
            if noise <= share:
                return change, noise
        return {"precision": "float"}, self._noise(recipe, name, place, {"precision": "float"})

    def _finer_levels(self, program: Program, name: str) -> int | None:
        """Give a number of rows to try, ``None`` where the tables cannot have more or are not what is measured."""
        layer = program.layers()[self.names.index(name)]
        tables = [program.module(target) for target in layer.expansions]
        if not isinstance(
            self.captured.module(self.captured.layers()[self.names.index(name)].contraction), Contraction
        ):
            return None  # a table behind a convolution is read by its 8-bit output
        found = [table for table in tables if isinstance(table, TableExpansion)]
        if not found:
            return None
        row_bytes = max(table.n_tables * table.k for table in found)
        now = max(table.index.levels for table in found)
        most = min(_MOST_LEVELS, _MOST_TABLE_BYTES // row_bytes)
        return min(4 * now, most) if min(4 * now, most) > now else None

    def _failure(self, recipe: Recipe, place: str, sqnr: float, least: float) -> str:
        kept = [name for name in self._up_to(place) if recipe.for_layer(name).lowering == "keep"]
        who = place if place == OUTPUT else f"layer {place!r}"
        text = f"{who}: SQNR is {sqnr:.2f} dB on the calibration data, expected at least {least:g} (min_sqnr)"
        text += ", with every layer up to it in float already" + (f" ({kept!r} kept by the recipe)" if kept else "")
        floor = self._float32_rounding()
        if floor is not None:
            text += f"; float32 rounding of the model itself leaves {floor:.1f} dB against float64"
        return text + "; lower min_sqnr, or retrain with wider knots and smaller weights"

    def _float32_rounding(self) -> float | None:
        """Measure the model's output in float32 against the same graph in float64, ``None`` where that does not run."""
        try:
            with ObserveRegion(double=True), torch.no_grad():
                exact = self.captured.graph_module(self.x)
        except (RuntimeError, TypeError):  # an operator without a float64 kernel, or of mixed types
            return None
        measure = ErrorMeasure()
        measure.add(exact, self.captured(self.x), OUTPUT)
        return measure.sqnr_db


def _settings(recipe: Recipe, name: str) -> dict[str, Any]:
    chosen = recipe.for_layer(name)
    return {"precision": chosen.precision, "levels": chosen.levels, "weight_bits": chosen.weight_bits}
