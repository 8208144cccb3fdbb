"""DoReFa: weights through a tangent, inputs on a fixed range (Zhou et al. 2016, arXiv 1606.06160, equations 5 to 9).

    weights:   v_bar = rnd(clip(q tanh(w) / max|tanh(w)|, n, p))        inputs:   x_hat = quantize(clip(x, low, high))

The paper's weight levels are ``2^b`` odd multiples, without 0; these are the whole numbers ``n ... p``, as in MQBench, so that
training can begin at the post-training codes and the codes are what a file stores. ``q`` is the largest code of the start
and ``max`` runs over the columns that vary. The tangent drops the magnitude of the weights, which the factor on the scale gives
back, learned. Inputs have no learned parameter: where the paper clips to [0, 1], the calibrated range stands.

    dv_bar/dw = q (1 - tanh(w)^2) / max|tanh(w)| inside, 0 outside (and through the maximum);   dx_hat/dx = 1 inside, 0 outside
"""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.qat.methods.straight_through import IndexMethod, WeightQuantizer, rounded

_LARGEST_TANGENT = 0.75  # of the start; nearer to 1 the tangent has hardly any slope


class DoReFaWeight(WeightQuantizer):
    """DoReFa of weights."""

    def __init__(self, codes: Tensor, low: int, high: int, group_sizes: Tensor, live: Tensor) -> None:
        super().__init__(codes, low, high, group_sizes, live)
        counted = codes[:, live] if bool(live.any()) else codes
        self.largest = max(1.0, float(counted.abs().max()))
        # columns that never vary may hold larger codes: they are out of the tangent's reach and stay at its end
        share = (_LARGEST_TANGENT * codes / self.largest).clamp(-0.999, 0.999)
        self.weight.data = self.largest * torch.atanh(share)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return codes and factors."""
        tangent = torch.tanh(self.weight / self.largest)
        counted = tangent[:, self.live] if bool(self.live.any()) else tangent
        normalized = tangent / counted.abs().amax().clamp(min=1e-6)
        return rounded(self.clipped(self.largest * normalized)), self.factor()


class DoReFaIndex(IndexMethod):
    """DoReFa of a row index, and the index that is not trained: the calibrated range stays."""

    def surrogate(self, x: Tensor) -> Tensor:
        """Give ``clip(x, low, high)``."""
        return x.clamp(self.start.low, self.start.high)
