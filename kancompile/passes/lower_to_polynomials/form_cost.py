"""Weigh forms of a layer's functions: a form four times as large must be twice as fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

_OTHER_BYTES = 1 << 12  # nodes and names of a layer


@dataclass(frozen=True)
class Beside:
    """What a layer takes apart from its polynomials: ``bytes`` of weights, and ``nanoseconds`` of functions that stay."""

    bytes: int
    nanoseconds: float

    def cost(self, nanoseconds: float = 0.0, table_bytes: int = 0) -> float:
        """Weigh a form of the functions: the layer's time, multiplied by the root of its bytes.

        Args:
            nanoseconds: of the polynomials, for each input.
            table_bytes: of their coefficients.
        """
        return (self.nanoseconds + nanoseconds) * math.sqrt(self.bytes + _OTHER_BYTES + table_bytes)
