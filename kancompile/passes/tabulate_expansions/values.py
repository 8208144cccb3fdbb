"""What the tables of linear and of convolutional layers share: options, values at their rows, and estimated errors."""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.ir import Expansion, IndexQuantizer
from kancompile.passes.tabulate_expansions.choose_index import row_parts

_MEASURED_INPUTS = 1 << 17
PRIOR = 16.0
"""Inputs of the nominal value that count beside those that a row receives, where inputs have tables of their own."""
STRETCH = (0.0, 0.25, 0.5, 0.75, 1.0)


def measured_samples(x: Tensor, samples: int) -> Tensor:
    """Take samples at even distances, and those that hold the smallest and the largest input of all."""
    n_in = x[0].numel()
    wanted = max(32, min(samples, _MEASURED_INPUTS // n_in))
    flat = x.flatten(1)
    extremes = torch.stack([flat.amin(1).argmin(), flat.amax(1).argmax()])
    return torch.cat([x[:: max(1, len(x) // wanted)][:wanted], x[extremes]])


def most_levels(row_bytes: int, weight_bytes: int) -> int:
    """Bound the rows so that the tables of inputs that share none stay below the weights in size (at least 64 KiB)."""
    return max(16, min(4096, max(1 << 16, weight_bytes) // row_bytes))


def rounding_error(columns: Tensor, weight: Tensor, bits: int, largest_code: int = 255) -> float:
    """Estimate what table codes and ``bits``-bit weights cost at the output, as mean squared error.

    Codes: uniform rounding noise of each column's range, ``(range / largest_code)^2 / 12``, through the weights. Weights: round
    to nearest with one scale per output, on the centered features (the bias absorbs the mean).
    """
    spread = (columns.amax(0) - columns.amin(0)) / largest_code
    codes = float((weight.square() * (spread.square() / 12)).sum(1).mean())
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    rounded = torch.round(weight / scale) * scale
    weights = float(((columns - columns.mean(0)) @ (weight - rounded).T).square().mean())
    return codes + weights


def values_at_rows(expansion: Expansion, index: IndexQuantizer, x: Tensor) -> Tensor:
    """Evaluate the functions that all inputs share at every row of their table, float32 ``[1, levels, k]``.

    Args:
        expansion: the float expansion.
        index: its index quantizer.
        x: calibration inputs, any shape; a row holds the mean of the functions over those that it receives.
    """
    if expansion.is_identity:  # rows that stand for themselves need no lookup
        return index.rows().float().reshape(1, -1, 1)
    points, share = row_parts(index, x)
    values = expansion.sample_shared(points.flatten()).reshape(*points.shape, -1)
    return _weighted_mean(values, share[..., None])[None]


def values_of_inputs(
    expansion: Expansion, index: IndexQuantizer, x: Tensor, group: Tensor, prior: float = PRIOR
) -> Tensor:
    """Evaluate the functions of every input at the rows of its table, float32 ``[levels, n_in, k]``.

    A row holds the mean of the functions over the calibration inputs that it receives, from all channels which share the
    table, and some of its nominal value. Otherwise curved functions, and what lies beyond the first and last row, would
    shift all outputs the same way, which later layers and pooling do not average out.

    Args:
        expansion: the float expansion.
        index: its index quantizer.
        x: calibration inputs ``[n, ...]``, as the expansion reads them.
        group: number of the table of every input, int64 ``[n_in]``.
        prior: how many inputs of the nominal value count.
    """
    x = expansion.inputs_last(x)
    parts = [row_parts(index, x[..., group == number], prior=prior) for number in range(int(group.max()) + 1)]
    points, share = (torch.stack(values) for values in zip(*parts, strict=True))  # [T, levels, parts]
    values = expansion.evaluate_inputs(points.flatten(1)[group].T).reshape(
        *points.shape[1:], *expansion.in_shape[-1:], -1
    )
    return _weighted_mean(values, share[group].permute(1, 2, 0)[..., None])


def _weighted_mean(values: Tensor, share: Tensor) -> Tensor:
    """Average the second dimension; equal values give exactly that value, so that constants stay constant."""
    first = values[:, :1]
    return first[:, 0] + ((values - first) * share.float()).sum(1)


def code_scale(spread: Tensor, exponent: float, largest_code: int = 255) -> Tensor:
    """Value of one step, ``spread^exponent * max(spread)^(1 - exponent) / largest_code``; for constant columns next to 0."""
    return stretched(spread / largest_code, spread.amax() / largest_code, exponent)


def stretched(least: Tensor, largest: Tensor, exponent: float) -> Tensor:
    """Give code steps between those that each column needs and the largest of them, ``least^exponent * largest^(1 - exponent)``.

    Columns that need none have one code only, which means their weights are multiplied by 0. A step next to 0 makes those
    weights small in units of codes, so that they have no part in the choice of a weight scale.
    """
    scale = least.clamp(min=1e-15).pow(exponent) * largest.clamp(min=1e-30).pow(1 - exponent)
    unused = torch.where(largest > 1e-12, 1e-6 * largest, 1.0)
    return torch.where(least > 0, torch.maximum(scale, least), unused)
