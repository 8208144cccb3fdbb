"""Numbers as codes in blocks: ``value[r, c] = code[r, c] * row_scale[r] * column_scale[c]``.

Of 16 bits, both scales are powers of two, so every value is a float32 number exactly, and the order of the two products does not
matter. What a matrix of coefficients needs is a scale for each row (narrow cells have steep polynomials) and for each
column (functions differ in size); a single scale would leave small entries no bits. Of 8 bits, weights have a scale for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 16
_LARGEST = (1 << (BITS - 1)) - 1
_LEAST_EXPONENT, _MOST_EXPONENT = -126 + BITS - 1, 126
"""Scales stay normal float32 numbers, also a row's, which is 15 powers of two below its largest entry."""


@dataclass(frozen=True)
class BlockCodes:
    """A matrix in codes of 16 or 8 bits.

    Attributes:
        codes: int16 ``[r, c]``, or int8.
        row_scale: float32 ``[r]``; powers of two with 16-bit codes.
        column_scale: float32 ``[c]``, powers of two.
    """

    codes: Tensor
    row_scale: Tensor
    column_scale: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 * self.codes.element_size()

    def values(self) -> Tensor:
        """Give the float32 numbers that the codes stand for, ``[r, c]``."""
        return self.codes.float() * self.row_scale[:, None] * self.column_scale

    def columns(self, start: int, end: int) -> BlockCodes:
        """Give the codes of some columns."""
        return BlockCodes(self.codes[:, start:end], self.row_scale, self.column_scale[start:end])


def round_to_blocks(values: Tensor) -> BlockCodes:
    """Round a matrix to 16-bit codes.

    An entry is off by at most half a step, ``2^-15`` of the smallest power of two above the largest entry of its row once
    all columns are scaled alike.

    Args:
        values: finite floats ``[r, c]``.
    """
    exact = values.double()
    column = _exponent(exact.abs().amax(0))
    row = _exponent((exact * torch.exp2(-column)).abs().amax(1))
    row = row - (BITS - 1)
    codes = torch.round(exact * torch.exp2(-column) * torch.exp2(-row)[:, None])
    # the exponent is one above the largest entry, so only rounding itself can reach the limit
    codes = codes.clamp(-_LARGEST, _LARGEST).to(torch.int16)
    return BlockCodes(codes, torch.exp2(row).float(), torch.exp2(column).float())


def _exponent(size: Tensor) -> Tensor:
    """Give the least whole exponent with ``size < 2^exponent``, 0 where nothing has a size."""
    _, exponent = torch.frexp(size)
    exponent = exponent.double().clamp(_LEAST_EXPONENT, _MOST_EXPONENT)
    return torch.where(size > 0, exponent, 0.0)
