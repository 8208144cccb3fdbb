"""Leave out terms that a mask of zeros switches off, before every operator of them is decomposed.

    y + sum(stack([mask[j] * f_j(x), ...]))    ->    y,  where all mask[j] = 0

pykan computes a symbolic function for every edge beside its spline, one operator after the other, and multiplies all of those
by zero that the user has not fixed. Only functions without poles are left out: what may be NaN stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from kancompile.frontend.trace.held_state import held_state

_ATEN = torch.ops.aten
_MOVES = frozenset(
    {
        *(_ATEN.select.int, _ATEN.slice.Tensor, _ATEN.index.Tensor, _ATEN.unsqueeze.default, _ATEN.squeeze.dim),
        *(_ATEN.view.default, _ATEN.reshape.default, _ATEN.permute.default, _ATEN.transpose.int, _ATEN.t.default),
        *(_ATEN.expand.default, _ATEN.clone.default, _ATEN.alias.default, _ATEN.lift_fresh_copy.default),
        *(_ATEN.stack.default, _ATEN.cat.default, _ATEN.to.dtype, _ATEN.to.dtype_layout),
    }
)
_SUMS = frozenset({_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.sum.dim_IntList, _ATEN.sum.default})
_PRODUCTS = frozenset(
    {_ATEN.einsum.default, _ATEN.linear.default, _ATEN.matmul.default, _ATEN.mm.default, _ATEN.bmm.default}
)
_FUNCTIONS = frozenset(
    {
        *(_ATEN.neg.default, _ATEN.relu.default, _ATEN.silu.default, _ATEN.sigmoid.default, _ATEN.tanh.default),
        *(_ATEN.sin.default, _ATEN.cos.default, _ATEN.ge.Tensor, _ATEN.gt.Tensor, _ATEN.le.Tensor, _ATEN.lt.Tensor),
    }
)
_FINITE = _MOVES | _SUMS | _PRODUCTS | _FUNCTIONS | {_ATEN.mul.Tensor, _ATEN.div.Tensor}
"""Operators whose results are finite where their inputs are, but for overflow; ``div`` by constants other than zero."""


def drop_zero_terms(program: ExportedProgram) -> None:
    """Replace sums of a tensor and a term that is zero by the tensor, in place; nothing where a program writes to tensors."""
    graph = program.graph
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in graph.nodes):
        return
    values = _constants(program)
    finite = {node for node in graph.nodes if node.name in program.graph_signature.user_inputs}
    finite.update(node for node, value in values.items() if bool(value.isfinite().all()))
    zero = {node for node, value in values.items() if value.is_floating_point() and not bool(value.any())}
    masked: set[fx.Node] = set()  # zeros that depend on the input; a bias of zeros is a parameter like any other
    for node in graph.nodes:
        if node.op != "call_function" or node in values:
            continue
        if node.target is not _ATEN.nan_to_num.default and not _is_finite(node, finite, values):
            continue
        finite.add(node)
        is_product = node.target is _ATEN.mul.Tensor and any(_is_zero(factor, zero) for factor in node.args)
        if is_product or (node.target in _MOVES | _SUMS and all(_is_zero(term, zero) for term in _terms(node))):
            zero.add(node)
            masked.add(node)
    dropped = False
    for node in graph.nodes:
        if node.target in (_ATEN.add.Tensor, _ATEN.sub.Tensor) and node not in zero:
            kept = _kept(node, masked)
            if kept is not None:
                node.replace_all_uses_with(kept)
                dropped = True
    if dropped:
        graph.eliminate_dead_code()
        program.graph_module.recompile()


def _constants(program: ExportedProgram) -> dict[fx.Node, Tensor]:
    """Give tensors of the state, what selects or moves them, and their sums."""
    held = held_state(program)
    found: dict[fx.Node, Tensor] = {}
    for node in program.graph.nodes:
        _, value = held.get(node.name, ("", None))
        if node.op == "placeholder" and isinstance(value, Tensor):
            found[node] = value.detach()
        elif node.target in _MOVES | _SUMS and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = node.target(*args, **kwargs)
    return found


def _is_finite(node: fx.Node, finite: set[fx.Node], values: Mapping[fx.Node, Tensor]) -> bool:
    if node.target not in _FINITE or not all(source in finite or _is_size(source) for source in node.all_input_nodes):
        return False
    if node.target is _ATEN.div.Tensor:
        divisor = values.get(node.args[1])  # type: ignore[arg-type]
        if divisor is None or not bool(divisor.all()):
            return False
    given = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    return all(math.isfinite(value) for value in given if isinstance(value, float))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _terms(node: fx.Node) -> list[Any]:
    """List what a move hands on or a sum adds up; indices and sizes are none of it."""
    first = node.args[0]
    terms = list(first) if isinstance(first, list | tuple) else [first]
    return [*terms, node.args[1]] if node.target in (_ATEN.add.Tensor, _ATEN.sub.Tensor) else terms


def _is_zero(value: Any, zero: set[fx.Node]) -> bool:
    return value in zero if isinstance(value, fx.Node) else isinstance(value, int | float) and value == 0


def _kept(node: fx.Node, masked: set[fx.Node]) -> fx.Node | None:
    """Give the other operand of a sum with a zero, where it is all that the sum yields."""
    x, y = node.args[:2]
    kept: Any = x if y in masked else None
    if x in masked and node.target is _ATEN.add.Tensor and not node.kwargs:
        kept = y
    mine, result = kept.meta.get("val") if isinstance(kept, fx.Node) else None, node.meta["val"]
    same = isinstance(mine, Tensor) and mine.dtype == result.dtype and mine.shape == result.shape
    return kept if same else None
