"""Bounds that a computation sets to its values whatever the network's input is, for indices into data.

An example shows which elements an index picks for one input. Which ones it can pick for others follows from the clamps,
remainders and searches that it was computed by: interval arithmetic over the graph, in the number types of the model,
since a bound just below a whole number may round up to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.frontend.flow.verdicts import operator_name

Bounds = tuple[Tensor, Tensor]
"""Least and largest value of every element; whole numbers are held as float64, which has infinity."""

_MOVES = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select"),
        *("expand", "clone", "alias", "detach", "lift_fresh_copy", "flip", "repeat", "cat", "stack"),
    }
)
_INCREASING = _MOVES | {
    *("clamp", "clamp_min", "clamp_max", "hardtanh", "minimum", "maximum", "relu"),
    *("floor", "ceil", "round", "trunc", "_to_copy"),
}
_MONOTONE = frozenset({"add", "sub", "rsub", "mul", "neg"})  # in each operand, upwards or downwards
_QUOTIENTS = frozenset({"div", "floor_divide"})  # so in the dividend


def value_bounds(node: fx.Node, values: Mapping[fx.Node, Any], constant: Container[fx.Node]) -> Bounds:
    """Bound a tensor's values, by infinity where nothing is known.

    Args:
        node: a tensor of the graph.
        values: of all nodes on the example, which give shapes, number types and constants.
        constant: nodes that do not depend on the network's input.
    """
    found: dict[fx.Node, Bounds] = {}
    stack = [node]
    while stack:
        operands = [] if stack[-1] in constant else _operands(stack[-1], values[stack[-1]], constant)
        missing = [source for source in operands if source not in found]
        if missing:
            stack.extend(missing)
            continue
        here = stack.pop()
        value = values[here]
        if here in constant:
            found[here] = (_typed(value, value), _typed(value, value))
        elif operands:
            found[here] = _of_operands(here, {source: found[source] for source in operands}, values)
        else:
            zeros = _typed(torch.zeros(value.shape), value)
            low, high = _limits(here, values, constant)
            found[here] = zeros + low, zeros + high
    return found[node]


def _operands(node: fx.Node, value: Tensor, constant: Container[fx.Node]) -> list[fx.Node]:
    """List the operands that the bounds of a data-dependent value follow from."""
    name = operator_name(node)
    data = [source for source in node.all_input_nodes if source not in constant]
    if value.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64):  # a narrow number may wrap around
        return []
    if name == "where":
        return [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
    if name in _QUOTIENTS:
        return data if data == [node.args[0]] else []
    if name in _MONOTONE:  # a square is not
        return data if data == [leaf for leaf in node.args if leaf in data] else []
    return data if name in _INCREASING else []


def _typed(value: Any, result: Tensor) -> Any:
    """Give a value in the number type of a result, whole numbers as float64."""
    dtype = result.dtype if result.is_floating_point() else torch.float64
    return value.to(dtype) if isinstance(value, Tensor) else value


def _of_operands(node: fx.Node, operands: Mapping[fx.Node, Bounds], values: Mapping[fx.Node, Any]) -> Bounds:
    """Evaluate an operator at the ends of its operands' ranges."""
    name, result = operator_name(node), values[node]
    if name in _MONOTONE or name in _QUOTIENTS:
        corners = list(itertools.product((0, 1), repeat=len(operands)))
    else:
        corners = [(0,) * len(operands), (1,) * len(operands)]
    found: list[Tensor] = []
    for corner in corners:
        ends = {source: bounds[end] for (source, bounds), end in zip(operands.items(), corner, strict=True)}
        known = {source: _typed(ends.get(source, values[source]), result) for source in node.all_input_nodes}
        at_end: Any = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        arguments, options = at_end
        if name == "where":
            found += [torch.as_tensor(choice).broadcast_to(result.shape) for choice in arguments[1:]]
        elif name == "_to_copy":
            found.append(arguments[0] if result.is_floating_point() else arguments[0].trunc())
        elif name in ("view", "_unsafe_view"):  # bounds need not have the strides of the values
            found.append(arguments[0].reshape(result.shape))
        else:
            found.append(node.target(*arguments, **options))  # type: ignore[operator]
    every = torch.stack([_typed(end, result) for end in found])
    unknown = torch.isnan(every)
    return every.masked_fill(unknown, -math.inf).amin(0), every.masked_fill(unknown, math.inf).amax(0)


def _limits(node: fx.Node, values: Mapping[fx.Node, Any], constant: Container[fx.Node]) -> tuple[float, float]:
    """Give the limits that an operator itself sets."""
    name, value = operator_name(node), values[node]
    arguments: Any = fx.map_arg(node.args, values.__getitem__)
    if value.dtype == torch.bool:
        return 0, 1
    if name in ("sigmoid", "tanh"):
        return (0 if name == "sigmoid" else -1), 1
    if name in ("searchsorted", "bucketize"):
        return 0, arguments[0 if name == "searchsorted" else 1].shape[-1]
    if name in ("argmax", "argmin"):
        dim = arguments[1] if len(arguments) > 1 else None
        return 0, (arguments[0].numel() if dim is None else arguments[0].shape[dim]) - 1
    if name == "remainder" and all(source in constant for source in node.all_input_nodes if source is not node.args[0]):
        divisor = torch.as_tensor(arguments[1])
        if bool((divisor > 0).all()):
            return 0, float(divisor.max()) - (0 if value.is_floating_point() else 1)
    return -math.inf, math.inf
