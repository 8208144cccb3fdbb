"""Round the weights of float layers to 8-bit codes, which make the smallest file of a tiny layer.

    W[o, c]      ->      code[o, c] * scale[o]        code: int8

Functions and sums stay float32. Tables of a layer of some hundred weights take more bytes than these weights, and the nodes that
look them up as many as those that compute simple functions, so that float arithmetic on 8-bit weights is the smaller file. Codes
are those of GPTQ on the features of the calibration data: neighboring functions overlap, and make up for each other's errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kancompile.errors import KanCompileError
from kancompile.ir import BlockCodes, Contraction, Layer, Program, Values
from kancompile.passes.rounding_methods import FeatureSource, Gptq, RoundingProblem

_BITS, _MOST_VALUES = 8, 1 << 24


@dataclass(frozen=True)
class RoundFloatWeights:
    """Round the weights of float layers, the first one first; those that are rounded already stay.

    Attributes:
        applies: says for a layer's name whether it is to be rounded.
        seed: of every random choice.
    """

    applies: Callable[[str], bool]
    seed: int = 0

    name = "round-float-weights"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the rounded program, or the same one where nothing changes.

        Args:
            program: one whose layers are float.
            x: calibration inputs ``[n, *input_shape]``.

        Raises:
            KanCompileError: a layer is a convolution.
        """
        for layer in program.layers():
            if not self.applies(layer.name) or not program.is_float(layer):
                continue
            contraction = program.node(layer.contraction, Contraction)
            if contraction.codes is None:
                rounded, notes = self._rounded(program, layer, contraction, x)
                program = program.replace_modules({layer.contraction: rounded}, notes)
        return program

    def _rounded(
        self, program: Program, layer: Layer, contraction: Contraction, x: Values
    ) -> tuple[Contraction, list[str]]:
        if contraction.kernel:
            raise KanCompileError(
                f"layer {layer.name!r}: precision is 'weight-only' for a convolution, expected a linear layer; use precision = "
                "'int8' or 'int16' there"
            )
        few = x[: max(1, _MOST_VALUES // max(1, contraction.in_columns))]
        features, _ = program.trace(few, [layer.contraction])[layer.contraction]
        rows = torch.cat([feature.flatten(-2).flatten(0, -2).float() for feature in features], -1)
        has_bias = bool(contraction.bias.any())
        if not has_bias:  # none is added: features are seen about 0, so that the mean error counts
            rows = torch.cat([rows, -rows])
        problem = RoundingProblem(layer.name, contraction.weight, FeatureSource.from_tensor(rows), _BITS)
        rounded = Gptq()(problem, torch.Generator().manual_seed(self.seed))
        codes = BlockCodes(rounded.codes, rounded.scale[0], torch.ones(problem.c))
        bias = contraction.bias + rounded.offset if has_bias else contraction.bias
        notes = [f"layer {layer.name!r}: {contraction.weight.numel()} weights in 8 bits, functions and sums in float"]
        return contraction.replace(weight=codes.values(), bias=bias, codes=codes), [*notes, *rounded.notes]
