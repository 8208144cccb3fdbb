"""Where the elements of a cut come from, for one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow.batch_layout import BatchLayout, NotLowerableError, layout_of
from kancompile.frontend.flow.flow import Flow
from kancompile.frontend.flow.flow_rules import judge
from kancompile.frontend.flow.verdicts import Call, Follows, Track, operator_name


@dataclass(frozen=True)
class Cut:
    """A cut and where its elements come from: ``origin[p]`` is the anchor element of its element ``p``, -1 for none."""

    node: fx.Node
    anchor: fx.Node
    layout: BatchLayout
    origin: Tensor
    constants: Tensor

    def base(self) -> Tensor:
        """Give a sample of the cut that depends on nothing: its constants, and 0 elsewhere, float32 ``[*layout.shape]``."""
        value = torch.zeros(self.layout.shape)
        value.view(-1)[self.origin < 0] = self.constants
        return value


def follow(flow: Flow, start: fx.Node, ends: Sequence[fx.Node]) -> dict[fx.Node, Track]:
    """Give the ids of what lies behind a node in elements of that node, which need be no anchor of the analysis.

    Raises:
        NotLowerableError: an end depends on other data as well, or on several elements of the node.
    """
    needed, stack = {start}, list(ends)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(flow.data_inputs(node))
    tracks: dict[fx.Node, Track] = {}
    for node in flow.graph.nodes:
        if node not in needed:
            continue
        value = flow.values[node]
        if node is start:
            tracks[node] = Track(start, torch.arange(value.numel()).view(value.shape))
            continue
        sources = flow.data_inputs(node)
        if any(source not in tracks for source in sources) or not sources:
            raise NotLowerableError(f"{node.name} depends on more than {start.name}")
        args, kwargs = fx.map_arg((node.args, node.kwargs), flow.values.__getitem__)
        own = {s: tracks[s] for s in sources}
        call = Call(node, operator_name(node), value, tuple(args), dict(kwargs), own, flow.bounds)
        verdict = judge(call)
        if not isinstance(verdict, Follows) or not isinstance(verdict.ids, Tensor):
            raise NotLowerableError(f"{node.name} depends on several elements of {start.name}")
        tracks[node] = Track(start, verdict.ids)
    return tracks


def locate(flow: Flow, node: fx.Node, tracks: Mapping[fx.Node, Track] | None = None) -> Cut:
    """Express a cut's ids as elements of one sample of its anchor.

    Args:
        flow: analysis of the network.
        node: the cut.
        tracks: ids by node where they are not those of the analysis.

    Raises:
        NotLowerableError: samples of the batch are not treated alike.
    """
    track = flow.track(node) if tracks is None else tracks[node]
    own_ids = (flow.track(track.anchor) if tracks is None else tracks[track.anchor]).ids
    anchor = layout_of(track.anchor, flow.batch)
    layout = layout_of(node, flow.batch)
    values = layout.to_samples(flow.values[node]).flatten(1)
    ids = layout.to_samples(track.ids).flatten(1)
    numbers = anchor.to_samples(own_ids).flatten(1)  # [b, elements]: id of each anchor element
    sample = torch.empty(numbers.numel(), dtype=torch.int64)
    element = torch.empty(numbers.numel(), dtype=torch.int64)
    sample[numbers.flatten()] = torch.arange(len(numbers)).repeat_interleave(numbers.shape[1])
    element[numbers.flatten()] = torch.arange(numbers.shape[1]).repeat(len(numbers))
    own = (ids < 0) | (sample[ids.clamp(min=0)] == torch.arange(len(ids)).unsqueeze(1))
    origin = torch.where(ids < 0, -1, element[ids.clamp(min=0)])
    constants = values[:, origin[0] < 0]
    if not bool(own.all()) or not bool((origin == origin[:1]).all()) or not bool((constants == constants[:1]).all()):
        raise NotLowerableError("samples of the batch are not treated alike")
    return Cut(node, track.anchor, layout, origin[0], constants[0].float())
