"""Round the functions of words to codes, and the codes of members to integers that they can be made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import LARGEST_PART, MOST_SHIFT, BasisParts, IndexQuantizer, JointTable
from kancompile.passes.reduce_functions.words import Words
from kancompile.passes.tabulate_expansions import STRETCH

NAME = "joint"
"""What reports call the functions, which belong to no branch."""
_WEIGHT_LEVELS = 127  # that code steps reckon with
_VARIANCE_ROWS = 512
_INT8, _INT16 = 127, 32767
_FAR = 4.0  # codes by which a mixture of integers may miss


@dataclass(frozen=True)
class SharedBasis:
    """Functions that all inputs share, as codes at the rows of the index.

    Attributes:
        codes: uint8 ``[L, k]``.
        step, low: real value of one code and of code 0, float32 ``[k]``.
    """

    codes: Tensor
    step: Tensor
    low: Tensor

    @classmethod
    def of(cls, values: Tensor) -> SharedBasis:
        """Round values ``[L, k]``."""
        low = values.amin(0)
        step = ((values.amax(0) - low) / 255).clamp(min=1e-12)
        return cls(torch.round((values - low) / step).to(torch.uint8), step, low)

    def values(self) -> Tensor:
        """Return what the codes stand for, float32 ``[L, k]``."""
        return self.codes.float() * self.step + self.low


@dataclass(frozen=True)
class CodedWords:
    """Words as codes.

    Attributes:
        index: of the inputs.
        members: int64 ``[m, w]``.
        parts: uint8 ``[m, k, w, L]``.
        made_of: integers that the parts follow from, or ``None``.
        scale, offset: of the columns, float32 ``[k * w]``.
        weight: of their codes, ``[n_out, k * w]``.
    """

    index: IndexQuantizer
    members: Tensor
    parts: Tensor
    made_of: BasisParts | None
    scale: Tensor
    offset: Tensor
    weight: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Look row numbers ``[n, n_in]`` up, uint8 ``[n, k * w]``."""
        codes: Tensor = torch.ops.kancompile.expand_joint(rows, self.members, self.parts)
        return codes[..., 0]

    def table(self, read_shape: tuple[int, ...]) -> JointTable:
        """Return the table that reads inputs of that shape."""
        scale, offset = self.scale[:, None], self.offset[:, None]
        return JointTable(read_shape, self.index, self.members, self.parts, scale, offset, NAME, made_of=self.made_of)


def code_words(
    words: Words, rows: Tensor, index: IndexQuantizer, basis: SharedBasis | None, column_scaling: float | None
) -> CodedWords:
    """Choose the code step of every column and round.

    Args:
        words: the functions.
        rows: row numbers of calibration inputs ``[n, n_in]``.
        index: of the inputs.
        basis: what all inputs share, ``None`` where they do not.
        column_scaling: exponent of the column maximum that moves to the weights, ``None`` to estimate the best.
    """
    low = words.values.amin(3)  # [m, k, w]
    spread = (words.values.amax(3) - low).sum(0).flatten()
    weight = words.weight.flatten(1)
    least, largest = spread / LARGEST_PART, max(float(spread.max()) / LARGEST_PART, 1e-30)
    variance = _variance(words, rows)
    best, scale = float("inf"), least
    for exponent in STRETCH if column_scaling is None else (column_scaling,):
        step = torch.maximum(least.clamp(min=1e-12 * largest).pow(exponent) * largest ** (1 - exponent), least)
        rounding = (weight.square() @ step.square()) * len(words.members) / 12
        weight_step = (weight.abs() * step).amax(1) / _WEIGHT_LEVELS
        error = float((rounding + weight_step.square() / 12 * (variance / step.square()).sum()).mean())
        if error < best:
            best, scale = error, step
    steps = scale.reshape(words.values.shape[1:3])
    exact = (words.values - low[..., None]) / steps[..., None]
    made_of = None if basis is None else _made_of(words, exact, steps, basis)
    # roundings of the parts may add up to one more than the largest code
    parts = torch.round(exact).clamp(0, LARGEST_PART).to(torch.uint8) if made_of is None else made_of.parts()
    return CodedWords(index, words.members, parts, made_of, scale, low.sum(0).flatten(), weight * scale)


def _made_of(words: Words, exact: Tensor, steps: Tensor, basis: SharedBasis) -> BasisParts | None:
    """Find integers whose mixtures are near codes ``exact``; ``None`` where they are no smaller, or miss by far."""
    mix = words.mix * basis.step / steps[..., None]  # codes for a code of the basis, [m, k, w, b]
    start = (exact - mix @ basis.codes.float().T).mean(3)  # equal at all rows but for float32
    room = torch.minimum(_INT8 / mix.abs().amax(3).clamp(min=1e-9), (_INT16 - 1) / (start.abs() + 1))
    shift = torch.floor(torch.log2(room)).clamp(0, MOST_SHIFT)
    factor = torch.pow(2.0, shift)
    found = BasisParts(
        basis.codes,
        torch.round(mix * factor[..., None]).clamp(-_INT8, _INT8).to(torch.int8),
        torch.round((start + 0.5) * factor).clamp(-_INT16, _INT16).to(torch.int16),
        shift.to(torch.uint8),
    )
    misses = float((found.parts().float() - exact).abs().max())
    return found if found.stored_bytes() < exact.numel() and misses <= _FAR else None


def _variance(words: Words, rows: Tensor) -> Tensor:
    """Measure the variance of every column over calibration inputs, ``[k * w]``."""
    total: Tensor = torch.zeros(())
    few = rows[:: max(1, len(rows) // _VARIANCE_ROWS)]
    for inputs, values in zip(words.members, words.values, strict=True):
        at = few[:, inputs].T.expand(values.shape[0], -1, -1)  # [k, w, n]
        total = total + torch.gather(values, 2, at)
    return total.var(2, correction=0).flatten()
