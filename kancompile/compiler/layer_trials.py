"""Lower one layer at a time, all others in float, and measure what it brings to each output.

How many such trials a compilation may take depends on the size of the model and the number of its samples, never on time, so that
equal inputs give equal files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.compiler.manifest import constant_bytes
from kancompile.errors import KanCompileError
from kancompile.ir import Program, Values
from kancompile.progress import quiet
from kancompile.recipe import SettledRecipe
from kancompile.validation import ErrorMeasure, FloatReplay, LayerPair, samples_that_fit

_ELEMENTS = 1 << 18
_FEW, _MANY = 32, 256
_CHUNK = 64
_PRODUCTS = 4e10
_FEWEST_TRIALS, _MOST_TRIALS = 6, 48


@dataclass(frozen=True)
class Trial:
    """One layer lowered alone.

    Attributes:
        noise: it brings to each output, float64 ``[m]``, infinite where outputs are not finite.
        extra_bytes: of its constants over those of the float layer.
        weights: how many codes it has.
        nanoseconds: of it in a call, estimated; 0 where nobody asks.
    """

    noise: Tensor
    extra_bytes: int
    weights: int = 1
    nanoseconds: float = 0.0


class LayerTrials:
    """Measures programs and layers of one model on calibration samples.

    Attributes:
        captured: the float program.
        names: of its layers.
        samples: that layers are calibrated with.
        left: trials that may still be made.
    """

    def __init__(
        self,
        captured: Program,
        x: Values,
        lower: Callable[[SettledRecipe], Program],
        size: Callable[[Program], int] = constant_bytes,
        time: Callable[[Program, str], float] | None = None,
    ) -> None:
        """Take what is compared.

        Args:
            captured: the float program.
            x: calibration samples ``[n, ...]``, of which some dozens are measured on.
            lower: lowers by a recipe.
            size: counts the bytes of all constants.
            time: estimates the nanoseconds of a layer in a call.
        """
        wanted = max(_FEW, min(_MANY, _ELEMENTS // x[0].numel()))
        self.captured, self.lower = captured, lower
        self.names = [layer.name for layer in captured.layers()]
        self.samples, self.left = len(x), trials_for(captured, x)
        self._x = x[:: max(1, len(x) // wanted)][:wanted]
        self._expected = [captured(part) for part in self._x.split(_CHUNK)]
        self._known: dict[tuple[str, tuple[tuple[str, Any], ...]], Trial] = {}
        self._size, self._time, self._float_bytes = size, time, size(captured)
        self._no_noise = self.measure(captured).noise_of

    @property
    def x(self) -> Values:
        """Samples that are measured on."""
        return self._x

    def measure(self, program: Program) -> ErrorMeasure:
        """Measure every output of a program against the float one."""
        measure = ErrorMeasure()
        for part, expected in zip(self._x.split(_CHUNK), self._expected, strict=True):
            measure.add(expected, program(part), "model output")
        return measure

    def noise_now(self, program: Program, names: Sequence[str]) -> dict[str, Tensor]:
        """Give the noise that each layer of a program alone brings to each output, float64 ``[m]``; nothing is lowered again."""
        measures = {name: ErrorMeasure() for name in names}
        for x in self._x.split(samples_that_fit(self.captured, self._x)):
            replay = FloatReplay(self.captured, x)
            for number, name in enumerate(self.names):
                if name in names:
                    changed = replay.with_layer(LayerPair(self.captured, program, number))
                    measures[name].add(replay.output, changed, "model output")
        return {name: _finite(measure.noise_of) for name, measure in measures.items()}

    def trial(self, recipe: SettledRecipe, name: str, change: Mapping[str, Any]) -> Trial | None:
        """Lower one layer with some recipe keys changed; ``None`` where no trial is left."""
        key = (name, tuple(sorted({**asdict(recipe[name]), **change}.items(), key=str)))
        if key not in self._known:
            if self.left <= 0:
                return None
            self.left -= 1
            others = {other: {"lowering": "keep"} for other in self.names if other != name}
            try:
                with quiet():
                    program = self.lower(recipe.with_overrides(others | ({name: change} if change else {})))
            except KanCompileError:  # functions without such a form: this way is closed
                self._known[key] = Trial(torch.full_like(self._no_noise, math.inf), 0)
            else:
                noise = _finite(self.measure(program).noise_of)
                contraction = program.contraction(program.layer(name))
                weights = contraction.products * contraction.n_out
                time = 0.0 if self._time is None else self._time(program, name)
                self._known[key] = Trial(noise, self._size(program) - self._float_bytes, weights, time)
        return self._known[key]


def trials_for(captured: Program, x: Values) -> int:
    """Give how many layers may be lowered on trial: fewer, the more products calibration takes."""
    contractions = [layer.contraction for layer in captured.layers()]
    traced = captured.trace(x[:1], contractions)
    products = 0
    for target in contractions:
        weight = captured.module(target).weight
        assert isinstance(weight, Tensor)
        products += weight[0].numel() * traced[target][1].numel()
    return max(_FEWEST_TRIALS, min(_MOST_TRIALS, int(_PRODUCTS / max(1, products * len(x)))))


def _finite(noise: Tensor) -> Tensor:
    return torch.where(torch.isfinite(noise), noise, math.inf)
