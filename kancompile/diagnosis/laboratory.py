"""Lower a captured program by any recipe and measure what its output is worth, each setting once.

The lowered program computes what the file computes, bit for bit, so no file and no session is needed to measure it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kancompile.compiler import Preparation, constant_bytes, describe, write
from kancompile.data import Calibration
from kancompile.errors import KanCompileError
from kancompile.ir import (
    Program,
    Values,
    first_of,
)
from kancompile.passes import Lowering, RecentlyUsed, method_named
from kancompile.progress import quiet
from kancompile.recipe import Recipe, SettledRecipe
from kancompile.targets import TARGETS
from kancompile.validation import CLASSES, ErrorMeasure, PairedDecisions, Score, TaskMetric, decibel, plain_number

_CHUNK = 256
_KEPT_PROGRAMS = 4
SLOW_COLUMNS = 2048
"""Columns above which rounding methods with a Hessian matrix take seconds to minutes for every setting."""


@dataclass(frozen=True)
class Outcome:
    """What one setting is worth on the samples that judge it.

    Attributes:
        signal, noise: powers of what varies in the float outputs and of the difference to them.
        worst_db: least SQNR of any output about its mean.
        metric: what ``score`` is, ``"accuracy"``, ``"iou"`` or ``"r2"``; ``None`` without labels.
        score: its value, accuracy and overlap in percent.
        drop: points of it lost against the float program, hundredths of R2, ``None`` without labels.
        agreement: percentage of samples with the same largest output, ``None`` where that is no decision.
        constant_bytes: bytes of weights and tables as stored.
        decisions, right, lost, won: samples, and of them those that the float program decides rightly, that only it does, and
            that only the lowered one does; ``None`` where labels are no classes.
    """

    signal: float
    noise: float
    worst_db: float
    metric: str | None
    score: float | None
    drop: float | None
    agreement: float | None
    constant_bytes: int
    decisions: int | None = None
    right: int | None = None
    lost: int | None = None
    won: int | None = None

    @property
    def paired(self) -> PairedDecisions | None:
        """Both programs' decisions on the same samples, with intervals; ``None`` where labels are no classes."""
        if self.decisions is None or self.right is None or self.lost is None or self.won is None:
            return None
        return PairedDecisions(self.decisions, self.right, self.lost, self.won)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of all outputs together, about their means."""
        return decibel(self.signal, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        apart = ("metric", "decisions", "right", "lost", "won")
        numbers = {key: plain_number(value) for key, value in asdict(self).items() if key not in apart}
        paired = None if self.paired is None else self.paired.to_dict()
        return numbers | {"metric": self.metric, "sqnr_db": plain_number(self.sqnr_db), "paired": paired}

    @property
    def score_text(self) -> str:
        """The score for people, with what it lost of that of the float program; empty without labels."""
        if self.metric is None or self.score is None:
            return ""
        text = Score(self.metric, self.score).text()
        if self.paired is not None:
            low, high = self.paired.accuracy_interval
            text += f" (95 % interval {low:.2f} ... {high:.2f})"
        return text


@dataclass(frozen=True)
class _FileSize:
    """What a memory remembers of a file."""

    bytes: int


Fact = TypeVar("Fact")


class Remembers(Protocol):
    """What keeps measured facts from one run to the next."""

    def get(self, key: Mapping[str, Any], kind: type[Fact]) -> Fact | None:
        """Return the fact, a dataclass, that was put under a key."""

    def put(self, key: Mapping[str, Any], fact: Any) -> None:
        """Keep a fact."""


class Laboratory:
    """Measures settings of one model on fixed samples.

    Attributes:
        program: the float program that all settings start from.
        fitting: samples that settings are calibrated with.
        judging: samples that they are judged with.
        recipe: the recipe as given, with bits allocated where it asks for that.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
    """

    def __init__(
        self,
        prepared: Preparation,
        judging: Calibration,
        memory: Remembers | None = None,
    ) -> None:
        recipe, budget = prepared.recipe, prepared.budget
        if budget is not None and recipe.whole.max_bytes is not None and recipe.whole.max_bytes < budget.smallest:
            raise KanCompileError(
                f"max_bytes {recipe.whole.max_bytes}: weights in the fewest bits take {budget.smallest} bytes, not counting "
                "tables and the graph; raise the budget"
            )
        self._prepared = prepared
        self.program, self.fitting, self.x, self.seed = prepared.program, prepared.samples, prepared.x, prepared.seed
        self.judging, self.recipe, self.memory = judging, recipe, memory
        self._lowering, self.device = prepared.lowering(), prepared.device
        self.names = [layer.name for layer in self.program.layers()]
        self.lowerings = 0
        self._programs: RecentlyUsed[str, Program] = RecentlyUsed(_KEPT_PROGRAMS)
        self._outcomes: dict[str, Outcome] = {}
        self._sizes: dict[str, int] = {}
        self._float_outputs: WeakKeyDictionary[Calibration, list[Tensor]] = WeakKeyDictionary()

    def settled(self, recipe: Recipe) -> SettledRecipe:
        """Settle a recipe for the layers of the program."""
        return self._lowering.settled(recipe)

    def lowered(self, recipe: SettledRecipe) -> Program:
        """Lower by a recipe; the last few programs in use are kept."""
        return self._programs.get(recipe.whole.canonical_json(), lambda: self._run(self._lowering, recipe))

    def functions(self, recipe: SettledRecipe) -> Program:
        """Give the float program in the form that a recipe tabulates."""
        with quiet():
            return self._lowering.functions(recipe)

    def lower_on(self, recipe: SettledRecipe, x: Values) -> Program:
        """Lower by a recipe on other samples ``[n, *input_shape]``."""
        return self._run(self._prepared.lowering(x), recipe)

    def _run(self, lowering: Lowering, recipe: SettledRecipe) -> Program:
        self.lowerings += 1
        with quiet():
            return lowering(recipe)

    def outcome(self, recipe: SettledRecipe) -> Outcome:
        """Measure a recipe."""
        key = recipe.whole.canonical_json()
        if key not in self._outcomes:
            fact = {"fact": "outcome", "recipe": key}
            known = None if self.memory is None else self.memory.get(fact, Outcome)
            self._outcomes[key] = self.judge(self.lowered(recipe)) if known is None else known
            if known is None and self.memory is not None:
                self.memory.put(fact, self._outcomes[key])
        return self._outcomes[key]

    def file_bytes(self, recipe: SettledRecipe) -> int:
        """Measure the ONNX file that a recipe makes."""
        said = recipe.whole.canonical_json()
        if said in self._sizes:
            return self._sizes[said]
        key = {"fact": "file", "recipe": said}
        known = None if self.memory is None else self.memory.get(key, _FileSize)
        if known is not None:
            return known.bytes
        program = self.lowered(recipe)
        facts = describe(program, self.fitting, recipe.whole, "ort-cpu", self.seed)
        with quiet():
            found = _FileSize(len(write(TARGETS["ort-cpu"], program, facts, recipe.whole)))
        if self.memory is not None:
            self.memory.put(key, found)
        self._sizes[said] = found.bytes
        return found.bytes

    def judge(self, program: Program, samples: Calibration | None = None) -> Outcome:
        """Compare a lowered program with the float one on samples, those that judge if none are given, and with their labels."""
        samples = self.judging if samples is None else samples
        measure, task, paired = ErrorMeasure(), TaskMetric(), None
        for (x, y), expected in zip(samples.batches(), self.float_outputs(samples), strict=True):
            found = program(x)
            measure.add(expected, found, "judged output")
            if y is not None:
                task.add(y, first_of(found), "data")
        float_task = self._float_task(samples)
        float_score = None if float_task is None else float_task.score
        score = None if float_score is None else task.score
        if float_task is not None and float_task.decisions is not None and task.decisions is not None:
            paired = PairedDecisions.of(float_task.decisions, task.decisions)
        return Outcome(
            measure.signal,
            measure.noise,
            measure.worst_db,
            None if score is None else score.name,
            None if score is None else score.value,
            None if score is None or float_score is None else float_score.points - score.points,
            measure.agreement if samples.targets is not None and task.kind == CLASSES else None,
            constant_bytes(program),
            *((None,) * 4 if paired is None else (paired.n, paired.right, paired.lost, paired.won)),
        )

    def float_score(self, samples: Calibration) -> Score | None:
        """Measure accuracy, overlap or R2 of the float program, ``None`` without labels or where it has no meaning."""
        task = self._float_task(samples)
        return None if task is None else task.score

    def _float_task(self, samples: Calibration) -> TaskMetric | None:
        if samples.targets is None:
            return None
        task = TaskMetric()
        for (_, y), output in zip(samples.batches(), self.float_outputs(samples), strict=True):
            assert y is not None
            task.add(y, first_of(output), "data")
        return task

    def float_outputs(self, samples: Calibration) -> list[Tensor]:
        """Evaluate the float program on samples, batch by batch, once for as long as they are in use."""
        if samples not in self._float_outputs:
            self._float_outputs[samples] = [self.program(x) for x in samples]
        return self._float_outputs[samples]

    def alone(self, recipe: SettledRecipe, name: str) -> SettledRecipe:
        """Give the recipe that lowers one layer and keeps all others in float."""
        return recipe.with_overrides({other: {"lowering": "keep"} for other in self.names if other != name})

    def integer_layers(self, recipe: SettledRecipe) -> list[str]:
        """List the layers that a recipe turns into integer tables."""
        return [name for name in self.names if recipe[name].arithmetic == "int8"]

    def fast(self, recipe: SettledRecipe) -> tuple[SettledRecipe, list[str]]:
        """Replace slow rounding methods of wide layers by ``uniform``; say in which layers that was done."""
        slow = []
        for layer in self.program.layers():
            chosen = recipe[layer.name]
            if (
                method_named(chosen.rounding_method).compensates
                and self.program.contraction(layer).products > SLOW_COLUMNS
            ):
                slow.append(layer.name)
        return (recipe.with_overrides({name: {"method": "uniform"} for name in slow}) if slow else recipe), slow


def transformed(samples: Calibration, inputs: Tensor) -> Calibration:
    """Return the samples with other inputs of the same shape."""
    array = inputs.to(torch.float32).numpy().copy()
    array.setflags(write=False)
    return replace(samples, inputs=array)
