"""Choose the 8-bit codes of the tables in front of a convolution: code steps, the code of 0, and the rounding.

Padding is 0 in all columns, so where there is padding one code stands for 0 in all of them (see ``tabulate_convolutions``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.convolutions import ConvContraction
from kancompile.modules import Expansion, IndexQuantizer, TableExpansion
from kancompile.passes.round_table_codes import Patches, round_together
from kancompile.passes.table_values import STRETCH, TableOptions, code_scale, stretched

_ZERO_POINTS = 255


@dataclass(frozen=True)
class TableDraft:
    """A table whose values are known and whose codes are not.

    Attributes:
        expansion: the float expansion.
        index: its index quantizer.
        values: float32 ``[T, levels, k]``.
        group: number of the table of every input, int64 ``[n_in]``.
        weight: this expansion's columns of the convolution, ``[n_out, n_in / groups * k, *kernel]``.
        patches: what a sample of the output pixels sees.
    """

    expansion: Expansion
    index: IndexQuantizer
    values: Tensor
    group: Tensor
    weight: Tensor
    patches: Patches

    def table(self, scale: Tensor, offset: Tensor, zero_point: int) -> TableExpansion:
        """Round the values with one code step ``scale`` and code 0 at ``offset``, ``[T, k]`` each.

        A table that all channels share is rounded with all its codes together (``round_table_codes``).
        """
        if zero_point:  # rounding after adding the zero point could move the code of 0
            codes = torch.round(self.values / scale[:, None]) + zero_point
        else:
            codes = torch.round((self.values - offset[:, None]) / scale[:, None])
        codes = codes.clamp(0, 255)
        if len(codes) == 1 and not self.expansion.is_identity:
            codes = round_together(codes[0], self.values[0], scale[0], offset[0], self.patches, self.index)[None]
        expansion = self.expansion
        return TableExpansion(
            expansion.in_shape,
            self.index,
            codes.to(torch.uint8).flatten(0, 1).contiguous(),
            None if len(self.values) == 1 else (self.group * self.index.levels).to(torch.int32),
            scale,
            offset,
            [branch.k for branch in expansion.branches],  # type: ignore[misc]
            [branch.name for branch in expansion.branches],  # type: ignore[misc]
            channels_first=expansion.channels_first,
        )


def choose_codes(
    drafts: Sequence[TableDraft], contraction: ConvContraction, options: TableOptions
) -> tuple[list[Tensor], list[Tensor], int]:
    """Choose code steps, the real value of code 0, and the code of 0, by estimated error at the output.

    Returns:
        for every table scale and offset, float32 ``[T, k]``, and the zero point (0 where nothing is padded).
    """
    (only, *others) = drafts
    if only.expansion.is_identity and not others and contraction.geometry.pads:  # rows hold their own numbers
        step = torch.tensor([[only.index.scale]])
        return [step], [-only.index.zero_point * step], only.index.zero_point
    exponents = STRETCH if options.column_scaling is None else (options.column_scaling,)
    low = [draft.values.amin(1) for draft in drafts]
    high = [draft.values.amax(1) for draft in drafts]
    if not contraction.geometry.pads:
        least = [(b - a) / 255 for a, b in zip(low, high, strict=True)]
        candidates = [([code_scale(step * 255, exponent) for step in least], 0) for exponent in exponents]
    else:
        candidates = list(_zero_preserving(low, high, exponents))
    spread = [b - a for a, b in zip(low, high, strict=True)]
    sizes = [_column_sizes(draft, contraction) for draft in drafts]
    scales, zero_point = min(
        candidates, key=lambda candidate: _codes_error(drafts, sizes, candidate[0], spread, options.weight_bits)
    )
    if not contraction.geometry.pads:
        return scales, low, zero_point
    scales = [exact_constants(scale, a, b) for scale, a, b in zip(scales, low, high, strict=True)]
    return scales, [-zero_point * scale for scale in scales], zero_point


def exact_constants(scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Shorten the code steps of constant functions so that a whole number of them gives the constant, ``[T, k]``.

    Its rounding error would be the same in all channels and pixels, and add up.
    """
    steps = torch.round(low.abs() / scale).clamp(min=1)
    return torch.where((low == high) & (low != 0), low.abs() / steps, scale)


def _zero_preserving(
    low: Sequence[Tensor], high: Sequence[Tensor], exponents: Sequence[float]
) -> Iterator[tuple[list[Tensor], int]]:
    """Yield column scales for every zero point that can represent all values.

    With 0 at code ``z`` a column needs a step of ``max(-low / z, high / (255 - z))`` to reach its ends.
    """
    negative = any(bool((a < 0).any()) for a in low)
    positive = any(bool((b > 0).any()) for b in high)
    for zero_point in range(1 if negative else 0, (_ZERO_POINTS if positive else _ZERO_POINTS + 1)):
        least = [
            torch.maximum(-a / max(zero_point, 1), b / max(255 - zero_point, 1)).clamp(min=0)
            for a, b in zip(low, high, strict=True)
        ]
        largest = torch.cat([step.flatten() for step in least]).max()
        for exponent in exponents:
            scaled = [stretched(step, largest, exponent) for step in least]
            yield scaled, zero_point


def _column_sizes(draft: TableDraft, contraction: ConvContraction) -> tuple[Tensor, Tensor, int]:
    """Give energy and largest weight of every column over its taps, ``[groups, n_out / groups, columns]``, and the taps."""
    weight = draft.weight.flatten(2).reshape(contraction.geometry.groups, -1, *draft.weight.flatten(2).shape[1:])
    return weight.square().sum(3), weight.abs().amax(3), int(weight.shape[3])


def _codes_error(
    drafts: Sequence[TableDraft],
    sizes: Sequence[tuple[Tensor, Tensor, int]],
    scales: Sequence[Tensor],
    spread: Sequence[Tensor],
    bits: int,
) -> float:
    """Estimate the error of column scales, as ``tabulate_expansions.scaling_error``, for all tables together."""
    codes, variances = torch.zeros(()), torch.zeros(())
    steps = []
    for draft, (energy, largest, taps), scale, reach in zip(drafts, sizes, scales, spread, strict=True):
        columns = scale[draft.group].reshape(len(energy), 1, -1)
        codes = codes + (energy * columns.square()).sum(2) / 12
        steps.append((largest * columns).amax(2))
        used = (reach / scale)[draft.group].reshape(len(energy), -1)
        variances = variances + (used.square() / 12).sum(1, keepdim=True) * taps
    step = torch.stack(steps).amax(0) / (2 ** (bits - 1) - 1)
    return float((codes + step.square() / 12 * variances).mean())
