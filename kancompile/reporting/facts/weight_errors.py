"""Map the rounding error of a layer's weights over its edges, as an image of bounded size.

    error[o, i] = root mean square over functions k and taps t of  (W^[o, i, k, t] - s[i, k] * W[o, i, k, t])

relative to the root mean square of all ``s * W`` of the layer. ``s`` is the real value of one code step of a table column, with
which the weights were multiplied before they were rounded (1 where there is no table).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.ir import AnyExpansion
from kancompile.validation import LayerPair

ROWS, COLUMNS = 48, 96


@dataclass(frozen=True)
class WeightErrors:
    """The map.

    Attributes:
        values: float64 ``[rows, columns]``, relative errors; blocks of outputs and inputs where the layer has more of them.
        n_out, n_in: size of the layer; with channel groups ``n_in`` is that of a group.
        relative: error of the whole layer.
    """

    values: Tensor
    n_out: int
    n_in: int
    relative: float


def weight_errors(pair: LayerPair) -> WeightErrors | None:
    """Map a layer; ``None`` where a pass changed the functions, so that no weight has a twin."""
    errors, sizes = [], []
    for branch in pair.float_branches:
        twin = next(
            (b for b in pair.branches if b.name == branch.name and pair.origin(b.expansion) == branch.expansion), None
        )
        if twin is None or twin.weight.shape != branch.weight.shape:
            return None
        groups, _, n_in, k, _ = branch.weight.shape
        scale = pair.program.node(twin.expansion, AnyExpansion).column_scale()[:, twin.columns].double()
        exact = branch.weight * scale.reshape(groups, 1, n_in, k, 1)
        errors.append((twin.weight - exact).square().sum((3, 4)).flatten(0, 1))
        sizes.append(exact.square().sum((3, 4)).flatten(0, 1))
        columns = k * branch.weight.shape[4]
    # several expansions stand side by side, branches of one on top of each other
    by_expansion: dict[str, tuple[Tensor, Tensor, int]] = {}
    for branch, error, size in zip(pair.float_branches, errors, sizes, strict=True):
        columns = branch.weight.shape[3] * branch.weight.shape[4]
        before = by_expansion.get(branch.expansion)
        by_expansion[branch.expansion] = (
            (error, size, columns) if before is None else (before[0] + error, before[1] + size, before[2] + columns)
        )
    power = sum(float(size.sum()) for _, size, _ in by_expansion.values())
    count = sum(size.numel() * columns for _, size, columns in by_expansion.values())
    if power == 0:
        return None
    squares = torch.cat([error / columns for error, _, columns in by_expansion.values()], 1) / (power / count)
    noise = sum(float(error.sum()) for error, _, _ in by_expansion.values())
    return WeightErrors(_pooled(squares).sqrt(), squares.shape[0], squares.shape[1], (noise / power) ** 0.5)


def _pooled(values: Tensor) -> Tensor:
    size = (min(ROWS, values.shape[0]), min(COLUMNS, values.shape[1]))
    return nn.functional.adaptive_avg_pool2d(values[None, None], size)[0, 0]
