"""See what the layers of a float program receive from calibration inputs: ranges, what tables cut off, dead columns.

One pass over the samples, in batches, so that memory holds one batch and a bounded sample of every expansion's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kancompile.ir import Expansion, JointTable, Program, TableExpansion, Values
from kancompile.progress import track
from kancompile.validation.layer_pairs import LayerPair

_ELEMENTS = 1 << 19
_FEW, _MANY = 64, 2048
_BATCH = 32
_KEPT_ROWS = 2048


@dataclass
class Outside:
    """Inputs that a table's range cuts off.

    An input is outside where even the nearest row is more than half a row away.

    Attributes:
        low, high: ends of the range, half a row beyond the outer rows.
        count: inputs seen.
        below, above: of these beyond each end.
        smallest, largest: input seen.
        of_input: beyond either end, by number of the input, int64 ``[n_in]``.
        seen_of_input: inputs seen with each number.
    """

    low: float
    high: float
    of_input: Tensor
    count: int = 0
    below: int = 0
    above: int = 0
    smallest: float = float("inf")
    largest: float = float("-inf")
    seen_of_input: int = 0

    def add(self, x: Tensor) -> None:
        """Take inputs ``[..., n_in]``."""
        below, above = x < self.low, x > self.high
        self.count += x.numel()
        self.below += int(below.sum())
        self.above += int(above.sum())
        self.of_input += (below | above).reshape(-1, x.shape[-1]).sum(0)
        self.seen_of_input += x.numel() // x.shape[-1]
        self.smallest = min(self.smallest, float(x.min()))
        self.largest = max(self.largest, float(x.max()))

    @property
    def share(self) -> float:
        """Share of inputs that are cut off."""
        return (self.below + self.above) / max(1, self.count)


@dataclass
class Observation:
    """What was seen.

    Attributes:
        samples: model inputs evaluated.
        inputs: a sample of what each float expansion reads, float32 ``[r, n_in]``, by its name.
        outside: by name of the lowered expansion; only tables have a range.
        extremes: least and largest value of every column, ``[n_in, k]`` each, by name of the lowered expansion.
    """

    samples: int = 0
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outside: dict[str, Outside] = field(default_factory=dict)
    extremes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def observe(program: Program, pairs: Sequence[LayerPair], x: Values, seed: int = 0) -> Observation:
    """Evaluate the float program on calibration inputs and note what its expansions read.

    Args:
        program: the captured float program.
        pairs: its layers beside the lowered ones.
        x: calibration inputs ``[n, *input_shape]``, evenly thinned to bounded work.
        seed: of the choice of kept inputs.
    """
    wanted = max(_FEW, min(_MANY, _ELEMENTS // x[0].numel()))
    x = x[torch.linspace(0, len(x) - 1, min(len(x), wanted)).long()]
    generator = torch.Generator().manual_seed(seed)
    origins = {target: pair.origin(target) for pair in pairs for target in pair.layer.expansions}
    wanted_targets = list(dict.fromkeys(origin for origin in origins.values() if _is_expansion(program, origin)))
    seen = Observation(samples=len(x))
    kept: dict[str, list[Tensor]] = {target: [] for target in wanted_targets}
    batches = x.split(_BATCH)
    for part in track(batches, "observing layer inputs"):
        traced = program.trace(part, wanted_targets)
        inputs = {}
        for target in wanted_targets:
            module = program.node(target, Expansion)
            inputs[target] = module.inputs_last(traced[target][0][0]).reshape(-1, module.n_in)
            rows = -(-_KEPT_ROWS // len(batches))
            chosen = torch.randperm(len(inputs[target]), generator=generator)[:rows]
            kept[target].append(inputs[target][chosen])
        for pair in pairs:
            for target in pair.layer.expansions:
                if origins[target] in inputs:
                    _note(seen, pair, target, inputs[origins[target]])
    seen.inputs = {target: torch.cat(parts) for target, parts in kept.items()}
    return seen


def _note(seen: Observation, pair: LayerPair, target: str, x: Tensor) -> None:
    module = pair.program.module(target)
    if isinstance(module, TableExpansion):
        # rows of joint tables are few and hold the mean of what they receive
        half = module.index.scale / (1 if isinstance(module, JointTable) else 2)
        if target not in seen.outside:
            of_input = torch.zeros(x.shape[-1], dtype=torch.int64)
            seen.outside[target] = Outside(module.index.low - half, module.index.high + half, of_input)
        seen.outside[target].add(x)
    if x.numel():
        values = pair.evaluate(target, x)
        low, high = values.amin(0), values.amax(0)
        if target in seen.extremes:
            low, high = torch.minimum(low, seen.extremes[target][0]), torch.maximum(high, seen.extremes[target][1])
        seen.extremes[target] = low, high


def _is_expansion(program: Program, target: str) -> bool:
    return target in program.graph_module._modules and isinstance(program.module(target), Expansion)
