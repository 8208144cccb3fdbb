"""The weight-rounding problem of one layer, its solution and the error that every method is judged by.

In units of its table, a layer is ``y[o] = bias[o] + sum over c of V[o, c] * q[c]`` with ``q`` the uint8 table codes and
``V`` the float weights times the value of one code step. Rounding replaces ``V`` by ``V_hat = scale * codes``. The bias
is stored in 32 bits, so any constant error is free to remove; what remains is, with ``D = V - V_hat``,

    E |D (q - mean)|^2 = tr(D S D^T),       S = Cov(q),

which is why methods work on the covariance ``S`` and not on ``E[q q^T]``: table codes have means far above 0, and the
uncentered moment spends its largest eigenvalue on an error that the bias absorbs.

Shapes: ``n`` calibration samples, ``c`` columns, ``m`` live columns (those that vary), ``n_out`` outputs, ``g`` scale
groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.passes.rounding_methods.quantizers import Width
from kancompile.processes import dealt, is_mine, sum_over_chunks
from kancompile.recipe import TERNARY

_CACHED_BYTES = 1 << 30
_FLOAT64_COLUMNS = 8192
_STRIP = 256


@dataclass(frozen=True)
class FeatureSource:
    """Calibration features of one layer, read in chunks as often as needed.

    Attributes:
        chunks: starts one pass over the data; yields uint8 or float tensors ``[rows, c]``, always the same ones.
        n: samples in one pass (rows of all chunks together).
        c: columns.
    """

    chunks: Callable[[], Iterator[Tensor]]
    n: int
    c: int

    @staticmethod
    def from_tensor(features: Tensor, chunk: int = 1024) -> FeatureSource:
        """Wrap features ``[n, c]`` that fit in memory."""
        return FeatureSource(lambda: iter(torch.split(features, chunk)), features.shape[0], features.shape[1])

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the chunks of one pass."""
        return self.chunks()

    def scaled(self, column_scale: Tensor) -> FeatureSource:
        """Give the codes of a table whose columns use only the fraction ``column_scale`` (``[c]``) of their range."""
        return replace(self, chunks=lambda: (torch.round(chunk.float() * column_scale) for chunk in self.chunks()))


@dataclass(frozen=True)
class SecondMoments:
    """Mean and covariance of calibration features.

    Attributes:
        n: samples.
        mean: float64 ``[c]``.
        variance: float64 ``[c]``.
        live: int64 ``[m]``, ascending: columns that vary.
        covariance: float32 ``[m, m]`` of the live columns, divided by ``n``.
    """

    n: int
    mean: Tensor
    variance: Tensor
    live: Tensor
    covariance: Tensor


def column_moments(features: FeatureSource, layer: str) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of every column, float64 ``[c]`` each, in one pass.

    Raises:
        KanCompileError: there is no sample, or a feature is not finite.
    """
    if features.n < 1:
        raise KanCompileError(f"layer {layer!r}: found 0 calibration samples, expected at least 1; pass more data")
    # without the first sample a constant column sums to exactly 0, so that dead columns are recognized
    shift = next(iter(features))[0].double().cpu()

    def sums(chunk: Tensor) -> tuple[Tensor, ...]:
        if chunk.is_floating_point() and not bool(torch.isfinite(chunk).all()):
            raise KanCompileError(
                f"layer {layer!r}: calibration features have NaN or infinite values, expected finite ones; "
                "check the calibration data and the layers before this one"
            )
        values = chunk.double().cpu() - shift
        return values.sum(0), values.square().sum(0), torch.tensor(float(len(values)))

    total, squares, count = sum_over_chunks(features, sums)
    rows = int(count)
    if rows != features.n:
        raise KanCompileError(f"layer {layer!r}: found {rows} calibration rows in one pass, expected {features.n}")
    mean = total / rows
    return mean + shift, (squares / rows - mean.square()).clamp_(min=0.0)


def live_columns(variance: Tensor) -> Tensor:
    """Return the columns that vary, ascending, int64 ``[m]``, for variances ``[c]``."""
    return torch.nonzero(variance > 1e-12 * variance.max().clamp(min=1e-12)).flatten()


def second_moments(features: FeatureSource, layer: str, device: str = "cpu") -> SecondMoments:
    """Accumulate mean and covariance of features in two passes and bounded memory.

    Chunks are centered and multiplied in float32, one strip of rows of the (symmetric) result at a time; sums over
    chunks, in their order, are kept in float64 where the matrix has at most 8192 live columns. Besides the result, that takes
    a strip and one chunk of floats. Several processes share the strips out.

    Raises:
        KanCompileError: as :func:`column_moments`.
    """
    mean, variance = column_moments(features, layer)
    live = live_columns(variance)
    m = len(live)
    dtype = torch.float64 if m <= _FLOAT64_COLUMNS else torch.float32
    total = torch.zeros(m, m, dtype=dtype, device=device)
    center = mean[live].float().to(device)
    picked = live.to(device)
    for chunk in features:
        # indexing first keeps the bytes moved small: uint8 columns are picked before they become float32
        values = chunk.to(device).index_select(1, picked).float() - center
        add_products(total, values, is_mine)
    exchange_strips(total)
    covariance = total.div_(features.n).float() if dtype is torch.float64 else total.div_(features.n)
    mirror(covariance)
    return SecondMoments(features.n, mean, variance, live, covariance)


def add_products(total: Tensor, values: Tensor, wanted: Callable[[int], bool] = lambda number: True) -> None:
    """Add ``values.T @ values`` to the strips of rows of ``total [m, m]`` that hold its lower triangle; see :func:`mirror`.

    ``wanted`` says by its number whether a strip is added to.
    """
    m = values.shape[1]
    for number, start in enumerate(range(0, m, _STRIP)):
        if wanted(number):
            stop = min(start + _STRIP, m)
            total[start:stop, :stop] += values[:, start:stop].T @ values[:, :stop]


def exchange_strips(total: Tensor) -> None:
    """Give all processes the strips of ``total [m, m]`` that each of them has added to."""
    starts = range(0, len(total), _STRIP)
    for start, (strip,) in zip(starts, dealt(starts, lambda start: (total[start : start + _STRIP],)), strict=True):
        total[start : start + _STRIP] = strip


def mirror(total: Tensor) -> None:
    """Copy the strips that :func:`add_products` adds to across the diagonal, so that ``total`` is exactly symmetric."""
    for start in range(0, len(total), _STRIP):
        stop = min(start + _STRIP, len(total))
        total[:start, start:stop] = total[start:stop, :start].T
        square = total[start:stop, start:stop]
        square.copy_((square + square.T) / 2)


@dataclass(frozen=True)
class RoundingProblem:
    """The weights of one layer to be rounded, and what they are multiplied with.

    Attributes:
        layer: name of the layer in the user's model.
        weight: float32 ``[n_out, c]``: ``V``, float weights in units of the table codes.
        features: calibration features, the table codes that reach this layer.
        bits: 2 to 8, or ternary.
        group_sizes: columns of each scale group, contiguous, in order; one group is one scale for each output.
        branch_of_column: int64 ``[c]``, for reports.
        tied_columns: int64 ``[c]``: columns of equal number share one column of a table, so that they can only be
            rescaled together; ``None`` where the tables are final and nothing may be rescaled.

    Raises:
        KanCompileError: bits, sizes or values that no method can work with.
    """

    layer: str
    weight: Tensor
    features: FeatureSource
    bits: Width
    group_sizes: tuple[int, ...] = field(default=())
    branch_of_column: Tensor | None = None
    tied_columns: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.group_sizes:
            object.__setattr__(self, "group_sizes", (self.c,))
        if self.bits not in (*range(2, 9), TERNARY):
            raise KanCompileError(f"layer {self.layer!r}: weight bits {self.bits!r}, expected 2 to 8 or {TERNARY!r}")
        if not bool(torch.isfinite(self.weight).all()):
            raise KanCompileError(f"layer {self.layer!r}: weight has NaN or infinite values; repair the checkpoint")
        if self.features.c != self.c:
            raise KanCompileError(
                f"layer {self.layer!r}: features have {self.features.c} columns, expected {self.c} as the weight has"
            )
        if sum(self.group_sizes) != self.c or min(self.group_sizes) < 1:
            raise KanCompileError(
                f"layer {self.layer!r}: group sizes {self.group_sizes!r}, expected positive sizes that add up to "
                f"{self.c} columns"
            )

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[0])

    @property
    def c(self) -> int:
        """Number of columns."""
        return int(self.weight.shape[1])

    @property
    def group_of_column(self) -> Tensor:
        """Scale group of every column, int64 ``[c]``."""
        return torch.repeat_interleave(torch.arange(len(self.group_sizes)), torch.tensor(self.group_sizes))

    @property
    def column_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every column, float64 ``[c]``; kept after the first use."""
        kept: tuple[Tensor, Tensor] | None = self.__dict__.get("_column_moments")
        if kept is None:
            kept = self.__dict__["_column_moments"] = column_moments(self.features, self.layer)
        return kept

    def second_moments(self, device: str = "cpu") -> SecondMoments:
        """Return the moments of the features, kept for the next method where they take at most 1 GiB."""
        kept: SecondMoments | None = self.__dict__.get("_moments")
        if kept is None or kept.covariance.device.type != torch.device(device).type:
            kept = second_moments(self.features, self.layer, device)
            self.__dict__["_column_moments"] = (kept.mean, kept.variance)
            if kept.covariance.numel() * 4 <= _CACHED_BYTES:
                self.__dict__["_moments"] = kept
        return kept


@dataclass(frozen=True)
class Rounded:
    """Integer weights of one layer.

    Attributes:
        codes: int8 ``[n_out, c]``.
        scale: float32 ``[g, n_out]``.
        offset: float32 ``[n_out]``, in units of the output: to be added to the bias.
        notes: lines for the report.
        group_sizes: as in the problem.
        column_scale: float32 ``[c]`` in ]0, 1] or ``None``: the fraction of its code range that a table column must be
            reduced to before these codes hold (a table absorbs it when it is made); equal within tied columns.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    notes: tuple[str, ...]
    group_sizes: tuple[int, ...]
    column_scale: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return ``V_hat`` in units of the problem's table codes, float32 ``[n_out, c]``."""
        sizes = torch.tensor(self.group_sizes)
        values = self.codes.float() * torch.repeat_interleave(self.scale, sizes, dim=0).T
        return values if self.column_scale is None else values * self.column_scale


class Method(Protocol):
    """A way to round the weights of one layer: a frozen dataclass of options that is called."""

    @property
    def compensates(self) -> bool:
        """Whether later weights make up for the rounding of earlier ones, which leaves less error and takes longer."""
        ...

    @property
    def quick_columns(self) -> float:
        """Columns of a layer up to which it takes seconds; 0 where it learns, which takes minutes whatever the layer."""
        ...

    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round ``problem.weight``; every random choice comes from ``generator``."""
        ...


def rescaled(problem: RoundingProblem, column_scale: Tensor) -> RoundingProblem:
    """Give the same layer on a table whose columns use only a fraction of their code range.

    ``V / s`` times ``round(s q)``: the float function is the same, its table is coarser.

    Args:
        problem: the layer as it is.
        column_scale: ``s``, float32 ``[c]`` in ]0, 1].
    """
    return replace(problem, weight=problem.weight / column_scale, features=problem.features.scaled(column_scale))


def bias_correction(problem: RoundingProblem, rounded_weight: Tensor) -> Tensor:
    """Return the mean error of the outputs, ``(V - V_hat) mean``, float32 ``[n_out]``: the offset that cancels it."""
    mean, _ = problem.column_moments
    return ((problem.weight - rounded_weight).double() @ mean).float()


def corrected(problem: RoundingProblem, codes: Tensor, scale: Tensor, notes: tuple[str, ...]) -> Rounded:
    """Complete codes ``[n_out, c]`` (any dtype) and scales ``[g, n_out]`` by the offset that cancels the mean error."""
    rounded = Rounded(codes.to(torch.int8), scale, torch.zeros(problem.n_out), notes, problem.group_sizes)
    return replace(rounded, offset=bias_correction(problem, rounded.dequantized()))


def on_fine_table(problem: RoundingProblem, coarse: RoundingProblem, rounded: Rounded, column_scale: Tensor) -> Rounded:
    """Make a rounding of ``coarse``, which is ``rescaled(problem, column_scale)``, one of ``problem``.

    A method corrects the bias against the table it was given; the mean of the fine one is what counts.
    """
    exact = problem.weight.double() @ problem.column_moments[0]
    offset = (exact - rounded.dequantized().double() @ coarse.column_moments[0]).float()
    return replace(rounded, offset=offset, column_scale=column_scale)


def output_errors(problem: RoundingProblem, rounded: Rounded) -> Tensor:
    """Measure the mean squared error of every output over the calibration features, float64 ``[n_out]``.

    ``diag(D S D^T) + (D mean - offset)^2``, summed sample by sample so that it needs no matrix of ``c^2`` elements. The
    rounding of table codes that a ``column_scale`` implies is included.
    """
    mean, _ = problem.column_moments
    center = mean.float()
    weight = rounded.dequantized()
    error = problem.weight - weight
    constant = (error.double() @ mean - rounded.offset.double()).float()

    def squares(chunk: Tensor) -> tuple[Tensor, ...]:
        values = chunk.float()
        residual = (values - center) @ error.T + constant
        if rounded.column_scale is not None:
            # what the coarser table loses: codes * scale weights for the difference between both tables
            coarse = torch.round(values * rounded.column_scale) / rounded.column_scale
            residual = residual + (values - coarse) @ weight.T
        return (residual.double().square().sum(0),)

    return sum_over_chunks(problem.features, squares)[0] / problem.features.n


def output_spreads(problem: RoundingProblem) -> Tensor:
    """Measure the variance of every output over the calibration features, ``diag(V S V^T)``, float64 ``[n_out]``."""
    center = problem.column_moments[0].float()

    def squares(chunk: Tensor) -> tuple[Tensor, ...]:
        return (((chunk.float() - center) @ problem.weight.T).double().square().sum(0),)

    return sum_over_chunks(problem.features, squares)[0] / problem.features.n


def objective(problem: RoundingProblem, rounded: Rounded) -> float:
    """Measure the mean squared error over samples and outputs, ``(tr(D S D^T) + |D mean - offset|^2) / n_out``."""
    return float(output_errors(problem, rounded).mean())
