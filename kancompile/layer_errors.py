"""Say which layer loses how much: the output of every contraction, lowered against float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kancompile.convolutions import QuantizedConvContraction
from kancompile.error_measures import ErrorMeasure, plain_number
from kancompile.errors import KanCompileError
from kancompile.modules import QuantizedContraction, TableExpansion
from kancompile.program import Program


@dataclass(frozen=True)
class LayerError:
    """Error of one contraction's output, errors of earlier layers included."""

    layer: str
    sqnr_db: float
    max_abs: float

    def cells(self) -> list[str]:
        """Return a table row."""
        return [self.layer, f"{self.sqnr_db:.2f}", f"{self.max_abs:.4g}"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"layer": self.layer, "sqnr_db": plain_number(self.sqnr_db), "max_abs": plain_number(self.max_abs)}


class LayerErrors:
    """Accumulates the errors of all contraction outputs of a lowered program against the float one.

    Outputs that are row numbers, or values in units of rows, are turned back into real values first; what the next
    table's range cuts off then counts as error of this layer. Convolutions that hand over row numbers are measured before
    that rounding: a range that is short where the functions behind are flat costs nothing, and what it does cost is
    part of the error of the layer behind.
    """

    def __init__(self, float_program: Program, program: Program) -> None:
        """Pair the layers.

        Raises:
            KanCompileError: the programs have not the same layers.
        """
        self.names = [layer.name for layer in float_program.layers()]
        found = [layer.name for layer in program.layers()]
        if self.names != found:
            raise KanCompileError(
                f"layers: found {found!r} in the lowered program, expected {self.names!r} as in the float one"
            )
        self.float_program, self.program = float_program, program
        self.float_targets = [layer.contraction for layer in float_program.layers()]
        self.targets = [layer.contraction for layer in program.layers()]
        nodes = program.graph_module.graph.nodes
        self.readers = {str(node.target): list(node.users) for node in nodes if node.op == "call_module"}
        self.measures = [ErrorMeasure() for _ in self.names]

    def add(self, x: Tensor) -> None:
        """Evaluate both programs on one batch."""
        expected = self.float_program.trace(x, self.float_targets)
        actual = self.program.trace(x, self.targets)
        for name, a, b, measure in zip(self.names, self.float_targets, self.targets, self.measures, strict=True):
            contraction = self.program.module(b)
            if isinstance(contraction, QuantizedConvContraction) and contraction.hands_over == "index":
                real = contraction.with_output(None, "real")(*actual[b][0])
            else:
                real = _real_values(self.program, b, actual[b][1], self.readers[b])
            # passes may regroup dimensions, never reorder them
            measure.add(expected[a][1].flatten(1), real.flatten(1), f"layer {name!r}")

    def result(self) -> tuple[LayerError, ...]:
        """Return the errors in the order of evaluation."""
        pairs = zip(self.names, self.measures, strict=True)
        return tuple(LayerError(name, measure.sqnr_db, measure.largest) for name, measure in pairs)


def _real_values(program: Program, target: str, output: Tensor, readers: list[fx.Node]) -> Tensor:
    contraction = program.module(target)
    index = None
    if isinstance(contraction, QuantizedContraction):
        index = contraction.output
    if index is not None:
        return (output.double() - index.zero_point) * index.scale
    for reader in readers:
        table = program.module(str(reader.target)) if reader.op == "call_module" else None
        if isinstance(table, TableExpansion) and table.input == "scaled":
            multiplier, offset = table.index.to_rows()
            return (output.double() - offset) / multiplier
    return output
