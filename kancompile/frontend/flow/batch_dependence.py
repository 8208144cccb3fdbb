"""Refuse networks whose output for one sample depends on the other samples of the batch.

Such a network (min-max or L2 normalization over the whole batch tensor) has no meaning for a compiler: its output changes
with the batch it is called with. The graph is run with other companions, in another order and with fewer rows, and the
first node where a sample's values change is named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.errors import KanCompileError, first_line
from kancompile.frontend.flow.flow import Flow
from kancompile.frontend.flow.table_rules import misses_table
from kancompile.frontend.trace import Examples, node_source
from kancompile.ir import tensors_of

_TOLERANCE = 1e-4


def refuse_batch_dependence(flow: Flow, examples: Examples) -> None:
    """Check that every sample is computed from itself alone.

    Args:
        flow: analysis of the network.
        examples: rows to take other companions from.

    Raises:
        KanCompileError: it is not, or an operator fails on some of them; the text names the node, the operator and the
            user's line.
    """
    generator = torch.Generator().manual_seed(2)
    firsts, others = [flow.values[node] for node in flow.inputs], tensors_of(examples.made(flow.rows, generator))
    companions = [torch.cat([own[:1], other[1:]]) for own, other in zip(firsts, others, strict=True)]
    variants: tuple[tuple[list[Tensor], int], ...] = (
        (companions, 0),  # same sample, other companions
        ([value.roll(1, 0) for value in firsts], 1),  # same samples, other places
        ([value[:2] for value in firsts], 0),  # fewer samples
    )
    for variant, place in variants:
        found = run(flow, variant)
        for output in flow.outputs:
            expected, actual = (_row(flow, output, v, at) for v, at in ((flow.values, 0), (found, place)))
            if (
                expected is None
                or actual is None
                or (_differs(expected, actual) and _differs_in_float64(flow, firsts, variant, place, output))
            ):
                _report(flow, run(flow, variant, keep=True), place, output)


def _differs_in_float64(
    flow: Flow, firsts: Sequence[Tensor], variant: Sequence[Tensor], place: int, output: fx.Node
) -> bool:
    """Whether a sample's output differs in float64, too: batches are added up in other orders, which deep networks enlarge."""
    alone, among = (run(flow, rows, dtype=torch.float64) for rows in (firsts, variant))
    expected, found = _row(flow, output, alone, 0), _row(flow, output, among, place)
    return expected is None or found is None or _differs(expected, found)


def run(
    flow: Flow, rows: Iterable[Tensor], keep: bool = False, dtype: torch.dtype = torch.float32
) -> dict[fx.Node, Any]:
    """Run the analysed nodes on another batch, one tensor for each input; give the outputs' values, or with ``keep`` all.

    In another ``dtype`` what is float32 in inputs, parameters and arguments of operators is of that type.

    Raises:
        KanCompileError: an operator fails on it.
    """
    given = dict(zip(flow.inputs, rows, strict=True))

    def as_dtype(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(dtype)
        return dtype if value is torch.float32 else value

    values: dict[fx.Node, Any] = {}
    readers = {node: sum(user in flow.values for user in node.users) for node in flow.values}
    lookup: Callable[[fx.Node], Any] = values.__getitem__
    for node in flow.graph.nodes:
        if node in given:
            values[node] = as_dtype(given[node])
        elif node in flow.parameter_of:
            values[node] = as_dtype(flow.values[node])
        elif node.op == "get_attr":  # a part of a loop
            values[node] = flow.values[node] if dtype == torch.float32 else _converted(flow.values[node], as_dtype)
        elif node in flow.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
            if dtype != torch.float32:  # operators such as full make float32 themselves
                args, kwargs = torch.utils._pytree.tree_map(as_dtype, (args, kwargs))
            values[node] = _evaluate(node, args, kwargs)
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not keep and readers[source] == 0 and source not in flow.outputs + flow.inputs:
                    del values[source]
    return values


def _converted(part: Any, as_dtype: Callable[[Any], Any]) -> Any:
    """Copy a graph with the parts that it calls, so that its operators make values of another type."""
    converted = copy.deepcopy(part)
    for module in converted.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = torch.utils._pytree.tree_map(as_dtype, (node.args, node.kwargs))
            module.recompile()
    return converted


def _evaluate(node: fx.Node, args: Any, kwargs: Any) -> Any:
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (IndexError, RuntimeError) as error:
        if not misses_table(error):
            raise
        raise KanCompileError(
            f"{node_source(node) or node.name}: found {str(node.target)!r}, which fails on other inputs than the example "
            f"({first_line(error)}), expected a function of every finite input; clamp an index to its table"
        ) from error


def _row(flow: Flow, node: fx.Node, values: dict[fx.Node, Any], place: int) -> Tensor | None:
    """Give one sample's part of a node's value; all of it where the shape has no batch; ``None`` if that is unclear."""
    value = values[node]
    if not isinstance(value, Tensor):
        return None
    sizes = node.meta["val"].shape
    with_batch = [
        dim for dim, size in enumerate(sizes) if not isinstance(size, int) and flow.batch in size.node.expr.free_symbols
    ]
    if not with_batch:
        return value
    samples = len(values[flow.inputs[0]])
    if len(with_batch) > 1 or value.shape[with_batch[0]] % samples:
        return None
    return value.movedim(with_batch[0], 0).reshape(samples, -1)[place]


def _differs(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return True
    expected, found = expected.double(), found.double()
    size = float(expected.abs().max())
    return not torch.allclose(expected, found, rtol=_TOLERANCE, atol=_TOLERANCE * size, equal_nan=True)


def _report(flow: Flow, values: dict[fx.Node, Any], place: int, output: fx.Node) -> None:
    culprit = output
    for node in flow.tracks:
        if node in flow.inputs or not isinstance(flow.values[node], Tensor) or flow.values[node].numel() == 0:
            continue
        expected, found = _row(flow, node, flow.values, 0), _row(flow, node, values, place)
        if expected is not None and found is not None and _differs(expected, found):
            culprit = node
            break
    loops = [source for source in culprit.all_input_nodes if source.target is torch.ops.higher_order.while_loop]
    culprit = loops[0] if loops else culprit
    source = node_source(culprit)
    way_out = (
        "let torch.where in its body keep what is finished"
        if loops
        else "replace statistics of the batch by fixed numbers, such as a minimum and maximum taken from training data"
    )
    raise KanCompileError(
        f"model: {source + ': ' if source else ''}found node {culprit.name!r} ({culprit.target}), where a sample's values "
        f"depend on the other samples of its batch, expected every sample to be computed from itself alone; {way_out}"
    )
