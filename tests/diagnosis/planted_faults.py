"""Small trained KANs of two families on the digits, and faults planted in their recipe or their calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from examples.zoo import chebyshev_kan, efficient_kan
from kancompile.frontend.capture import capture
from kancompile.ir import Program

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits"
FAMILIES = ("efficient_kan", "chebyshev_kan")


@dataclass(frozen=True)
class Samples:
    """Inputs ``[n, 64]`` and labels ``[n]``."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    @property
    def pair(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return self.x, self.y

    def scaled(self, factor: float, offset: float = 0.0) -> Samples:
        return Samples((self.x * factor + offset).astype(np.float32), self.y)

    def with_outlier(self, feature: int, value: float, share: float, seed: int) -> Samples:
        x = self.x.copy()
        x[np.random.default_rng(seed).random(len(x)) < share, feature] = value
        return Samples(x, self.y)

    def shuffled(self, seed: int) -> Samples:
        order = np.random.default_rng(seed).permutation(len(self.x))
        return Samples(self.x[order], self.y[order])


@lru_cache
def samples(name: str) -> Samples:
    """Load ``"calibration"`` (256 samples) or ``"test"`` (450)."""
    with np.load(DIGITS / f"digits_{name}.npz") as arrays:
        return Samples(arrays["x"], arrays["y"])


@lru_cache
def trained(family: str) -> nn.Module:
    """Give a trained model: the one of the repository, or a small one trained here for a second."""
    if family == "efficient_kan":
        model = efficient_kan.build(widths=(64, 64, 10))
        model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
        return model.eval()
    model = chebyshev_kan.build(widths=(64, 16, 10), seed=3)
    data = samples("test")  # judged on the other set, which these digits do not overlap
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@lru_cache
def captured(family: str) -> Program:
    """Capture it once for all tests."""
    return capture(trained(family), torch.from_numpy(samples("calibration").x[:2]))
