"""Make up for what rounding before a layer did to it, by the weights that give the float program's outputs on its features.

    y = V q + b     ->     y = V* q + b*          (see ``rounding_methods.drift``)

Rows are those that the weights will be rounded on: the same samples, and of a convolution the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Contraction, Layer, Program, Values
from kancompile.passes.round_weights.rows import CHUNK, Pixels
from kancompile.passes.rounding_methods import DriftRows, MadeUp, RoundingProblem, make_up

_FOLDS = 5
_LEAST_ROWS, _ROWS_FOR_A_COLUMN, _MANY_COLUMNS = 8192, 6, 8192
_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class FloatOutputs:
    """The float program, whose outputs the layers of the rounded one are to give.

    Attributes:
        program: in float; its layers have the names that they have in the rounded one.
        x: calibration inputs ``[n, *input_shape]``.
        seed: of the folds, and of the rows that are picked where there are more than needed.
    """

    program: Program
    x: Values
    seed: int

    def make_up(
        self, contraction: Contraction, layer: Layer, problems: Sequence[RoundingProblem], pixels: Pixels | None
    ) -> tuple[Contraction, str]:
        """Change the weights of a layer, and say in a line of the report by how much.

        Args:
            contraction: of the layer, in float, on table codes.
            layer: as it stands in the rounded program.
            problems: its rounding problems: one, or one for each channel group.
            pixels: which output pixels their rows are; ``None`` for a linear layer.
        """
        rows = (
            self._linear(contraction, layer, problems[0]) if pixels is None else self._pixels(layer, problems, pixels)
        )
        folds = torch.randperm(len(self.x), generator=self._generator()) % _FOLDS
        biases = contraction.bias.reshape(len(problems), -1)
        groups = [
            DriftRows(features, outputs - bias - _times(features, problem.weight), sample)
            for (features, outputs, sample), problem, bias in zip(rows, problems, biases, strict=True)
        ]
        found = make_up(groups, folds, layer.name)
        if found is None or not found.changes:
            return contraction, _note(layer, found)
        weight = torch.stack([change.weight for change in found.changes]).reshape(contraction.weight.shape)
        bias = torch.cat([change.bias for change in found.changes])
        changed = contraction.with_weight(contraction.weight + weight, contraction.bias + bias)
        return changed, _note(layer, found)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _linear(
        self, contraction: Contraction, layer: Layer, problem: RoundingProblem
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Collect features, float outputs and numbers of samples of rows, of more than needed some drawn evenly."""
        columns = problem.c
        most = _LEAST_ROWS if columns > _MANY_COLUMNS else max(_LEAST_ROWS, _ROWS_FOR_A_COLUMN * columns)
        share, generator, start = most / problem.features.n, self._generator(), 0
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, features in zip(self.x.split(CHUNK), problem.features, strict=True):
            outputs = contraction.by_output(self.program.trace(part, [layer.contraction])[layer.contraction][1])
            # rows of one use behind those of another, in each the rows of one sample behind those of another
            each = len(features) // layer.uses // len(part)
            sample = start + torch.arange(len(features)) // each % len(part)
            start += len(part)
            if share < 1:
                drawn = torch.rand(len(features), generator=generator) < share
                features, outputs, sample = features[drawn], outputs[drawn], sample[drawn]
            kept.append((features, outputs, sample))
        features, outputs, sample = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return [(features, outputs, sample)]

    def _pixels(
        self, layer: Layer, problems: Sequence[RoundingProblem], pixels: Pixels
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same of the pixels of every channel group."""
        module = self.program.contraction(layer)
        elements = math.prod(module.out_shape) + sum(
            math.prod(one.in_shape) * one.k for one in self.program.expansions(layer)
        )
        size = max(1, min(CHUNK, _CHUNK_BYTES // (4 * elements * layer.uses)))
        kept = []
        for part, here, local in pixels.chunks(layer.uses, size):
            outputs = self.program.trace(self.x[part], [layer.contraction])[layer.contraction][1]
            kept.append(outputs.flatten(2)[local, :, pixels.position[here]])
        for problem, outputs in zip(problems, torch.cat(kept).chunk(len(problems), 1), strict=True):
            yield torch.cat(list(problem.features)), outputs, pixels.image // layer.uses


def _times(features: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([part.float() @ weight.T for part in features.split(1024)])


def _note(layer: Layer, found: MadeUp | None) -> str:
    what = f"layer {layer.name!r}: drift of what comes before"
    if found is None:
        return f"{what} not made up for: fewer calibration samples than it takes to fit, choose and report"
    if not found.changes:
        return f"{what} not made up for (alpha 0): no change of the weights is clearly better on samples that did not fit it"
    return (
        f"{what} made up for by alpha {found.alpha:g}: mean squared output error {found.before:.4g} -> {found.after:.4g} on "
        "samples that took no part, weights not yet rounded"
    )
