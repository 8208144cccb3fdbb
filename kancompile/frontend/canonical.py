"""Bring a captured layer into canonical form: expansions that feed one contraction.

Every cut of the region becomes a branch: the univariate sub-graph as a module, with a map from (input, function) to the
place of that value in the sub-graph's output, read off the element ids. What lies between the cuts and the target is
affine and becomes the weight matrix and the bias.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.activations import is_plain_activation
from kancompile.frontend.affine_map import affine_map
from kancompile.frontend.batch_layout import BatchLayout, NotLowerableError, layout_of
from kancompile.frontend.columns import Columns, merge_columns, sample_points
from kancompile.frontend.flow import Flow, operator_name
from kancompile.frontend.regions import Region
from kancompile.frontend.subgraph import cut_out, largest_row, sample_rows
from kancompile.modules import Branch, Contraction, Expansion

_LARGEST_WEIGHT = 1 << 27
"""Most entries of a weight matrix that is written out densely (512 MiB in float32)."""


@dataclass(frozen=True)
class CanonicalLayer:
    """A layer as modules.

    Attributes:
        region: where it stands in the exported graph.
        anchors: node that each expansion reads.
        expansions, contraction: the modules.
    """

    region: Region
    anchors: tuple[fx.Node, ...]
    expansions: tuple[Expansion, ...]
    contraction: Contraction


@dataclass(frozen=True)
class _Cut:
    """A cut and where its elements come from: ``origin[p]`` is the anchor element of its element ``p``, -1 for none."""

    node: fx.Node
    anchor: fx.Node
    layout: BatchLayout
    origin: Tensor
    constants: Tensor


def canonicalize(flow: Flow, region: Region, name: str, per_token: bool) -> CanonicalLayer:
    """Build the modules of one layer.

    Args:
        flow: analysis of the network.
        region: the layer.
        name: layer name.
        per_token: treat all but the last dimension of the anchors as tokens, whose map is read off the first one; the
            caller confirms it by evaluation. Otherwise every element of an anchor is an input of its own.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    target = layout_of(region.target, flow.batch)
    cuts = [_locate(flow, node) for node in region.cuts]
    anchors = list(dict.fromkeys(cut.anchor for cut in cuts))
    layouts = {anchor: layout_of(anchor, flow.batch) for anchor in anchors}
    lead = _lead(target, list(layouts.values())) if per_token else ()
    n_out = math.prod(target.shape) // math.prod(lead)
    n_columns = sum(int((cut.origin >= 0).sum()) for cut in cuts) // math.prod(lead)
    if n_out * n_columns > _LARGEST_WEIGHT:
        raise NotLowerableError(f"a dense matrix of {n_out} x {n_columns} weights would be too large")
    matrices, bias = affine_map(
        cut_out(flow, region.cuts, region.target),
        [cut.layout.shape for cut in cuts],
        n_out,
        largest_row(flow, [*region.affine, *region.cuts]),
    )
    expansions, kept_anchors, weights, kan = [], [], [], False
    for anchor in anchors:
        shape = layouts[anchor].shape
        in_shape = (*lead, math.prod(shape) // math.prod(lead))
        branches, parts = [], []
        for cut, matrix in zip(cuts, matrices, strict=True):
            if cut.anchor is anchor:
                position = _positions(cut.origin, math.prod(shape)).reshape(*in_shape, -1)
                inner = None if cut.node is anchor else cut_out(flow, [anchor], cut.node)
                branches.append(Branch(cut.node.name, inner, position))
                first = position.reshape(-1, *position.shape[-2:])[0]
                parts.append(matrix[:, first.clamp(min=0)] * (first >= 0))
                bias = bias + matrix[:, cut.origin < 0] @ cut.constants
        columns = Columns(Expansion(shape, branches), torch.cat(parts, dim=-1))
        values = columns.expansion.sample(sample_points(columns.expansion))
        if not _alike_in_tokens(values):
            raise NotLowerableError("functions differ between tokens")
        merged, shift, values = merge_columns(columns, values)
        bias = bias + shift
        if merged is not None:
            kan = kan or _is_kan(merged.expansion, values)
            kept_anchors.append(anchor)
            expansions.append(merged.expansion)
            weights.append(merged.weight.flatten(1))
    if not expansions or all(expansion.is_identity for expansion in expansions):
        raise NotLowerableError("plain linear layer")
    if not kan:
        raise NotLowerableError("linear layer after a plain activation")
    contraction = Contraction(name, torch.cat(weights, dim=1), bias, target.shape)
    return CanonicalLayer(region, tuple(kept_anchors), tuple(expansions), contraction)


def can_be_per_token(flow: Flow, region: Region) -> bool:
    """Whether shapes allow that a layer treats leading dimensions as tokens."""
    try:
        layouts = [layout_of(flow.track(node).anchor, flow.batch) for node in region.cuts]
        return bool(_lead(layout_of(region.target, flow.batch), layouts))
    except NotLowerableError:
        return False


def refuse_other_layers(flow: Flow, region: Region) -> None:
    """Leave out what this form cannot hold.

    Raises:
        NotLowerableError: a plain linear layer, a convolution over positions, other number types.
    """
    if all(node in flow.anchors for node in region.cuts):
        raise NotLowerableError("plain linear layer")
    for node in region.affine:
        value = flow.values[node]
        if operator_name(node) == "convolution" and math.prod(value.shape[2:]) > 1:
            raise NotLowerableError("convolution: not lowered yet")
    for node in (*region.cuts, region.target, *(flow.track(cut).anchor for cut in region.cuts)):
        if flow.values[node].dtype != torch.float32:
            raise NotLowerableError(f"computes in {flow.values[node].dtype}, not in float32")


def _lead(target: BatchLayout, anchors: Sequence[BatchLayout]) -> tuple[int, ...]:
    """Leading dimensions that the anchors and the target share, dimensions of size 1 aside."""
    shapes = [[size for size in layout.shape if size != 1] for layout in anchors]
    lead = shapes[0][:-1]
    if any(shape[:-1] != lead for shape in shapes) or list(target.shape[: len(lead)]) != lead:
        return ()
    return tuple(lead)


def _locate(flow: Flow, node: fx.Node) -> _Cut:
    """Express a cut's ids as elements of one sample of its anchor.

    Raises:
        NotLowerableError: samples of the batch are not treated alike.
    """
    track = flow.track(node)
    anchor = layout_of(track.anchor, flow.batch)
    layout, values = sample_rows(flow, node)
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
    return _Cut(node, track.anchor, layout, origin[0], constants[0].float())


def _positions(origin: Tensor, n_elements: int) -> Tensor:
    """Invert ``origin``: int64 ``[n_elements, k]``, places of each element's functions in order, filled up with -1."""
    places = torch.nonzero(origin >= 0).flatten()
    places = places[torch.argsort(origin[places], stable=True)]
    owners = origin[places]
    counts = torch.bincount(owners, minlength=n_elements)
    starts = counts.cumsum(0) - counts
    position = torch.full((n_elements, max(1, int(counts.max()))), -1)
    position[owners, torch.arange(len(owners)) - starts[owners]] = places
    return position


def _alike_in_tokens(values: Tensor) -> bool:
    """Whether samples ``[points, *tokens, n_in, k]`` are the same for all tokens."""
    tokens = values.reshape(len(values), -1, *values.shape[-2:])
    return torch.allclose(tokens, tokens[:, :1], rtol=1e-5, atol=1e-6, equal_nan=True)


def _is_kan(expansion: Expansion, values: Tensor) -> bool:
    """Tell a learnable or manifold expansion from the activation of an ordinary network.

    Several functions of one input, functions that differ between inputs, or one function that is no standard activation.
    """
    if expansion.k >= 2:
        return True
    if expansion.is_identity:
        return False
    functions = values.flatten(1)  # [points, inputs]
    if not torch.allclose(functions, functions[:, :1], rtol=1e-5, atol=1e-6):
        return True
    return not is_plain_activation(sample_points(expansion), functions[:, 0])


def layer_name(flow: Flow, region: Region) -> str:
    """Name a layer by the innermost module that holds its contractions and its cuts, empty for the model itself."""
    nodes = [node for node in region.affine if node in flow.contractions] or [region.target]
    paths = [path for node in (*nodes, *region.cuts) if (path := _module_path(node)) is not None]
    return ".".join(os.path.commonprefix(paths))


def _module_path(node: fx.Node) -> list[str] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0]).removeprefix("L['self']").lstrip(".")
    return path.split(".") if path else []
