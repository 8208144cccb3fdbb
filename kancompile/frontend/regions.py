"""Layers of a network: which nodes are contractions worth naming, and what they are affine in.

From a node that a nonlinear function reads (or that leaves the network) the graph is followed backwards through everything
affine. Where that ends, values are nonlinear functions of single elements: the expansion. It may be cut at any set of
nodes between there and the contraction; the one with the fewest elements is chosen, since every element becomes a column
of the weight matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from kancompile.frontend.flow import Flow
from kancompile.frontend.flow_rules import Track
from kancompile.frontend.minimum_cut import minimum_cut


@dataclass(frozen=True)
class Region:
    """One contraction with what feeds it.

    Attributes:
        target: node that is affine in the cuts.
        cuts: nodes that are univariate in their anchors; a cut that is its own anchor is an identity.
        affine: nodes between the cuts and the target, target included, in order of evaluation.
    """

    target: fx.Node
    cuts: tuple[fx.Node, ...]
    affine: tuple[fx.Node, ...]


def find_regions(flow: Flow) -> list[Region]:
    """List the layers of a network in order of evaluation.

    A target is an anchor that is affine in what precedes it and is used nonlinearly or returned. Two joins are no layers
    but stay as they are, and the tensors they join become targets: a skip connection (a sum with an anchor itself) and a
    concatenation of values of different anchors, for which one dense matrix would be a waste.
    """
    required = set(flow.used)
    kept_joins: set[fx.Node] = set()
    while True:
        before = len(required)
        for anchor in [node for node in flow.anchors if node in required and flow.anchors[node]]:
            if anchor in kept_joins:
                continue
            for join in _joins_to_keep(flow, anchor, required):
                kept_joins.add(join)
                required.add(join)
                required.update(flow.track(node).anchor for node in flow.data_inputs(join))
        if len(required) == before:
            break
    order = {node: position for position, node in enumerate(flow.graph.nodes)}
    targets = [node for node in flow.anchors if node in required and flow.anchors[node] and node not in kept_joins]
    if flow.output in flow.tracks and flow.output in flow.linear and flow.output not in flow.anchors:
        targets.append(flow.output)
    regions = []
    for target in targets:
        region = _cut(flow, target, required, order)
        if region is not None:
            regions.append(region)
    return sorted(regions, key=lambda region: order[region.target])


def _is_end(flow: Flow, node: fx.Node, required: set[fx.Node]) -> bool:
    """Whether following affine nodes backwards ends at an anchor: a barrier, the input, or another layer's target."""
    return node in flow.anchors and (not flow.anchors[node] or node in required)


def _joins_to_keep(flow: Flow, target: fx.Node, required: set[fx.Node]) -> list[fx.Node]:
    keep = []
    stack, seen = [target], {target}
    while stack:
        node = stack.pop()
        inputs = flow.data_inputs(node)
        joins = flow.anchors.get(node, False) and node not in flow.contractions and len(inputs) > 1
        if joins and (
            any(_is_plain(flow, source, required) for source in inputs)
            or (_is_concatenation(node) and len({_origins(flow, source, required) for source in inputs}) > 1)
        ):
            keep.append(node)
            continue
        if node in flow.contractions and not joins:
            continue
        for source in inputs:
            if source in flow.linear and source not in seen and not _is_end(flow, source, required):
                seen.add(source)
                stack.append(source)
    return keep


def _is_concatenation(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise not in node.target.tags


def _is_plain(flow: Flow, node: fx.Node, required: set[fx.Node]) -> bool:
    """Whether a value is an anchor itself up to moves, scales and shifts: the straight arm of a skip connection."""
    while not _is_end(flow, node, required):
        inputs = flow.data_inputs(node)
        if node not in flow.linear or node in flow.contractions or len(inputs) != 1:
            return False
        node = inputs[0]
    return True


def _origins(flow: Flow, node: fx.Node, required: set[fx.Node]) -> frozenset[fx.Node]:
    """Anchors that a value is computed from, across the contractions that a layer would swallow."""
    origins: set[fx.Node] = set()
    stack, seen = [node], {node}
    while stack:
        node = stack.pop()
        if _is_end(flow, node, required):
            origins.add(node)
        elif node not in flow.linear and isinstance(flow.tracks[node], Track):
            origins.add(flow.track(node).anchor)
        else:
            new = [source for source in flow.data_inputs(node) if source not in seen]
            seen.update(new)
            stack.extend(new)
    return frozenset(origins)


def _cut(flow: Flow, target: fx.Node, required: set[fx.Node], order: dict[fx.Node, int]) -> Region | None:
    ends: list[fx.Node] = []
    edges: list[tuple[fx.Node, fx.Node]] = []
    stack, seen = [target], {target}
    while stack:
        node = stack.pop()
        for source in flow.data_inputs(node):
            edges.append((source, node))
            if source not in seen:
                seen.add(source)
                if source in flow.linear and not _is_end(flow, source, required):
                    stack.append(source)
                else:
                    ends.append(source)
    if not ends:
        return None
    capacity = {
        node: int((track.ids >= 0).sum())
        for node in seen
        if node is not target
        and isinstance(track := flow.tracks[node], Track)
        and (_is_end(flow, track.anchor, required) or node in ends)
    }
    position = order.__getitem__
    edges.sort(key=lambda edge: (position(edge[0]), position(edge[1])))
    cuts = sorted(minimum_cut(edges, sorted(ends, key=position), target, capacity), key=position)
    return Region(target, tuple(cuts), tuple(_between(flow, cuts, target, position)))


def _between(flow: Flow, cuts: Sequence[fx.Node], target: fx.Node, position: object) -> list[fx.Node]:
    found: set[fx.Node] = set()
    stack = [target]
    while stack:
        node = stack.pop()
        if node not in found and node not in cuts:
            found.add(node)
            stack.extend(flow.data_inputs(node))
    return sorted(found, key=position)  # type: ignore[arg-type]
