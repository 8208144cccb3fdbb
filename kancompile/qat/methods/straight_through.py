"""What the methods share: rounding with a straight-through slope, scaled gradients, and what a quantizer of each kind answers.

Rounding is half to even, as in the kernels; its slope is 1 (Bengio et al., *Estimating or propagating gradients through
stochastic neurons* (2013)).

**Weights** are kept in steps of the post-training scale, so that a learning rate means the same in every layer: a quantizer
gives codes and, for every scale group and output, the factor on that scale, 1 to begin with. **Row indices** are kept as a
factor on the calibrated step and as a shift of the zero point in rows. Training begins at the post-training result, whatever
start a method's paper has.

Where one training serves several widths, the latent weights of a width are its own codes and a change that all widths share
(:meth:`WeightQuantizer.share`), so that each of them begins at its own post-training result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kancompile.ir import IndexQuantizer

SMALLEST_FACTOR = 1e-2
"""A step may shrink to this part of what it was; at 0 or below there is no quantizer."""
_MOST_ZERO_POINT = 255  # of a uint8 QuantizeLinear


def standing_for(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the very values of ``hard`` with the gradient of ``soft``."""
    return _StandingFor.apply(soft, hard)  # type: ignore[no-any-return, no-untyped-call]


def rounded(value: Tensor) -> Tensor:
    """Round half to even; the slope is 1."""
    return standing_for(torch.round(value.detach()), value)


def with_scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """Return the very value, whose gradient is multiplied by ``factor``."""
    return _ScaledGradient.apply(value, factor)  # type: ignore[no-any-return, no-untyped-call]


class _StandingFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, soft, hard):  # type: ignore[no-untyped-def]
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.factor, None


class SharedChange(nn.Module):
    """What the weights of a layer change by at all widths of one training.

    Attributes:
        move: float32 ``[n_out, c]``, 0 to begin with.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.move = nn.Parameter(torch.zeros(shape))


class WeightQuantizer(nn.Module):
    """Integer codes of one layer's weights, from latent weights that an optimizer moves.

    Attributes:
        weight: float32 ``[n_out, c]``, in post-training steps; the codes to begin with. Constant where a change is shared.
        step: float32 ``[g, n_out]``, factors on the post-training scales, 1 to begin with.
        low, high: codes.
        group_sizes: columns of each scale group.
        live: bool ``[c]``, columns that vary on the calibration data; statistics look at no others.
        limits: smallest and largest code of every weight, float32 ``[2, n_out, c]``, ``None`` where all are within ``low`` and
            ``high``.
        change: module whose ``move``, float32 ``[n_out, c]``, other widths share, and ``ratio``, steps of this width in its unit.
    """

    weight: Tensor
    live: Tensor
    limits: Tensor | None
    ratio: Tensor
    change: SharedChange | None

    def __init__(self, codes: Tensor, low: int, high: int, group_sizes: Tensor, live: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(codes.clone())
        self.step = nn.Parameter(torch.ones(len(group_sizes), len(codes)))
        self.low, self.high = low, high
        self.register_buffer("live", live, persistent=False)
        self.register_buffer("group_sizes", group_sizes, persistent=False)
        self.register_buffer("limits", None, persistent=False)
        self.__dict__["change"] = None

    def share(self, change: SharedChange, ratio: Tensor) -> None:
        """Train a change that other widths share, in place of latent weights of its own: ``weight + ratio move``."""
        start = self.weight.detach()
        del self.weight
        self.register_buffer("weight", start, persistent=False)
        self.register_buffer("ratio", ratio, persistent=False)
        self.__dict__["change"] = change  # owned by the module of all widths

    def latent(self) -> Tensor:
        """Return the latent weights, float32 ``[n_out, c]``."""
        return self.weight if self.change is None else self.weight + self.ratio * self.change.move

    def clipped(self, value: Tensor) -> Tensor:
        """Clip to the codes that weights can have."""
        if self.limits is None:
            return torch.clamp(value, self.low, self.high)
        return torch.clamp(value, self.limits[0], self.limits[1])

    def factor(self) -> Tensor:
        """Return the factors on the scales, float32 ``[g, n_out]``, positive."""
        return self.step.clamp(min=SMALLEST_FACTOR)

    def by_weight(self, of_group: Tensor) -> Tensor:
        """Spread ``[g, n_out]`` to one for every weight, in a shape that broadcasts to ``[n_out, c]``."""
        if len(of_group) == 1:
            return of_group[0].unsqueeze(1)
        return torch.repeat_interleave(of_group, self.get_buffer("group_sizes"), dim=0).T

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return codes ``[n_out, c]``, whole numbers in float32, and the factors on the scales ``[g, n_out]``."""
        raise NotImplementedError


class IndexMethod(nn.Module):
    """A quantizer of the inputs of tables, ``x -> s (clip(rnd(x / s) + z, 0, L - 1) - z)``, whose range training may move.

    The value is always that of the kernels; a method gives the expression whose gradient takes the place of it.

    Attributes:
        start: the calibrated quantizer.
    """

    def __init__(self, start: IndexQuantizer, features: int) -> None:
        """Take the quantizer and how many features of a sample it reads."""
        super().__init__()
        self.start = start
        # LSQ's gradient scale, with the features of a sample alone: with the batch the rate would depend on its size
        self.gradient_scale = 1.0 / (features * max(1, start.levels - 1)) ** 0.5

    @property
    def most(self) -> int:
        """The last row."""
        return self.start.levels - 1

    def factor(self) -> Tensor:
        """Return the factor on the calibrated step, a float32 scalar; 1 where it is not learned."""
        return torch.ones(())

    def zero_point(self) -> Tensor | float:
        """Return the row that stands for 0, a whole number."""
        return float(self.start.zero_point)

    def step(self) -> Tensor:
        """Return the step as the file has it: the product in float64, rounded to float32."""
        return (self.factor().double() * self.start.scale).float()

    def surrogate(self, x: Tensor) -> Tensor:
        """Give the expression of ``x`` and the parameters whose gradient stands for the quantizer's."""
        raise NotImplementedError

    def rows(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Map real values to row numbers as the kernels do, in float.

        Args:
            x: real values.
            position: the quotients ``x / step``, where a kernel computes them in another way.
        """
        with torch.no_grad():
            quotient = x / self.step() if position is None else position
            return torch.clamp(torch.round(quotient) + self.zero_point(), 0, self.most)

    def real(self, rows: Tensor) -> Tensor:
        """Give the real values that rows stand for."""
        with torch.no_grad():
            return (rows - self.zero_point()) * self.step()

    def floored(self, x: Tensor) -> Tensor:
        """Map real values to row numbers in float arithmetic, where a file does (``kancompile::floor_index``)."""
        with torch.no_grad():
            multiplier = (1.0 / (self.factor().double() * self.start.scale)).float()
            return (x * multiplier + (self.zero_point() + 0.5)).clamp(0, self.most).trunc()

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Map real values to the real values of their rows."""
        return self.through(x, self.rows(x, position))

    def through(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the real values of rows that were found for ``x``, with the gradient of the method."""
        hard = self.real(rows)
        learns = torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in self.parameters()))
        if not learns:
            return hard
        return standing_for(hard, self.surrogate(x))

    @torch.no_grad()
    def quantizer(self) -> IndexQuantizer:
        """Return the quantizer of the parameters as they are now."""
        return IndexQuantizer(
            self.start.scale * float(self.factor()), round(float(self.zero_point())), self.start.levels
        )


class LearnedStep(IndexMethod):
    """An index with a learned step.

    Attributes:
        step_factor: on the calibrated step, float32 scalar.
    """

    def __init__(self, start: IndexQuantizer, features: int) -> None:
        super().__init__(start, features)
        self.step_factor = nn.Parameter(torch.ones(()))

    def factor(self) -> Tensor:
        """Return the factor, with LSQ's gradient scale."""
        return with_scaled_gradient(self.step_factor.clamp(min=SMALLEST_FACTOR), self.gradient_scale)


def whole_zero_point(value: Tensor) -> Tensor:
    """Round a zero point to what a file can hold; the slope is 1 inside."""
    return rounded(value.clamp(0, _MOST_ZERO_POINT))
