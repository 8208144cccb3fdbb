"""Measure how sensitive the task loss is to the weights of every layer and branch.

Dong et al., *HAWQ-V2* (2020), sections 3.1 and 3.3: to second order, rounding the weights of a part of the network from
``W`` to ``Q(W)`` raises the loss by about ``average trace of the Hessian * |W - Q(W)|^2``. The trace comes from
Hutchinson's estimator ``tr(H) = E z^T H z`` with Rademacher vectors ``z``; ``H z`` is one more backward pass.

The choice of bits from these numbers is made in ``allocation``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.errors import KanCompileError

Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Traces:
    """Estimated Hessian traces.

    Attributes:
        average: for each layer float64 ``[parts]``: trace divided by the number of weights of that part.
        spread: for each layer float64 ``[parts]``: standard error of ``average``.
        probes: number of Rademacher vectors used.
        converged: whether the running means settled before the limit on probes.
    """

    average: tuple[Tensor, ...]
    spread: tuple[Tensor, ...]
    probes: int
    converged: bool


@torch.enable_grad()  # whatever the caller's mode is
def hessian_traces(
    loss: Loss,
    weights: Sequence[Tensor],
    parts: Sequence[Tensor],
    generator: torch.Generator,
    max_probes: int = 100,
    tolerance: float = 1e-3,
) -> Traces:
    """Estimate the trace of the loss's Hessian for every part of every layer.

    One probe covers all layers: ``z_part^T (H z)_part`` has the trace of that part's diagonal block as its mean, since
    signs of different weights are independent. The loss is evaluated once; each probe costs one backward pass.

    Args:
        loss: maps weights to a scalar, twice differentiable.
        weights: ``[n_out, c]`` of every layer.
        parts: int64 ``[c]`` of every layer: the part (branch) of each column, counted from 0.
        generator: draws the signs.
        max_probes: limit.
        tolerance: stop once no running mean changed by more than this share of itself.

    Raises:
        KanCompileError: the loss or a product with its Hessian is not finite.
    """
    variables = [weight.detach().clone().requires_grad_(True) for weight in weights]
    value = loss(variables)
    if not bool(torch.isfinite(value)):
        raise KanCompileError(
            f"sensitivity: loss is {float(value.detach())!r}, expected a finite number; check the data"
        )
    gradients = torch.autograd.grad(value, variables, create_graph=True, materialize_grads=True)
    sizes = [torch.bincount(part).double() * weight.shape[0] for part, weight in zip(parts, weights, strict=True)]
    sums = [torch.zeros_like(size) for size in sizes]
    squares = [torch.zeros_like(size) for size in sizes]
    probes, converged = 0, False
    while probes < max_probes and not converged:
        signs = [
            torch.randint(0, 2, variable.shape, generator=generator).to(variable.dtype) * 2 - 1
            for variable in variables
        ]
        dot = sum((gradient * sign).sum() for gradient, sign in zip(gradients, signs, strict=True))
        if isinstance(dot, Tensor) and dot.requires_grad:
            products = torch.autograd.grad(dot, variables, retain_graph=True, materialize_grads=True)
        else:  # a linear loss: its gradient does not depend on the weights
            products = tuple(torch.zeros_like(variable) for variable in variables)
        probes += 1
        largest = 0.0
        for i, (product, sign) in enumerate(zip(products, signs, strict=True)):
            by_column = (product * sign).double().sum(0)
            sample = torch.zeros_like(sums[i]).index_add_(0, parts[i], by_column) / sizes[i].clamp(min=1)
            if not bool(torch.isfinite(sample).all()):
                raise KanCompileError("sensitivity: Hessian has NaN or infinite values; check the calibration data")
            before = sums[i] / max(1, probes - 1)
            sums[i] += sample
            squares[i] += sample.square()
            change = (sums[i] / probes - before).abs() / before.abs().clamp(min=torch.finfo(torch.float64).tiny)
            change = torch.where(sums[i] / probes == before, 0.0, change)
            largest = max(largest, float(change.max()))
        converged = probes > 1 and largest < tolerance
    average = tuple(total / probes for total in sums)
    variance = [(square / probes - mean.square()).clamp(min=0) for square, mean in zip(squares, average, strict=True)]
    spread = tuple((value / probes).sqrt() for value in variance)
    return Traces(average, spread, probes, converged)


def sensitivity(average_trace: Tensor, weight: Tensor, rounded_weight: Tensor, part: Tensor) -> Tensor:
    """Return ``average trace * |W - Q(W)|^2`` of every part of one layer, float64 ``[parts]``.

    Both weights and the trace must be in the same units. A negative estimate of a trace counts as 0: near a minimum
    the true one is not negative, and a negative cost would reward errors.

    Args:
        average_trace: ``[parts]``.
        weight, rounded_weight: ``[n_out, c]``.
        part: int64 ``[c]``.
    """
    by_column = (weight - rounded_weight).double().square().sum(0)
    perturbation = torch.zeros(len(average_trace), dtype=torch.float64).index_add_(0, part, by_column)
    return average_trace.double().clamp(min=0) * perturbation
