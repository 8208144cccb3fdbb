"""Uniform quantizers for weights: ranges, rounding as ONNX does it, and the search for scales.

Shapes: ``weight`` ``[n_out, c]``; scales ``[g, n_out]`` for ``g`` contiguous groups of columns. Scales are positive and
finite for every finite weight: an all-zero row gets scale 1 and codes 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.recipe import TERNARY

Width = int | str
"""Bits of a weight code, 2 to 8, or ``"ternary"``."""
ScaleSearch = Literal["minmax", "mse", "hessian"]

_SMALLEST_SCALE = 1e-30  # keeps weight / scale finite in float32
_MSE_POWER = 2.4
_AT_ONCE = 1 << 16


def stored_bits(bits: Width) -> int:
    """Return the bits that hold a code: two for three values."""
    return bits if isinstance(bits, int) else 2


def code_range(bits: Width) -> tuple[int, int]:
    """Return the smallest and largest weight code.

    All ``2**bits`` levels are used: at 2 bits the lowest is a quarter of what there is. At 8 bits -127 ... 127 stays
    symmetric, so that codes may be negated, and loses one level in 256. Ternary codes are -1, 0 and 1.

    Raises:
        KanCompileError: ``bits`` is neither 2 to 8 nor ternary.
    """
    if bits == TERNARY:
        return -1, 1
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise KanCompileError(f"weight bits {bits!r}, expected 2 to 8 or {TERNARY!r}")
    return (-127, 127) if bits == 8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def quantize(x: Tensor, scale: Tensor, low: int, high: int, zero_point: int = 0) -> Tensor:
    """Quantize as ONNX QuantizeLinear does: ``clip(rint(x / scale) + zero_point, low, high)``, ties to even, as floats.

    The zero point is added after rounding, which differs from rounding the sum when the zero point is odd.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def scale_of_column(scale: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Spread scales ``[g, n_out]`` to one for every weight, ``[n_out, c]``."""
    sizes = torch.tensor(list(group_sizes), device=scale.device)
    return torch.repeat_interleave(scale, sizes, dim=0).T


def round_to_nearest(weight: Tensor, scale: Tensor, group_sizes: Sequence[int], bits: Width) -> Tensor:
    """Round every weight to its nearest code, int8 ``[n_out, c]``."""
    return quantize(weight, scale_of_column(scale, group_sizes), *code_range(bits)).to(torch.int8)


def minmax_scale(weight: Tensor, bits: Width) -> Tensor:
    """Return the smallest scales that clip nothing, float32 ``[n_out]``, for one group ``[n_out, columns]``."""
    low, high = code_range(bits)
    largest = torch.maximum(weight.amax(1) / high, weight.amin(1) / low)
    return torch.where(largest > 0, largest.clamp(min=_SMALLEST_SCALE), torch.ones_like(largest)).float()


def search_scale(
    weight: Tensor,
    bits: Width,
    group_sizes: Sequence[int],
    search: ScaleSearch = "hessian",
    importance: Tensor | None = None,
) -> Tensor:
    """Choose one scale for each group and output.

    Args:
        weight: float32 ``[n_out, c]``.
        bits: 2 to 8, or ternary, for which ``"mse"`` and ``"hessian"`` both mean :func:`ternary_scale`.
        group_sizes: columns of each group.
        search: ``"minmax"`` clips nothing. ``"mse"`` tries 80 steps of 1 % below it and keeps the least
            ``sum |error|^2.4``, as the reference code of GPTQ does. ``"hessian"`` minimises the squared error weighted by
            ``importance`` over 40 geometric steps that reach far below (with thousands of columns and 2 bits the best
            scale is a small fraction of the largest weight), then over 9 finer ones.
        importance: non-negative ``[c]``, the diagonal of the Hessian; ones where ``None``.

    Returns:
        float32 ``[g, n_out]``, positive.

    Raises:
        KanCompileError: unknown ``search``.
    """
    if search not in ("minmax", "mse", "hessian"):
        raise KanCompileError(f"scale search {search!r}, expected 'minmax', 'mse' or 'hessian'")
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    scales = []
    sizes = list(group_sizes)
    for part, cost in zip(torch.split(weight, sizes, dim=1), torch.split(importance.float(), sizes), strict=True):
        widest = minmax_scale(part, bits)
        if bits == TERNARY and search != "minmax":
            widest = ternary_scale(part, torch.ones_like(cost) if search == "mse" else cost)
        elif search == "mse":
            factors = 1.0 - 0.01 * torch.arange(80)
            widest = _best_scale(part, bits, widest, factors, torch.ones_like(cost), _MSE_POWER)
        elif search == "hessian":
            coarse = 64.0 ** -(torch.arange(40) / 39)
            widest = _best_scale(part, bits, widest, coarse, cost, 2.0)
            fine = 64.0 ** (torch.linspace(-0.8, 0.8, 9) / 39)
            widest = _best_scale(part, bits, widest, fine, cost, 2.0)
        scales.append(widest)
    return torch.stack(scales)


def ternary_scale(part: Tensor, cost: Tensor) -> Tensor:
    """Give the scales of least ``sum of cost (w - scale code)^2`` over codes -1, 0 and 1, exactly, float32 ``[n_out]``.

    Whatever the scale, codes other than 0 are best for the weights larger than half of it, so that they are the largest ones of
    an output, and for the ``m`` largest the scale is their weighted mean size. All ``m`` are compared. Li et al., *Ternary weight
    networks* (2016), section 2.3, without the assumption on how weights are distributed, and with a cost for each column.

    Args:
        part: weights ``[n_out, c]``.
        cost: of each column, ``[c]``, non-negative.
    """
    size, order = part.abs().double().sort(dim=1, descending=True)
    weight = cost.double()[order]
    total, mass = (weight * size).cumsum(1), weight.cumsum(1)
    gain = total.square() / mass.clamp(min=1e-300)
    best = gain.argmax(1, keepdim=True)
    scale = (total.gather(1, best) / mass.gather(1, best).clamp(min=1e-300))[:, 0]
    return torch.where(scale > 0, scale.clamp(min=_SMALLEST_SCALE), torch.ones_like(scale)).float()


def _best_scale(part: Tensor, bits: Width, start: Tensor, factors: Tensor, cost: Tensor, power: float) -> Tensor:
    low, high = code_range(bits)
    best = start
    least = torch.full_like(start, torch.inf)
    # several factors at once, since small layers spend their time in calls; more than a cache holds would be slower
    for some in torch.split(factors.to(start.device), max(1, _AT_ONCE // max(1, part.numel()))):
        scale = (start * some[:, None]).clamp(min=_SMALLEST_SCALE)
        error = (quantize(part, scale[..., None], low, high) * scale[..., None] - part).abs_()
        error = error.square_() if power == 2.0 else error.pow_(power)
        total, first = (error @ cost).min(0)
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better, scale.gather(0, first[None])[0], best)
    return best
