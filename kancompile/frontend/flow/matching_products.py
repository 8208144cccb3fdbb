"""A batched product of two data-dependent matrices whose factors belong to the same features, written as what it is.

Basis functions times weights that were gathered for them: the product of two elements is a function of one feature, and
the sum over functions and features is a contraction. As one ``bmm`` it is neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kancompile.frontend.flow.verdicts import Call, combine, merge_along

_ATEN = torch.ops.aten


def split_matching_product(call: Call) -> list[fx.Node]:
    """Replace a ``bmm`` by products and sums of them, over the functions of each feature first.

    Returns:
        the new nodes in order of evaluation; none where factors of different features meet.
    """
    left, right = call.ids(0), call.ids(1)
    if call.name != "bmm" or not call.one_anchor or left is None or right is None:
        return []
    of_row, of_column = merge_along(left, (1,)), merge_along(right, (2,))
    ids = None if of_row is None or of_column is None else combine([of_row, of_column], of_row.shape)
    if ids is None:
        return []
    node = call.node
    first, second = node.args
    nodes: list[fx.Node] = []

    def append(operator: Any, *arguments: Any) -> fx.Node:
        with node.graph.inserting_after(nodes[-1] if nodes else node):
            new = node.graph.call_function(operator, arguments)
        new.meta = dict(node.meta)
        new.meta["val"] = operator(*fx.map_arg(arguments, lambda source: source.meta["val"]))
        nodes.append(new)
        return new

    wide = append(_ATEN.unsqueeze.default, first, 3)  # [b, m, s, 1]
    product = append(_ATEN.mul.Tensor, wide, append(_ATEN.unsqueeze.default, second, 1))  # [b, m, s, n]
    groups = _groups(ids)
    if groups is not None:
        (outer, inner), functions = groups
        shape = [-1, left.shape[1], outer, inner, right.shape[2]]
        product = append(_ATEN.sum.dim_IntList, append(_ATEN.view.default, product, shape), [functions])
    total = append(_ATEN.sum.dim_IntList, product, [2])
    node.replace_all_uses_with(total)
    return nodes


def _groups(ids: Tensor) -> tuple[tuple[int, int], int] | None:
    """Find how a sum over ``ids [b, s]`` splits into features and their functions.

    Returns:
        ``s`` as two sizes and which of the two dimensions of ``[b, m, *sizes, n]`` holds functions, ``None`` for neither.
    """
    length = ids.shape[1]
    features = len(torch.unique(ids[0][ids[0] >= 0]))
    if features in (0, length) or length % features:
        return None
    if merge_along(ids.view(-1, features, length // features), (2,)) is not None:
        return (features, length // features), 3
    if merge_along(ids.view(-1, length // features, features), (1,)) is not None:
        return (length // features, features), 2
    return None
