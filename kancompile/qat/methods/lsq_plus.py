"""LSQ+: step and offset are learned (Bhalgat et al., *LSQ+*, CVPRW 2020, arXiv 2004.09576).

    x_bar = rnd(clip((x - beta) / s, n, p))        x_hat = s x_bar + beta

    dx_hat/ds    = rnd(t) - t inside, n below, p above,   t = (x - beta) / s
    dx_hat/dbeta = 0 inside, 1 outside

A file has whole zero points, so ``beta = -s z`` and ``z`` is learned through its rounding; what is left of a free offset is
learned by the bias of the layer in front and by the table's codes. Weights are symmetric and have no offset in the paper:
there it is LSQ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kancompile.ir import IndexQuantizer
from kancompile.qat.methods.lsq import LsqWeight
from kancompile.qat.methods.straight_through import LearnedStep, rounded, whole_zero_point, with_scaled_gradient


class LsqPlusWeight(LsqWeight):
    """LSQ+ of weights."""


class LsqPlusIndex(LearnedStep):
    """LSQ+ of a row index.

    Attributes:
        shift: rows by which the zero point has moved, float32 scalar.
    """

    def __init__(self, start: IndexQuantizer, features: int) -> None:
        super().__init__(start, features)
        self.shift = nn.Parameter(torch.zeros(()))

    def zero_point(self) -> Tensor:
        """Return the zero point, rounded."""
        return whole_zero_point(with_scaled_gradient(self.shift, self.gradient_scale) + self.start.zero_point)

    def surrogate(self, x: Tensor) -> Tensor:
        """Give ``s rnd(clip(x / s, -z, L - 1 - z))``."""
        step, zero_point = self.step(), self.zero_point()
        return step * rounded(torch.clamp(x / step, min=-zero_point, max=self.most - zero_point))
