"""Look at the inputs of layers: features that stretch a table for all others, wrong scaling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STRETCHED = 3.0
"""By how much a few features must stretch the range of all others to be called outliers."""
_MOST_OUTLIERS = 3
_FEWEST_FEATURES = 4
_QUANTILES = 95
_TAIL = 0.03  # left out at both ends: a few outliers are another fault than another scaling
_MOST_VALUES = 1 << 18


@dataclass(frozen=True)
class Outliers:
    """Features that stretch the range of a table.

    Attributes:
        features: their numbers, the worst first.
        low, high: range of all features.
        others_low, others_high: range of the others; both ranges contain 0, as those of tables do.
    """

    features: tuple[int, ...]
    low: float
    high: float
    others_low: float
    others_high: float

    @property
    def stretch(self) -> float:
        """By how much they stretch the range."""
        return (self.high - self.low) / max(self.others_high - self.others_low, 1e-30)


def find_outliers(x: Tensor) -> Outliers | None:
    """Find up to three features without which the range of all others would be a third or less.

    Args:
        x: inputs ``[n, n_in]``.
    """
    if x.shape[1] < _FEWEST_FEATURES:
        return None
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    left = torch.ones(len(low), dtype=torch.bool)
    features: list[int] = []
    found = None
    for _ in range(min(_MOST_OUTLIERS, len(low) // _FEWEST_FEATURES)):
        numbers = left.nonzero()[:, 0]
        extremes = {int(numbers[low[numbers].argmin()]), int(numbers[high[numbers].argmax()])}
        spans = {}
        for feature in extremes:
            rest = left.clone()
            rest[feature] = False
            spans[feature] = float(high[rest].max() - low[rest].min())
        worst = min(spans, key=lambda feature: spans[feature])
        left[worst] = False
        features.append(worst)
        now = Outliers(
            tuple(features), float(low.min()), float(high.max()), float(low[left].min()), float(high[left].max())
        )
        before = found.stretch if found is not None else 1.0
        # two outliers on one side hide each other, so the one that shows no effect yet is kept for the next turn
        if now.stretch >= STRETCHED * before and now.others_high > now.others_low:
            found = now
    return found


@dataclass(frozen=True)
class Scaling:
    """An affine map of inputs.

    Attributes:
        text: as a formula in ``x``.
        factor, offset: of it.
    """

    text: str
    factor: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x * self.factor + self.offset


def usual_scalings(x: Tensor) -> Iterator[Scaling]:
    """Yield the scalings that are forgotten, or done once too often, in practice.

    Args:
        x: inputs as found, whose extremes, mean and deviation take part.
    """
    low, high = float(x.min()), float(x.max())
    yield Scaling("x / 255", 1 / 255, 0.0)
    yield Scaling("x / 127.5 - 1", 1 / 127.5, -1.0)
    yield Scaling("2 x - 1", 2.0, -1.0)
    yield Scaling("(x + 1) / 2", 0.5, 0.5)
    yield Scaling("255 x", 255.0, 0.0)
    yield Scaling("127.5 (x + 1)", 127.5, 127.5)
    span = high - low
    if span > 0:
        if low == 0 and high not in (1.0, 255.0):
            yield Scaling(f"x / {high:g}", 1 / high, 0.0)
            yield Scaling(f"2 x / {high:g} - 1", 2 / high, -1.0)
        mean, deviation = float(x.double().mean()), float(x.double().std())
        if deviation > 0:
            yield Scaling(f"(x - {mean:.4g}) / {deviation:.4g}", 1 / deviation, -mean / deviation)


@dataclass(frozen=True)
class Mismatch:
    """How far two sets of samples are apart, in standard deviations of the second, averaged over quantiles.

    Attributes:
        distance: as they are.
        scaling: the affine map of the first that brings them closest.
        scaled_distance: the distance then.
    """

    distance: float
    scaling: Scaling
    scaled_distance: float


def compare_distributions(x: Tensor, data: Tensor) -> Mismatch:
    """Compare the values of two sets of samples and find the scaling that makes the first like the second."""
    points = torch.linspace(_TAIL, 1 - _TAIL, _QUANTILES, dtype=torch.float64)
    found, wanted = (torch.quantile(_some(values), points) for values in (x, data))
    spread = float(wanted.std().clamp(min=1e-12))

    def distance(scaling: Scaling | None) -> float:
        return float(((found if scaling is None else scaling(found)) - wanted).abs().mean()) / spread

    centred = found - found.mean()
    factor = float((centred * (wanted - wanted.mean())).sum() / centred.square().sum().clamp(min=1e-30))
    offset = float(wanted.mean() - factor * found.mean())
    fitted = Scaling(f"{factor:.4g} x {'-' if offset < 0 else '+'} {abs(offset):.4g}", factor, offset)
    best = min(usual_scalings(x), key=distance)
    # a usual scaling is believed before a fitted one that is hardly better
    if distance(fitted) < distance(best) - 0.05:
        best = fitted
    return Mismatch(distance(None), best, distance(best))


def _some(x: Tensor) -> Tensor:
    values = x.flatten().double()
    return values[:: max(1, values.numel() // _MOST_VALUES)]
