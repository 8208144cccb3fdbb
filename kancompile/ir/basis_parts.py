"""Parts of joint tables as integer mixtures of functions that all inputs share, made when a file is loaded.

    parts[j, p, w, l] = clip(floor((sum_b basis[l, b] mix[j, p, w, b] + bias[j, p, w]) 2^-shift[j, p, w]), 0, 127)

A function then takes a byte for each function of the basis, not for each row. All numbers are integers below 2**24 or powers of
two, so that float32 computes them exactly, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_PART = 127
MOST_SHIFT = 20


@dataclass(frozen=True)
class BasisParts:
    """Integers that parts follow from.

    Attributes:
        basis: uint8 ``[L, b]``, codes of the functions that inputs share at the rows.
        mix: int8 ``[m, k, w, b]``.
        bias: int16 ``[m, k, w]``; half a code is in it, so that rounding down rounds to nearest.
        shift: uint8 ``[m, k, w]``, at most ``MOST_SHIFT``.
    """

    basis: Tensor
    mix: Tensor
    bias: Tensor
    shift: Tensor

    def parts(self) -> Tensor:
        """Compute the parts, uint8 ``[m, k, w, L]``."""
        total = self.mix.double() @ self.basis.double().T + self.bias.double()[..., None]
        codes = torch.floor(total * torch.pow(2.0, -self.shift.double())[..., None])
        return codes.clamp(0, LARGEST_PART).to(torch.uint8)

    def stored_bytes(self) -> int:
        """Count the bytes of the integers."""
        return self.basis.numel() + self.mix.numel() + 2 * self.bias.numel() + self.shift.numel()
