"""Measure how far outputs are from a reference about what varies in it, batch by batch, in bounded memory.

A constant part of an output says nothing: an output of 1000 +- 1 that is off by 1 has lost everything. So the error of every
output is compared with the variance of that output over the samples,

    SQNR[j] = 10 log10( sum over samples of (y[j] - mean y[j])^2 / sum of (y'[j] - y[j])^2 ),

and the worst output counts. An output that does not vary is judged by its error against its value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import Values, by_name

CONSTANT = 1e-6
"""Share of its mean below which the spread of an output counts as none."""
_MOST_LISTED = 64


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


@dataclass(frozen=True)
class OutputError:
    """The error of one output over all samples.

    Attributes:
        output: its number in its tensor.
        mean, spread: mean and standard deviation of the reference.
        rms: root mean square of the error.
        largest: largest absolute error.
        range: largest less smallest value of the reference.
        is_constant: whether the reference does not vary; the error is then compared with its value.
        sqnr_db: power of what varies, or of a constant's value, to that of the error.
        of: name of its tensor, where a network returns several.
    """

    output: int
    mean: float
    spread: float
    rms: float
    largest: float
    range: float
    is_constant: bool
    sqnr_db: float
    of: str = ""

    @property
    def called(self) -> str:
        """The output's number; where a network returns several tensors, behind the name of its tensor: ``box[2]``."""
        return f"{self.of}[{self.output}]" if self.of else str(self.output)

    @property
    def rms_share(self) -> float:
        """Root mean square of the error as a share of what it is compared with."""
        return math.nan if math.isnan(self.sqnr_db) else 10 ** (-self.sqnr_db / 20)

    @property
    def largest_share(self) -> float | None:
        """Largest error as a share of the range; ``None`` for a constant."""
        return None if self.is_constant or self.range == 0 else self.largest / self.range

    def text(self) -> str:
        """Say the error for people."""
        if self.is_constant:
            return f"constant at {self.mean:.4g}, off by {self.rms:.2g}"
        return f"{self.sqnr_db:.1f} dB, rms error {100 * self.rms_share:.2g} % of its spread {self.spread:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        numbers = ("mean", "spread", "rms", "largest", "range", "sqnr_db", "rms_share", "largest_share")
        return {
            "output": self.output,
            **({"of": self.of} if self.of else {}),
            "is_constant": self.is_constant,
            **{name: plain_number(getattr(self, name)) for name in numbers},
        }


@dataclass
class ErrorMeasure:
    """Accumulates the error of outputs against a reference, in float64, each output by itself.

    What an output is depends on the shape: a column of ``[b, n]``, an entry of the last dimension of ``[b, tokens, n]``, a
    channel of an image ``[b, c, *]``. A network that returns several tensors is measured tensor by tensor, and its outputs are
    those of all of them in order.

    Attributes:
        count: elements seen.
        rows: values seen of every output.
        absolute: sum of absolute differences.
        differing: elements that are not equal.
        samples, agreeing: rows seen and rows whose largest element stands in the same place, where that has a meaning.
        is_finite: whether all values were.
        parts: measures of a network's tensors by name, where it returns several.
    """

    count: int = 0
    rows: int = 0
    absolute: float = 0.0
    differing: int = 0
    samples: int = 0
    agreeing: int = 0
    is_finite: bool = True
    parts: dict[str, ErrorMeasure] = field(default_factory=dict)
    _mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _power: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _noise: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _largest: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _low: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _high: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, reference: Values, output: Values, what: str) -> None:
        """Take one batch of both.

        Raises:
            KanCompileError: the shapes differ, or the names.
        """
        if isinstance(reference, Tensor) and isinstance(output, Tensor):
            self._add_tensor(reference, output, what)
            return
        wanted, found = by_name(reference, ["output"]), by_name(output, ["output"])
        if list(wanted) != list(found):
            raise KanCompileError(
                f"{what}: found the outputs {list(found)!r}, expected {list(wanted)!r} as the float model gives; compare a file "
                "with the model it was compiled from"
            )
        for (name, expected), value in zip(wanted.items(), found.values(), strict=True):
            part = self.parts.setdefault(name, ErrorMeasure())
            part._add_tensor(expected.float(), value.float(), f"{what}, output {name!r}")
        parts = list(self.parts.values())
        self.count, self.differing = sum(part.count for part in parts), sum(part.differing for part in parts)
        self.rows, self.absolute = max(part.rows for part in parts), sum(part.absolute for part in parts)
        self.samples, self.agreeing = parts[0].samples, parts[0].agreeing
        self.is_finite = all(part.is_finite for part in parts)

    def _add_tensor(self, reference: Tensor, output: Tensor, what: str) -> None:
        # a model may return decisions, of which booleans can neither be subtracted nor compared by size
        reference, output = (one if one.is_floating_point() else one.float() for one in (reference, output))
        if reference.shape != output.shape:
            raise KanCompileError(
                f"{what}: found output shape {tuple(output.shape)!r}, expected {tuple(reference.shape)!r} "
                "as the float model gives; compare a file with the model it was compiled from"
            )
        if reference.numel() == 0:
            return
        self.differing += int((output != reference).sum())
        if reference.ndim == 2 and reference.shape[1] > 1:
            self.samples += len(reference)
            self.agreeing += int((reference.argmax(1) == output.argmax(1)).sum())
        self.add_columns(as_columns(reference), as_columns(output))

    def add_columns(self, reference: Tensor, output: Tensor) -> None:
        """Take values ``[r, m]`` of ``m`` outputs."""
        reference, difference = reference.double(), output.double() - reference.double()
        rows, size = len(reference), difference.abs()
        self.count += difference.numel()
        self.absolute += float(size.sum())
        self.is_finite = self.is_finite and bool(torch.isfinite(difference).all())
        mean = reference.mean(0)
        power = (reference - mean).square().sum(0)
        low, high = torch.aminmax(reference, dim=0)
        parts = (difference.square().sum(0), size.amax(0), low, high)
        if self.rows == 0:
            self._mean, self._power = mean, power
            self._noise, self._largest, self._low, self._high = parts
        else:
            # means and powers of two sets of values (Chan, Golub, LeVeque, 1983)
            step, total = mean - self._mean, self.rows + rows
            self._power = self._power + power + step.square() * (self.rows * rows / total)
            self._mean = self._mean + step * (rows / total)
            self._noise = self._noise + parts[0]
            self._largest = torch.maximum(self._largest, parts[1])
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self.rows += rows

    @property
    def n_outputs(self) -> int:
        """Number of outputs."""
        return len(self.noise_of)

    @property
    def is_constant(self) -> Tensor:
        """Whether each output does not vary, bool ``[m]``; no more than float32 rounding of its value counts as none, too."""
        if self.parts:
            return torch.cat([part.is_constant for part in self.parts.values()])
        spread, mean = (self._power / max(1, self.rows)).sqrt(), self._mean.abs()
        if self.n_outputs and bool((spread <= CONSTANT * mean.max()).all()):
            return torch.ones_like(
                spread, dtype=torch.bool
            )  # equal samples: an output near 0 has the rounding of the others
        return spread <= CONSTANT * mean

    @property
    def allowed(self) -> Tensor:
        """Power that the error of each output is compared with, all samples together, float64 ``[m]``.

        What varies; of a constant its value, and of a constant 0 what varies in the outputs beside it.
        """
        if self.parts:
            return torch.cat([part.allowed for part in self.parts.values()])
        constant = self.is_constant
        varying = self._power[~constant]
        beside = varying.max() if len(varying) else torch.ones((), dtype=torch.float64)
        value = self.rows * self._mean.square()
        return torch.where(constant, torch.where(value > 0, value, beside), self._power)

    @property
    def noise_of(self) -> Tensor:
        """Power of the error of each output, all samples together, float64 ``[m]``."""
        return torch.cat([part.noise_of for part in self.parts.values()]) if self.parts else self._noise

    @property
    def signal(self) -> float:
        """Power of what varies in all outputs together; of constants their values."""
        return float(self.allowed.sum())

    @property
    def noise(self) -> float:
        """Power of the error of all outputs together."""
        return float(self.noise_of.sum())

    @property
    def largest(self) -> float:
        """Largest absolute difference; NaN once any value was not finite."""
        if self.parts and self.is_finite:
            return max(part.largest for part in self.parts.values())
        return (float(self._largest.max()) if self.n_outputs else 0.0) if self.is_finite else math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of all outputs together, about their means; NaN where one was not finite."""
        return decibel(self.signal, self.noise) if self.is_finite else math.nan

    @property
    def worst(self) -> OutputError | None:
        """The output of the least ratio, or the first that was not finite; ``None`` where nothing was measured."""
        if not self.n_outputs:
            return None
        unusable = ~torch.isfinite(self.noise_of)
        share = torch.where(unusable, math.inf, self.noise_of / self.allowed.clamp(min=1e-300))
        return self.output(int(share.argmax()))

    @property
    def worst_db(self) -> float:
        """Least ratio of any output; NaN where one was not finite."""
        worst = self.worst
        return math.inf if worst is None else worst.sqnr_db if self.is_finite else math.nan

    def output(self, number: int) -> OutputError:
        """Return the error of one output."""
        for name, part in self.parts.items():
            if number < part.n_outputs:
                return replace(part.output(number), of=name)
            number -= part.n_outputs
        noise, rows = float(self._noise[number]), max(1, self.rows)
        low, high = float(self._low[number]), float(self._high[number])
        return OutputError(
            number,
            float(self._mean[number]),
            math.sqrt(float(self._power[number]) / rows) if math.isfinite(float(self._power[number])) else math.nan,
            math.sqrt(noise / rows) if math.isfinite(noise) else math.nan,
            float(self._largest[number]),
            high - low,
            bool(self.is_constant[number]),
            decibel(float(self.allowed[number]), noise) if math.isfinite(noise) else math.nan,
        )

    @property
    def largest_share(self) -> float | None:
        """Largest error of any output as a share of that output's range; ``None`` where none varies."""
        if self.parts:
            found = [share for part in self.parts.values() if (share := part.largest_share) is not None]
            return max(found, default=None)
        shares = (self._largest / (self._high - self._low))[~self.is_constant & (self._high > self._low)]
        return float(shares.max()) if len(shares) else None

    @property
    def mean_abs(self) -> float:
        """Mean absolute difference."""
        return self.absolute / self.count if self.count else 0.0

    @property
    def agreement(self) -> float | None:
        """Percentage of samples with the same largest output; ``None`` where an output is not ``[b, classes]``."""
        return 100 * self.agreeing / self.samples if self.samples else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        listed = [self.output(number).to_dict() for number in range(min(self.n_outputs, _MOST_LISTED))]
        worst = self.worst
        return {
            "max_abs": plain_number(self.largest),
            "mean_abs": plain_number(self.mean_abs),
            "sqnr_db": plain_number(self.sqnr_db),
            "worst_db": plain_number(self.worst_db),
            "worst": None if worst is None else worst.to_dict(),
            "outputs": listed,
            "n_outputs": self.n_outputs,
            "top1_agreement": self.agreement,
            "differing": self.differing,
            "count": self.count,
            **({"tensors": {name: part.to_dict() for name, part in self.parts.items()}} if self.parts else {}),
        }


def as_columns(values: Tensor) -> Tensor:
    """View ``[b, ...]`` as ``[r, m]`` with a column for every output (see :class:`ErrorMeasure`)."""
    if values.ndim <= 2:
        return values.reshape(len(values), -1)
    if values.ndim == 3:
        return values.flatten(0, 1)
    return values.movedim(1, -1).flatten(0, -2)
