"""Replace every float expansion by an integer table and fold the table's scales into the weights.

    phi = expand(x)                  q = table[index(x)]              (uint8)
    y = W phi + b          ->        y = V q + b'

with ``phi ~ s * q + z`` for each column, ``V = W diag(s)`` and ``b' = b + W z``. The program then computes in float on
integer features, which is what weight rounding works on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kancompile.ir import (
    AnyExpansion,
    Expansion,
    JointTable,
    Layer,
    Program,
    Values,
    quantizer_in_front,
    single_table_behind,
)
from kancompile.passes.tabulate_expansions.choose_index import Range, choose_index
from kancompile.passes.tabulate_expansions.known import KnownTables
from kancompile.passes.tabulate_expansions.layer import tabulate_layer
from kancompile.passes.tabulate_expansions.lookup_cost import LookupCost
from kancompile.passes.tabulate_expansions.options import TableOptions
from kancompile.passes.tabulate_expansions.values import STRETCH, measured_samples, values_at_rows, values_of_inputs


@dataclass(frozen=True)
class TabulateExpansions:
    """Tabulate the expansions of every layer; layers that already are tables stay.

    Attributes:
        options: gives the options of a layer by its name, ``None`` to keep the layer in float.
        samples: calibration samples used to measure errors (ranges always use all of them).
        known: what earlier calls with the same program and inputs found.
    """

    options: Callable[[str], TableOptions | None]
    samples: int = 256
    known: KnownTables | None = None

    name = "tabulate-expansions"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the tabulated program.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        layers = [layer for layer in program.layers() if self._applies(program, layer)]
        wanted = [target for layer in layers for target in layer.expansions]
        if not any(isinstance(program.module(target), Expansion) for target in wanted):
            return program
        read = program.inputs(x, wanted)
        known = KnownTables() if self.known is None else self.known
        for layer in layers:
            inputs = {target: read[target] for target in layer.expansions}
            options = self.options(layer.name)
            assert options is not None
            in_front = tuple(quantizer_in_front(program, target) for target in layer.expansions)
            behind = single_table_behind(program, layer.contraction)
            chosen_behind = behind is not None and (behind in wanted or program.node(behind, AnyExpansion).yields_codes)
            modules, said = known.layer(
                (layer.name, options, in_front, chosen_behind),
                partial(tabulate_layer, program, layer, inputs, options, self.samples, known, chosen_behind),
            )
            program = program.replace_modules(modules, said)
        return program

    def _applies(self, program: Program, layer: Layer) -> bool:
        expansions = [program.module(target) for target in layer.expansions]
        tabulated = any(isinstance(expansion, JointTable) for expansion in expansions)
        return program.is_float(layer) and not tabulated and self.options(layer.name) is not None


__all__ = [
    "STRETCH",
    "KnownTables",
    "LookupCost",
    "Range",
    "TableOptions",
    "TabulateExpansions",
    "choose_index",
    "measured_samples",
    "values_at_rows",
    "values_of_inputs",
]
