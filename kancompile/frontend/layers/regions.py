"""Layers of a network: which nodes are contractions worth naming, and what they are affine in.

From a node that a nonlinear function reads (or that leaves the network) the graph is followed backwards through
everything affine. Where that ends, values are nonlinear functions of single elements: the expansion. It may be cut at any
set of nodes between there and the contraction. The set with the fewest elements is chosen, since every element becomes a
column of the weight matrix. Where that lies behind weights (the functions of all edges out of an input, when those are
fewer than the basis functions), the best set in front of all weights is a second candidate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import Flow, NotLowerableError, Track, follow, locate, operator_name
from kancompile.frontend.layers.minimum_cut import minimum_cut
from kancompile.frontend.layers.pixelwise_map import can_be_added, is_over_positions

_LEAST_DENSITY = 2 / 3
"""Share of a dense matrix that concatenated contractions must fill to become one."""
_SMALL_MATRIX = 1 << 10
"""Entries of a matrix that may be mostly zeros."""
_ONE_NODE = 1 << 20
"""Weight of an element against a node in choosing cuts: fewer elements first, then fewer nodes."""
_OUT_OF_ORDER = 1 << 10
"""Factor on the cost of a node whose samples do not stand one after the other: it could only be cut in vain."""

_SUMS = frozenset({"add", "sub", "rsub"})
_MOVEMENTS = frozenset({"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "clone", "alias", "unsqueeze"})


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


def without_final_movement(flow: Flow, region: Region) -> Region:
    """Leave the reshapes at the end of a region behind it: its target is what the last node before them returns."""
    target = unmoved(flow, region.target)
    if target not in region.affine:
        return region
    return Region(target, region.cuts, region.affine[: region.affine.index(target) + 1])


def origin_of_target(flow: Flow, region: Region) -> Tensor:
    """Give for every element of a region's target which element it is of the target without its final movements."""
    return locate(flow, region.target, follow(flow, unmoved(flow, region.target), [region.target])).origin


def unmoved(flow: Flow, node: fx.Node) -> fx.Node:
    """Follow reshapes backwards: the node whose values another one holds in some order."""
    while operator_name(node) in _MOVEMENTS and len(flow.data_inputs(node)) == 1:
        (node,) = flow.data_inputs(node)
    return node


class Search:
    """The nodes at which following affine nodes backwards ends, and what is found there.

    A target is an anchor that is affine in what precedes it and is used nonlinearly or returned. Some joins are no layers
    but stay as they are, and the tensors they join become targets: a skip connection (a sum with an anchor itself), a
    concatenation for which one dense matrix would mostly hold zeros, and convolutions that move differently.

    Attributes:
        flow: analysis of the network.
        required: anchors at which layers end.
        joins: sums and concatenations of layers that are no layers themselves, and why.
        order: place of a node in the order of evaluation.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.required = set(flow.used)
        self.joins: dict[fx.Node, str] = {}
        self.order: Callable[[fx.Node], int] = {node: place for place, node in enumerate(flow.graph.nodes)}.__getitem__
        self._keep_convolutions()
        self._settle_joins()

    def targets(self) -> list[fx.Node]:
        """List the outputs of layers in order of evaluation."""
        found = [node for node in self.flow.anchors if self.is_target(node)]
        found += [output for output in dict.fromkeys(self.flow.outputs) if self._is_univariate_output(output)]
        return sorted(found, key=self.order)

    def divided(self, region: Region) -> Search | None:
        """Give the search in which layers end in front of the last contractions of a region that read other ones.

        Sums of such contractions with anything else stay as they are. Nothing is returned where there are none.
        """
        flow = self.flow
        inside = set(region.affine)
        last: dict[fx.Node, list[fx.Node]] = {}  # contraction -> what it reads
        behind: set[fx.Node] = set()
        leads_on: set[fx.Node] = set()  # what another such contraction is behind
        for node in reversed(region.affine):
            if node in leads_on:
                leads_on.update(flow.data_inputs(node))
            elif node in flow.contractions:
                sources = [flow.track(source).anchor for source in flow.data_inputs(node)]
                if any(source in inside for source in sources):
                    last[node] = sources
                    leads_on.update(flow.data_inputs(node))
        if not last:
            return None
        found = copy.copy(self)
        found.required, found.joins = set(self.required), dict(self.joins)
        for node in region.affine:
            inputs = flow.data_inputs(node)
            if node in last:
                found.required.update(last[node])
                behind.add(node)
            elif any(source in behind for source in inputs):
                behind.add(node)
                if flow.anchors.get(node, False) and any(source not in behind for source in inputs):
                    found.joins[node] = "sum of a layer and a linear map behind another layer"
                    found.required.update((node, *(flow.track(source).anchor for source in inputs)))
        found._settle_joins()
        return found

    def parted(self, region: Region) -> Search | None:
        """Give the search in which the terms of the sum at the end of a region are layers of their own, if each can be one."""
        flow, node = self.flow, region.target
        inside = set(region.affine)
        while node in inside and node not in flow.contractions and len(flow.data_inputs(node)) == 1:
            (node,) = flow.data_inputs(node)
        terms = flow.data_inputs(node)
        if node not in inside or operator_name(node) not in _SUMS or not flow.anchors.get(node, False):
            return None
        anchors = [flow.track(term).anchor for term in terms]
        if len(terms) < 2 or not all(a in inside and self._holds_contraction(a, inside) for a in anchors):
            return None
        found = copy.copy(self)
        found.required, found.joins = {*self.required, node, *anchors}, {**self.joins, node: "sum of layers"}
        found._settle_joins()
        return found

    def _holds_contraction(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self.flow.contractions:
                return True
            stack.extend(source for source in self.flow.data_inputs(node) if source in inside)
        return False

    def is_target(self, node: fx.Node) -> bool:
        """Whether an anchor is the output of a layer."""
        return node in self.required and self.flow.anchors[node] and node not in self.joins

    def is_layer(self, region: Region) -> bool:
        """Whether a region adds anything up: not a move or scale behind a barrier or a join that stays."""
        flow = self.flow
        return region.target not in flow.anchors or any(node in flow.mixing for node in region.affine)

    def is_end(self, node: fx.Node) -> bool:
        """Whether a node is an anchor that bounds a layer: a barrier, the input, or another layer's target."""
        return node in self.flow.anchors and (not self.flow.anchors[node] or node in self.required)

    def _is_univariate_output(self, node: fx.Node) -> bool:
        """Whether the network ends in an affine map of functions of single numbers that adds nothing up.

        So it is with a hidden width of 1, and where pruning left one edge for every output. As a layer it needs a dense
        matrix of mostly zeros, so it is one only where that is small.
        """
        flow = self.flow
        if node not in flow.tracks or node not in flow.linear or node in flow.anchors:
            return False
        rows = flow.rows
        n_in = flow.values[flow.track(node).anchor].numel() // rows
        return bool(n_in == 1 or n_in * (flow.values[node].numel() // rows) <= _SMALL_MATRIX)

    def _keep_convolutions(self) -> None:
        """Make the output of a convolution a target where another contraction reads it, such as average pooling.

        One that mixes no pixels again, a convolution of kernel 1, becomes part of the layer instead.
        """
        flow = self.flow
        for node in flow.contractions:
            if _is_convolution_of_pixels(flow, node):
                continue
            for source in flow.data_inputs(node):
                anchor = flow.track(source).anchor
                if flow.anchors[anchor] and self._convolutions(anchor):
                    self.required.add(anchor)

    def _convolutions(self, node: fx.Node) -> list[fx.Node]:
        """List the convolutions over positions that a value is, up to sums, shifts and scales."""
        flow = self.flow
        found = []
        stack, seen = [node], {node}
        while stack:
            node = stack.pop()
            if node in flow.contractions:
                found += [node] if is_over_positions(flow, node) else []
            elif node in flow.linear:
                new = [source for source in flow.data_inputs(node) if source not in seen and not self.is_end(source)]
                seen.update(new)
                stack.extend(new)
        return found

    def _fall_apart(self, join: fx.Node) -> bool:
        """Whether a sum or concatenation of convolutions is no convolution, or only one that mostly holds zeros."""
        flow = self.flow
        nodes = [node for source in flow.data_inputs(join) for node in self._convolutions(source)]
        if len(nodes) < 2:
            return False
        kernels = {tuple(flow.values[node.all_input_nodes[1]].shape[2:]) for node in nodes}
        return (_is_concatenation(join) and len(kernels) > 1) or not can_be_added(flow, nodes)

    def _settle_joins(self) -> None:
        """Find the joins that stay, until what they make a target leads to no further one."""
        flow = self.flow
        found = True
        while found:
            found = False
            for anchor in filter(self.is_target, flow.anchors):
                for join, reason in self._joins_to_keep(anchor):
                    self.joins[join] = reason
                    self.required.add(join)
                    self.required.update(flow.track(node).anchor for node in flow.data_inputs(join))
                    found = True

    def _joins_to_keep(self, target: fx.Node) -> list[tuple[fx.Node, str]]:
        flow = self.flow
        keep = []
        stack, seen = [target], {target}
        while stack:
            node = stack.pop()
            if node in flow.contractions:
                continue
            inputs = flow.data_inputs(node)
            if flow.anchors.get(node, False) and len(inputs) > 1:
                if any(self._is_plain(source) for source in inputs):
                    keep.append((node, "skip connection"))
                    continue
                if self._fall_apart(node):
                    keep.append((node, "join of different convolutions"))
                    continue
                if _is_concatenation(node) and self._density(inputs) < _LEAST_DENSITY:
                    keep.append((node, "concatenation of layers"))
                    continue
                if operator_name(node) in _SUMS and any(self._is_repeated(source, node) for source in inputs):
                    keep.append((node, "sum of layers, one of which is repeated"))
                    continue
            for source in inputs:
                if source in flow.linear and source not in seen and not self.is_end(source):
                    seen.add(source)
                    stack.append(source)
        return keep

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a value is an anchor itself up to moves, scales and shifts: the straight arm of a skip connection."""
        flow = self.flow
        while not self.is_end(node):
            inputs = flow.data_inputs(node)
            if node not in flow.linear or node in flow.contractions or len(inputs) != 1:
                return False
            node = inputs[0]
        return True

    def _is_repeated(self, node: fx.Node, join: fx.Node) -> bool:
        """Whether a value is a layer's output that a sum repeats along an axis which that layer does not have."""
        flow = self.flow
        track = flow.track(node)
        return flow.anchors[track.anchor] and len(torch.unique(track.ids[track.ids >= 0])) < flow.values[join].numel()

    def _density(self, inputs: Sequence[fx.Node]) -> float:
        """Share of nonzero blocks in the matrix that maps all elements the inputs depend on to the inputs."""
        reaches = [self._reach(node) for node in inputs]
        sizes: list[int] = [self.flow.values[node].numel() for node in inputs]
        union = _count(
            {a: torch.stack([r[a] for r in reaches if a in r]).any(0) for a in {a for r in reaches for a in r}}
        )
        filled: int = sum(size * _count(reach) for size, reach in zip(sizes, reaches, strict=True))
        return filled / max(1, sum(sizes) * union)

    def _reach(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Which elements of bounding anchors a value depends on, across the contractions a layer would swallow."""
        flow = self.flow
        reach: dict[fx.Node, Tensor] = {}
        stack, seen = [node], {node}
        while stack:
            node = stack.pop()
            track = flow.tracks[node]
            if isinstance(track, Track) and self.is_end(track.anchor):
                mask = reach.setdefault(track.anchor, torch.zeros(flow.values[track.anchor].numel(), dtype=torch.bool))
                mask[track.ids[track.ids >= 0]] = True
                continue
            new = [source for source in flow.data_inputs(node) if source not in seen]
            seen.update(new)
            stack.extend(new)
        return reach

    def cut(self, target: fx.Node) -> tuple[Region, ...]:
        """Give the regions of a target to choose from, the one with the fewest columns first."""
        flow = self.flow
        ends: list[fx.Node] = []
        edges: list[tuple[fx.Node, fx.Node]] = []
        stack, seen = [target], {target}
        while stack:
            node = stack.pop()
            for source in flow.data_inputs(node):
                edges.append((source, node))
                if source not in seen:
                    seen.add(source)
                    if source in flow.linear and not self.is_end(source):
                        stack.append(source)
                    else:
                        ends.append(source)
        if not ends:
            return ()
        edges.sort(key=lambda edge: (self.order(edge[0]), self.order(edge[1])))
        ends.sort(key=self.order)
        capacity = {}
        for node in seen - {target}:
            track = flow.tracks[node]
            if isinstance(track, Track) and (self.is_end(track.anchor) or node in ends):
                cost = int((track.ids >= 0).sum()) * _ONE_NODE + 1
                capacity[node] = cost if self._is_in_samples(node) else cost * _OUT_OF_ORDER
        regions = [self._region(target, minimum_cut(edges, ends, target, capacity))]
        weighted = self._weighted(sorted(seen, key=self.order), ends)
        if any(node in weighted for node in regions[0].cuts):
            in_front = {node: size for node, size in capacity.items() if node not in weighted}
            regions.append(self._region(target, minimum_cut(edges, ends, target, in_front)))
        return tuple(regions)

    def _is_in_samples(self, node: fx.Node) -> bool:
        try:
            locate(self.flow, node)
        except NotLowerableError:
            return False
        return True

    def _weighted(self, nodes: Iterable[fx.Node], ends: Sequence[fx.Node]) -> set[fx.Node]:
        """Nodes behind a multiplication by weights: a matrix product, or a product with a tensor of different numbers."""
        flow = self.flow
        weighted: set[fx.Node] = set()
        for node in nodes:
            if node in ends:
                continue
            factors = flow.factors(node)
            if operator_name(node) in ("mul", "div"):
                applies = any(isinstance(v, Tensor) and not bool((v == v.flatten()[:1]).all()) for v in factors)
            else:
                applies = operator_name(node) in ("mm", "bmm", "addmm", "baddbmm", "convolution")
            if applies or any(source in weighted for source in flow.data_inputs(node)):
                weighted.add(node)
        return weighted

    def _region(self, target: fx.Node, cuts: Sequence[fx.Node]) -> Region:
        found: set[fx.Node] = set()
        stack = [target]
        while stack:
            node = stack.pop()
            if node not in found and node not in cuts:
                found.add(node)
                stack.extend(self.flow.data_inputs(node))
        return Region(target, tuple(sorted(cuts, key=self.order)), tuple(sorted(found, key=self.order)))


def _count(reach: dict[fx.Node, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in reach.values())


def _is_convolution_of_pixels(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a convolution of kernel 1 at every pixel."""
    if operator_name(node) != "convolution":
        return False
    kernel, _, stride, padding = node.args[1:5]
    assert isinstance(kernel, fx.Node)
    assert isinstance(stride, list | tuple)
    assert isinstance(padding, list | tuple)
    return math.prod(flow.values[kernel].shape[2:]) == 1 and all(step == 1 for step in stride) and not any(padding)


def _is_concatenation(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise not in node.target.tags
