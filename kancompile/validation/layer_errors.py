"""Say which layer loses how much: the output of every contraction, lowered against float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import AnyContraction, AnyExpansion, IndexQuantizer, Layer, Program, Values, tables_behind
from kancompile.validation.error_measures import ErrorMeasure, OutputError, plain_number

_BEYOND = (0.0, 0.01, 0.5, 4.0)
"""Where to look whether functions are constant beyond a range, in its widths."""


@dataclass(frozen=True)
class LayerError:
    """Error of one contraction's output.

    Attributes:
        layer: its name.
        sqnr_db, max_abs: with the inputs that the lowered layers before it yield, so with their errors.
        worst: the output (feature or channel) that is worst, with the same inputs.
        own_sqnr_db: of the layer alone, with the inputs that it has in the float program; ``None`` where it was not measured.
    """

    layer: str
    sqnr_db: float
    max_abs: float
    worst: OutputError | None
    own_sqnr_db: float | None = None

    def cells(self) -> list[str]:
        """Return a table row."""
        own = "" if self.own_sqnr_db is None else f"{self.own_sqnr_db:.2f}"
        worst = "" if self.worst is None else f"{self.worst.sqnr_db:.2f}"
        return [self.layer, f"{self.sqnr_db:.2f}", worst, own, f"{self.max_abs:.4g}"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "layer": self.layer,
            "sqnr_db": plain_number(self.sqnr_db),
            "worst": None if self.worst is None else self.worst.to_dict(),
            "own_sqnr_db": plain_number(self.own_sqnr_db),
            "max_abs": plain_number(self.max_abs),
        }


class LayerErrors:
    """Accumulates the errors of all contraction outputs of a lowered program against the float one.

    Outputs that are row numbers, or values in units of rows, are turned back into real values first; what the next
    table's range cuts off then counts as error of this layer. Convolutions that hand over row numbers are measured before
    that rounding, and so are linear layers behind which all functions are constant beyond the range: there a short range costs
    nothing, and what it does cost is part of the error of the layer behind.

    Attributes:
        measures: of every layer, errors of the layers before it included.
        own: of every layer alone; empty unless asked for.
    """

    def __init__(self, float_program: Program, program: Program, own: bool = False) -> None:
        """Pair the layers.

        Args:
            float_program: the captured program.
            program: the lowered one.
            own: whether every layer is computed once more, with the inputs that it has in the float program.

        Raises:
            KanCompileError: the programs have not the same layers.
        """
        self.float_layers, self.layers = float_program.layers(), program.layers()
        self.names = [layer.name for layer in self.float_layers]
        found = [layer.name for layer in self.layers]
        if self.names != found:
            raise KanCompileError(
                f"layers: found {found!r} in the lowered program, expected {self.names!r} as in the float one"
            )
        self.float_program, self.program = float_program, program
        self.measures = [ErrorMeasure() for _ in self.names]
        self.own = [ErrorMeasure() for _ in self.names] if own else []
        self._unrounded = [_costs_nothing_beyond(float_program, program, layer) for layer in self.layers]

    def add(self, x: Values) -> None:
        """Evaluate both programs on one batch."""
        float_targets = [layer.contraction for layer in self.float_layers]
        if self.own:
            float_targets += [target for layer in self.float_layers for target in layer.expansions]
        expected = self.float_program.trace(x, float_targets)
        actual = self.program.trace(x, [layer.contraction for layer in self.layers])
        for number, (float_layer, layer) in enumerate(zip(self.float_layers, self.layers, strict=True)):
            reference = expected[float_layer.contraction][1]
            exact, contraction = self.float_program.contraction(float_layer), self.program.contraction(layer)
            what = f"layer {layer.name!r}"
            # passes may regroup dimensions, never reorder them
            real = _real_values(contraction, *actual[layer.contraction], self._unrounded[number])
            _add(self.measures[number], exact, reference, real, what)
            if self.own:
                inputs = {target: expected[target][0][0] for target in float_layer.expansions}
                with torch.no_grad():
                    features = tuple(
                        expansion.reading_real()(inputs[float_layer.origin(target)])
                        for target, expansion in zip(layer.expansions, self.program.expansions(layer), strict=True)
                    )
                    alone = _real_values(contraction, features, contraction(*features), self._unrounded[number])
                _add(self.own[number], exact, reference, alone, f"{what} alone")

    def result(self) -> tuple[LayerError, ...]:
        """Return the errors in the order of evaluation."""
        own: list[float | None] = [measure.sqnr_db for measure in self.own]
        return tuple(
            LayerError(name, measure.sqnr_db, measure.largest, measure.worst, alone)
            for name, measure, alone in zip(self.names, self.measures, own or [None] * len(self.names), strict=True)
        )


def _costs_nothing_beyond(float_program: Program, program: Program, layer: Layer) -> bool:
    """Whether the range of row numbers that a layer hands over costs nothing, or counts as error of the layer behind."""
    contraction = program.contraction(layer)
    if contraction.hands_over.kind != "rows":
        return False
    if contraction.geometry is not None:
        return True
    index, tables = contraction.hands_over.index, tables_behind(program, layer.contraction)
    pairs = zip(float_program.layers(), program.layers(), strict=True)
    origins = {known.origin(table) for known, reader in pairs for table in tables if table in reader.expansions}
    assert index is not None
    return all(_is_constant_beyond(float_program.node(origin, AnyExpansion), index) for origin in origins)


def _is_constant_beyond(expansion: AnyExpansion, index: IndexQuantizer) -> bool:
    span = index.high - index.low
    ends = torch.tensor(
        [index.low - share * span for share in _BEYOND] + [index.high + share * span for share in _BEYOND]
    )
    values = expansion.evaluate_inputs(ends[:, None].expand(-1, expansion.in_shape[-1]))
    below, above = values.split(len(_BEYOND))
    return torch.equal(below, below[:1].expand_as(below)) and torch.equal(above, above[:1].expand_as(above))


def _real_values(contraction: AnyContraction, features: tuple[Tensor, ...], output: Tensor, unrounded: bool) -> Tensor:
    """Give the output of a contraction in real units, before its rounding if wished; ``features`` are what it read."""
    if unrounded:
        with torch.no_grad():
            real: Tensor = contraction.unrounded()(*features)
        return real
    return contraction.hands_over.real(output)


def _add(measure: ErrorMeasure, exact: AnyContraction, reference: Tensor, output: Tensor, what: str) -> None:
    """Compare what a layer yields, feature by feature or channel by channel."""
    if reference.numel() != output.numel():
        raise KanCompileError(
            f"{what}: found output shape {tuple(output.shape)!r}, expected {tuple(reference.shape)!r} as the float layer gives"
        )
    measure.add_columns(exact.by_output(reference), exact.by_output(output.reshape(reference.shape)))
