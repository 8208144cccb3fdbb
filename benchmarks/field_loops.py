"""Networks that use a KAN layer many times: as a cell over the steps of a sequence, as the slope that a solver asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.field_layers import GaussianKan


class KanCell(nn.Module):
    """A state that a KAN makes anew of itself and of each step of a sequence ``[b, steps, n_in]``: logits ``[b, 10]``."""

    def __init__(self, n_in: int = 18, width: int = 64) -> None:
        super().__init__()
        self.cell, self.head = GaussianKan(n_in + width, width), GaussianKan(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.head.base.in_features)
        for step in range(x.shape[1]):
            h = self.cell(torch.cat([x[:, step], h], dim=1))
        logits: Tensor = self.head(h)
        return logits


class KanOde(nn.Module):
    """``y' = f(y)`` from 0 to 1 by the classical method of Runge and Kutta in steps of one length: ``[b, 64]`` to ``[b, 10]``.

    ``f`` is a KAN of two layers, called four times a step.
    """

    def __init__(self, width: int = 32, hidden: int = 64, calls: int = 20) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(64, width), GaussianKan(width, 10)
        self.slope = nn.Sequential(GaussianKan(width, hidden), GaussianKan(hidden, width))
        self.steps = calls // 4

    def forward(self, x: Tensor) -> Tensor:
        y, length = self.into(x), 1 / self.steps
        for _ in range(self.steps):
            first = self.slope(y)
            second = self.slope(y + length / 2 * first)
            third = self.slope(y + length / 2 * second)
            fourth = self.slope(y + length * third)
            y = y + length / 6 * (first + 2 * second + 2 * third + fourth)
        logits: Tensor = self.head(y)
        return logits
