"""Decompositions of operators beyond core ATen, into forms whose parts the data-flow analysis can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kancompile.frontend.trace.recurrence import WHOLE_RECURRENCES

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Apply a linear layer to rows of transposed tokens, too, for which PyTorch expands the weight to one of every sample."""
    if x.dim() < 3 or x.is_contiguous():
        return _of_pytorch(_ATEN.linear.default, x, weight, bias)
    rows = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def product_with_a_matrix(x: Tensor, matrix: Tensor) -> Any:
    """Multiply as :func:`linear` does."""
    if x.dim() < 3 or matrix.dim() != 2 or x.is_contiguous():
        return _of_pytorch(_ATEN.matmul.default, x, matrix)
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Mix values by the softmax of scores, for attention without a mask of the user's.

    PyTorch's form looks for rows whose scores are all -inf, which nothing but such a mask can bring about.
    """
    if attn_mask is not None or dropout_p or enable_gqa:
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        return _of_pytorch(_ATEN.scaled_dot_product_attention.default, *given, scale=scale, enable_gqa=enable_gqa)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return torch.softmax(scores, dim=-1) @ value


def _of_pytorch(operator: Any, *given: Any, **named: Any) -> Any:
    """Decompose as PyTorch does: its kernel, since ``decompose`` would find our form again."""
    return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *given, **named)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.sum.dim_IntList: sum_of_dimensions,
    _ATEN.linear.default: linear,
    _ATEN.matmul.default: product_with_a_matrix,
    _ATEN.scaled_dot_product_attention.default: attention,
    _ATEN._embedding_bag.default: embedding_bag,
    _ATEN._embedding_bag_forward_only.default: embedding_bag,
    **WHOLE_RECURRENCES,
}
WHOLE = frozenset({_ATEN.im2col.default})
"""Operators that are not decomposed."""


def is_checked(operator: Any) -> bool:
    """Whether a decomposition of this operator holds for some inputs only, so that its result has to be compared."""
    return "embedding_bag" in str(operator)
