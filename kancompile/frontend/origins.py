"""Where the elements of a cut come from, for one sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.batch_layout import BatchLayout, NotLowerableError, layout_of
from kancompile.frontend.flow import Flow


@dataclass(frozen=True)
class Cut:
    """A cut and where its elements come from: ``origin[p]`` is the anchor element of its element ``p``, -1 for none."""

    node: fx.Node
    anchor: fx.Node
    layout: BatchLayout
    origin: Tensor
    constants: Tensor


def locate(flow: Flow, node: fx.Node) -> Cut:
    """Express a cut's ids as elements of one sample of its anchor.

    Raises:
        NotLowerableError: samples of the batch are not treated alike.
    """
    track = flow.track(node)
    anchor = layout_of(track.anchor, flow.batch)
    layout = layout_of(node, flow.batch)
    values = layout.to_samples(flow.values[node]).flatten(1)
    ids = layout.to_samples(track.ids).flatten(1)
    numbers = anchor.to_samples(flow.track(track.anchor).ids).flatten(1)  # [b, elements]: id of each anchor element
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
