"""Choose for every weight between the code below and the code above by gradient descent on the layer's error.

Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization* (2020), section 3.3: minimise
``E |(V - V_hat(alpha)) (q - mean)|^2 + weight * regulariser`` with Adam. The error is quadratic in the weights, so with few
columns the covariance gives its exact gradient, and with many columns mini-batches of features are cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kancompile.passes.rounding_methods.gptq import Gptq, polish_rounded
from kancompile.passes.rounding_methods.problem import Rounded, RoundingProblem, corrected, live_columns, output_errors
from kancompile.passes.rounding_methods.quantizers import code_range, scale_of_column
from kancompile.passes.rounding_methods.soft_rounding import Schedule, SoftRounding

_IN_MEMORY_BYTES = 1 << 29


def better_outputs(problem: RoundingProblem, learned: Rounded, start: Rounded) -> Rounded:
    """Take every output from the rounding with the smaller error on the calibration data; outputs do not interact."""
    gain = output_errors(problem, start) - output_errors(problem, learned)
    keep = gain > 0
    note = f"learned rounding is better than its start in {int(keep.sum())} of {len(keep)} outputs, the others kept it"
    return Rounded(
        torch.where(keep[:, None], learned.codes, start.codes),
        torch.where(keep, learned.scale, start.scale),
        torch.where(keep, learned.offset, start.offset),
        (*learned.notes, note),
        problem.group_sizes,
    )


@dataclass(frozen=True)
class AdaRound:
    """Learn roundings on the scales that GPTQ found, then polish them under the same error.

    Attributes:
        scales: the method whose scales are used, and whose damping and polishing.
        iterations: steps of Adam.
        learning_rate: of alpha. The paper's 1e-3 needs its 10,000 iterations to move alpha across its range.
        regularisation: weight of the regulariser. The error counts in units of the mean error that nearest rounding
            of one weight makes, so that the weight does not depend on the units of the layer. (The paper's 0.01 is
            for raw errors, which are far smaller; 0.01 here would leave most codes undecided.)
        warm_start, beta: see :class:`~kancompile.passes.rounding_methods.soft_rounding.Schedule`.
        covariance_columns: up to so many live columns the covariance is used, above it mini-batches.
        batch: samples of a mini-batch.
        sweeps: most rounds of polishing afterwards.
        keep_better: whether outputs for which the rounding of ``scales`` has the smaller error keep it.
    """

    compensates: ClassVar[bool] = True
    quick_columns: ClassVar[float] = 0

    scales: Gptq = field(default_factory=Gptq)
    iterations: int = 1000
    learning_rate: float = 3e-2
    regularisation: float = 10.0
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    covariance_columns: int = 2048
    batch: int = 256
    sweeps: int = 10
    keep_better: bool = True

    @torch.enable_grad()  # whatever the caller's mode is
    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round ``problem.weight``; ``generator`` draws the mini-batches."""
        start = self.scales(problem, generator)
        live = live_columns(problem.column_moments[1])
        if not len(live):
            return start
        device = self.scales.device
        low, high = code_range(problem.bits)
        weight = problem.weight[:, live].float().to(device)
        step = scale_of_column(start.scale, problem.group_sizes)[:, live].to(device)
        rounding = SoftRounding.between_levels(weight, step, low, high)
        error_of = self._error(problem, live, generator)
        nearest = torch.clamp(torch.round(weight / step), low, high) * step
        variance = problem.column_moments[1][live].float().to(device)
        unit = float(((weight - nearest).square() @ variance).sum()) / weight.numel()
        unit = max(unit, torch.finfo(torch.float32).tiny)
        optimizer = torch.optim.Adam([rounding.alpha], lr=self.learning_rate)
        schedule = Schedule(self.iterations, self.warm_start, self.beta)
        for iteration in range(self.iterations):
            optimizer.zero_grad()
            loss = error_of(weight - rounding.soft() * step) / unit
            beta = schedule.exponent(iteration)
            if beta is not None:
                loss = loss + self.regularisation * rounding.regulariser(beta)
            loss.backward()
            optimizer.step()
        codes = start.codes.clone()
        codes[:, live] = rounding.hard().to(torch.int8).cpu()
        learned = corrected(problem, codes, start.scale, start.notes)
        if self.sweeps:
            learned = polish_rounded(problem, learned, self.scales, self.sweeps)
        return better_outputs(problem, learned, start) if self.keep_better else learned

    def _error(self, problem: RoundingProblem, live: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Return the error as a function of ``V - V_hat``: mean over samples, summed over outputs."""
        damping = self.scales.damping * float(problem.column_moments[1][live].mean())
        if len(live) <= self.covariance_columns:
            covariance = problem.second_moments(self.scales.device).covariance.clone()
            covariance.diagonal().add_(damping)
            return lambda difference: ((difference @ covariance) * difference).sum()
        batches = self._batches(problem, live, generator)

        def sampled(difference: Tensor) -> Tensor:
            residual = next(batches) @ difference.T
            return residual.square().sum(1).mean() + damping * difference.square().sum()

        return sampled

    def _batches(self, problem: RoundingProblem, live: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield centered mini-batches without end: from all samples where they fit in memory, else chunk by chunk."""
        device = self.scales.device
        center = problem.column_moments[0][live].float().to(device)
        while True:
            chunks: Iterator[Tensor] | list[Tensor] = (chunk[:, live] for chunk in problem.features)
            if problem.features.n * len(live) <= _IN_MEMORY_BYTES:
                chunks = [torch.cat(list(chunks))] * 64
            for chunk in chunks:
                for rows in torch.split(torch.randperm(chunk.shape[0], generator=generator), self.batch):
                    yield chunk[rows].to(device).float() - center
