"""Tell which captured layers are uses of one: the same parameters, read in the same way.

Parameters are the same where they are one tensor in memory, under whatever names; that values agree says nothing. The same
parameters can still mean different layers (a step of a solver that is longer than the others scales its weights), so that
weights and functions are compared, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kancompile.frontend.flow import Flow, operator_name
from kancompile.frontend.layers.canonical import CanonicalLayer
from kancompile.frontend.layers.columns import agree, sample_points, sample_tokens
from kancompile.frontend.layers.regions import Region
from kancompile.ir import Branch, Contraction, Expansion, attribute

_MOVES = frozenset({"reshape", "index_select", "slice", "select", "squeeze", "unsqueeze", "permute", "clone", "alias"})


def uses_of_layers(flow: Flow, layers: Sequence[CanonicalLayer]) -> list[list[str]]:
    """Group the names of layers that are uses of one, each group in the order of evaluation."""
    groups: list[list[CanonicalLayer]] = []
    parameters = {layer.contraction.layer: _parameters(flow, layer.region) for layer in layers}
    for layer in layers:
        own = parameters[layer.contraction.layer]
        alike = (
            group
            for group in groups
            if own and own == parameters[group[0].contraction.layer] and _is_same(group[0], layer)
        )
        group = next(alike, None)
        if group is None:
            groups.append([layer])
        else:
            group.append(layer)
    return [[layer.contraction.layer for layer in group] for group in groups]


def _parameters(flow: Flow, region: Region) -> set[tuple[Any, ...]]:
    """Give the places in memory of the parameters and buffers between the anchors of a layer and its target."""
    places: set[tuple[Any, ...]] = set()
    stack, seen = [region.target], {flow.track(cut).anchor for cut in region.cuts}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = flow.values[node]
        if node in flow.parameter_of and node not in flow.literals and value.numel():
            places.add((value.data_ptr(), value.shape, value.stride()))
        stack.extend(flow.data_inputs(node))
        stack.extend(source for source in node.all_input_nodes if source in flow.constant)
    return places


def _is_same(layer: CanonicalLayer, other: CanonicalLayer) -> bool:
    return (
        len(layer.expansions) == len(other.expansions)
        and _is_same_map(layer.contraction, other.contraction)
        and all(_has_same_functions(a, b) for a, b in zip(layer.expansions, other.expansions, strict=True))
    )


def _is_same_map(a: Contraction, b: Contraction) -> bool:
    forms = [(c.out_shape, c.geometry, c.matrix_shape) for c in (a, b)]
    return forms[0] == forms[1] and agree(a.weight, b.weight) and agree(a.bias, b.bias)


def _has_same_functions(a: Expansion, b: Expansion) -> bool:
    """Whether expansions apply the same operators and constants, and agree where they are sampled.

    Samples say which element a function reads, operators that it has no other values between them.
    """
    forms = [(e.anchor_shape, e.in_shape, e.channels_first, [branch.k for branch in e.branches]) for e in (a, b)]
    if forms[0] != forms[1]:
        return False
    for branch, other in zip(a.branches, b.branches, strict=True):
        (operators, constants), (others, other_constants) = _operators(branch), _operators(other)
        if operators != others or not all(map(torch.equal, constants, other_constants)):
            return False
    values = [sample_tokens(expansion, sample_points()).nan_to_num() for expansion in (a, b)]
    return agree(values[0], values[1])


def _operators(branch: nn.Module) -> tuple[list[tuple[Any, ...]], list[Tensor]]:
    """List what a region applies to its input, and its constants; what only moves or selects elements is left out."""
    assert isinstance(branch, Branch)
    if branch.region is None:
        return [], []
    region = branch.region
    assert isinstance(region, fx.GraphModule)  # as captured
    graph = region.graph
    (output,) = graph.output_node().all_input_nodes
    needed, stack = set(), [output]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes[:1] if _moves(node) else node.all_input_nodes)
    operators: list[tuple[Any, ...]] = []
    constants: list[Tensor] = []
    number: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node not in needed:
            continue
        if _moves(node):
            number[node] = number[node.all_input_nodes[0]]
            continue
        number[node] = len(operators)
        if node.op == "get_attr":
            constants.append(attribute(branch.region, node.target))
        called = node.target if node.op == "call_function" else node.op
        operators.append((called, fx.map_arg((node.args, node.kwargs), lambda source: ("node", number[source]))))
    return operators, constants


def _moves(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node) in _MOVES
