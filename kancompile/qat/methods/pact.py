"""PACT: the end of the range is learned from what is clipped (Choi et al. 2018, arXiv 1805.06085, equations 1 to 3).

    y = clip(x, 0, alpha)         y_hat = rnd(y (2^b - 1) / alpha) alpha / (2^b - 1)

    dy_hat/dalpha = 1 if x >= alpha, else 0        dy_hat/dx = 1 if 0 <= x <= alpha, else 0

It replaces a rectifier, whose range begins at 0. A range that reaches below 0 keeps its zero point, and its lower end
``-alpha z / (L - 1 - z)`` moves with ``alpha``. Only the L2 penalty of the paper, weight decay on ``step_factor``, shrinks
``alpha``. It is a method for activations: the weights of such networks are quantized by DoReFa or LSQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.qat.methods.straight_through import LearnedStep


class PactIndex(LearnedStep):
    """PACT of a row index."""

    def surrogate(self, x: Tensor) -> Tensor:
        """Give ``clip(x, -z s, (L - 1 - z) s)``."""
        step, zero_point = self.step(), float(self.zero_point())
        return torch.clamp(x, min=-zero_point * step, max=(self.most - zero_point) * step)
