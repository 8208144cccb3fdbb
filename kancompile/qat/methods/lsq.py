"""LSQ: the step is learned (Esser et al., *Learned Step Size Quantization*, ICLR 2020, arXiv 1902.08153, equations 1 to 3).

    v_bar = rnd(clip(v / s, n, p))        v_hat = s v_bar

    dv_hat/dv = 1                   if n <= v/s <= p, else 0
    dv_hat/ds = rnd(v/s) - v/s      if n <= v/s <= p;   n below;   p above

The gradient of ``s`` is multiplied by ``1 / sqrt(N p)``, ``N`` the weights that share it, or the features of one sample. The
paper's interval is open; ours is closed, because training begins on codes, those at the ends included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.qat.methods.straight_through import LearnedStep, WeightQuantizer, rounded, with_scaled_gradient


class LsqWeight(WeightQuantizer):
    """LSQ of weights, one step for each output and scale group."""

    rounds = staticmethod(rounded)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return codes and factors."""
        shared = float(self.live.sum().clamp(min=1)) / len(self.step)
        factor = with_scaled_gradient(self.factor(), 1.0 / (shared * self.high) ** 0.5)
        return self.rounds(self.clipped(self.latent() / self.by_weight(factor))), factor


class LsqIndex(LearnedStep):
    """LSQ of a row index; its zero point stays."""

    rounds = staticmethod(rounded)

    def surrogate(self, x: Tensor) -> Tensor:
        """Give ``s rnd(clip(x / s, -z, L - 1 - z))``, whose slope is that of ``rounds``."""
        step, zero_point = self.step(), float(self.zero_point())
        return step * self.rounds(torch.clamp(x / step, -zero_point, self.most - zero_point))
