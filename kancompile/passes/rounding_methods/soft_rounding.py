"""Rounding as a differentiable choice between two neighboring codes, for AdaRound and BRECQ.

Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization* (2020), equations 23 to 24: a code is
``base + h(alpha)`` with the rectified sigmoid ``h = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)``, zeta 1.1 and gamma
-0.1, and the regulariser ``sum of 1 - |2 h - 1|^beta`` drives every ``h`` to 0 or 1 as beta falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
_SETTLED = 0.02  # h of a code taken over from another method: nearly decided, with a gradient left to change its mind


@dataclass(frozen=True)
class Schedule:
    """How strongly the regulariser pulls over the iterations.

    Attributes:
        iterations: steps of the optimizer.
        warm_start: share of them without regulariser.
        beta: exponent after the warm start and at the end; falls linearly.
    """

    iterations: int
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def exponent(self, iteration: int) -> float | None:
        """Return beta at an iteration, ``None`` during the warm start."""
        first = self.warm_start * self.iterations
        if iteration < first:
            return None
        passed = (iteration - first) / max(1.0, self.iterations - first)
        return self.beta[0] + (self.beta[1] - self.beta[0]) * passed


class SoftRounding:
    """Codes of one layer between ``base`` and ``base + 1``.

    Attributes:
        base: integers as float32 ``[n_out, c]``.
        alpha: float32 ``[n_out, c]``, what the optimizer changes.
    """

    def __init__(self, base: Tensor, h: Tensor) -> None:
        self.base = base
        self.alpha = _inverse(h).requires_grad_(True)

    @staticmethod
    def between_levels(weight: Tensor, step: Tensor, low: int, high: int) -> SoftRounding:
        """Start where the soft weight equals ``weight``, clipped to the range (``step`` ``[n_out, c]``)."""
        real = (weight / step).clamp(low, high)
        base = torch.floor(real).clamp(max=high - 1)
        return SoftRounding(base, real - base)

    @staticmethod
    def around_codes(codes: Tensor, weight: Tensor, step: Tensor, low: int, high: int) -> SoftRounding:
        """Start near given codes, with the neighbor towards ``weight`` as the alternative."""
        codes = codes.float()
        up = weight / step > codes
        base = torch.where(up, codes, codes - 1).clamp(low, high - 1)
        return SoftRounding(base, torch.where(codes == base, _SETTLED, 1 - _SETTLED))

    def h(self) -> Tensor:
        """Return the share of the upper code, ``[n_out, c]`` in [0, 1], differentiable."""
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def soft(self) -> Tensor:
        """Return real-valued codes, differentiable."""
        return self.base + self.h()

    def hard(self) -> Tensor:
        """Return the codes decided for, integers as float32."""
        return self.base + (self.h().detach() >= 0.5)

    def regulariser(self, beta: float) -> Tensor:
        """Return the sum of ``1 - |2 h - 1|^beta``."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()


def _inverse(h: Tensor) -> Tensor:
    share = (h.clamp(0.01, 0.99) - GAMMA) / (ZETA - GAMMA)
    return torch.log(share / (1 - share))
