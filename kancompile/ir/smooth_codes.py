"""Codes of a table as differences of neighboring rows: functions are smooth, so that these take few bits.

    order 1:  T[r] = T[0] + d[1] + ... + d[r]
    order 2:  d[r] = d[1] + e[2] + ... + e[r]

All numbers are whole, so that sums give back the very codes. Of 2,048 rows of Gaussians first differences take 2 bits, of 192
rows of cubic B-splines second ones 4 or 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_ROWS = 16


@dataclass(frozen=True)
class SmoothCodes:
    """A table as differences.

    Attributes:
        first: int32 ``[order, k]``, the first row and, of order 2, the first difference.
        differences: int8 ``[rows - order, k]``, of the order that takes the fewest bits.
        bits: that hold each of them, 2 to 7.
    """

    first: NDArray[np.int32]
    differences: NDArray[np.int8]
    bits: int

    @property
    def order(self) -> int:
        """How often differences were taken."""
        return len(self.first)

    def stored_bytes(self) -> int:
        """Count the bytes of all numbers."""
        return -(-self.differences.size * self.bits // 8) + self.first.nbytes

    def codes(self) -> NDArray[np.uint8]:
        """Give back the table, ``[rows, k]``."""
        found = self.differences.astype(np.int32)
        for row in self.first[::-1]:
            found = np.concatenate([row[None], found]).cumsum(0, dtype=np.int32)
        return found.astype(np.uint8)


def smooth_codes(table: NDArray[np.uint8]) -> SmoothCodes | None:
    """Write a table ``[rows, k]`` as differences; ``None`` where these take 8 bits or rows are few."""
    if len(table) < _LEAST_ROWS:
        return None
    found, first = table.astype(np.int32), list[NDArray[np.int32]]()
    best: SmoothCodes | None = None
    for _ in range(2):
        first.append(found[0])
        found = np.diff(found, axis=0)
        bits = max(2, int(np.maximum(found, ~found).max()).bit_length() + 1)
        if bits < 8 and (best is None or bits < best.bits):
            best = SmoothCodes(np.stack(first), found.astype(np.int8), bits)
    return best
