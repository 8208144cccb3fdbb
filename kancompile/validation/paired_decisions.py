"""Compare two classifiers on the same samples, and say what a sample of that size can tell at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scipy import special
from torch import Tensor

_LEVEL = 0.95
_QUANTILE = 1.959963984540054  # of the standard normal distribution, at 0.975


@dataclass(frozen=True)
class PairedDecisions:
    """How the decisions of two classifiers differ on the same samples.

    Attributes:
        n: samples.
        right: of them, how many the first one decides rightly.
        lost: how many the first one decides rightly and the second one wrongly.
        won: the reverse.
    """

    n: int
    right: int
    lost: int
    won: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> PairedDecisions:
        """Count: bool ``[n]`` each, whether decisions were right."""
        return cls(len(first), int(first.sum()), int((first & ~second).sum()), int((second & ~first).sum()))

    @property
    def loss(self) -> float:
        """Points of accuracy that the second one loses."""
        return 100 * (self.lost - self.won) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the loss in points.

        Wald's interval of a paired difference with half an observation more in each cell (Agresti and Min, 2005); where no
        decision changed, the largest loss that this would still happen with once in twenty times.
        """
        if self.lost + self.won == 0:
            unseen = self.smallest_visible
            return -unseen, unseen
        lost, won, n = self.lost + 0.5, self.won + 0.5, self.n + 2
        half = _QUANTILE * math.sqrt(lost + won - (lost - won) ** 2 / n) / n
        return 100 * ((lost - won) / n - half), 100 * ((lost - won) / n + half)

    @property
    def p_value(self) -> float:
        """Probability of a difference as large if both were equally good: McNemar's exact test (1947)."""
        changed = self.lost + self.won
        return min(1.0, 2 * float(special.bdtr(min(self.lost, self.won), changed, 0.5))) if changed else 1.0

    @property
    def smallest_visible(self) -> float:
        """Points of loss below which more than one sample in twenty of this size shows no changed decision at all."""
        return float(100 * (1 - (1 - _LEVEL) ** (1 / self.n)))

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of the second one's accuracy in percent (Clopper and Pearson, 1934)."""
        return _interval_of(self.right - self.lost + self.won, self.n)

    @property
    def first_accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of the first one's accuracy in percent, likewise."""
        return _interval_of(self.right, self.n)

    def interval_row(self) -> list[str]:
        """Give the row of a table for both accuracies' intervals: what it is, the first one's, the second one's, how likely."""
        texts = ("{:.2f} ... {:.2f}".format(*ends) for ends in (self.first_accuracy_interval, self.accuracy_interval))
        return ["  95 % interval", *texts, f"of {self.n:,} samples"]

    @property
    def is_within_chance(self) -> bool:
        """Whether the interval of the loss holds 0."""
        low, high = self.interval
        return low <= 0 <= high

    def text(self) -> str:
        """Say it for people."""
        if self.lost + self.won == 0:
            return f"no decision of {self.n:,} differs; a loss below {self.smallest_visible:.2g} points cannot be seen"
        low, high = self.interval
        return (
            f"{self.lost + self.won} of {self.n:,} decisions differ: {self.loss:+.2f} points lost, 95 % interval {low:+.2f} ... "
            f"{high:+.2f}, McNemar p = {self.p_value:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "samples": self.n,
            "lost": self.lost,
            "won": self.won,
            "loss": self.loss,
            "interval": list(self.interval),
            "p_value": self.p_value,
            "is_within_chance": self.is_within_chance,
            "smallest_visible": self.smallest_visible,
            "accuracy_interval": list(self.accuracy_interval),
        }


def _interval_of(k: int, n: int) -> tuple[float, float]:
    tail = (1 - _LEVEL) / 2
    low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return 100 * low, 100 * high
