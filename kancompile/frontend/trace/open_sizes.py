"""Find the dimensions beside the batch that torch.export can keep dynamic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kancompile.data import arguments, evaluation_mode, named_leaves
from kancompile.frontend.trace.examples import Examples
from kancompile.frontend.trace.export import Dynamic, quiet
from kancompile.frontend.trace.recurrence import WholeRecurrences
from kancompile.ir import Values, by_name


def open_sizes(model: Any, example: Values) -> list[Dynamic]:
    """List the sizes that a model takes of any value, each with all dimensions that have it; none where that cannot be told.

    Args:
        model: a module; others say their own sizes.
        example: samples, several inputs by name.

    Returns:
        for each size names by input and number of the dimension, called by the first of them, such as ``x_1``.
    """
    if not isinstance(model, nn.Module):
        return []
    rows = Examples.of(example).first()
    names = {id(value): name for name, value in by_name(rows, ["input"]).items()}
    args, kwargs = arguments(model, rows)
    shapes = torch.export.ShapesCollection()
    leaves = [leaf for _, leaf in named_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        shapes[leaf] = dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO)
    try:
        with quiet(), evaluation_mode(model), torch.no_grad(), WholeRecurrences():
            traced = torch.export.export(
                model, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs), strict=False
            )
    except Exception:  # user code and the tracer raise anything; then no size is open
        return []
    inputs = [node for node in traced.graph.nodes if node.name in traced.graph_signature.user_inputs]
    found: dict[Any, dict[str, dict[int, str]]] = {}
    batch = {
        node.meta["val"].shape[0].node.expr for node in inputs if isinstance(node.meta["val"].shape[0], torch.SymInt)
    }
    for node, leaf in zip(inputs, leaves, strict=True):
        for dim, size in enumerate(node.meta["val"].shape):
            if dim and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.expr not in batch:
                sizes = found.setdefault(size.node.expr, {})
                called = next((name for own in sizes.values() for name in own.values()), f"{names[id(leaf)]}_{dim}")
                sizes.setdefault(names[id(leaf)], {})[dim] = called
    return list(found.values())
