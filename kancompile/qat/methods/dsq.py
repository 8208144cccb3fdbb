"""DSQ: the slope of a soft staircase (Gong et al., *Differentiable Soft Quantization*, ICCV 2019, arXiv 1908.05033).

    t = x / D in cell i, between codes i and i + 1
    phi = S tanh(k (t - i - 1/2)),     k = log(2 / alpha - 1),     S = 1 / tanh(k / 2)

    forward: rnd(t), clipped           backward: that of   i + 1/2 + phi / 2
    dQ/dt = (k S / 2) (1 - tanh^2(k (t - i - 1/2)))

``alpha`` is 0.4, as in MQBench: towards 0 the staircase is hard and its slope is 0 off the middles, towards 1 it is a line.
The range is ``D`` times whole numbers, so that a file can hold it; ``D`` is learned through the soft staircase.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kancompile.qat.methods.lsq import LsqIndex, LsqWeight
from kancompile.qat.methods.straight_through import standing_for

ALPHA = 0.4
_K = math.log(2 / ALPHA - 1)
_S = 1 / math.tanh(_K / 2)


def soft_staircase(t: Tensor) -> Tensor:
    """Give the soft staircase whose slope stands for that of rounding."""
    cell = torch.floor(t.detach())
    return cell + 0.5 + 0.5 * _S * torch.tanh(_K * (t - cell - 0.5))


def _rounded(value: Tensor) -> Tensor:
    return standing_for(torch.round(value.detach()), soft_staircase(value))


class DsqWeight(LsqWeight):
    """DSQ of weights: LSQ with the slope of the staircase."""

    rounds = staticmethod(_rounded)


class DsqIndex(LsqIndex):
    """DSQ of a row index: LSQ with the slope of the staircase."""

    rounds = staticmethod(_rounded)
