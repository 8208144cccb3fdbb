"""Round the coefficients and weights of polynomial layers to 16-bit codes, which halves a file of floats.

    c_j[row, k] , W[o, c]      ->      code * 2^a[row] * 2^b[k] ,  code * 2^a[o] * 2^b[c]        code: int16

Arithmetic stays float32. That was measured against the alternatives on ONNX Runtime (one x86-64 thread, a layer of 784
inputs, 64 outputs and 9 functions, and smaller ones): there is no integer kernel of 16 bits; codes split into two byte
planes and multiplied by integer kernels took 1.1 to 1.3 times as long as a float product of the same codes, and a table
that is looked up without interpolation needs more than 65,536 rows to be as exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from kancompile.ir import BlockCodes, Contraction, Layer, PolynomialExpansion, Program, round_to_blocks


@dataclass(frozen=True)
class RoundTo16Bits:
    """Round what a layer holds; layers that are rounded already, or read tables, stay.

    Attributes:
        applies: says for a layer's name whether it is to be rounded.
    """

    applies: Callable[[str], bool]

    name = "round-to-16-bits"

    def __call__(self, program: Program) -> Program:
        """Return the rounded program, or the same one where nothing changes."""
        modules: dict[str, nn.Module] = {}
        notes = []
        for layer in program.layers():
            if not self.applies(layer.name) or not program.is_float(layer):
                continue
            contraction = program.node(layer.contraction, Contraction)
            tables = {
                target: module
                for target in layer.expansions
                if isinstance(module := program.module(target), PolynomialExpansion) and module.codes is None
            }
            if contraction.codes is None:
                modules[layer.contraction] = _rounded(contraction)
                notes.append(_note(program, layer, contraction.weight.numel()))
            modules |= {target: table.with_codes(_table_codes(table)) for target, table in tables.items()}
        return program.replace_modules(modules, notes) if modules else program


def _table_codes(table: PolynomialExpansion) -> list[BlockCodes]:
    return [round_to_blocks(table.get_buffer(f"coefficient_{power}")) for power in range(table.degree + 1)]


def _rounded(contraction: Contraction) -> Contraction:
    codes = round_to_blocks(contraction.weight.flatten(1))
    weight: Tensor = codes.values().reshape(contraction.weight.shape)
    return contraction.replace(weight=weight, codes=codes)


def _note(program: Program, layer: Layer, weights: int) -> str:
    expansions = [program.module(target) for target in layer.expansions]
    coefficients = sum(
        module.get_buffer("coefficient_0").numel() * (module.degree + 1)
        for module in expansions
        if isinstance(module, PolynomialExpansion)
    )
    stay = sum(not isinstance(module, PolynomialExpansion) for module in expansions)
    text = f"layer {layer.name!r}: {coefficients} coefficients and {weights} weights in 16 bits"
    return text + (f"; {stay} expansion(s) computed in float as in PyTorch" if stay else "")
