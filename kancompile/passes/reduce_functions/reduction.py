"""The pass that gives layers fewer functions, whatever scope shares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kancompile.ir import Program, Values
from kancompile.passes.reduce_functions.across_inputs import across_inputs
from kancompile.passes.reduce_functions.channels import across_channels
from kancompile.passes.reduce_functions.within_inputs import within_inputs

NEGLIGIBLE = 1e-6
"""Share of a layer's output variance below which functions are left out wherever tables are made: their rows round by more."""


@dataclass(frozen=True)
class ReduceFunctions:
    """Give layers fewer functions; the second run finds nothing more to save.

    Functions of all inputs first, since tables that inputs share are the smallest; then those of each input, where inputs have
    little in common; convolutions last, whose weights are fitted to what their functions have become.

    Attributes:
        applies: says for a layer's name whether functions may be left out that nothing shows of (:data:`NEGLIGIBLE`).
        share: says for a layer's name which squared error is allowed, as a share of the output's variance, where weights are
            fitted again; layers with 0 keep their functions.
        negligible: the former share.
    """

    applies: Callable[[str], bool]
    share: Callable[[str], float]
    negligible: float = NEGLIGIBLE

    name = "reduce-functions"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with fewer functions, or the same one.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        program = across_inputs(program, x, self.applies, self.negligible)
        program = within_inputs(program, x, self.applies, self.negligible)
        return across_channels(program, x, self.share)
