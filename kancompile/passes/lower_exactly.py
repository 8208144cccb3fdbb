"""Lower float layers to polynomials as exactly as the network needs: functions, and what later layers make of their error.

A tolerance holds for the functions of one layer. Steep layers behind it (narrow knots, symbolic squares) amplify its
error, so the output is compared on calibration inputs, and the tolerance lowered where that is not enough.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kancompile.ir.program import Program
from kancompile.passes.lower_to_polynomials import LowerToPolynomials

TOLERANCES = (1e-6, 1.5e-7)
"""Relative errors of functions to try; float32 rounding is 6e-8."""
OUTPUT_ERROR = 5e-6
_COMPARED = 256


def lower_exactly(program: Program, x: Tensor, applies: Callable[[str], bool]) -> Program:
    """Lower with the first tolerance that keeps the output within ``OUTPUT_ERROR`` of its largest value, else the least.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        applies: says for a layer's name whether to lower it.
    """
    few = x[:: max(1, len(x) // _COMPARED)][:_COMPARED]
    expected = program(few)
    lowered = program
    for tolerance in TOLERANCES:
        lowered = LowerToPolynomials(tolerance, applies=applies)(program, x)
        error = float((lowered(few) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if error <= OUTPUT_ERROR:
            break
    return lowered
