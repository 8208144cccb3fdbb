"""Reconstruct the output of several consecutive layers together, weighted by how much the task loss feels it.

Li et al., *BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction* (2021), equation 10: over the
roundings of all layers of a block minimise

    E (y - y_hat)^T diag(g^2) (y - y_hat),      g = d loss / d y at the float output y,

``g^2`` being the diagonal of the Fisher matrix, an estimate of the Hessian of the task loss with respect to ``y``. A later
layer then makes up for the errors of an earlier one and, unlike layer by layer, an earlier one for those of a later one.

The block itself is a callable, so that this file knows nothing of programs: it gets real-valued weights and offsets and must
be differentiable in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.passes.rounding_methods.gptq import Gptq
from kancompile.passes.rounding_methods.problem import Method, Rounded, RoundingProblem
from kancompile.passes.rounding_methods.quantizers import code_range, scale_of_column
from kancompile.passes.rounding_methods.soft_rounding import Schedule, SoftRounding

BlockForward = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
_EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class Block:
    """Consecutive layers that are reconstructed together.

    Attributes:
        problems: the layers, in the order of evaluation.
        forward: maps ``(weights, offsets, x)`` to the block's output: ``weights[i]`` ``[n_out, c]`` in units of the table
            codes of layer ``i`` (of its rescaled table, where the layer has a ``column_scale``), ``offsets[i]``
            ``[n_out]`` to be added to its bias. Differentiable in weights and offsets; table lookups between layers
            need a gradient of their own (the float functions, or the slope between rows).
        inputs: calibration inputs of the block, ``[n, ...]``, as the quantized layers before it produce them.
        targets: float outputs of the block for the same samples, ``[n, ...]``.
        gradients: gradient of the task loss of each sample with respect to ``targets``, same shape; ``None`` weighs all
            outputs alike.
    """

    problems: tuple[RoundingProblem, ...]
    forward: BlockForward
    inputs: Tensor
    targets: Tensor
    gradients: Tensor | None = None

    def __post_init__(self) -> None:
        names = [problem.layer for problem in self.problems]
        n = len(self.inputs)
        if len(self.targets) != n or (self.gradients is not None and self.gradients.shape != self.targets.shape):
            raise KanCompileError(
                f"block {names!r}: found {n} inputs, targets {tuple(self.targets.shape)!r} and gradients "
                f"{None if self.gradients is None else tuple(self.gradients.shape)!r}, expected as many samples in all "
                "and gradients shaped as targets"
            )
        for value, what in ((self.targets, "targets"), (self.gradients, "gradients")):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise KanCompileError(
                    f"block {names!r}: {what} have NaN or infinite values; check the calibration data"
                )


@dataclass(frozen=True)
class Brecq:
    """Round each layer by another method, then reconstruct whole blocks from there.

    Calling it rounds one layer, which is the first stage; :meth:`reconstruct` is the second one.

    Attributes:
        start: method of the first stage.
        iterations: steps of Adam; the paper takes 20,000.
        batch: samples of a mini-batch.
        learning_rate: of the roundings.
        scale_learning_rate: of the logarithms of the weight scales and, in units of the standard deviation of
            a layer's error, of the offsets; 0 keeps both.
        regularisation: weight of the rounding regulariser, with the loss in units of its value at the start for each
            weight.
        settling: share of the iterations, at the end, in which codes are final and scales and offsets adapt to them.
        warm_start, beta: see :class:`~kancompile.passes.rounding_methods.soft_rounding.Schedule`.
        fisher_floor: weight that every output gets besides its share of ``g^2`` (whose mean is 1): samples that the
            float network is sure of have hardly any gradient, and would be free to become wrong.
    """

    compensates: ClassVar[bool] = True
    quick_columns: ClassVar[float] = 0

    start: Method = field(default_factory=Gptq)
    iterations: int = 1500
    batch: int = 128
    learning_rate: float = 1e-1
    scale_learning_rate: float = 1e-3
    regularisation: float = 100.0
    settling: float = 0.2
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    fisher_floor: float = 1.0

    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round one layer by ``start``."""
        return self.start(problem, generator)

    def reconstruct(self, block: Block, start: Sequence[Rounded], generator: torch.Generator) -> tuple[Rounded, ...]:
        """Improve the rounding of all layers of a block together; returns ``start`` where nothing was gained.

        Args:
            block: the layers and their data.
            start: a rounding of each layer.
            generator: draws the mini-batches.
        """
        layers = [_SoftLayer(problem, rounded) for problem, rounded in zip(block.problems, start, strict=True)]
        importance = self._importance(block)
        before = _loss(block, importance, [layer.hard() for layer in layers])
        unit = max(before, torch.finfo(torch.float32).tiny) / sum(layer.rounding.base.numel() for layer in layers)
        learned = [value for layer in layers for value in (layer.log_scale, layer.offset)]
        optimizer = torch.optim.Adam(
            [
                {"params": [layer.rounding.alpha for layer in layers], "lr": self.learning_rate},
                {"params": learned, "lr": self.scale_learning_rate},
            ]
        )
        soft_iterations = self.iterations - int(self.settling * self.iterations)
        schedule = Schedule(soft_iterations, self.warm_start, self.beta)
        order = torch.empty(0, dtype=torch.int64)
        with torch.enable_grad():
            for iteration in range(self.iterations):
                settled = iteration >= soft_iterations
                if len(order) < min(self.batch, len(block.inputs)):
                    order = torch.randperm(len(block.inputs), generator=generator)
                rows, order = order[: self.batch], order[self.batch :]
                optimizer.zero_grad()
                parts = [layer.settled() if settled else layer.soft() for layer in layers]
                y = block.forward([weight for weight, _ in parts], [offset for _, offset in parts], block.inputs[rows])
                error = (y - block.targets[rows]).square() * importance[rows]
                loss = error.flatten(1).sum(1).mean() / unit
                beta = None if settled else schedule.exponent(iteration)
                if beta is not None:
                    for layer in layers:
                        loss = loss + self.regularisation * layer.rounding.regulariser(beta)
                loss.backward()
                optimizer.step()
        after = _loss(block, importance, [layer.hard() for layer in layers])
        names = ", ".join(repr(problem.layer) for problem in block.problems)
        if not after < before:  # NaN too, where a block of zero error leaves nothing to divide by
            note = f"block {names}: reconstruction kept its start, weighted error {before:.4g} against {after:.4g}"
            return tuple(replace(rounded, notes=(*rounded.notes, note)) for rounded in start)
        note = f"block {names}: reconstruction lowered the weighted error from {before:.4g} to {after:.4g}"
        return tuple(layer.rounded(note) for layer in layers)

    def _importance(self, block: Block) -> Tensor:
        if block.gradients is None:
            return torch.ones_like(block.targets)
        fisher = block.gradients.square()
        return fisher / fisher.mean().clamp(min=torch.finfo(torch.float32).tiny) + self.fisher_floor


class _SoftLayer:
    """One layer while it is being learned: soft codes, logarithms of scales, offset."""

    def __init__(self, problem: RoundingProblem, start: Rounded) -> None:
        self.start = start
        self.group_sizes = problem.group_sizes
        low, high = code_range(problem.bits)
        weight = problem.weight if start.column_scale is None else problem.weight / start.column_scale
        self.rounding = SoftRounding.around_codes(
            start.codes, weight, scale_of_column(start.scale, problem.group_sizes), low, high
        )
        self.log_scale = start.scale.log().requires_grad_(True)
        # offsets move in units of the output's own spread, so that one learning rate serves all layers
        error = (problem.weight - start.dequantized()).square() @ problem.column_moments[1].float()
        self.unit = error.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.offset = (start.offset / self.unit).requires_grad_(True)

    def soft(self) -> tuple[Tensor, Tensor]:
        step = scale_of_column(self.log_scale.exp(), self.group_sizes)
        return self.rounding.soft() * step, self.offset * self.unit

    def settled(self) -> tuple[Tensor, Tensor]:
        step = scale_of_column(self.log_scale.exp(), self.group_sizes)
        return self.rounding.hard() * step, self.offset * self.unit

    def hard(self) -> tuple[Tensor, Tensor]:
        weight, offset = self.settled()
        return weight.detach(), offset.detach()

    def rounded(self, note: str) -> Rounded:
        codes = self.rounding.hard().to(torch.int8)
        scale, offset = self.log_scale.detach().exp(), (self.offset * self.unit).detach()
        return replace(self.start, codes=codes, scale=scale, offset=offset, notes=(*self.start.notes, note))


def _loss(block: Block, importance: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the weighted squared error of the block, mean over samples, summed over outputs."""
    total = 0.0
    weights, offsets = [weight for weight, _ in layers], [offset for _, offset in layers]
    with torch.no_grad():
        for x, target, weight in zip(
            torch.split(block.inputs, _EVALUATION_BATCH),
            torch.split(block.targets, _EVALUATION_BATCH),
            torch.split(importance, _EVALUATION_BATCH),
            strict=True,
        ):
            total += float(((block.forward(weights, offsets, x) - target).square() * weight).double().sum())
    return total / len(block.inputs)
