"""Write a layer as one dense map: every element of the anchors, or every element of a token, is an input of its own."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import (
    BatchLayout,
    Cut,
    Flow,
    NotLowerableError,
    Selection,
    cut_out,
    largest_row,
    layout_of,
    locate,
)
from kancompile.frontend.layers.affine_map import affine_map
from kancompile.frontend.layers.canonical import CanonicalLayer, positions_of
from kancompile.frontend.layers.columns import Columns, merge_columns, sample_points, sample_tokens, tokens_are_alike
from kancompile.frontend.layers.recognition import is_kan, refuse_other_layers, refuse_plain
from kancompile.frontend.layers.regions import Region
from kancompile.ir import Branch, Contraction, Expansion

_LARGEST_WEIGHT = 1 << 27
"""Most entries of a weight matrix that is written out densely (512 MiB in float32)."""


def canonicalize(
    flow: Flow, region: Region, name: str, per_token: bool, channels_first: bool = False
) -> CanonicalLayer:
    """Build the modules of one layer.

    Args:
        flow: analysis of the network.
        region: the layer.
        name: layer name.
        per_token: treat all but the last dimension of the anchors as tokens, whose map is read off the first one; the
            caller confirms it by evaluation. Otherwise every element of an anchor is an input of its own.
        channels_first: the first dimension of the anchors holds the features of a token, all others are tokens, as where a
            convolution is in front.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    target = layout_of(region.target, flow.batch)
    cuts = [locate(flow, node) for node in region.cuts]
    anchors = [layout_of(cut.anchor, flow.batch) for cut in cuts]
    lead = _lead(target, anchors, channels_first) if per_token else ()
    arranged = [
        _arrange(flow, anchor, cuts, lead, channels_first) for anchor in dict.fromkeys(cut.anchor for cut in cuts)
    ]
    inputs = [part for part in arranged if part is not None]
    weights, bias = _weights(flow, region, cuts, inputs, target, lead)
    kept, kan = [], False
    for part, weight in zip(inputs, weights, strict=True):
        columns = Columns(part.expansion, weight)
        values = sample_tokens(columns.expansion, sample_points())
        if lead and not tokens_are_alike(columns.expansion):
            raise NotLowerableError("functions differ between tokens")
        merged, shift, values = merge_columns(columns, values, flow.values[part.anchor])
        bias = bias + shift.sum(1)
        if merged is not None:
            kan = kan or is_kan(merged.expansion, values)
            kept.append((part, merged))
    refuse_plain([columns.expansion for _, columns in kept], kan, "linear layer")
    return CanonicalLayer(
        region,
        tuple(part.anchor for part, _ in kept),
        tuple(part.selection for part, _ in kept),
        tuple(columns.expansion for _, columns in kept),
        Contraction(name, torch.cat([columns.weight.flatten(1) for _, columns in kept], dim=1), bias, target.shape),
    )


@dataclass(frozen=True)
class _Inputs:
    """What a layer reads from one anchor; ``cuts`` are the numbers of the region's cuts that became branches."""

    anchor: fx.Node
    selection: Selection | None
    expansion: Expansion
    cuts: tuple[int, ...]


def _arrange(
    flow: Flow, anchor: fx.Node, cuts: Sequence[Cut], lead: tuple[int, ...], channels_first: bool
) -> _Inputs | None:
    """Make the cuts of one anchor branches of one expansion, ``None`` where all of them are constant."""
    shape = layout_of(anchor, flow.batch).shape
    size = math.prod(shape) // math.prod(lead)
    own = [number for number, cut in enumerate(cuts) if cut.anchor is anchor]

    def arranged(of_element: Tensor) -> Tensor:
        """Bring what belongs to the anchor's elements, ``[elements, k]``, to ``[*lead, size, k]``."""
        if channels_first:
            return of_element.reshape(size, *lead, -1).movedim(0, -2).contiguous()
        return of_element.reshape(*lead, size, -1)

    positions = [arranged(positions_of(cuts[number].origin, math.prod(shape))) for number in own]
    used = torch.cat([position >= 0 for position in positions], dim=-1).any(-1).reshape(-1, size)
    if not bool(used.any()):
        return None
    if not bool((used == used[:1]).all()):
        raise NotLowerableError("inputs differ between tokens")
    if channels_first and not bool(used.all()):
        raise NotLowerableError("some channels are not read")
    selection = None if bool(used.all()) else Selection(lead, size, torch.nonzero(used[0]).flatten())
    branches = []
    for number, position in zip(own, positions, strict=True):
        node = cuts[number].node
        if selection is not None:
            position = position[..., selection.used, :]
        if node is anchor:
            position = arranged(torch.arange(position.numel())[:, None])
        inner = None if node is anchor else cut_out(flow, [anchor], node, selection)
        branches.append(Branch(node.name, inner, position))
    read = shape if selection is None else selection.shape
    return _Inputs(anchor, selection, Expansion(read, branches, channels_first), tuple(own))


def _weights(
    flow: Flow,
    region: Region,
    cuts: Sequence[Cut],
    inputs: Sequence[_Inputs],
    target: BatchLayout,
    lead: tuple[int, ...],
) -> tuple[list[Tensor], Tensor]:
    """Read the affine map off the graph: weights ``[n_out, n_in, k]`` of each expansion, and the bias with all constants."""
    tokens = math.prod(lead)
    places: dict[int, Tensor] = {}  # cut -> [tokens, n_in, k]
    for part in inputs:
        for number, branch in zip(part.cuts, part.expansion.branches, strict=True):
            assert isinstance(branch, Branch)
            position = branch.position
            if cuts[number].node is part.anchor and part.selection is not None:
                whole = torch.arange(cuts[number].origin.numel()).reshape(*lead, -1, 1)
                position = whole[..., part.selection.used, :]
            places[number] = position.reshape(tokens, *position.shape[-2:])
    nothing = torch.empty(tokens, 0, dtype=torch.int64)
    columns = [places[n].clamp(min=0).flatten(1) if n in places else nothing for n in range(len(cuts))]
    n_out = math.prod(target.shape) // tokens
    n_columns = sum(part.shape[1] for part in columns)
    if n_out * n_columns > _LARGEST_WEIGHT:
        raise NotLowerableError(f"a dense matrix of {n_out} x {n_columns} weights would be too large")
    base = [torch.zeros(cut.layout.shape) for cut in cuts]
    for value, cut in zip(base, cuts, strict=True):
        value.view(-1)[cut.origin < 0] = cut.constants
    row_elements = largest_row(flow, [*region.affine, *region.cuts])
    matrices, bias = affine_map(cut_out(flow, region.cuts, region.target), base, columns, n_out, row_elements)
    weights = []
    for part in inputs:
        first = [(matrices[number], places[number][0]) for number in part.cuts]
        weights.append(torch.cat([(m.reshape(n_out, *p.shape)) * (p >= 0) for m, p in first], dim=-1))
    return weights, bias


def can_be_per_token(flow: Flow, region: Region, channels_first: bool = False) -> bool:
    """Whether shapes allow that a layer treats leading dimensions, or all but the first one, as tokens."""
    try:
        layouts = [layout_of(flow.track(node).anchor, flow.batch) for node in region.cuts]
        return bool(_lead(layout_of(region.target, flow.batch), layouts, channels_first))
    except NotLowerableError:
        return False


def _lead(target: BatchLayout, anchors: Sequence[BatchLayout], channels_first: bool) -> tuple[int, ...]:
    """Dimensions of tokens that the anchors and the target share, dimensions of size 1 aside.

    Behind channels they may be flattened in the target, as where an image becomes a sequence of patches.
    """
    if channels_first:
        places = tuple(anchors[0].shape[1:])
        flat = itertools.accumulate(target.shape[:-1], operator.mul)
        alike = all(tuple(layout.shape[1:]) == places for layout in anchors) and math.prod(places) > 1
        return places if alike and math.prod(places) in flat else ()
    shapes = [[size for size in layout.shape if size != 1] for layout in anchors]
    lead = shapes[0][:-1]
    if any(shape[:-1] != lead for shape in shapes) or list(target.shape[: len(lead)]) != lead:
        return ()
    return tuple(lead)
