"""Measure how far one output is from another, batch by batch, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import KanCompileError


def decibel(signal: float, noise: float) -> float:
    """Return ``10 log10(signal / noise)`` of two powers; infinite where there is no noise, NaN for NaN."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def plain_number(value: float | None) -> float | str | None:
    """Make a number fit for JSON, which knows neither infinity nor NaN: those become text."""
    return value if value is None or math.isfinite(value) else str(value)


@dataclass
class ErrorMeasure:
    """Accumulates the error of outputs against a reference, in float64.

    Attributes:
        count: elements seen.
        signal, noise: sums of squares of the reference and of the difference.
        absolute: sum of absolute differences.
        largest: largest absolute difference; NaN once any value was not finite.
        differing: elements that are not equal.
        samples, agreeing: rows seen and rows whose largest element stands in the same place, where that has a meaning.
    """

    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    differing: int = 0
    samples: int = 0
    agreeing: int = 0

    def add(self, reference: Tensor, output: Tensor, what: str) -> None:
        """Take one batch of both.

        Raises:
            KanCompileError: the shapes differ.
        """
        if reference.shape != output.shape:
            raise KanCompileError(
                f"{what}: found output shape {tuple(output.shape)!r}, expected {tuple(reference.shape)!r} "
                "as the float model gives; compare a file with the model it was compiled from"
            )
        difference = output.double() - reference.double()
        self.count += difference.numel()
        self.signal += float(reference.double().square().sum())
        self.noise += float(difference.square().sum())
        self.absolute += float(difference.abs().sum())
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        self.largest = math.nan if math.isnan(largest) or math.isnan(self.largest) else max(self.largest, largest)
        self.differing += int((output != reference).sum())
        if reference.ndim == 2 and reference.shape[1] > 1:
            self.samples += len(reference)
            self.agreeing += int((reference.argmax(1) == output.argmax(1)).sum())

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio; NaN where an output was not finite."""
        return math.nan if math.isnan(self.largest) else decibel(self.signal, self.noise)

    @property
    def mean_abs(self) -> float:
        """Mean absolute difference."""
        return self.absolute / self.count if self.count else 0.0

    @property
    def agreement(self) -> float | None:
        """Percentage of samples with the same argmax; ``None`` where an output is not ``[b, classes]``."""
        return 100 * self.agreeing / self.samples if self.samples else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "max_abs": plain_number(self.largest),
            "mean_abs": plain_number(self.mean_abs),
            "sqnr_db": plain_number(self.sqnr_db),
            "argmax_agreement": self.agreement,
            "differing": self.differing,
            "count": self.count,
        }


class TaskMetric:
    """Accumulates how well outputs predict labels.

    Integer labels ``[n]`` (or ``[n, 1]``) with outputs ``[n, classes]``: accuracy in percent. Anything else is
    regression: R2, averaged over the outputs with equal weights, in percent, and the root mean squared error.
    """

    def __init__(self) -> None:
        self.count = 0
        self.correct: int | None = None
        self.squares = torch.zeros(())
        self.labels: list[Tensor] = []

    def add(self, labels: Tensor, output: Tensor, what: str) -> None:
        """Take one batch.

        Raises:
            KanCompileError: labels that such an output cannot be compared with.
        """
        n, n_out = len(output), output[0].numel()
        flat = labels.reshape(n, -1)
        self.count += n
        if not labels.is_floating_point() and flat.shape[1] == 1 and n_out > 1 and output.ndim == 2:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= n_out:
                raise KanCompileError(
                    f"{what} labels: found classes {low} ... {high}, expected 0 ... {n_out - 1} as the model has "
                    f"{n_out} outputs"
                )
            self.correct = (self.correct or 0) + int((output.argmax(1) == flat[:, 0]).sum())
            return
        if flat.shape[1] != n_out:
            raise KanCompileError(
                f"{what} labels: found {flat.shape[1]} values a sample, expected {n_out} as the model has outputs"
            )
        self.squares = self.squares + (output.reshape(n, -1).double() - flat.double()).square().sum(0)
        self.labels.append(flat.double())  # two passes: a running variance would cancel for targets far from zero

    def values(self) -> dict[str, float]:
        """Return the measures by name; the first one is what a drop is measured in, in points."""
        if self.correct is not None:
            return {"accuracy": 100 * self.correct / self.count}
        labels = torch.cat(self.labels)
        spread = (labels - labels.mean(0)).square().sum(0)
        rmse = float((self.squares.sum() / labels.numel()).sqrt())
        # R2 has no meaning for a constant target
        r2 = 100 * float((1 - self.squares / spread).mean()) if bool((spread > 0).all()) else math.nan
        return {"r2": r2, "rmse": rmse}
