"""QIL: the interval that is quantized is learned.

Jung et al., *Learning to Quantize Deep Networks by Optimizing Quantization Intervals*, CVPR 2019, arXiv 1808.05779::

    a = 0.5 / d,   e = 0.5 - 0.5 c / d                          interval [c - d, c + d]
    weights:   T(w) = 0 if |w| < c - d;   sign(w) if |w| > c + d;   sign(w) (a |w| + e) otherwise;   v_bar = rnd(q T(w))
    inputs:    T(x) = clip(a x + e, 0, 1);   x_hat = (rnd(q T(x)) / q - e) / a

    dT/dc = -0.5 / d,   dT/dd = -0.5 (|w| - c) / d^2            inside the interval (times sign(w)), 0 outside

``gamma`` is 1 and gradients of ``c`` and ``d`` have LSQ's scale, since the paper's own were reported not to converge (MQBench).
The transformer drops the magnitude of weights, which the factor on the scale gives back, learned. ``q`` is the largest code,
the lowest one's size included, so that training begins at the post-training codes: ``c = d = q / 2``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kancompile.ir import IndexQuantizer
from kancompile.qat.methods.straight_through import (
    SMALLEST_FACTOR,
    IndexMethod,
    WeightQuantizer,
    rounded,
    whole_zero_point,
    with_scaled_gradient,
)


class QilWeight(WeightQuantizer):
    """QIL of weights.

    Attributes:
        center, distance: ``c`` and ``d`` as parts of ``q / 2``, 1 to begin with.
    """

    def __init__(self, codes: Tensor, low: int, high: int, group_sizes: Tensor, live: Tensor) -> None:
        super().__init__(codes, low, high, group_sizes, live)
        self.center = nn.Parameter(torch.ones(()))
        self.distance = nn.Parameter(torch.ones(()))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return codes and factors."""
        largest = max(-self.low, self.high)
        scale = 1.0 / (self.weight.numel() * self.high) ** 0.5
        center = with_scaled_gradient(self.center, scale)
        distance = with_scaled_gradient(self.distance.clamp(min=SMALLEST_FACTOR), scale)
        weight = self.latent()
        sign = torch.where(weight >= 0, 1.0, -1.0)
        # in units of q: a |w| + e with a = 1 / (q d) and e = (1 - c / d) / 2
        size = ((weight * sign) / distance + 0.5 * largest * (1 - center / distance)).clamp(0, largest)
        return rounded(self.clipped(sign * size)), self.factor()


class QilIndex(IndexMethod):
    """QIL of a row index: LSQ+ in other coordinates, since the interval is mapped back.

    Attributes:
        distance: factor on half the calibrated range, 1 to begin with.
        shift: rows by which the center has moved.
    """

    def __init__(self, start: IndexQuantizer, features: int) -> None:
        super().__init__(start, features)
        self.distance = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def factor(self) -> Tensor:
        """Return the factor on the step."""
        return with_scaled_gradient(self.distance.clamp(min=SMALLEST_FACTOR), self.gradient_scale)

    def _interval(self) -> tuple[Tensor, Tensor]:
        """Center and half of the range, in calibrated steps."""
        half = self.most / 2
        center = half - self.start.zero_point + with_scaled_gradient(self.shift, self.gradient_scale)
        return center, half * self.factor()

    def zero_point(self) -> Tensor:
        """Return the zero point, rounded."""
        center, distance = self._interval()
        return whole_zero_point((distance - center) / self.factor())

    def surrogate(self, x: Tensor) -> Tensor:
        """Give the transformed, rounded and transformed back input."""
        center, distance = self._interval()
        slope = 0.5 / (distance * self.start.scale)
        offset = 0.5 - 0.5 * center / distance
        return (rounded((slope * x + offset).clamp(0, 1) * self.most) / self.most - offset) / slope
