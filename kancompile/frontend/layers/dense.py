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
    follow,
    largest_row,
    layout_of,
    locate,
)
from kancompile.frontend.layers.affine_map import affine_map
from kancompile.frontend.layers.canonical import CanonicalLayer, positions_of
from kancompile.frontend.layers.columns import Columns, merge_columns, sample_points, sample_tokens, tokens_are_alike
from kancompile.frontend.layers.recognition import is_kan, refuse_other_layers, refuse_plain
from kancompile.frontend.layers.regions import Region, unmoved
from kancompile.ir import Branch, Contraction, Expansion


@dataclass(frozen=True)
class Tokens:
    """How a layer that has the same map for every token finds features and tokens in its tensors.

    Attributes:
        channels_first: the first dimension of the anchors holds the features of a token, all others are tokens, as where a
            convolution is in front; else the last dimension holds features.
        outputs_first: the last dimensions of the target are tokens, as where a convolution is behind; else the first ones.
    """

    channels_first: bool = False
    outputs_first: bool = False


def canonicalize(
    flow: Flow, region: Region, name: str, cuts: Sequence[Cut], tokens: Tokens | None, largest: int
) -> CanonicalLayer:
    """Build the modules of one layer.

    Args:
        flow: analysis of the network.
        region: the layer.
        name: layer name.
        cuts: where the elements of the region's cuts come from.
        tokens: where tokens stand, whose map is read off the first one; the caller confirms it by evaluation. Without
            tokens every element of an anchor is an input of its own.
        largest: most weights that are written out.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    target = layout_of(region.target, flow.batch)
    anchors = [layout_of(cut.anchor, flow.batch) for cut in cuts]
    lead = () if tokens is None else _lead(target, anchors, tokens)
    channels_first = tokens is not None and tokens.channels_first
    outputs_first = tokens is not None and tokens.outputs_first
    arranged = [
        _arrange(flow, anchor, cuts, lead, channels_first) for anchor in dict.fromkeys(cut.anchor for cut in cuts)
    ]
    inputs = [part for part in arranged if part is not None]
    weights, bias = _weights(flow, region, cuts, inputs, target, lead, outputs_first, largest)
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
    out_shape = (math.prod(lead), len(bias)) if outputs_first else target.shape
    return CanonicalLayer(
        region,
        tuple(part.anchor for part, _ in kept),
        tuple(part.selection for part, _ in kept),
        tuple(columns.expansion for _, columns in kept),
        Contraction(name, torch.cat([columns.weight.flatten(1) for _, columns in kept], dim=1), bias, out_shape),
        target.shape if outputs_first else None,
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
    outputs_first: bool,
    largest: int,
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
    if n_out * n_columns > largest:
        raise NotLowerableError(f"a dense matrix of {n_out} x {n_columns} weights would be too large")
    base = [torch.zeros(cut.layout.shape) for cut in cuts]
    for value, cut in zip(base, cuts, strict=True):
        value.view(-1)[cut.origin < 0] = cut.constants
    row_elements = largest_row(flow, [*region.affine, *region.cuts])
    map_of_cuts = cut_out(flow, region.cuts, region.target)
    matrices, bias = affine_map(map_of_cuts, base, columns, n_out, row_elements, outputs_first)
    weights = []
    for part in inputs:
        first = [(matrices[number], places[number][0]) for number in part.cuts]
        weights.append(torch.cat([(m.reshape(n_out, *p.shape)) * (p >= 0) for m, p in first], dim=-1))
    return weights, bias


def located(flow: Flow, region: Region) -> list[list[Cut]]:
    """Say where the elements of the cuts come from: in their anchors, and in what these are reshapes of, if they are any.

    In an anchor that holds features in groups, for example, tokens are no dimensions of their own.
    """
    found = [[locate(flow, node) for node in region.cuts]]
    anchors = {cut.anchor: unmoved(flow, cut.anchor) for cut in found[0]}
    if any(source is not anchor for anchor, source in anchors.items()) and not any(c in anchors for c in region.cuts):
        sources = [anchors[cut.anchor] for cut in found[0]]
        try:
            cuts = zip(region.cuts, sources, strict=True)
            found.append([locate(flow, node, follow(flow, source, [node])) for node, source in cuts])
        except NotLowerableError:
            pass  # something else reads them, too
    return found


def possible_tokens(flow: Flow, region: Region, cuts: Sequence[Cut]) -> list[Tokens]:
    """List where shapes allow tokens to stand."""
    try:
        target = layout_of(region.target, flow.batch)
        anchors = [layout_of(cut.anchor, flow.batch) for cut in cuts]
    except NotLowerableError:
        return []
    ways = (Tokens(), Tokens(True), Tokens(False, True), Tokens(True, True))
    return [tokens for tokens in ways if _lead(target, anchors, tokens)]


def _lead(target: BatchLayout, anchors: Sequence[BatchLayout], tokens: Tokens) -> tuple[int, ...]:
    """Dimensions of tokens that the anchors and the target share, dimensions of size 1 aside.

    Beside channels they may be flattened in the target, as where an image becomes a sequence of patches or the reverse.
    """
    if tokens.channels_first:
        lead = tuple(anchors[0].shape[1:])
        alike = all(tuple(layout.shape[1:]) == lead for layout in anchors)
    else:
        shapes = [[size for size in layout.shape if size != 1] for layout in anchors]
        lead = tuple(shapes[0][:-1])
        alike = all(tuple(shape[:-1]) == lead for shape in shapes)
    if not alike or math.prod(lead) == 1:
        return ()
    if tokens.outputs_first:
        return lead if math.prod(lead) in itertools.accumulate(target.shape[:0:-1], operator.mul) else ()
    if tokens.channels_first:
        return lead if math.prod(lead) in itertools.accumulate(target.shape[:-1], operator.mul) else ()
    return lead if target.shape[: len(lead)] == lead else ()
