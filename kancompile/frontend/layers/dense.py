"""Write a layer as one dense map: every element of the anchors, or every element of a token, is an input of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import (
    Axes,
    Cut,
    Flow,
    NotLowerableError,
    ReorderedSelection,
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
from kancompile.frontend.layers.token_axes import TokenAxes
from kancompile.ir import Branch, Contraction, Expansion


def canonicalize(
    flow: Flow, region: Region, name: str, cuts: Sequence[Cut], tokens: TokenAxes | None, largest: int
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
    target = layout_of(region.target, flow.batch).shape
    shapes = {cut.anchor: layout_of(cut.anchor, flow.batch).shape for cut in cuts}
    if tokens is None:
        every = {anchor: Axes.joined(shape, range(len(shape))) for anchor, shape in shapes.items()}
        tokens = TokenAxes((), False, every, Axes.joined(target, range(len(target))))
    arranged = [_arrange(flow, anchor, shape, cuts, tokens) for anchor, shape in shapes.items()]
    inputs = [part for part in arranged if part is not None]
    weights, bias = _weights(flow, region, cuts, inputs, target, tokens, largest)
    kept, kan = [], False
    for part, weight in zip(inputs, weights, strict=True):
        columns = Columns(part.expansion, weight)
        values = sample_tokens(columns.expansion, sample_points())
        if tokens.lead and not tokens_are_alike(columns.expansion):
            raise NotLowerableError("functions differ between tokens")
        merged, shift, values = merge_columns(columns, values, flow.values[part.anchor])
        bias = bias + shift.sum(1)
        if merged is not None:
            kan = kan or is_kan(merged.expansion, values)
            kept.append((part, merged))
    refuse_plain([columns.expansion for _, columns in kept], kan, "linear layer")
    stays = tokens.target.stays
    out_shape = target if stays else (tokens.tokens, len(bias))
    return CanonicalLayer(
        region,
        tuple(part.anchor for part, _ in kept),
        tuple(part.selection for part, _ in kept),
        tuple(columns.expansion for _, columns in kept),
        Contraction(name, torch.cat([columns.weight.flatten(1) for _, columns in kept], dim=1), bias, out_shape),
        None if stays else tokens.target.inverse,
        target,
    )


@dataclass(frozen=True)
class _Inputs:
    """What a layer reads from one anchor; ``cuts`` are the numbers of the region's cuts that became branches."""

    anchor: fx.Node
    selection: Selection | None
    expansion: Expansion
    cuts: tuple[int, ...]


def _arrange(
    flow: Flow, anchor: fx.Node, shape: tuple[int, ...], cuts: Sequence[Cut], tokens: TokenAxes
) -> _Inputs | None:
    """Make the cuts of one anchor branches of one expansion, ``None`` where all of them are constant."""
    size, lead, axes = math.prod(shape) // tokens.tokens, tokens.lead, tokens.anchors[anchor]
    own = [number for number, cut in enumerate(cuts) if cut.anchor is anchor]
    numbers = axes(torch.arange(math.prod(shape)), (*lead, size))[0]  # element of the anchor at [*lead, n]
    places = [positions_of(cuts[number].origin, math.prod(shape))[numbers] for number in own]
    used = torch.cat([place >= 0 for place in places], dim=-1).any(-1).reshape(-1, size)
    if not bool(used.any()):
        return None
    if not bool((used == used[:1]).all()):
        raise NotLowerableError("inputs differ between tokens")
    chosen = torch.nonzero(used[0]).flatten()
    channels_first = tokens.channels_first and bool(used.all())
    selection: Selection | None = None
    if not axes.stays and not channels_first:
        selection = ReorderedSelection(lead, size, chosen, axes)
    elif not bool(used.all()):
        selection = Selection(lead, size, chosen)
    branches = []
    for number, place in zip(own, places, strict=True):
        node, position = cuts[number].node, place[..., chosen, :].contiguous()
        if node is anchor:
            read = numbers if selection is None else torch.arange(position.numel())
            position = read.reshape(position.shape).contiguous()
        inner = None if node is anchor else cut_out(flow, [anchor], node, selection)
        branches.append(Branch(node.name, inner, position))
    expansion = Expansion(shape if selection is None else selection.shape, branches, channels_first)
    return _Inputs(anchor, selection, expansion, tuple(own))


def _weights(
    flow: Flow,
    region: Region,
    cuts: Sequence[Cut],
    inputs: Sequence[_Inputs],
    target: tuple[int, ...],
    tokens: TokenAxes,
    largest: int,
) -> tuple[list[Tensor], Tensor]:
    """Read the affine map off the graph: weights ``[n_out, n_in, k]`` of each expansion, and the bias with all constants."""
    count = tokens.tokens
    places: dict[int, Tensor] = {}  # cut -> [tokens, n_in, k]
    for part in inputs:
        for number, branch in zip(part.cuts, part.expansion.branches, strict=True):
            assert isinstance(branch, Branch)
            position = branch.position
            if cuts[number].node is part.anchor and part.selection is not None:
                elements = torch.arange(cuts[number].origin.numel())
                whole = tokens.anchors[part.anchor](elements, (count, part.selection.size))[0]
                position = whole[:, part.selection.used, None]
            places[number] = position.reshape(count, *position.shape[-2:])
    nothing = torch.empty(count, 0, dtype=torch.int64)
    columns = [places[n].clamp(min=0).flatten(1) if n in places else nothing for n in range(len(cuts))]
    n_out = math.prod(target) // count
    n_columns = sum(part.shape[1] for part in columns)
    if n_out * n_columns > largest:
        raise NotLowerableError(f"a dense matrix of {n_out} x {n_columns} weights would be too large")
    base = [cut.base() for cut in cuts]
    row_elements = largest_row(flow, [*region.affine, *region.cuts])
    map_of_cuts = cut_out(flow, region.cuts, region.target)
    matrices, bias = affine_map(map_of_cuts, base, columns, n_out, row_elements, tokens.target)
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
