"""Decompositions of operators beyond core ATen, into forms whose parts the data-flow analysis can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_SUM = 0  # modes of embedding_bag
_MEAN = 1


def sum_of_dimensions(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Sum over one dimension after the other, the last one first.

    A sum over functions and inputs at once contracts everything; a sum over the functions alone may leave one function of
    each input.
    """
    if dim is None or len(dim) < 2:
        return NotImplemented
    for place in sorted((place % x.dim() for place in dim), reverse=True):
        x = _ATEN.sum.dim_IntList(x, [place], keepdim, dtype=dtype)
    return x


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """Look rows up, weigh them and sum every bag; for bags of equal length only, which the caller has to check.

    Returns:
        the bags ``[b, n]`` and three tensors that only gradients need, here empty.
    """
    if mode not in (_SUM, _MEAN) or include_last_offset or padding_idx >= 0:
        return NotImplemented
    rows = _ATEN.embedding(weight, indices)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    bags = rows.reshape(offsets.shape[0], indices.shape[0] // offsets.shape[0], weight.shape[1])
    summed = bags.sum(1) if mode == _SUM else bags.mean(1)
    nothing = [indices.new_empty(0) for _ in range(3)]
    return (summed, *nothing)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.sum.dim_IntList: sum_of_dimensions,
    _ATEN._embedding_bag.default: embedding_bag,
    _ATEN._embedding_bag_forward_only.default: embedding_bag,
}
WHOLE = frozenset({_ATEN.im2col.default})
"""Operators that are not decomposed."""


def is_checked(operator: Any) -> bool:
    """Whether a decomposition of this operator holds for some inputs only, so that its result has to be compared."""
    return "embedding_bag" in str(operator)
