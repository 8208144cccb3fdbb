"""Lower a captured program by any recipe and measure what its output is worth, each setting once.

The lowered program computes what the file computes, bit for bit, so no file and no session is needed to measure it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kancompile.compiler import BitBudget
from kancompile.data import Calibration
from kancompile.diagnosis.tune_cache import recalled
from kancompile.errors import KanCompileError
from kancompile.ir import (
    Contraction,
    ConvContraction,
    PolynomialExpansion,
    Program,
    QuantizedContraction,
    QuantizedConvContraction,
    TableExpansion,
)
from kancompile.passes import Lowering, RecentlyUsed, prepare
from kancompile.progress import quiet
from kancompile.recipe import Recipe
from kancompile.validation import ErrorMeasure, TaskMetric, decibel, plain_number

_CHUNK = 256
_KEPT_PROGRAMS = 4
SLOW_COLUMNS = 2048
"""Columns above which rounding methods with a Hessian matrix take seconds to minutes for every setting."""


@dataclass(frozen=True)
class Outcome:
    """What one setting is worth on the samples that judge it.

    Attributes:
        signal, noise: sums of squares of the float output and of the difference to it.
        score: accuracy or R2 in percent, ``None`` without labels.
        drop: points of it lost against the float program, ``None`` without labels.
        agreement: percentage of samples of equal argmax, ``None`` where that has no meaning.
        constant_bytes: bytes of weights and tables as stored.
    """

    signal: float
    noise: float
    score: float | None
    drop: float | None
    agreement: float | None
    constant_bytes: int

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the output."""
        return decibel(self.signal, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {key: plain_number(value) for key, value in asdict(self).items()} | {
            "sqnr_db": plain_number(self.sqnr_db)
        }


class Remembers(Protocol):
    """What keeps measured facts from one run to the next."""

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the fact that was put under a key."""

    def put(self, key: Mapping[str, Any], fact: Mapping[str, Any]) -> None:
        """Keep a fact."""


class Laboratory:
    """Measures settings of one model on fixed samples.

    Attributes:
        program: the float program that all settings start from.
        fitting: samples that settings are calibrated with.
        judging: samples that they are judged with.
        recipe: the recipe as given, with bits allocated where it asks for that.
        seed: of every random choice.
    """

    def __init__(
        self,
        captured: Program,
        fitting: Calibration,
        judging: Calibration,
        recipe: Recipe,
        seed: int = 0,
        device: str = "cpu",
        memory: Remembers | None = None,
    ) -> None:
        self.fitting, self.judging, self.seed, self.device, self.memory = fitting, judging, seed, device, memory
        self.x = fitting.samples
        with quiet():
            self.program = prepare(captured, self.x, recipe)
            if recipe.max_bytes is not None or recipe.allocated_bits is not None:
                budget = BitBudget(self.program, self.x, recipe, seed)
                if recipe.max_bytes is not None and recipe.max_bytes < budget.smallest:
                    raise KanCompileError(
                        f"max_bytes {recipe.max_bytes}: weights in the fewest bits take {budget.smallest} bytes, not counting "
                        "tables and the graph; raise the budget"
                    )
                recipe, _ = budget.allocated()
        self.recipe = recipe
        self._lowering = Lowering(self.program, self.x, seed, device)
        self.names = [layer.name for layer in self.program.layers()]
        self.lowerings = 0
        self._programs: RecentlyUsed[str, Program] = RecentlyUsed(_KEPT_PROGRAMS)
        self._outcomes: dict[str, Outcome] = {}
        self._float_outputs: WeakKeyDictionary[Calibration, list[Tensor]] = WeakKeyDictionary()

    def lowered(self, recipe: Recipe) -> Program:
        """Lower by a recipe; the last few programs in use are kept."""
        return self._programs.get(recipe.canonical_json(), lambda: self._run(self._lowering, recipe))

    def functions(self, recipe: Recipe) -> Program:
        """Give the float program in the form that a recipe tabulates."""
        with quiet():
            return self._lowering.functions(recipe)

    def lower_on(self, recipe: Recipe, x: Tensor) -> Program:
        """Lower by a recipe on other samples ``[n, *input_shape]``."""
        return self._run(Lowering(self.program, x, self.seed, self.device), recipe)

    def _run(self, lowering: Lowering, recipe: Recipe) -> Program:
        self.lowerings += 1
        with quiet():
            return lowering(recipe)

    def outcome(self, recipe: Recipe) -> Outcome:
        """Measure a recipe."""
        key = recipe.canonical_json()
        if key not in self._outcomes:
            fact = {"fact": "outcome", "recipe": key}
            known = None if self.memory is None else self.memory.get(fact)
            if known is None:
                self._outcomes[key] = self.judge(self.lowered(recipe))
                if self.memory is not None:
                    self.memory.put(fact, asdict(self._outcomes[key]))
            else:
                self._outcomes[key] = recalled(known, Outcome)
        return self._outcomes[key]

    def judge(self, program: Program, samples: Calibration | None = None) -> Outcome:
        """Compare a lowered program with the float one on samples, those that judge if none are given, and with their labels."""
        samples = self.judging if samples is None else samples
        measure, task = ErrorMeasure(), TaskMetric()
        for (x, y), expected in zip(samples.batches(), self.float_outputs(samples), strict=True):
            found = program(x)
            measure.add(expected.flatten(1), found.flatten(1), "judged output")
            if y is not None:
                task.add(y, found, "data")
        score = drop = None
        float_score = self.float_score(samples)
        if float_score is not None:
            score = next(iter(task.values().values()))
            drop = float_score - score
        return Outcome(measure.signal, measure.noise, score, drop, measure.agreement, constant_bytes(program))

    def float_score(self, samples: Calibration) -> float | None:
        """Measure accuracy or R2 of the float program in percent, ``None`` without labels."""
        if samples.targets is None:
            return None
        task = TaskMetric()
        for (_, y), output in zip(samples.batches(), self.float_outputs(samples), strict=True):
            assert y is not None
            task.add(y, output, "data")
        return next(iter(task.values().values()))

    def float_outputs(self, samples: Calibration) -> list[Tensor]:
        """Evaluate the float program on samples, batch by batch, once for as long as they are in use."""
        if samples not in self._float_outputs:
            self._float_outputs[samples] = [self.program(x) for x in samples]
        return self._float_outputs[samples]

    def alone(self, recipe: Recipe, name: str) -> Recipe:
        """Give the recipe that lowers one layer and keeps all others in float."""
        return recipe.with_overrides({other: {"lowering": "keep"} for other in self.names if other != name})

    def integer_layers(self, recipe: Recipe) -> list[str]:
        """List the layers that a recipe turns into integer tables."""
        return [name for name in self.names if recipe.for_layer(name).arithmetic == "int8"]

    def fast(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """Replace slow rounding methods of wide layers by ``uniform``; say in which layers that was done."""
        slow = []
        for layer in self.program.layers():
            module = self.program.module(layer.contraction)
            assert isinstance(module, Contraction | ConvContraction)
            chosen = recipe.for_layer(layer.name)
            if chosen.rounding_method != "uniform" and module.weight[0].numel() > SLOW_COLUMNS:
                slow.append(layer.name)
        return (recipe.with_overrides({name: {"method": "uniform"} for name in slow}) if slow else recipe), slow


def transformed(samples: Calibration, inputs: Tensor) -> Calibration:
    """Return the samples with other inputs of the same shape."""
    array = inputs.to(torch.float32).numpy().copy()
    array.setflags(write=False)
    return replace(samples, inputs=array)


def constant_bytes(program: Program) -> int:
    """Count the bytes of tables and weights as a file stores them."""
    total = 0
    for layer in program.layers():
        module = program.module(layer.contraction)
        if isinstance(module, QuantizedContraction):
            total += -(-sum(codes.numel() for codes in module.weights) * module.weight_bits // 8)
        elif isinstance(module, QuantizedConvContraction):
            total += -(-module.weight.numel() * module.weight_bits // 8)
        elif isinstance(module, Contraction | ConvContraction):
            total += module.weight.numel() * (4 if module.codes is None else 2)
        for target in layer.expansions:
            expansion = program.module(target)
            if isinstance(expansion, TableExpansion):
                total += expansion.table.numel()
            elif isinstance(expansion, PolynomialExpansion):
                total += sum(value.numel() * value.element_size() for value in expansion.buffers())
    return total
